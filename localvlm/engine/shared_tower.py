"""A vision tower that several VLMs of one process carry runs once for a tile: what its last block gave in one of them
is kept, and their projectors go on from there.

Towers are the same if their metadata, the bytes of their tensors and the way they are run are. Bytes are compared when
the second tower of the same metadata encodes for the first time, up to the first difference.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cached_property
from io import FileIO
from itertools import count
from pathlib import Path
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.gguf_header import Header, TensorInfo

__all__ = ["LIMIT", "Member", "Output", "Towers", "same_tower"]

Float32 = NDArray[np.float32]
RGB = NDArray[np.uint8]
File = tuple[int, int, int, int]

LIMIT = 64 << 20
"""Bytes of outputs that are kept at once: 28 tiles of CLIP-L/336, 15 of InternVL, 3 of Gemma 3."""
_CHUNK = 1 << 18
"""Bytes read at once: both files' fit a processor's cache."""
_BEGINNING = 1 << 10
"""Bytes of each tensor that a fingerprint has."""
_PROJECTORS = frozenset({"clip.vision.projection_dim"})
"""Metadata that no block of a tower depends on."""


@dataclass(eq=False)
class Output:
    """What the blocks of a tower gave for a tile.

    Attributes:
        rows: (n,) float32, all rows of the last block; empty once there was no room.
        attention: (n_layer, n_tokens) float32, None if it was not read.
        by: whose tower ran.
        taken: whether another VLM has gone on from it.
    """

    rows: Float32
    attention: Float32 | None
    by: Member
    taken: bool = False

    @property
    def n_bytes(self) -> int:
        return self.rows.nbytes + (0 if self.attention is None else self.attention.nbytes)

    def drop(self) -> None:
        """Frees the memory, whoever still refers to it."""
        self.rows, self.attention = np.zeros(0, np.float32), None


class Towers:
    """Those of one process. An output is kept as long as someone refers to it; all of them take ``limit`` bytes."""

    def __init__(self, limit: int = LIMIT) -> None:
        self._limit = limit
        self._outputs: WeakValueDictionary[tuple[int, bytes], Output] = WeakValueDictionary()
        self._members: list[Member] = []
        self._groups = count()

    @property
    def n_bytes(self) -> int:
        return sum(output.n_bytes for output in self._outputs.values())

    def _join(self, new: Member) -> int:
        """The same number for the same tower."""
        others = {m.group: m for m in self._members if m.signature == new.signature}
        self._members.append(new)
        same = (group for group, member in others.items() if group is not None and _same_bytes(new, member))
        found = next(same, None)
        return next(self._groups) if found is None else found

    def _room(self, n_bytes: int) -> bool:
        """Makes room, if need be in place of outputs that were taken already."""
        free = self._limit - self.n_bytes
        for key, output in list(self._outputs.items()) if free < n_bytes else ():
            if output.taken and free < n_bytes:
                free += output.n_bytes
                self._outputs.pop(key).drop()
        return free >= n_bytes


class Member:
    """One VLM's tower among those of a process.

    Made before llama.cpp reads the file, so that another one in its place is noticed. ``row_end``: a tensor that has a
    tower's name and is no part of it; ``how`` it is run: towers that are run differently share nothing.
    """

    def __init__(self, towers: Towers, mmproj: Header, row_end: str, how: Hashable) -> None:
        self._towers = towers
        self._several = len(mmproj.integers("clip.vision.feature_layer")) > 1 or any(
            name.startswith("v.deepstack.") for name in mmproj.tensors
        )
        self.tensors = {t.name: t for t in mmproj.tensors.values() if t.name.startswith("v.") and t.name != row_end}
        self.signature = _signature(mmproj, self.tensors), how
        self.path, self.file = mmproj.path, _identity(mmproj.path)
        self.group: int | None = None
        """Of towers known to be the same; None before the first tile."""

    @cached_property
    def fingerprint(self) -> str:
        """Equal for towers that are the same, by where each tensor begins: found in milliseconds, for what costs time
        alone if it is wrong. "" for one that shares nothing: its file cannot be read, or its projector goes by what
        several blocks gave.
        """
        if self._several:
            return ""
        digest = hashlib.sha256(repr(self.signature).encode())
        try:
            with self.path.open("rb", buffering=0) as file:
                for name in sorted(self.tensors):
                    file.seek(self.tensors[name].offset)
                    digest.update(file.read(min(_BEGINNING, self.tensors[name].n_bytes)))
        except OSError:
            return ""
        return digest.hexdigest()[:16]

    def find(self, pixels: RGB, attention: bool) -> Output | None:
        """What the same tower gave another VLM for a tile of these pixels, with its attention if that is asked."""
        output = self._towers._outputs.get(self._key(pixels))
        if output is None or output.by is self or (attention and output.attention is None):
            return None
        output.taken = True
        return output

    def keep(self, pixels: RGB, rows: Float32, attention: Float32 | None) -> Output | None:
        """Keeps what the tower gave for a tile as long as the result is referred to. None: there is no room."""
        key, output = self._key(pixels), Output(rows, attention, self)
        known = self._towers._outputs.pop(key, None)
        if known is not None:
            known.drop()
        if not self._towers._room(output.n_bytes):
            return None
        self._towers._outputs[key] = output
        return output

    def leave(self) -> None:
        """The file of a VLM that is closed is not looked at any more."""
        if self in self._towers._members:
            self._towers._members.remove(self)

    def _key(self, pixels: RGB) -> tuple[int, bytes]:
        if self.group is None:
            self.group = self._towers._join(self)
        return self.group, repr(pixels.shape).encode() + hashlib.sha256(pixels.tobytes()).digest()


def same_tower(one: Header, other: Header, row_end: str) -> bool:
    """Whether two projector files have one tower, by their fingerprints. ``row_end`` as of :class:`Member`."""
    towers = Towers()
    a, b = (Member(towers, mmproj, row_end, ()).fingerprint for mmproj in (one, other))
    return a == b != ""


def _signature(mmproj: Header, tensors: dict[str, TensorInfo]) -> Hashable:
    """What two files with the same tower have in common, bytes apart."""
    known = {**mmproj.values, **mmproj.array_hashes}
    values = sorted((k, v) for k, v in known.items() if k.startswith("clip.") and k not in _PROJECTORS)
    return tuple(values), tuple(sorted((t.name, t.shape, t.type) for t in tensors.values()))


def _identity(path: Path) -> File | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _same_bytes(a: Member, b: Member) -> bool:
    """Whether the tensors of two towers of one signature are equal, in files that are still those that were loaded."""
    if None in (a.file, b.file) or (_identity(a.path), _identity(b.path)) != (a.file, b.file):
        return False
    if a.file == b.file:
        return True
    one, other = bytearray(_CHUNK), bytearray(_CHUNK)
    try:
        with a.path.open("rb", buffering=0) as mine, b.path.open("rb", buffering=0) as its:
            for name, tensor in a.tensors.items():
                pieces = zip(_pieces(mine, tensor, one), _pieces(its, b.tensors[name], other), strict=True)
                if any(n != m or one != other for n, m in pieces):  # behind a short piece, both hold the same as before
                    return False
    except OSError:
        return False
    return True


def _pieces(file: FileIO, tensor: TensorInfo, into: bytearray) -> Iterator[int]:
    """Reads a tensor piece by piece; how many bytes each has."""
    file.seek(tensor.offset)
    for at in range(0, tensor.n_bytes, len(into)):
        yield file.readinto(memoryview(into)[: tensor.n_bytes - at])
