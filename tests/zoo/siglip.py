"""A SigLIP tower (2303.15343) as several families carry it: its weights, and its half of the projector file.

Names on the left are those of transformers, on the right those of ``conversion/`` in llama.cpp; every tensor is F32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.zoo.mmproj import Values, VitSizes, write_projector
from tests.zoo.weights import Float32, Weights

__all__ = ["BLOCK_NAMES", "SiglipConfig", "encoder_weights", "siglip_weights", "write_siglip"]

MEAN = STD = (0.5, 0.5, 0.5)


class SiglipConfig(VitSizes):
    """Sizes of the tower."""

    def hf(self) -> dict[str, Any]:
        return {**super().hf(), "hidden_act": "gelu_pytorch_tanh"}


def siglip_weights(out: Weights, prefix: str, vision: SiglipConfig, positions: int) -> None:
    """Adds the tower's tensors; ``positions`` rows of position embeddings."""
    v = vision
    out.matrix(f"{prefix}.embeddings.patch_embedding.weight", v.hidden, 3, v.patch, v.patch, gain=2.0)
    out.bias(f"{prefix}.embeddings.patch_embedding.bias", v.hidden)
    out.normal(f"{prefix}.embeddings.position_embedding.weight", positions, v.hidden, std=1.0)
    encoder_weights(out, prefix, v)


def encoder_weights(out: Weights, prefix: str, vision: VitSizes) -> None:
    """Adds the blocks of a SigLIP or CLIP, and the norm after them."""
    v = vision
    out.norm(f"{prefix}.post_layernorm", v.hidden, bias=True)
    for i in range(v.layers):
        layer = f"{prefix}.encoder.layers.{i}"
        out.attention(f"{layer}.self_attn", v.hidden)
        out.norm(f"{layer}.layer_norm1", v.hidden, bias=True)
        out.norm(f"{layer}.layer_norm2", v.hidden, bias=True)
        out.linear(f"{layer}.mlp.fc1", v.ffn, v.hidden, bias=True)
        out.linear(f"{layer}.mlp.fc2", v.hidden, v.ffn, bias=True)


NAMES = {
    "embeddings.patch_embedding": "v.patch_embd",
    "embeddings.position_embedding": "v.position_embd",
    "post_layernorm": "v.post_ln",
}
BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def _tensors(prefix: str, vision: SiglipConfig, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """The tower's tensors by llama.cpp names."""
    names = {f"{prefix}.{hf}": ours for hf, ours in NAMES.items()}
    for i in range(vision.layers):
        names |= {f"{prefix}.encoder.layers.{i}.{hf}": f"v.blk.{i}.{ours}" for hf, ours in BLOCK_NAMES.items()}
    kinds = [(f"{hf}.{kind}", f"{ours}.{kind}") for hf, ours in names.items() for kind in ("weight", "bias")]
    return {ours: tensors[hf] for hf, ours in kinds if hf in tensors}


def write_siglip(
    path: Path,
    projector: str,
    vision: SiglipConfig,
    prefix: str,
    tensors: Mapping[str, Float32],
    *,
    width: int,
    values: Values,
    names: Mapping[str, str],
    gelu: bool = True,
) -> None:
    """Writes a projector file.

    Args:
        width: of the decoder's embeddings.
        values: the projector's own keys.
        names: its tensors, llama.cpp's name -> transformers' name.
        gelu: see ``write_projector``.
    """
    named = _tensors(prefix, vision, tensors) | {ours: tensors[hf] for ours, hf in names.items()}
    write_projector(path, projector, vision, named, width=width, mean=MEAN, std=STD, values=values, gelu=gelu)
