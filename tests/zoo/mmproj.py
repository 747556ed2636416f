"""A projector file, every tensor in F32, as llama.cpp's converters write it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from tests.zoo.weights import Float32

__all__ = ["Values", "VisionSizes", "VitSizes", "write_projector"]

Values = Mapping[str, int | bool | str | list[int]]


class VisionSizes(Protocol):
    """A ViT's sizes; ``image`` and ``patch`` in pixels."""

    @property
    def hidden(self) -> int: ...
    @property
    def layers(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def image(self) -> int: ...
    @property
    def patch(self) -> int: ...
    @property
    def eps(self) -> float: ...


@dataclass(frozen=True)
class VitSizes:
    """A ViT's sizes; ``image`` and ``patch`` in pixels."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    image: int
    patch: int = 14
    eps: float = 1e-6

    @property
    def side(self) -> int:
        """Patches along each side of a picture of ``image`` pixels."""
        return self.image // self.patch

    def hf(self) -> dict[str, Any]:
        """Arguments of the Hugging Face configuration."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
            "layer_norm_eps": self.eps,
        }


def write_projector(
    path: Path,
    projector: str,
    vision: VisionSizes,
    tensors: Mapping[str, Float32],
    *,
    width: int,
    mean: Sequence[float],
    std: Sequence[float],
    values: Values,
    gelu: bool = True,
) -> None:
    """Writes ``tensors`` by llama.cpp names.

    Args:
        width: of the decoder's embeddings.
        values: the projector's own keys.
        gelu: the file says GELU; otherwise llama.cpp takes the quick one.
    """
    from gguf import GGUFWriter, LlamaFileType

    v = vision
    writer = GGUFWriter(path, "clip")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type(projector)
    writer.add_vision_use_gelu(gelu)
    writer.add_vision_image_size(v.image)
    writer.add_vision_patch_size(v.patch)
    writer.add_vision_embedding_length(v.hidden)
    writer.add_vision_feed_forward_length(v.ffn)
    writer.add_vision_projection_dim(width)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(v.eps)
    writer.add_vision_block_count(v.layers)
    writer.add_vision_image_mean(mean)
    writer.add_vision_image_std(std)
    for key, value in values.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_bool(key, value) if isinstance(value, bool) else writer.add_uint32(key, value)
    for name, tensor in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
