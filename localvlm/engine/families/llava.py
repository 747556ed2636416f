"""LLaVA-1.5 (2310.03744): CLIP ViT, patches in raster order, CLS dropped, one square tile, CLIP's mean around it."""

from __future__ import annotations

from localvlm.engine.families.base import Block, Cut, Family, Projector, Tile, Tower
from localvlm.engine.gguf_header import Header

__all__ = ["PINPOINTS", "clip_notes", "clip_repairs", "clip_tower", "open_llava"]

GROUND = (122, 116, 104)
"""CLIP's mean colour, times 255, rounded down (``expand2square`` of the LLaVA repository)."""
PINPOINTS = "clip.vision.image_grid_pinpoints"
BLOCKS = {768: 12, 1024: 24, 1152: 27, 1280: 32}
"""Width of a published tower -> its blocks: CLIP and SigLIP B, CLIP and SigLIP L, SigLIP So400m, CLIP H."""


def _lacks_block(mmproj: Header) -> bool:
    """Whether the file holds no more than the blocks that LLaVA uses and does not say so (ggml-org/llama.cpp 25817):
    the converter dropped the last block of the tower, and llama.cpp then leaves out one more.
    """
    blocks = BLOCKS.get(mmproj.integer("clip.vision.embedding_length"))
    said = mmproj.integers("clip.vision.feature_layer")
    return not said and blocks == mmproj.integer("clip.vision.block_count") + 1


def clip_tower(mmproj: Header) -> Tower:
    """The CLIP tower of a LLaVA-like projector file, as it is with its repairs. llama.cpp leaves the last block out
    unless the file says which layer's output is used.
    """
    blocks = mmproj.integer("clip.vision.block_count")
    deepest = max(mmproj.integers("clip.vision.feature_layer"), default=-1)
    return Tower(
        n_layer=deepest if deepest >= 0 else blocks - (not _lacks_block(mmproj)),
        cls="v.class_embd" in mmproj.tensors,
        merge=1,
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )


def clip_repairs(mmproj: Header) -> tuple[str, ...]:
    """What llama.cpp's tower needs to be right for this file."""
    cls = "v.class_embd" in mmproj.tensors
    said = mmproj.integer("clip.use_gelu") or mmproj.integer("clip.use_silu")
    needed = {
        "llava-cls-order": cls,
        "llava-last-block": _lacks_block(mmproj),
        "siglip-gelu": not cls and not said,  # the converter takes SigLIP's tanh form for CLIP's quick one
    }
    return tuple(name for name, wanted in needed.items() if wanted)


def clip_notes(mmproj: Header) -> tuple[str, ...]:
    """What cannot be known of this file's tower."""
    width = mmproj.integer("clip.vision.embedding_length")
    if mmproj.integers("clip.vision.feature_layer") or width in BLOCKS:
        return ()
    return (f"whether the projector file lacks a block of its tower cannot be told for one of width {width}",)


def open_llava(projector: Projector) -> Family | None:
    """LLaVA-1.5; not the tiled ones."""
    mmproj = projector.header
    if PINPOINTS in mmproj.array_lengths:
        return None
    tower = clip_tower(mmproj)
    side = tower.image_size // tower.patch if tower.patch else 0

    def cut(width: int, height: int) -> Cut:
        long = max(width, height)
        canvas = (long, long, (long - width) // 2, (long - height) // 2)
        target = (tower.image_size, tower.image_size)
        view = (side * tower.patch, side * tower.patch)
        resized = () if (width, height) == target else (target,)
        return [Block((Tile(resized, (0, 0, *target), side, side, canvas, GROUND, view=view),))]

    return Family(
        "llava",
        "LLaVA-1.5, github.com/haotian-liu/LLaVA llava/mm_utils.py",
        tower,
        cut,
        repairs=clip_repairs(mmproj),
        notes=clip_notes(mmproj),
    )
