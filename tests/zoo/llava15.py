"""LLaVA-1.5 (2310.03744): CLIP with CLS, its last block unused, a two-layer projector, a Llama decoder.

Names and layouts of the projector file are those of llama.cpp's only converter for CLIP LLaVA
(``tools/mtmd/legacy-models``), which calls fc1 ``ffn_down`` and fc2 ``ffn_up``; the loader swaps them back. Every
tensor is F32, the patch convolution too (published files have it in F16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.row import RGB, Case, Drawing, Grid, Int32, Row, filler
from tests.zoo.siglip import SiglipConfig
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import MERGES, Tokenizer
from tests.zoo.weights import SHARP, Float32, Weights

__all__ = ["LARGE", "ROW", "TOKENIZER", "VOCAB", "LlavaReference", "VisionConfig", "weights", "write_mmproj"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOWER = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
NEWLINE = "model.image_newline"

TOKENIZER = Tokenizer(
    pre="gpt-2",
    controls=("<s>", "</s>", "<pad>", "<image>"),
    bos="<s>",
    eos="</s>",
    template=(
        "{% for m in messages %}"
        "{% if m.role == 'user' %}USER: {% elif m.role == 'assistant' %} ASSISTANT: {% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "{% endif %}"
        "{% if m.role == 'assistant' %}{{ eos_token }}{% elif m.role == 'system' %} {% endif %}"
        "{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
    ),
)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the tower; ``layers`` counts the block that LLaVA does not use. ``pinpoints`` (height, width) of tiled
    pictures make it a LLaVA-NeXT."""

    hidden: int
    layers: int
    heads: int
    ffn: int
    image: int
    patch: int = 14
    eps: float = 1e-5
    pinpoints: tuple[tuple[int, int], ...] = ()

    @property
    def side(self) -> int:
        return self.image // self.patch

    def hf(self) -> dict[str, Any]:
        """Arguments of the Hugging Face configuration."""
        return {
            "model_type": "clip_vision_model",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "image_size": self.image,
            "patch_size": self.patch,
            "layer_norm_eps": self.eps,
            "hidden_act": "quick_gelu",
        }


def weights(text: TextConfig, vision: VisionConfig, out: Weights) -> None:
    """The whole model by Hugging Face names (``LlavaForConditionalGeneration``)."""
    v = vision
    out.normal(f"{TOWER}.embeddings.class_embedding", v.hidden, std=1.0)
    out.matrix(f"{TOWER}.embeddings.patch_embedding.weight", v.hidden, 3, v.patch, v.patch, gain=2.0)
    out.normal(f"{TOWER}.embeddings.position_embedding.weight", v.side**2 + 1, v.hidden, std=1.0)
    out.norm(f"{TOWER}.pre_layrnorm", v.hidden, bias=True)
    out.norm(f"{TOWER}.post_layernorm", v.hidden, bias=True)
    for i in range(v.layers):
        layer = f"{TOWER}.encoder.layers.{i}"
        for name, gain in (("q_proj", SHARP), ("k_proj", SHARP), ("v_proj", 1.0), ("out_proj", 1.0)):
            out.linear(f"{layer}.self_attn.{name}", v.hidden, v.hidden, bias=True, gain=gain)
        out.norm(f"{layer}.layer_norm1", v.hidden, bias=True)
        out.norm(f"{layer}.layer_norm2", v.hidden, bias=True)
        out.linear(f"{layer}.mlp.fc1", v.ffn, v.hidden, bias=True)
        out.linear(f"{layer}.mlp.fc2", v.hidden, v.ffn, bias=True)
    out.linear(f"{PROJECTOR}.linear_1", text.hidden, v.hidden, bias=True)
    out.linear(f"{PROJECTOR}.linear_2", text.hidden, text.hidden, bias=True)
    if v.pinpoints:
        out.normal(NEWLINE, text.hidden, std=1.0)
    text_weights(out, text)


BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "mlp.fc1": "ffn_down",
    "mlp.fc2": "ffn_up",
}


def write_mmproj(
    text: TextConfig, vision: VisionConfig, path: Path, tensors: Mapping[str, Float32], *, blocks: str = "all"
) -> None:
    """Writes the projector file.

    Args:
        blocks: "all" blocks, of which llama.cpp skips the last; "explicit": without the unused one, with
            ``feature_layer`` saying so; "dropped": without it and without saying so, so that llama.cpp skips one too
            many, as it does with many published files (ggml-org/llama.cpp 25817).
    """
    from gguf import GGUFWriter, LlamaFileType

    v = vision
    n_blocks = v.layers if blocks == "all" else v.layers - 1
    writer = GGUFWriter(path, "clip")
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_bool("clip.use_gelu", False)  # quick GELU, as CLIP was trained
    writer.add_vision_image_size(v.image)
    writer.add_vision_patch_size(v.patch)
    writer.add_vision_embedding_length(v.hidden)
    writer.add_vision_feed_forward_length(v.ffn)
    writer.add_vision_projection_dim(text.hidden)
    writer.add_vision_head_count(v.heads)
    writer.add_vision_attention_layernorm_eps(v.eps)
    writer.add_vision_block_count(n_blocks)
    if blocks == "explicit":
        writer.add_array("clip.vision.feature_layer", [v.layers - 1])
    if v.pinpoints:
        writer.add_array("clip.vision.image_grid_pinpoints", [n for size in v.pinpoints for n in size])
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        writer.add_tensor(NEWLINE, tensors[NEWLINE])
    writer.add_vision_image_mean(MEAN)
    writer.add_vision_image_std(STD)
    writer.add_tensor("v.class_embd", tensors[f"{TOWER}.embeddings.class_embedding"])
    writer.add_tensor("v.patch_embd.weight", tensors[f"{TOWER}.embeddings.patch_embedding.weight"])
    writer.add_tensor("v.position_embd.weight", tensors[f"{TOWER}.embeddings.position_embedding.weight"])
    for kind in ("weight", "bias"):
        writer.add_tensor(f"v.pre_ln.{kind}", tensors[f"{TOWER}.pre_layrnorm.{kind}"])
        writer.add_tensor(f"mm.0.{kind}", tensors[f"{PROJECTOR}.linear_1.{kind}"])
        writer.add_tensor(f"mm.2.{kind}", tensors[f"{PROJECTOR}.linear_2.{kind}"])
        for i in range(n_blocks):
            for hf, ours in BLOCK_NAMES.items():
                writer.add_tensor(f"v.blk.{i}.{ours}.{kind}", tensors[f"{TOWER}.encoder.layers.{i}.{hf}.{kind}"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlavaReference:
    """The model in transformers; torch is imported here and nowhere else in this file."""

    CLASSES = "Llava"

    def __init__(
        self, text: TextConfig, vision: VisionConfig | SiglipConfig, tensors: Mapping[str, Float32], **settings: Any
    ) -> None:
        import torch
        import transformers

        from tests.zoo.reference import Decoder

        config = getattr(transformers, f"{self.CLASSES}Config")(
            **{
                "vision_config": vision.hf(),
                "text_config": transformers.LlamaConfig(**text.hf()),
                "vision_feature_layer": -2,
                "image_token_index": TOKENIZER.id("<image>"),
                "attn_implementation": "eager",
            }
            | settings
        )
        self._model = getattr(transformers, f"{self.CLASSES}ForConditionalGeneration")(config).eval()
        self._model.load_state_dict({k: torch.from_numpy(t) for k, t in tensors.items()}, strict=True)
        self._layers, self._torch = vision.layers, torch
        self._decoder = Decoder(self._model)
        self._size = {
            "size": {"shortest_edge": vision.image},
            "crop_size": {"height": vision.image, "width": vision.image},
        }

    def _processor(self) -> Any:
        from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

        return LlavaImageProcessorPil(**self._size, do_pad=True)

    def _cut(self, image: RGB) -> Any:
        """What the processor makes of a picture: pixel_values, and sizes if it gives them."""
        return self._processor()(image, input_data_format="channels_last", return_tensors="pt")

    def _features(self, cut: Any) -> tuple[Any, Float32]:
        """Rows (n, width) that transformers packs, and the attention of each block (tiles, heads, rows, rows)."""
        with self._torch.no_grad():
            out = self._model.model.get_image_features(**cut, return_dict=True, output_attentions=True)
        return out.pooler_output[0], np.stack([a.numpy() for a in out.attentions])

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        rows, attention = self._features(self._cut(image))
        return rows.numpy(), self._saliency(attention)[:, 0]

    def _saliency(self, attention: Float32) -> Float32:
        """(layers, tiles, patches) CLS attention of the blocks used, head means."""
        return attention[: self._layers - 1, :, :, 0, 1:].mean(axis=2)

    def encode_stock(self, image: RGB) -> Float32:
        with self._torch.no_grad():
            return np.asarray(self._stock_tiles(self._cut(image)["pixel_values"])[0].numpy())

    def _stock_tiles(self, tiles: Any) -> Any:
        """(tiles, N, width): llama.cpp appends CLS after the N patches but numbers positions and picks rows as if it
        came first (ggml-org/llama.cpp 25814): patch i gets position row i, CLS row N, and the rows taken are patches
        1 .. N-1 and CLS."""
        model = self._model.model
        table = model.vision_tower.embeddings.position_embedding.weight
        right = table.detach().clone()
        try:
            table.data = right.roll(1, dims=0)
            hidden = model.vision_tower(tiles, output_hidden_states=True).hidden_states[-2]
        finally:
            table.data = right
        return model.multi_modal_projector(self._torch.cat([hidden[:, 2:], hidden[:, :1]], dim=1))

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        return self._decoder.decode(ids, rows, positions)


def _cases(image: int) -> tuple[Case, ...]:
    n = (image // 14) ** 2
    noise, wide, tall = Drawing(image, image, 1, 11), Drawing(150, 70, 7, 12), Drawing(31, 120, 10, 13)
    return (
        Case(
            "noise",
            ("USER: ", 0, "\nwhat is the thing in red? ASSISTANT:"),
            (noise,),
            fed=(83, 266, 7, 201, 40, 99),
            keep=(tuple(range(1, n, 3)),),
        ),
        Case(
            "two",
            ("USER: look: ", 0, "\nand then the other one: ", 1, "\nwhat differs? ASSISTANT:"),
            (wide, tall),
            fed=(120, 33, 270, 64),
            keep=((0, 2, 3, 11, n - 1), tuple(range(5, n, 7))),
        ),
        Case(
            "long",
            (f"USER: {filler(1, 9)}", 0, f"\n{filler(10, 25)} what is where? ASSISTANT:"),
            (Drawing(2 * image, image + 1, 14, 14),),
            fed=(),
            keep=((4, 5, 17, 18, n - 2),),
        ),
    )


def make_row(name: str, text: TextConfig, vision: VisionConfig, seed: int) -> Row:
    """A LLaVA-1.5 of the given sizes."""
    return Row(
        name=name,
        text=text,
        tokenizer=TOKENIZER,
        spell=lambda width, height: (Grid(vision.side, vision.side),),
        tower_layers=vision.layers - 1,
        repairs=("llava-cls-order",),
        cases=_cases(vision.image),
        seed=seed,
        fill=partial(weights, text, vision),
        write_mmproj=partial(write_mmproj, text, vision),
        reference=partial(LlavaReference, text, vision),
    )


VOCAB = math.ceil((256 + len(MERGES) + len(TOKENIZER.controls)) / 4) * 4
assert len(TOKENIZER.tokens) == VOCAB

ROW = make_row(
    "llava15",
    TextConfig("llama", hidden=128, layers=3, heads=4, kv_heads=2, ffn=192, vocab=VOCAB, rope_theta=1e4, eps=1e-5),
    VisionConfig(hidden=64, layers=5, heads=2, ffn=128, image=84),
    seed=15,
)
LARGE = make_row(
    "llava15-large",
    TextConfig("llama", hidden=192, layers=4, heads=6, kv_heads=3, ffn=320, vocab=VOCAB, rope_theta=1e4, eps=1e-5),
    VisionConfig(hidden=96, layers=4, heads=3, ffn=160, image=112),
    seed=16,
)
