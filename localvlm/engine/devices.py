"""The GPUs that llama.cpp can use, as the library tells: which backends it was built with, and what these found."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

from localvlm.errors import UsageError

__all__ = ["backends", "check_gpu", "gpu_memory", "gpus"]

_INTEGRATED = 2
_GPU_TYPES = (1, _INTEGRATED)
"""GGML_BACKEND_DEVICE_TYPE_GPU and _IGPU of ``ggml-backend.h``: a card, and a part of the processor."""


def _registry() -> Any:
    """The registry, by the handle of libllama, which is linked to libggml: llama-cpp-python's own handle of that maps
    another copy of the file, with another registry.
    """
    from llama_cpp.llama_cpp import _lib as libggml

    for name in ("ggml_backend_dev_count", "ggml_backend_reg_count"):
        getattr(libggml, name).restype = ctypes.c_size_t
    for name in ("ggml_backend_dev_get", "ggml_backend_reg_get"):
        getattr(libggml, name).restype, getattr(libggml, name).argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    for name in ("ggml_backend_dev_name", "ggml_backend_dev_description", "ggml_backend_reg_name"):
        getattr(libggml, name).restype, getattr(libggml, name).argtypes = ctypes.c_char_p, [ctypes.c_void_p]
    size_p = ctypes.POINTER(ctypes.c_size_t)
    libggml.ggml_backend_dev_memory.restype = None
    libggml.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, size_p, size_p]
    libggml.ggml_backend_dev_type.restype, libggml.ggml_backend_dev_type.argtypes = ctypes.c_int, [ctypes.c_void_p]
    return libggml


def backends() -> tuple[str, ...]:
    """Names of the backends that llama.cpp was built with, whether or not they found a device."""
    lib = _registry()
    found = (lib.ggml_backend_reg_get(i) for i in range(lib.ggml_backend_reg_count()))
    return tuple(lib.ggml_backend_reg_name(one).decode("utf-8", "replace") for one in found)


def gpus() -> tuple[str, ...]:
    """Names and descriptions of the GPUs that layers can be put on."""
    lib = _registry()
    found = (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count()))
    told = ((lib.ggml_backend_dev_name(d), lib.ggml_backend_dev_description(d)) for d in found if _is_gpu(lib, d))
    return tuple(f"{name.decode()}: {description.decode('utf-8', 'replace')}" for name, description in told)


def gpu_memory() -> tuple[int, bool]:
    """Free bytes of all GPUs together, and whether that is the machine's own memory."""
    lib = _registry()
    free, total, free_of_all = ctypes.c_size_t(), ctypes.c_size_t(), 0
    unified = sys.platform == "darwin"
    for device in (lib.ggml_backend_dev_get(i) for i in range(lib.ggml_backend_dev_count())):
        if _is_gpu(lib, device):
            lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            free_of_all += free.value
            unified = unified or lib.ggml_backend_dev_type(device) == _INTEGRATED
    return free_of_all, unified


def _is_gpu(lib: Any, device: int) -> bool:
    return lib.ggml_backend_dev_type(device) in _GPU_TYPES


def check_gpu(gpu_layers: int, found: Sequence[str], built: Sequence[str]) -> None:
    """llama.cpp keeps layers that find no GPU on the CPU and says nothing: refused, as they would be slow for no reason
    that anyone sees.

    Args:
        gpu_layers: as :attr:`localvlm.engine.api.LoadOptions.gpu_layers`.
        found: see :func:`gpus`.
        built: see :func:`backends`.

    Raises:
        UsageError: layers shall go to a GPU, and there is none.
    """
    if gpu_layers and not found:
        raise UsageError(
            f"-ngl {gpu_layers} puts layers on a GPU, and llama.cpp sees none (built for: {', '.join(built)})",
            "pass -ngl 0, or install llama-cpp-python for your GPU: docs/gpu.md",
        )
