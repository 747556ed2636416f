"""Qwen2.5-VL (2502.13923): a dynamic-size tower with window and full attention, a 2x2 merger, M-RoPE.

Names and layouts of the projector file are those of ``conversion/qwenvl.py``: qkv is split, and the 3-D patch
convolution becomes two 2-D ones, which llama.cpp adds for a still picture. Every tensor is F32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tests.zoo.row import RGB, Case, Drawing, Grid, Int32, Row, Spelling, filler
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import MERGES, Tokenizer
from tests.zoo.weights import SHARP, Float32, Weights

__all__ = ["LARGE", "ROW"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOWER = "model.visual"
PATCH, MERGE, WINDOW = 14, 2, 112
EPS = 1e-6
"""transformers fixes it in the tower; llama.cpp reads it from the file."""

TOKENIZER = Tokenizer(
    pre="qwen2",
    controls=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|vision_pad|>",
        "<|image_pad|>",
        "<|video_pad|>",
    ),
    bos="",
    eos="<|im_end|>",
    template=(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% endif %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; every ``pattern``-th block attends to the whole picture."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    pattern: int = 2


def weights(text: TextConfig, vision: VisionConfig, seed: int) -> dict[str, Float32]:
    """The whole model by Hugging Face names (``Qwen2_5_VLForConditionalGeneration``)."""
    out, v = Weights(seed), vision
    out.matrix(f"{TOWER}.patch_embed.proj.weight", v.hidden, 3, 2, PATCH, PATCH, gain=2.0)
    for i in range(v.layers):
        block = f"{TOWER}.blocks.{i}"
        out.norm(f"{block}.norm1", v.hidden)
        out.norm(f"{block}.norm2", v.hidden)
        out.matrix(f"{block}.attn.qkv.weight", 3 * v.hidden, v.hidden)
        out.tensors[f"{block}.attn.qkv.weight"][: 2 * v.hidden] *= np.float32(SHARP)
        out.bias(f"{block}.attn.qkv.bias", 3 * v.hidden)
        out.linear(f"{block}.attn.proj", v.hidden, v.hidden, bias=True)
        out.linear(f"{block}.mlp.gate_proj", v.ffn, v.hidden, bias=True)
        out.linear(f"{block}.mlp.up_proj", v.ffn, v.hidden, bias=True)
        out.linear(f"{block}.mlp.down_proj", v.hidden, v.ffn, bias=True)
    merged = v.hidden * MERGE**2
    out.norm(f"{TOWER}.merger.ln_q", v.hidden)
    out.linear(f"{TOWER}.merger.mlp.0", merged, merged, bias=True)
    out.linear(f"{TOWER}.merger.mlp.2", text.hidden, merged, bias=True)
    text_weights(out, text)
    return out.tensors


BLOCK_NAMES = {
    "norm1": "ln1",
    "norm2": "ln2",
    "attn.proj": "attn_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def _mmproj_tensors(vision: VisionConfig, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """The projector file's tensors by llama.cpp names."""
    conv = tensors[f"{TOWER}.patch_embed.proj.weight"]  # (hidden, 3, frames, patch, patch)
    out = {
        "v.patch_embd.weight": conv[:, :, 0],
        "v.patch_embd.weight.1": conv[:, :, 1],
        "v.post_ln.weight": tensors[f"{TOWER}.merger.ln_q.weight"],
    }
    for kind in ("weight", "bias"):
        out[f"mm.0.{kind}"] = tensors[f"{TOWER}.merger.mlp.0.{kind}"]
        out[f"mm.2.{kind}"] = tensors[f"{TOWER}.merger.mlp.2.{kind}"]
        for i in range(vision.layers):
            block = f"{TOWER}.blocks.{i}"
            for letter, part in zip("qkv", np.split(tensors[f"{block}.attn.qkv.{kind}"], 3), strict=True):
                out[f"v.blk.{i}.attn_{letter}.{kind}"] = part
            for hf, ours in BLOCK_NAMES.items():
                tensor = tensors.get(f"{block}.{hf}.{kind}")
                if tensor is not None:
                    out[f"v.blk.{i}.{ours}.{kind}"] = tensor
    return out


def write_mmproj(text: TextConfig, vision: VisionConfig, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file."""
    from gguf import GGUFWriter, LlamaFileType

    v = vision
    writer = GGUFWriter(path, "clip")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("qwen2.5vl_merger")
    writer.add_vision_use_silu(True)
    writer.add_vision_n_wa_pattern(v.pattern)
    writer.add_vision_image_size(560)
    writer.add_vision_patch_size(PATCH)
    writer.add_vision_embedding_length(v.hidden)
    writer.add_vision_feed_forward_length(v.ffn)
    writer.add_vision_projection_dim(text.hidden)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(EPS)
    writer.add_vision_block_count(v.layers)
    writer.add_vision_image_mean(MEAN)
    writer.add_vision_image_std(STD)
    for name, tensor in _mmproj_tensors(vision, tensors).items():
        writer.add_tensor(name, np.ascontiguousarray(tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class QwenReference:
    """The model in transformers; torch is imported here and nowhere else in this file."""

    def __init__(self, text: TextConfig, vision: VisionConfig, tensors: Mapping[str, Float32]) -> None:
        import torch
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import (
            Qwen2_5_VLTextConfig,
            Qwen2_5_VLVisionConfig,
        )

        from tests.zoo.reference import Decoder

        v = vision
        config = Qwen2_5_VLConfig(
            vision_config=Qwen2_5_VLVisionConfig(
                depth=v.layers,
                hidden_size=v.hidden,
                intermediate_size=v.ffn,
                num_heads=v.heads,
                out_hidden_size=text.hidden,
                patch_size=PATCH,
                spatial_merge_size=MERGE,
                window_size=WINDOW,
                fullatt_block_indexes=list(range(v.pattern - 1, v.layers, v.pattern)),
            ),
            text_config=Qwen2_5_VLTextConfig(**text.hf()),
            image_token_id=TOKENIZER.id("<|image_pad|>"),
            video_token_id=TOKENIZER.id("<|video_pad|>"),
            vision_start_token_id=TOKENIZER.id("<|vision_start|>"),
            vision_end_token_id=TOKENIZER.id("<|vision_end|>"),
            attn_implementation="eager",
        )
        self._model = Qwen2_5_VLForConditionalGeneration(config).eval()
        self._model.load_state_dict({k: torch.from_numpy(t) for k, t in tensors.items()}, strict=True)
        self._torch = torch
        self._decoder = Decoder(self._model)

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received: mean over queries and heads, summed over the 2x2 patches of a token, tokens in raster
        order."""
        from transformers.vision_utils import get_vision_window_index

        from tests.zoo.reference import recorded_attention

        patches, grid = _patches(image)
        thw = self._torch.tensor([[1, *grid]])
        with self._torch.no_grad(), recorded_attention(self._model.model.visual) as layers:
            out = self._model.model.visual(self._torch.from_numpy(patches), grid_thw=thw)
        received = np.stack([np.concatenate([a.mean(axis=0).sum(axis=0) for a in chunks]) for chunks in layers])
        received /= patches.shape[0]
        per_token = received.reshape(len(layers), -1, MERGE**2).sum(axis=2)
        order, _ = get_vision_window_index(thw, spatial_merge_size=MERGE, window_size=WINDOW, patch_size=PATCH)
        tower = np.empty_like(per_token)
        tower[:, order.numpy()] = per_token
        return out.pooler_output.numpy(), tower

    def encode_stock(self, image: RGB) -> Float32:
        return self.encode(image)[0]

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        return self._decoder.decode(ids, rows, positions)


def _patches(image: RGB) -> tuple[Float32, tuple[int, int]]:
    """(n_patches, 3 * 2 * patch^2) normalised pixels as Qwen2.5-VL's processor lays them out, patches in groups of
    2x2, the still picture taken as two equal frames; and the grid (rows, columns) of patches."""
    pixels = (image.astype(np.float32) / 255.0 - np.array(MEAN, np.float32)) / np.array(STD, np.float32)
    rows, columns = image.shape[0] // PATCH, image.shape[1] // PATCH
    cells = pixels.reshape(rows // MERGE, MERGE, PATCH, columns // MERGE, MERGE, PATCH, 3)
    grouped = cells.transpose(0, 3, 1, 4, 6, 2, 5)  # row, column, dy, dx, channel, y, x
    frames = np.repeat(grouped[:, :, :, :, :, None], 2, axis=5)
    return np.ascontiguousarray(frames.reshape(rows * columns, -1), np.float32), (rows, columns)


def _spell(width: int, height: int) -> Spelling:
    return ("<|vision_start|>", Grid(height // (PATCH * MERGE), width // (PATCH * MERGE)), "<|vision_end|>")


CASES = (
    Case(
        "wide",
        ("<|im_start|>user\n", 0, "what is the thing in red?<|im_end|>\n<|im_start|>assistant\n"),
        (Drawing(168, 112, 7, 21),),
        fed=(83, 266, 7, 201, 40, 99),
        keep=(tuple(range(1, 24, 3)),),
    ),
    Case(
        "two",
        ("<|im_start|>user\nlook: ", 0, "and then the other: ", 1, "what differs?<|im_end|>\n<|im_start|>assistant\n"),
        (Drawing(140, 196, 10, 22), Drawing(140, 56, 1, 23)),
        fed=(120, 33, 270, 64),
        keep=((0, 4, 6, 17, 34), (3, 8)),
    ),
    Case(
        "long",
        (f"<|im_start|>user\n{filler(1, 9)}", 0, f"{filler(10, 25)}<|im_end|>\n<|im_start|>assistant\n"),
        (Drawing(224, 140, 14, 24),),
        fed=(),
        keep=((4, 5, 17, 18, 38),),
    ),
)


def make_row(name: str, text: TextConfig, vision: VisionConfig, seed: int) -> Row:
    """A Qwen2.5-VL of the given sizes."""
    return Row(
        name=name,
        text=text,
        tokenizer=TOKENIZER,
        spell=_spell,
        tower_layers=vision.layers,
        repairs=(),
        cases=CASES,
        weights=partial(weights, text, vision, seed),
        write_mmproj=partial(write_mmproj, text, vision),
        reference=partial(QwenReference, text, vision),
    )


def _text(hidden: int, layers: int, heads: int, kv_heads: int, ffn: int) -> TextConfig:
    return TextConfig(
        arch="qwen2vl",
        hidden=hidden,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        vocab=256 + len(MERGES) + len(TOKENIZER.controls),
        rope_theta=1e6,
        eps=EPS,
        qkv_bias=True,
        mrope=(4, 6, 6),
    )


ROW = make_row("qwen25vl", _text(128, 3, 4, 2, 192), VisionConfig(hidden=64, layers=4, heads=2, ffn=96), seed=25)
LARGE = make_row(
    "qwen25vl-large", _text(192, 4, 6, 3, 320), VisionConfig(hidden=64, layers=4, heads=2, ffn=96), seed=26
)
