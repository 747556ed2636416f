"""What the headers of a VLM's files tell people, and what is to be known of two VLMs that work together."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from localvlm.catalog import as_pair
from localvlm.engine.gguf_header import Header, check_pair, parts_of, read_header, read_model
from localvlm.planning.shapes import VlmShape

__all__ = ["PICTURES", "VlmFacts", "facts_alone", "facts_of", "pair_notes"]

PICTURES = ((640, 480), (1920, 1080))
"""Sizes of the pictures whose tokens are told."""


@dataclass(frozen=True)
class VlmFacts:
    """One VLM, or its language model alone.

    Attributes:
        mmproj: None where there is no projector; then ``family`` is "" and ``tokens`` is empty.
        quant: as llama.cpp calls the mixture of types, or ``""``.
        n_params: weights of the language model.
        context: positions that it was trained on.
        family: how its tower takes pictures; "other": tokens cannot be placed, and nothing is pruned.
        tokens: of each of PICTURES, where the family is known.
        licence: as its file says, or ``""``.
        vocabulary: equal for two that share a tokenizer.
    """

    name: str
    model: Path
    mmproj: Path | None
    n_bytes: int
    architecture: str
    quant: str
    n_params: int
    n_layer: int
    context: int
    family: str
    tokens: tuple[int, ...]
    tiles: tuple[tuple[int, ...], ...]
    licence: str
    vocabulary: str


def facts_of(files: Mapping[str, Path]) -> dict[str, VlmFacts]:
    """Of "guide" and "model", whose files are given by PAIR_KEYS.

    Raises:
        ModelError: a file is missing, damaged or of another kind, or model and projector do not fit each other.
    """
    pair = as_pair(None, files)
    given = {"guide": pair.guide, "model": pair.model}
    return {role: _facts(vlm.model, vlm.mmproj) for role, vlm in given.items() if vlm is not None}


def _facts(model: Path, mmproj: Path) -> VlmFacts:
    check_pair(read_model(model), read_header(mmproj))
    shape = VlmShape(as_pair(None, {"model": model, "mmproj": mmproj}).model)  # type: ignore[arg-type] # it is given
    views = [view for size in PICTURES if (view := shape.view(*size)) is not None]
    alone = facts_alone(model)
    return replace(
        alone,
        mmproj=mmproj,
        n_bytes=alone.n_bytes + mmproj.stat().st_size,
        family=shape.family(0).name,
        tokens=tuple(view.tokens for view in views),
        tiles=tuple(tuple(tokens for _, tokens in view.tiles) for view in views),
    )


def facts_alone(model: Path) -> VlmFacts:
    """Of a language model that has no projector.

    Raises:
        ModelError: the file is missing, damaged or of another kind.
    """
    text = read_model(model)
    arch, vocabulary = text.architecture, ("tokenizer.ggml.tokens", "tokenizer.ggml.merges")
    return VlmFacts(
        text.text("general.name") or model.stem,
        model,
        None,
        sum(path.stat().st_size for path in parts_of(model)),
        arch,
        _quant(text),
        sum(math.prod(tensor.shape) for tensor in text.tensors.values()),
        text.integer(f"{arch}.block_count"),
        text.integer(f"{arch}.context_length"),
        "",
        (),
        (),
        text.text("general.license"),
        " ".join(text.array_hashes.get(key, "") for key in vocabulary),
    )


def _quant(header: Header) -> str:
    from gguf.constants import LlamaFileType

    try:
        return (
            str(LlamaFileType(header.integer("general.file_type", -1)).name)
            .removeprefix("MOSTLY_")
            .removeprefix("ALL_")
        )
    except ValueError:
        return ""


def pair_notes(found: Mapping[str, VlmFacts]) -> list[str]:
    """What to know of the VLMs, alone and together."""
    notes = [
        f"the {role}'s family is not known: its image tokens cannot be placed, so nothing is pruned by or of it"
        for role, vlm in found.items()
        if not vlm.tokens
    ]
    if "guide" in found and "model" in found:
        guide, model = found["guide"], found["model"]
        if guide.vocabulary != model.vocabulary:
            notes.append("the tokenizers differ, so that the guide's answer is no draft of the model's")
        if guide.tokens and model.tokens and guide.tiles != model.tiles:
            notes.append("the grids of image tokens differ, so that the guide's attention is resampled to the model's")
        if guide.n_bytes > model.n_bytes / 2:
            notes.append("the guide is over half as large as the model, and may cost more than it saves")
    return notes
