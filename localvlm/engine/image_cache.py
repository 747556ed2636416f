"""Rows of tiles kept on disk, for those who ask for it: a picture asked about again is not encoded again.

A file holds what one tower, run in one way, gave for one tile: its rows and, where it was read, its attention. It is
found by the pixels and by all that the run depends on, its check sum covers both, and one that is damaged is as one
that is not there. What it gives is what the tower gave, bit for bit. Nothing of a GPU is kept, where encoding is quick
and results may depend on more than is known here.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import localvlm
from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import Header
from localvlm.engine.kept_files import file_identity, keep_file
from localvlm.engine.llama import describe_backend

__all__ = ["FOLDER", "ImageCache"]

Float32 = NDArray[np.float32]
RGB = NDArray[np.uint8]

FOLDER = "images"
"""Below the cache directory."""
_HEAD = struct.Struct("<III")
"""Rows, numbers in each, layers of attention; behind the check sum, and before the numbers as little-endian float32."""


class ImageCache:
    """Those of one tower in a folder of at most ``limit`` bytes; without a folder nothing is kept."""

    def __init__(self, folder: Path | None, identity: str, limit: int) -> None:
        self._folder, self._identity, self._limit = folder, identity.encode(), limit

    @classmethod
    def of(cls, mmproj: Header, options: LoadOptions, how: Sequence[object]) -> ImageCache:
        """That of a projector file as it was loaded; ``how``: the tower is run, in what shows as text."""
        if not (options.cache and options.image_cache) or options.gpu_layers:
            return cls(None, "", 0)
        about = [localvlm.__version__, file_identity(mmproj), describe_backend(), *how]
        return cls(Path(options.cache) / FOLDER, repr(about), options.image_cache)

    def find(self, pixels: RGB, rows: int, width: int, layers: int) -> tuple[Float32, Float32 | None] | None:
        """Rows (rows, width) of a tile, and its attention (layers, rows) unless ``layers`` is 0; None: not there."""
        if self._folder is None:
            return None
        key = self._key(pixels)
        path = self._folder / key.hex()
        try:
            with path.open("rb") as file:
                digest, head = file.read(32), file.read(_HEAD.size)
                n, each, seen = _HEAD.unpack(head)
                size = 4 * n * (each + seen)
                if (n, each) != (rows, width) or seen < layers or os.fstat(file.fileno()).st_size != 44 + size:
                    return None
                data = file.read(size)
        except (OSError, struct.error):
            return None
        if digest != _sum(key, head, data):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)  # the least asked for are the oldest
        numbers = np.frombuffer(data, "<f4").astype(np.float32)
        found, attention = numbers[: n * each].reshape(n, each), numbers[n * each :].reshape(seen, n)
        return found, attention if layers else None

    def keep(self, pixels: RGB, rows: Float32, attention: Float32 | None) -> None:
        """Keeps what a tower gave for a tile; see :meth:`find`."""
        if self._folder is None:
            return
        key = self._key(pixels)
        head = _HEAD.pack(*rows.shape, 0 if attention is None else len(attention))
        data = b"".join(a.astype("<f4").tobytes() for a in (rows, attention) if a is not None)
        keep_file(self._folder / key.hex(), _sum(key, head, data) + head + data, max_bytes=self._limit)

    def _key(self, pixels: RGB) -> bytes:
        found = hashlib.sha256(self._identity)
        found.update(repr(pixels.shape).encode())
        found.update(pixels.tobytes())
        return found.digest()


def _sum(key: bytes, head: bytes, data: bytes) -> bytes:
    found = hashlib.sha256(key + head)
    found.update(data)
    return found.digest()
