"""Frames between client and worker: JSON with arrays behind it. Neither side can make the other run code.

A frame is ``<u32 n_json> <u32 n_arrays> <json> (<u64 n_bytes> <bytes>)*``. In the JSON, an array is
``{"$nd": i, "dtype": ..., "shape": ...}``, a tuple ``{"$tuple": [...]}`` and a dataclass of the engine's API
``{"$type": name, ...}``.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from localvlm.engine import api

__all__ = ["pack", "unpack"]

_TYPES: dict[str, Any] = {
    t.__name__: t
    for t in (
        api.Attention,
        api.Completion,
        api.Encoded,
        api.ImageLayout,
        api.ImagePart,
        api.LoadOptions,
        api.Message,
        api.Paused,
        api.Prefilled,
        api.SamplingOptions,
        api.TextPart,
        api.VlmInfo,
    )
}
_DTYPES = {"float32", "int32", "uint8"}
_HEAD = struct.Struct("<II")
_SIZE = struct.Struct("<Q")
MAX_JSON = 1 << 26
MAX_ARRAYS = 1 << 16
"""Of a frame: a picture of a prompt has up to four, and each turn of a conversation may add tokens of each."""
MAX_ARRAY_BYTES = 1 << 33


def _encode(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, np.ndarray):
        arrays.append(np.ascontiguousarray(value))
        return {"$nd": len(arrays) - 1, "dtype": str(value.dtype), "shape": list(value.shape)}
    if isinstance(value, np.generic):
        return value.item()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _encode(getattr(value, f.name), arrays) for f in dataclasses.fields(value)}
        return {"$type": type(value).__name__, **fields}
    if isinstance(value, tuple):
        return {"$tuple": [_encode(v, arrays) for v in value]}
    if isinstance(value, list):
        return [_encode(v, arrays) for v in value]
    if isinstance(value, dict):
        return {k: _encode(v, arrays) for k, v in value.items()}
    return str(value) if isinstance(value, Path) else value


def _decode(value: Any, arrays: list[bytes]) -> Any:
    if isinstance(value, list):
        return [_decode(v, arrays) for v in value]
    if not isinstance(value, dict):
        return value
    if "$nd" in value:
        if value["dtype"] not in _DTYPES:
            raise ValueError(f"array of type {value['dtype']!r}")
        if any(side < 0 for side in value["shape"]):
            raise ValueError(f"array of shape {value['shape']}")
        return np.frombuffer(arrays[value["$nd"]], value["dtype"]).reshape(value["shape"]).copy()
    if "$tuple" in value:
        return tuple(_decode(v, arrays) for v in value["$tuple"])
    fields = {k: _decode(v, arrays) for k, v in value.items() if k != "$type"}
    return _TYPES[value["$type"]](**fields) if "$type" in value else fields


def pack(message: dict[str, Any]) -> list[bytes]:
    """The buffers of one frame, to be written in order."""
    arrays: list[np.ndarray] = []
    text = json.dumps(_encode(message, arrays), ensure_ascii=True).encode()
    out: list[bytes] = [_HEAD.pack(len(text), len(arrays)) + text]
    for array in arrays:
        out += [_SIZE.pack(array.nbytes), array.tobytes()]
    return out


def unpack(read: Callable[[int], bytes]) -> dict[str, Any]:
    """One frame from ``read(n)``, which returns exactly n bytes or raises EOFError.

    Raises:
        ValueError: the frame is not one that :func:`pack` writes.
    """
    n_json, n_arrays = _HEAD.unpack(read(_HEAD.size))
    if n_json > MAX_JSON or n_arrays > MAX_ARRAYS:
        raise ValueError(f"frame of {n_json} bytes and {n_arrays} arrays")
    text = read(n_json)
    arrays = []
    for _ in range(n_arrays):
        (size,) = _SIZE.unpack(read(_SIZE.size))
        if size > MAX_ARRAY_BYTES:
            raise ValueError(f"array of {size} bytes")
        arrays.append(read(size))
    try:
        message = _decode(json.loads(text), arrays)
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"frame of another form: {error}") from None
    if not isinstance(message, dict):
        raise ValueError("frame that is no object")
    return message
