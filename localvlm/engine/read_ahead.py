"""Files that are needed soon, read from disk while the processor does something else."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from pathlib import Path

__all__ = ["PIECE", "read_ahead"]

PIECE = 8 << 20
"""Bytes asked for at once: a process that ends waits for no more."""


def read_ahead(paths: Iterable[Path]) -> threading.Thread:
    """Has the kernel read files into its cache, one after the other and in the background, up to half of the memory
    that is available: weights that are repacked take as much again. Does nothing where there is no posix_fadvise, and
    leaves out what cannot be opened: a load tells why.
    """
    thread = threading.Thread(target=_read, args=(list(paths),), name="read-ahead", daemon=True)
    thread.start()
    return thread


def _read(paths: Iterable[Path]) -> None:
    if not hasattr(os, "posix_fadvise"):
        return
    import psutil

    left = int(psutil.virtual_memory().available) // 2
    for path in paths:
        with contextlib.suppress(OSError), path.open("rb", buffering=0) as file:
            size = min(os.fstat(file.fileno()).st_size, left)
            left -= size
            for at in range(0, size, PIECE):
                os.posix_fadvise(file.fileno(), at, min(PIECE, size - at), os.POSIX_FADV_WILLNEED)
