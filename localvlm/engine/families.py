"""Where each VLM family puts its image tokens: one short description per family, and the map to the picture.

Facts are llama.cpp's (``tools/mtmd``): how it resizes and pads, and in what order the projector's rows come.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.gguf_header import Header

__all__ = ["FAMILIES", "Family", "Tower", "describe", "raster_boxes"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Tower:
    """The vision tower of one projector file.

    Attributes:
        n_layer: blocks that llama.cpp runs.
        cls: whether a CLS row is appended after the patches.
        merge: patches per token along each side.
        patch, image_size: pixels; image_size is the side of a fixed-size input.
    """

    n_layer: int
    cls: bool
    merge: int
    patch: int
    image_size: int


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        projectors: values of ``clip.projector_type``.
        fixed: every picture becomes image_size x image_size; else the token grid follows its shape.
        source: where the layout is published.
        token_of_patch: (n_patches, window index or None) -> output token of each tower row; None = the identity.
    """

    name: str
    projectors: tuple[str, ...]
    fixed: bool
    source: str
    token_of_patch: Callable[[int, Int32 | None], Int32] | None = None


def _groups_of_four(n_patches: int, window: Int32 | None) -> Int32:
    """Rows come in 2x2 groups; in windowed towers group g is the raster cell window[g]."""
    groups = np.arange(n_patches, dtype=np.int32) // 4
    return groups if window is None else window[groups]


FAMILIES: tuple[Family, ...] = (
    Family("llava", ("mlp",), True, "LLaVA-1.5 (2310.03744): CLIP ViT patches in raster order, CLS dropped"),
    Family(
        "qwen2.5vl",
        ("qwen2.5vl_merger",),
        False,
        "Qwen2.5-VL (2502.13923): 2x2 patches merge into one token; tokens in raster order",
        _groups_of_four,
    ),
)
UNKNOWN = Family("unknown", (), False, "")


def describe(mmproj: Header) -> tuple[Family, Tower]:
    """The family and tower of a projector file; family "unknown" has no token map."""
    projector = mmproj.text("clip.vision.projector_type") or mmproj.text("clip.projector_type", "mlp")
    family = next((f for f in FAMILIES if projector in f.projectors), UNKNOWN)
    blocks = mmproj.integer("clip.vision.block_count")
    cls = "v.class_embd" in mmproj.tensors
    if family.name == "llava":
        tiled = "clip.vision.image_grid_pinpoints" in mmproj.array_lengths
        if tiled or not cls:
            family = UNKNOWN if tiled else family
        deepest = max(mmproj.integers("clip.vision.feature_layer"), default=-1)
        blocks = deepest if deepest >= 0 else blocks - 1
    return family, Tower(
        n_layer=blocks,
        cls=cls,
        merge=mmproj.integer("clip.vision.spatial_merge_size", 2) if family.name == "qwen2.5vl" else 1,
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )


def raster_boxes(width: int, height: int, columns: int, rows: int, cell: int) -> Float32:
    """Boxes of a raster of tokens over a picture that llama.cpp has resized with its aspect kept and centred.

    Args:
        width: pixels of the picture as given.
        height: likewise.
        columns: tokens in a row.
        rows: of tokens.
        cell: pixels a token covers along each side, after resizing.

    Returns:
        (rows * columns, 4) float32 x0, y0, x1, y1 in pixels of the picture, clipped to it; zero area on padding.
    """
    target_w, target_h = columns * cell, rows * cell
    scale = np.float32(min(np.float32(target_w) / np.float32(width), np.float32(target_h) / np.float32(height)))
    new_w = min(math.ceil(np.float32(width) * scale), target_w)
    new_h = min(math.ceil(np.float32(height) * scale), target_h)
    left, top = (target_w - new_w) // 2, (target_h - new_h) // 2
    x = np.clip((np.arange(columns + 1) * cell - left) * (width / new_w), 0, width)
    y = np.clip((np.arange(rows + 1) * cell - top) * (height / new_h), 0, height)
    boxes = np.empty((rows, columns, 4), np.float32)
    boxes[..., 0], boxes[..., 2] = x[None, :-1], x[None, 1:]
    boxes[..., 1], boxes[..., 3] = y[:-1, None], y[1:, None]
    return boxes.reshape(-1, 4)
