"""Gemma 3 (2503.19786): one picture stretched to a square, SigLIP patches averaged to a raster of tokens, which see
each other in both directions in the decoder.
"""

from __future__ import annotations

from localvlm.engine.families.base import Block, Cut, Family, Projector, Tower, merged, whole

__all__ = ["open_gemma3"]

POOL = 4
"""Patches along each side of a token, unless the file says otherwise."""
START, END = "\n\n<start_of_image>", "<end_of_image>\n\n"
"""``full_image_sequence`` of transformers' processing_gemma3.py; llama.cpp leaves the line breaks out."""


def open_gemma3(projector: Projector) -> Family:
    """Gemma 3 4B, 12B and 27B: 896 pixels, 256 tokens."""
    mmproj = projector.header
    tower = Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls=False,
        merge=mmproj.integer("clip.vision.projector.scale_factor", POOL),
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )
    side = tower.image_size // (tower.patch * tower.merge) if tower.patch else 0

    def cut(width: int, height: int) -> Cut:
        size = (tower.image_size, tower.image_size)
        return [START, Block((whole(width, height, size, side, side, "BILINEAR"),)), END]

    return Family("gemma3", "2503.19786; transformers image_processing_pil_gemma3.py", tower, cut, merged)
