"""Weights of the trained methods: GGUF files beside a model's own, named ``<its stem>.<method>.gguf``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.gguf_header import Header, TensorInfo, read_header
from localvlm.errors import NotGguf, UsageError
from localvlm.pruning.dyvte import Gate

__all__ = ["read_gates", "read_weights", "weights_path"]

Float32 = NDArray[np.float32]


def weights_path(model: Path, method: str) -> Path:
    """Where the weights of a method for that model lie."""
    return model.with_name(f"{model.stem}.{method}.gguf")


def read_weights(model: Path, method: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Float32]:
    """The arrays of those names and shapes, in C order, that were trained for the model of file ``model``.

    Raises:
        UsageError: there are none.
        NotGguf: the file is damaged, of another method, or lacks one of them.
    """
    header = _header(model, method)
    return {name: _array(header, name, shape) for name, shape in shapes.items()}


def read_gates(model: Path, width: int, n_layer: int) -> dict[int, Gate]:
    """DyVTE's gates of a model of ``n_layer`` layers, by the layer before which each stands; errors as of
    :func:`read_weights`.
    """
    parts = {"up.weight": (4 * width, 2 * width), "up.bias": (4 * width,), "down.weight": (2, 4 * width),
             "down.bias": (2,)}  # fmt: skip
    header = _header(model, "dyvte")
    layers = [layer for layer in range(1, n_layer) if f"gate.{layer}.up.weight" in header.tensors]
    if not layers:
        raise NotGguf(f"'{header.path.name}' holds no gate for a layer from 1 to {n_layer - 1}", "export it again")
    return {
        layer: Gate(*(_array(header, f"gate.{layer}.{name}", shape) for name, shape in parts.items()))
        for layer in layers
    }


def _header(model: Path, method: str) -> Header:
    path = weights_path(model, method)
    if not path.exists():
        raise UsageError(
            f"method '{method}' needs weights trained for '{model.name}', and there is no '{path.name}' beside it",
            "choose a method that is not trained; models/demo/README.md tells how those of the demo pair were made",
        )
    header = read_header(path)
    if header.text("localvlm.method") != method:
        raise NotGguf(f"'{path.name}' holds no weights of method '{method}'")
    return header


def _array(header: Header, name: str, shape: tuple[int, ...]) -> Float32:
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    tensor = header.tensors.get(name, TensorInfo(name, (), 0, 0, 0))
    if tensor.shape[::-1] != shape:
        raise NotGguf(
            f"'{header.path.name}' has tensor '{name}' of shape {list(tensor.shape[::-1])}, where {list(shape)} is "
            "wanted: it was not trained for this model",
            "export it again",
        )
    raw = np.fromfile(header.path, np.uint8, tensor.n_bytes, offset=tensor.offset)
    kind = GGMLQuantizationType(tensor.type)
    plain = {GGMLQuantizationType.F32: np.float32, GGMLQuantizationType.F16: np.float16}.get(kind)
    try:
        found = dequantize(raw.view(plain) if plain else raw.reshape(math.prod(shape[:-1]), -1), kind)
    except NotImplementedError:
        raise NotGguf(f"'{header.path.name}' has tensor '{name}' of a type that cannot be read: {kind.name}") from None
    return np.asarray(found, np.float32).reshape(shape)
