"""Weights that are no numbers, found by llama.cpp's own check (``check_tensors``) without loading the model."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from localvlm.engine.gguf_header import read_header

__all__ = ["unsound_tensors"]


def unsound_tensors(path: Path) -> list[str]:
    """Names of a file's tensors that hold NaN or infinity.

    Raises:
        ModelError: it is no sound GGUF file.
    """
    from llama_cpp.llama_cpp import _lib as libggml  # as in devices.py

    # bool ggml_validate_row_data(enum ggml_type type, const void * data, size_t nbytes);
    valid = libggml.ggml_validate_row_data
    valid.restype, valid.argtypes = ctypes.c_bool, [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    tensors = read_header(path).tensors.values()
    data = np.memmap(path, np.uint8, "r")
    with _quiet():
        return [t.name for t in tensors if not valid(t.type, data[t.offset :].ctypes.data, t.n_bytes)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what C code prints off stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
