"""Small VLMs with real widths and one or two layers, written to be timed: constant weights of any type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from localvlm.answers import VlmFiles

__all__ = ["MiniLlm", "MiniTower", "write"]

FILL = 0x30
"""Every byte of every matrix. A block of any ggml type made of it is a finite number, neither 0 nor so small that its
products would be denormal, which is slow; no layout need be known, and kernels take the same time for any numbers.
"""
_BYTES = 256
"""Tokens of the vocabulary that stand for one byte; with <unk>, <s> and </s> that is all of it."""


@dataclass(frozen=True)
class MiniLlm:
    """Shape of an LLM. ``kind``: name of a ggml type, of the blocks' matrices; ``heads``, ``kv_heads``: of ``head``
    channels each, 0: as many as the width has, and as there are others.
    """

    kind: str
    width: int
    ffn: int
    layers: int
    head: int = 128
    heads: int = 0
    kv_heads: int = 0

    @property
    def queries(self) -> int:
        """Channels of the queries."""
        return self.heads * self.head or self.width

    @property
    def keys(self) -> int:
        """Channels of the keys, and of the values."""
        return self.kv_heads * self.head or self.queries

    @property
    def weights(self) -> int:
        """Of all blocks."""
        return self.layers * self.width * (2 * self.queries + 2 * self.keys + 3 * self.ffn)

    @property
    def trimmed(self) -> int:
        """Of the last block's feed-forward part, which llama.cpp runs only for rows whose logits are asked for."""
        return self.width * 3 * self.ffn


@dataclass(frozen=True)
class MiniTower:
    """Shape of a vision tower of one size, CLIP's. ``side``: patches."""

    kind: str
    width: int
    ffn: int
    layers: int
    side: int
    head: int = 64

    patch = 14

    @property
    def weights(self) -> int:
        """That each patch meets."""
        return self.width * (self.layers * (4 * self.width + 2 * self.ffn) + 3 * self.patch**2)


def write(folder: Path, name: str, llm: MiniLlm, tower: MiniTower) -> VlmFiles:
    """Writes the two files of a VLM."""
    files = VlmFiles(folder / f"{name}.gguf", folder / f"{name}-mmproj.gguf")
    _write_llm(files.model, llm)
    _write_tower(files.mmproj, tower, llm.width)
    return files


class _Writer:
    """A GGUF file in the making."""

    def __init__(self, path: Path, architecture: str) -> None:
        import gguf

        self._gguf, self.out = gguf, gguf.GGUFWriter(path, architecture)

    def matrix(self, name: str, rows: int, columns: int, kind: str) -> None:
        wanted = self._gguf.GGMLQuantizationType[kind]
        block, n_bytes = self._gguf.GGML_QUANT_SIZES[wanted]
        self.out.add_tensor(name, np.full((rows, columns // block * n_bytes), FILL, np.uint8), raw_dtype=wanted)

    def vector(self, name: str, n: int, value: float = 1.0) -> None:
        self.out.add_tensor(name, np.full(n, value, np.float32))

    def table(self, name: str, *shape: int) -> None:
        self.out.add_tensor(name, np.random.default_rng(0).normal(0, 1, shape).astype(np.float32))

    def close(self) -> None:
        self.out.write_header_to_file()
        self.out.write_kv_data_to_file()
        self.out.write_tensors_to_file()
        self.out.close()


def _write_llm(path: Path, s: MiniLlm) -> None:
    file = _Writer(path, "llama")
    out: Any = file.out
    out.add_name(path.stem)
    for key, value in (
        ("block_count", s.layers),
        ("context_length", 4096),
        ("embedding_length", s.width),
        ("feed_forward_length", s.ffn),
        ("attention.head_count", s.queries // s.head),
        ("attention.head_count_kv", s.keys // s.head),
        ("attention.key_length", s.head),
        ("attention.value_length", s.head),
        ("rope.dimension_count", s.head),
    ):
        out.add_uint32(f"llama.{key}", value)
    out.add_layer_norm_rms_eps(1e-5)
    _write_vocabulary(out)
    n_vocab = 3 + _BYTES
    file.table("token_embd.weight", n_vocab, s.width)
    file.matrix("output.weight", n_vocab, s.width, "F32")
    file.vector("output_norm.weight", s.width)
    for i in range(s.layers):
        for norm in ("attn_norm", "ffn_norm"):
            file.vector(f"blk.{i}.{norm}.weight", s.width)
        for name, rows in (("attn_q", s.queries), ("attn_k", s.keys), ("attn_v", s.keys)):
            file.matrix(f"blk.{i}.{name}.weight", rows, s.width, s.kind)
        file.matrix(f"blk.{i}.attn_output.weight", s.width, s.queries, s.kind)
        for name in ("ffn_gate", "ffn_up"):
            file.matrix(f"blk.{i}.{name}.weight", s.ffn, s.width, s.kind)
        file.matrix(f"blk.{i}.ffn_down.weight", s.width, s.ffn, s.kind)
    file.close()


def _write_vocabulary(out: Any) -> None:
    """A SentencePiece vocabulary that spells all text in bytes."""
    out.add_tokenizer_model("llama")
    out.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(_BYTES))])
    out.add_token_scores([0.0] * (3 + _BYTES))
    out.add_token_types([2, 3, 3, *[6] * _BYTES])
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    out.add_add_bos_token(True)


def _write_tower(path: Path, s: MiniTower, projection: int) -> None:
    file = _Writer(path, "clip")
    out: Any = file.out
    out.add_name(path.stem)
    out.add_bool("clip.has_vision_encoder", True)
    out.add_string("clip.projector_type", "mlp")
    for key, value in (
        ("image_size", s.side * s.patch),
        ("patch_size", s.patch),
        ("embedding_length", s.width),
        ("feed_forward_length", s.ffn),
        ("projection_dim", projection),
        ("attention.head_count", s.width // s.head),
        ("block_count", s.layers),
    ):
        out.add_uint32(f"clip.vision.{key}", value)
    out.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    out.add_array("clip.vision.image_mean", [0.5] * 3)
    out.add_array("clip.vision.image_std", [0.5] * 3)
    out.add_array("clip.vision.feature_layer", [s.layers])
    d = s.width
    weights = np.full((d, 3, s.patch, s.patch), 0.01, np.float16)
    out.add_tensor("v.patch_embd.weight", weights)
    file.table("v.class_embd", d)
    file.table("v.position_embd.weight", s.side**2 + 1, d)
    for name in ("v.pre_ln", *(f"v.blk.{i}.{norm}" for i in range(s.layers) for norm in ("ln1", "ln2"))):
        file.vector(f"{name}.weight", d)
        file.vector(f"{name}.bias", d, 0.0)
    for i in range(s.layers):
        for name, rows, columns in (*((n, d, d) for n in ("attn_q", "attn_k", "attn_v", "attn_out")),
                                    ("ffn_up", s.ffn, d), ("ffn_down", d, s.ffn)):  # fmt: skip
            file.matrix(f"v.blk.{i}.{name}.weight", rows, columns, s.kind)
            file.vector(f"v.blk.{i}.{name}.bias", rows, 0.0)
    for name, columns in (("mm.0", d), ("mm.2", projection)):
        file.matrix(f"{name}.weight", projection, columns, "F32")
        file.vector(f"{name}.bias", projection, 0.0)
    file.close()
