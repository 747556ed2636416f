"""LLaVA-1.5 (2310.03744): CLIP with CLS, its last block unused, a two-layer projector, a Llama decoder.

Names and layouts of the projector file are those of llama.cpp's only converter for CLIP LLaVA
(``tools/mtmd/legacy-models``), which calls fc1 ``ffn_down`` and fc2 ``ffn_up``; the loader swaps them back. Every
tensor is F32, the patch convolution too (published files have it in F16).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.hf import HfReference
from tests.zoo.mmproj import VitSizes, write_projector
from tests.zoo.row import RGB, Case, Drawing, Grid, Row, filler, standard_cases
from tests.zoo.siglip import BLOCK_NAMES, encoder_weights
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import MERGES, Tokenizer
from tests.zoo.weights import Float32, Weights

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
class VisionConfig(VitSizes):
    """Sizes of the tower; ``layers`` counts the block that LLaVA does not use. ``pinpoints`` (height, width) of tiled
    pictures make it a LLaVA-NeXT."""

    eps: float = 1e-5
    pinpoints: tuple[tuple[int, int], ...] = ()

    def hf(self) -> dict[str, Any]:
        return {**super().hf(), "model_type": "clip_vision_model", "hidden_act": "quick_gelu"}


def weights(text: TextConfig, vision: VisionConfig, out: Weights) -> None:
    """The whole model by Hugging Face names (``LlavaForConditionalGeneration``)."""
    v = vision
    out.normal(f"{TOWER}.embeddings.class_embedding", v.hidden, std=1.0)
    out.matrix(f"{TOWER}.embeddings.patch_embedding.weight", v.hidden, 3, v.patch, v.patch, gain=2.0)
    out.normal(f"{TOWER}.embeddings.position_embedding.weight", v.side**2 + 1, v.hidden, std=1.0)
    out.norm(f"{TOWER}.pre_layrnorm", v.hidden, bias=True)
    encoder_weights(out, TOWER, v)
    out.linear(f"{PROJECTOR}.linear_1", text.hidden, v.hidden, bias=True)
    out.linear(f"{PROJECTOR}.linear_2", text.hidden, text.hidden, bias=True)
    if v.pinpoints:
        out.normal(NEWLINE, text.hidden, std=1.0)
    text_weights(out, text)


NAMES = {
    "v.class_embd": f"{TOWER}.embeddings.class_embedding",
    "v.patch_embd.weight": f"{TOWER}.embeddings.patch_embedding.weight",
    "v.position_embd.weight": f"{TOWER}.embeddings.position_embedding.weight",
}


def write_mmproj(
    text: TextConfig, vision: VisionConfig, path: Path, tensors: Mapping[str, Float32], *, blocks: str = "all"
) -> None:
    """Writes the projector file, with the quick GELU that CLIP was trained with.

    Args:
        blocks: "all" blocks, of which llama.cpp skips the last; "explicit": without the unused one, with
            ``feature_layer`` saying so; "dropped": without it and without saying so, so that llama.cpp skips one too
            many, as it does with many published files (ggml-org/llama.cpp 25817).
    """
    v = replace(vision, layers=vision.layers - (blocks != "all"))
    modules = {"v.pre_ln": f"{TOWER}.pre_layrnorm", "mm.0": f"{PROJECTOR}.linear_1", "mm.2": f"{PROJECTOR}.linear_2"}
    for i in range(v.layers):
        for hf, ours in {**BLOCK_NAMES, "mlp.fc1": "ffn_down", "mlp.fc2": "ffn_up"}.items():
            modules[f"v.blk.{i}.{ours}"] = f"{TOWER}.encoder.layers.{i}.{hf}"
    names = NAMES | {f"{ours}.{kind}": f"{hf}.{kind}" for ours, hf in modules.items() for kind in ("weight", "bias")}
    values: dict[str, bool | str | list[int]] = {"clip.has_text_encoder": False, "clip.has_llava_projector": True}
    if blocks == "explicit":
        values |= {"clip.vision.feature_layer": [v.layers]}
    if v.pinpoints:
        values |= {
            "clip.vision.image_grid_pinpoints": [n for size in v.pinpoints for n in size],
            "clip.vision.mm_patch_merge_type": "spatial_unpad",
        }
        names[NEWLINE] = NEWLINE
    named = {ours: tensors[hf] for ours, hf in names.items()}
    write_projector(path, "mlp", v, named, width=text.hidden, mean=MEAN, std=STD, values=values, gelu=False)


class LlavaReference(HfReference):
    """The model in transformers."""

    CLASSES = "Llava"

    def __init__(self, text: TextConfig, vision: VitSizes, tensors: Mapping[str, Float32], **settings: Any) -> None:
        import transformers

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
        super().__init__(getattr(transformers, f"{self.CLASSES}ForConditionalGeneration")(config), tensors)
        self._layers = vision.layers
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

    def _attended(self, cut: Any) -> tuple[Any, Float32]:
        """Rows (n, width) that transformers packs, and the attention of each block (tiles, heads, rows, rows)."""
        out = self._features(**cut, output_attentions=True)
        return out.pooler_output[0], np.stack([a.numpy() for a in out.attentions])

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        rows, attention = self._attended(self._cut(image))
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


def llava_cases(
    first: str, pictures: Sequence[tuple[Drawing, tuple[int, ...]]], after_long: int = 25
) -> tuple[Case, ...]:
    """``first``: name of the first case; ``after_long``: sentences after the fourth picture."""
    long = (filler(1, 9), f"{filler(10, after_long)} what is where?")
    return standard_cases("USER: ", " ASSISTANT:", pictures, first=first, after="\n", other="the other one", long=long)


def _cases(image: int) -> tuple[Case, ...]:
    n = (image // 14) ** 2
    return llava_cases(
        "noise",
        (
            (Drawing(image, image, 1, 11), tuple(range(1, n, 3))),
            (Drawing(150, 70, 7, 12), (0, 2, 3, 11, n - 1)),
            (Drawing(31, 120, 10, 13), tuple(range(5, n, 7))),
            (Drawing(2 * image, image + 1, 14, 14), (4, 5, 17, 18, n - 2)),
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
