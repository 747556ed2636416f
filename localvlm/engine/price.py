"""What encoding a tile costs: multiplications of one pass of the vision tower over those of one token in the LLM."""

from __future__ import annotations

import math

from localvlm.engine.families import Tower
from localvlm.engine.gguf_header import Header

__all__ = ["tile_price"]


def tile_price(model: Header, mmproj: Header, tower: Tower) -> float:
    """Tokens of prefill that take as many multiplications as one tile of the tower's size; 0 where shapes do not say.

    Counted are the matrices of all blocks and of the projector, and the tower's attention (2 n^2 d a block); of experts
    those that run. Left out are the LLM's attention and output, small beside its matrices in a prefill. LLaVA-1.5-7B
    comes to 31; 34 were timed (2 cores, Q4_0 and an F16 tower).
    """
    token = _weights(model, "blk.", model.architecture)
    if token <= 0 or min(tower.patch, tower.merge) < 1:
        return 0.0
    patches = (tower.image_size // tower.patch) ** 2
    width, blocks = mmproj.integer("clip.vision.embedding_length"), mmproj.integer("clip.vision.block_count")
    inside = _weights(mmproj, "v.blk.") + _weights(mmproj, "v.patch_embd") + 2.0 * patches * width * blocks
    return (inside * patches + _weights(mmproj, "mm.") * patches / tower.merge**2) / token


def _weights(header: Header, prefix: str, arch: str = "") -> float:
    """Weights of matrices whose names begin so, each expert in the share of tokens that it sees."""
    seen = header.integer(f"{arch}.expert_used_count", 1) / max(header.integer(f"{arch}.expert_count", 1), 1)
    found = (t for name, t in header.tensors.items() if name.startswith(prefix) and len(t.shape) > 1)
    return sum(math.prod(t.shape) * (seen if "_exps" in t.name else 1.0) for t in found)
