"""LLaVA-1.5 (2310.03744): CLIP ViT, patches in raster order, CLS dropped, one square tile, CLIP's mean around it."""

from __future__ import annotations

from localvlm.engine.families.base import Block, Cut, Family, Projector, Tile, Tower
from localvlm.engine.gguf_header import Header

__all__ = ["clip_tower", "open_llava"]

GROUND = (122, 116, 104)
"""CLIP's mean colour, times 255, rounded down (``expand2square`` of the LLaVA repository)."""


def clip_tower(mmproj: Header) -> Tower:
    """The CLIP tower of a LLaVA-like projector file. llama.cpp leaves the last block out unless the file says which
    layer's output is used.
    """
    blocks = mmproj.integer("clip.vision.block_count")
    deepest = max(mmproj.integers("clip.vision.feature_layer"), default=-1)
    return Tower(
        n_layer=deepest if deepest >= 0 else blocks - 1,
        cls="v.class_embd" in mmproj.tensors,
        merge=1,
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )


def open_llava(projector: Projector) -> Family | None:
    """LLaVA-1.5; not the tiled ones."""
    mmproj = projector.header
    if "clip.vision.image_grid_pinpoints" in mmproj.array_lengths:
        return None
    tower = clip_tower(mmproj)
    side = tower.image_size // tower.patch if tower.patch else 0

    def cut(width: int, height: int) -> Cut:
        long = max(width, height)
        canvas = (long, long, (long - width) // 2, (long - height) // 2)
        target = (tower.image_size, tower.image_size)
        resized = () if (width, height) == target else (target,)
        return [Block((Tile(resized, (0, 0, *target), side, side, canvas, GROUND),))]

    return Family(
        "llava",
        "LLaVA-1.5, github.com/haotian-liu/LLaVA llava/mm_utils.py",
        tower,
        cut,
        repairs=("llava-cls-order",) if tower.cls else (),
    )
