"""What the trained methods share: the shipped model, which does not change, what it is asked, and their files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from . import export, restore, text
from .lm import MODEL, Vlm
from .questions import TYPES
from .world import Scene

ASKED = (*TYPES, "describe")
AHEAD = text.prefix()


@dataclass(frozen=True)
class Asked:
    """A question and its answer as token ids: `prompt` stands after the image, `words` are the question's own."""

    words: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    kind: str


def shipped(files: Path = export.HERE) -> Vlm:
    """The model as it is shipped, frozen."""
    vlm = Vlm(MODEL, text.tokenizer().get_vocab_size())
    vlm.load_state_dict(restore.state_of(files, "model", MODEL))
    return vlm.eval().requires_grad_(False)


def asked(scene: Scene, rng: np.random.Generator, kinds: Sequence[str]) -> list[Asked]:
    """A question of each of those types that the scene allows, one turn each."""
    turns = [turn for kind in kinds if (turn := text.ask(scene, rng, kind))]
    return [
        Asked(
            text.ids(t.question), text.ids(t.question + "\nASSISTANT:"), (*text.ids(" " + t.answer), text.EOS), t.type
        )
        for t in turns
    ]


def write(path: Path, method: str, tensors: Mapping[str, Tensor]) -> None:
    """The weights of a method beside the model's file: matrices Q8_0, all else F32."""
    writer = gguf.GGUFWriter(path, "localvlm")
    export.describe(writer, f"localvlm demo model, {method}", gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_string("localvlm.method", method)
    q8 = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in tensors.items():
        value = tensor.detach().float().numpy()
        if value.ndim == 2 and value.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(value, q8), raw_dtype=q8)
        else:
            writer.add_tensor(name, value)
    export.finish(writer)


def seen_by(owner: Tensor) -> Tensor:
    """(batch, 1, rows, rows) bool: rows see themselves and those before them of the same owner, or of owner 0; -1 is
    padding, which sees itself alone.

    Args:
        owner: (batch, rows) int64.
    """
    rows = owner.shape[1]
    same = (owner[:, :, None] == owner[:, None, :]) | ((owner == 0)[:, None, :] & (owner >= 0)[:, :, None])
    own = torch.eye(rows, dtype=torch.bool)
    same &= (owner >= 0)[:, None, :] | own
    return (same & torch.tril(torch.ones(rows, rows, dtype=torch.bool)))[:, None]
