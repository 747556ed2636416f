"""Where each VLM family puts its image tokens: one row a family, one module a kind of layout.

To add a family: write a module with an opener (:data:`Opener`) and give it a row here.
"""

from __future__ import annotations

from localvlm.engine.families.base import NUMBER, Block, Cut, Family, Opener, Patches, Projector, Tile, Tower, draw
from localvlm.engine.families.gemma import open_gemma3
from localvlm.engine.families.idefics3 import open_idefics3
from localvlm.engine.families.internvl import open_internvl
from localvlm.engine.families.llava import open_llava
from localvlm.engine.families.llava_next import open_llava_next
from localvlm.engine.families.minicpmv import open_minicpmv46
from localvlm.engine.families.pixtral import open_pixtral
from localvlm.engine.families.qwen import open_qwen2, open_qwen3, open_qwen25
from localvlm.engine.gguf_header import Header

__all__ = ["FAMILIES", "NUMBER", "Block", "Cut", "Family", "Patches", "Tile", "Tower", "describe", "draw"]

FAMILIES: dict[str, tuple[Opener, ...]] = {
    "gemma3": (open_gemma3,),
    "idefics3": (open_idefics3,),
    "internvl": (open_internvl,),
    "minicpmv4_6": (open_minicpmv46,),
    "mlp": (open_llava, open_llava_next),
    "pixtral": (open_pixtral,),
    "qwen2.5vl_merger": (open_qwen25,),
    "qwen2vl_merger": (open_qwen2,),
    "qwen3vl_merger": (open_qwen3,),
}
"""``clip.projector_type`` -> the families that use it; the first whose opener accepts the file is it."""


def describe(mmproj: Header, max_tokens: int = 0) -> Family:
    """The family of a projector file; "unknown" leaves the cutting to llama.cpp and has no token map."""
    projector = mmproj.text("clip.vision.projector_type") or mmproj.text("clip.projector_type", "mlp")
    for opener in FAMILIES.get(projector, ()):
        family = opener(Projector(mmproj, max_tokens))
        if family is not None:
            return family
    tower = Tower(
        n_layer=mmproj.integer("clip.vision.block_count"),
        cls="v.class_embd" in mmproj.tensors,
        merge=1,
        patch=mmproj.integer("clip.vision.patch_size"),
        image_size=mmproj.integer("clip.vision.image_size"),
    )
    return Family("unknown", "", tower)
