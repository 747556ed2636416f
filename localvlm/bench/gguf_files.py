"""GGUF files of random weights, written piece by piece: no tensor is ever in memory whole."""

from __future__ import annotations

import shutil
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.errors import StorageError

__all__ = ["KINDS", "Tensor", "add_bytes", "add_pieces", "check_room", "write_gguf"]

Bytes = NDArray[np.uint8]

PIECE = 8 << 20
"""Bytes made and written at a time."""
SPARE = 1 << 30
"""Bytes of the disk that are left free."""


def _half(blocks: Bytes, at: int, value: float) -> None:
    """Puts a float16 into each block."""
    blocks[:, at : at + 2] = np.frombuffer(np.float16(value).tobytes(), np.uint8)


def _q4_0(blocks: Bytes, std: float) -> None:
    _half(blocks, 0, std / 4.61)


def _q5_0(blocks: Bytes, std: float) -> None:
    _half(blocks, 0, std / 9.23)


def _q8_0(blocks: Bytes, std: float) -> None:
    _half(blocks, 0, std / 73.9)


def _q4_k(blocks: Bytes, std: float) -> None:
    """All eight scales and minima are 8, so that weights are 8 (d q - dmin)."""
    d = std / (8 * 4.61)
    _half(blocks, 0, d)
    _half(blocks, 2, 7.5 * d)
    blocks[:, 4:12], blocks[:, 12:16] = 8, 0x88


def _q6_k(blocks: Bytes, std: float) -> None:
    """All sixteen scales are 16, so that weights are 16 d (q - 32)."""
    blocks[:, 192:208] = 16
    _half(blocks, 208, std / (16 * 18.47))


@dataclass(frozen=True)
class Kind:
    """How a type of ggml packs weights (``ggml-common.h``): ``weights`` and ``size`` in bytes of a block, what gives
    blocks of random bytes a standard deviation.
    """

    weights: int
    size: int
    scale: Callable[[Bytes, float], None] | None = None


KINDS = {
    "F32": Kind(1, 4),
    "F16": Kind(1, 2),
    "Q4_0": Kind(32, 18, _q4_0),
    "Q5_0": Kind(32, 22, _q5_0),
    "Q8_0": Kind(32, 34, _q8_0),
    "Q4_K": Kind(256, 144, _q4_k),
    "Q6_K": Kind(256, 210, _q6_k),
}
_NORMAL = np.array([NormalDist().inv_cdf((i + 0.5) / 256) for i in range(256)], np.float32)
"""Evenly likely values of a normal distribution, for weights that are not packed."""


@dataclass(frozen=True)
class Tensor:
    """A tensor of random weights.

    Attributes:
        shape: outermost first, as numpy has it.
        kind: of KINDS.
        std, mean: of its weights; those of packed ones have a mean of about 0.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    std: float
    mean: float = 0.0

    @property
    def row_bytes(self) -> int:
        kind = KINDS[self.kind]
        return self.shape[-1] // kind.weights * kind.size

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1]))

    @property
    def n_bytes(self) -> int:
        return self.rows * self.row_bytes

    def pieces(self, seed: int) -> Iterator[Bytes]:
        """(rows, row_bytes) some rows after others, the same for the same seed."""
        rng = np.random.default_rng([seed, zlib.crc32(self.name.encode())])
        step = max(1, PIECE // self.row_bytes)
        for first in range(0, self.rows, step):
            yield self._filled(rng, min(step, self.rows - first))

    def _filled(self, rng: np.random.Generator, n: int) -> Bytes:
        kind = KINDS[self.kind]
        if kind.scale is None:
            table = (self.mean + self.std * _NORMAL).astype(np.float32 if self.kind == "F32" else np.float16)
            drawn = np.frombuffer(rng.bytes(n * self.shape[-1]), np.uint8)
            return table[drawn].view(np.uint8).reshape(n, self.row_bytes)
        blocks = np.frombuffer(bytearray(rng.bytes(n * self.row_bytes)), np.uint8).reshape(-1, kind.size)
        kind.scale(blocks, self.std)
        return blocks.reshape(n, self.row_bytes)


def check_room(folder: Path, n_bytes: int) -> None:
    """Refuses to begin what the disk has no room for.

    Raises:
        StorageError: it has not.
    """
    free = shutil.disk_usage(folder).free
    if free < n_bytes + SPARE:
        raise StorageError(
            f"the files take {n_bytes / 1e9:.1f} GB and '{folder}' has {free / 1e9:.1f} GB left",
            "pass --keep-files with a folder on another disk",
        )


def write_gguf(
    path: Path, arch: str, describe: Callable[[Any], None], tensors: Sequence[Tensor], seed: int = 0
) -> None:
    """Writes a file that is whole when it bears its name. ``describe`` adds metadata to a ``gguf.GGUFWriter``.

    Raises:
        StorageError: the disk is full.
    """
    import gguf

    part = path.with_suffix(".part")
    writer = gguf.GGUFWriter(part, arch)
    describe(writer)
    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.kind]
        writer.add_tensor_info(t.name, (*t.shape[:-1], t.row_bytes), np.dtype(np.uint8), t.n_bytes, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        for t in tensors:
            writer.write_padding(file, file.tell())
            for piece in t.pieces(seed):
                file.write(piece.data)
        writer.write_padding(file, file.tell())
        writer.close()
    except OSError as error:
        part.unlink(missing_ok=True)
        raise StorageError(f"'{path}' cannot be written: {error.strerror}", "pass --keep-files") from error
    part.replace(path)


def add_bytes(writer: Any, vocab: int) -> None:
    """A SentencePiece vocabulary of bytes and filler, enough to tokenize any text."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    tokens += [f"\u2581w{i}".encode() for i in range(vocab - len(tokens))]
    kinds += [1] * (vocab - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def add_pieces(writer: Any, vocab: int, pre: str, controls: Sequence[str], end: str) -> None:
    """A byte-level vocabulary of bytes, filler and, last, control tokens; ``pre`` is llama.cpp's name of how words are
    split, ``end`` the control token that ends an answer.
    """
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(256, 512))
    tokens = [chr(byte if byte in plain else next(spare)) for byte in range(256)]
    first = vocab - len(controls)
    tokens += [f"w{i}" for i in range(first - len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list([*tokens, *controls])
    writer.add_token_types([1] * first + [3] * len(controls))
    writer.add_token_merges(["w 0"])
    writer.add_bos_token_id(first + controls.index(end))
    writer.add_eos_token_id(first + controls.index(end))
    writer.add_add_bos_token(False)
