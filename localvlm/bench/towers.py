"""Vision towers and projectors of random weights, with the names and layouts that llama.cpp's converters give them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from localvlm.bench.gguf_files import Tensor

__all__ = ["Tower", "projector_tensors", "write_projector_keys"]

_CLIP = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NORMAL = {"clip": _CLIP, "internvit": _IMAGENET, "siglip": _HALF, "qwen2.5": _CLIP}
"""Mean and standard deviation of the pixels."""
_PROJECTORS = {"clip": "mlp", "internvit": "internvl", "siglip": "idefics3", "qwen2.5": "qwen2.5vl_merger"}


@dataclass(frozen=True)
class Tower:
    """A ViT and its projector, matrices in F16.

    Attributes:
        kind: of LLaVA, InternVL, SmolVLM or Qwen2.5-VL.
        layers: blocks in the file; llama.cpp leaves LLaVA's last one out.
        image, patch: pixels; those of a tile.
        merge: patches along each side of a token.
        pinpoints: (height, width) that pictures are tiled to: LLaVA-NeXT.
        edge: tiles along the longest edge of a picture: SmolVLM.
        full_every: every so many blocks attend to the whole picture, the others within windows: Qwen2.5-VL.
    """

    kind: Literal["clip", "internvit", "siglip", "qwen2.5"]
    layers: int
    width: int
    heads: int
    ffn: int
    image: int
    patch: int
    merge: int = 1
    pinpoints: tuple[tuple[int, int], ...] = ()
    edge: int = 0
    full_every: int = 0

    @property
    def patches(self) -> int:
        return (self.image // self.patch) ** 2


def write_projector_keys(tower: Tower, name: str, width: int, writer: Any) -> None:
    """Metadata of a projector file for a ``width`` wide LLM."""
    mean, std = _NORMAL[tower.kind]
    writer.add_name(f"{name}-mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(_PROJECTORS[tower.kind])
    writer.add_vision_image_size(tower.image)
    writer.add_vision_patch_size(tower.patch)
    writer.add_vision_embedding_length(tower.width)
    writer.add_vision_feed_forward_length(tower.ffn)
    writer.add_vision_projection_dim(width)
    writer.add_vision_head_count(tower.heads)
    writer.add_vision_attention_layernorm_eps(1e-5 if tower.kind == "clip" else 1e-6)
    writer.add_vision_block_count(tower.layers)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    writer.add_vision_use_gelu(tower.kind in ("internvit", "siglip"))
    if tower.kind == "qwen2.5":
        writer.add_bool("clip.use_silu", True)
        writer.add_uint32("clip.vision.n_wa_pattern", tower.full_every)
    elif tower.pinpoints:
        writer.add_array("clip.vision.image_grid_pinpoints", [n for size in tower.pinpoints for n in size])
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
    elif tower.kind != "clip":
        writer.add_uint32("clip.vision.projector.scale_factor", tower.merge)
    if tower.kind == "internvit":
        writer.add_uint32("clip.vision.preproc_min_tiles", 1)
        writer.add_uint32("clip.vision.preproc_max_tiles", 12)
    elif tower.kind == "siglip":
        writer.add_uint32("clip.vision.preproc_image_size", tower.edge * tower.image)


def projector_tensors(tower: Tower, width: int) -> list[Tensor]:
    """Tower and projector for a ``width`` wide LLM."""
    t, cls = tower, tower.kind in ("clip", "internvit")
    out = [_matrix("v.patch_embd.weight", t.width, 3, t.patch, t.patch)]
    if t.kind == "qwen2.5":  # one for each frame of a pair
        out.append(_matrix("v.patch_embd.weight.1", t.width, 3, t.patch, t.patch))
    else:
        out.append(Tensor("v.position_embd.weight", (t.patches + cls, t.width), "F32", 0.5))
    if cls:
        out.append(_vector("v.class_embd", t.width, 0.5))
    if t.kind == "clip":
        out += _norm("v.pre_ln", t.width)
    elif t.kind in ("internvit", "siglip"):
        out.append(_vector("v.patch_embd.bias", t.width))
    for i in range(t.layers):
        out += _block(t, f"v.blk.{i}")
    return out + _projector(t, width)


def _block(t: Tower, name: str) -> list[Tensor]:
    out: list[Tensor] = []
    wide = {"ffn_up": (t.ffn, t.width), "ffn_down": (t.width, t.ffn)}
    if t.kind == "qwen2.5":
        wide["ffn_gate"] = t.ffn, t.width
    for part in ("attn_q", "attn_k", "attn_v", "attn_out", *wide):
        rows, columns = wide.get(part, (t.width, t.width))
        out += _linear(f"{name}.{part}", rows, columns)
    for norm in ("ln1", "ln2"):
        out += _norm(f"{name}.{norm}", t.width, bias=t.kind != "qwen2.5")
    if t.kind == "internvit":
        out += [_vector(f"{name}.{scale}.weight", t.width, 0.1, 0.5) for scale in ("ls1", "ls2")]
    return out


def _projector(t: Tower, width: int) -> list[Tensor]:
    merged = t.width * t.merge**2
    if t.kind == "clip":
        out = _linear("mm.0", width, t.width) + _linear("mm.2", width, width)
        return [*out, _vector("model.image_newline", width, 1.0)] if t.pinpoints else out
    if t.kind == "internvit":
        out = _norm("mm.model.mlp.0", merged)
        return out + _linear("mm.model.mlp.1", width, merged) + _linear("mm.model.mlp.3", width, width)
    if t.kind == "siglip":
        return [*_norm("v.post_ln", t.width), _matrix("mm.model.fc.weight", width, merged)]
    return [
        *_norm("v.post_ln", t.width, bias=False),
        *_linear("mm.0", merged, merged),
        *_linear("mm.2", width, merged),
    ]


def _matrix(name: str, rows: int, *columns: int) -> Tensor:
    fan_in = 1
    for n in columns:
        fan_in *= n
    return Tensor(name, (rows, *columns), "F16", fan_in**-0.5)


def _vector(name: str, n: int, std: float = 0.1, mean: float = 0.0) -> Tensor:
    return Tensor(name, (n,), "F32", std, mean)


def _linear(name: str, rows: int, columns: int) -> list[Tensor]:
    return [_matrix(f"{name}.weight", rows, columns), _vector(f"{name}.bias", rows)]


def _norm(name: str, n: int, *, bias: bool = True) -> list[Tensor]:
    return [_vector(f"{name}.weight", n, 0.05, 1.0), *([_vector(f"{name}.bias", n)] if bias else [])]
