"""Pixtral (2410.07073): a tower of any size with rotary positions in two dimensions, [IMG_BREAK] after rows of tokens.

Mistral Small 3.1 (``mistral3.py``) has the same tower and merges patches before the projector. Names and layouts of the
projector file are those of ``conversion/llava.py``; every tensor is F32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.hf import HfReference, per_token
from tests.zoo.mmproj import VitSizes, write_projector
from tests.zoo.row import RGB, Drawing, Grid, Row, Spelling, standard_cases
from tests.zoo.text import PREFIX, TextConfig, interleaved, text_weights
from tests.zoo.tokenizer import Tokenizer
from tests.zoo.weights import Float32, Weights

__all__ = ["ROW", "Sizes", "make_row", "text"]

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
NORM, MERGER = f"{PROJECTOR}.norm.weight", f"{PROJECTOR}.patch_merger.merging_layer.weight"

TOKENIZER = Tokenizer(
    pre="tekken",
    controls=("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"),
    bos="<s>",
    eos="</s>",
    template=(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
        "{% elif m.content is string %}[INST]{{ m.content }}[/INST]{% else %}[INST]"
        "{% for c in m.content %}{% if c.type == 'image' %}[IMG]{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "[/INST]{% endif %}{% endfor %}"
    ),
)


@dataclass(frozen=True)
class Sizes(VitSizes):
    """Of the tower. ``merge``: patches along each side of a token; ``image``: the longest edge in pixels."""

    eps: float = 1e-5
    """transformers fixes it in the tower."""
    merge: int = 1

    @property
    def cell(self) -> int:
        """Pixels along each side of a token."""
        return self.patch * self.merge

    def hf(self) -> dict[str, Any]:
        return {**super().hf(), "model_type": "pixtral", "hidden_act": "silu"}


def weights(text: TextConfig, vision: Sizes, out: Weights) -> None:
    """The whole model by Hugging Face names."""
    v = vision
    out.matrix(f"{TOWER}.patch_conv.weight", v.hidden, 3, v.patch, v.patch, gain=2.0)
    out.norm(f"{TOWER}.ln_pre", v.hidden)
    for i in range(v.layers):
        layer = f"{TOWER}.transformer.layers.{i}"
        out.norm(f"{layer}.attention_norm", v.hidden)
        out.norm(f"{layer}.ffn_norm", v.hidden)
        out.attention(f"{layer}.attention", v.hidden, out="o_proj", bias=False)
        out.linear(f"{layer}.feed_forward.gate_proj", v.ffn, v.hidden, bias=False)
        out.linear(f"{layer}.feed_forward.up_proj", v.ffn, v.hidden, bias=False)
        out.linear(f"{layer}.feed_forward.down_proj", v.hidden, v.ffn, bias=False)
    merged = v.merge > 1
    if merged:
        out.norm(NORM.removesuffix(".weight"), v.hidden)
        out.matrix(MERGER, v.hidden, v.hidden * v.merge**2)
    out.linear(f"{PROJECTOR}.linear_1", text.hidden, v.hidden, bias=not merged)
    out.linear(f"{PROJECTOR}.linear_2", text.hidden, text.hidden, bias=not merged)
    text_weights(out, text)


NAMES = {
    f"{TOWER}.patch_conv.weight": "v.patch_embd.weight",
    f"{TOWER}.ln_pre.weight": "v.pre_ln.weight",
    NORM: "mm.input_norm.weight",
    MERGER: "mm.patch_merger.weight",
    **{f"{PROJECTOR}.linear_{i}.{kind}": f"mm.{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")},
}
BLOCK_NAMES = {
    "attention_norm": "ln1",
    "ffn_norm": "ln2",
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_out",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}


def _mmproj_tensors(vision: Sizes, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """The projector file's tensors by llama.cpp names."""
    out = {ours: tensors[hf] for hf, ours in NAMES.items() if hf in tensors}
    out["v.token_embd.img_break"] = tensors[f"{PREFIX}.embed_tokens.weight"][TOKENIZER.id("[IMG_BREAK]")]
    for i in range(vision.layers):
        for hf, ours in BLOCK_NAMES.items():
            tensor = tensors[f"{TOWER}.transformer.layers.{i}.{hf}.weight"]
            if ours in ("attn_q", "attn_k"):
                tensor = interleaved(tensor, vision.heads)
            out[f"v.blk.{i}.{ours}.weight"] = tensor
    return out


def write_mmproj(text: TextConfig, vision: Sizes, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file."""
    write_projector(
        path,
        "pixtral",
        vision,
        _mmproj_tensors(vision, tensors),
        width=text.hidden,
        mean=MEAN,
        std=STD,
        values={
            "clip.use_silu": True,
            **({"clip.vision.spatial_merge_size": vision.merge} if vision.merge > 1 else {}),
        },
        gelu=False,
    )


class PixtralReference(HfReference):
    """The model in transformers."""

    def __init__(self, text: TextConfig, vision: Sizes, tensors: Mapping[str, Float32]) -> None:
        import transformers
        from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

        self._vision = vision
        common = {
            "vision_config": vision.hf(),
            "text_config": {"model_type": "mistral", "sliding_window": None, **text.hf()},
            "image_token_index": TOKENIZER.id("[IMG]"),
            "vision_feature_layer": -1,
            "tie_word_embeddings": False,
            "attn_implementation": "eager",
        }
        if vision.merge > 1:
            config = transformers.Mistral3Config(**common, spatial_merge_size=vision.merge)
            model = transformers.Mistral3ForConditionalGeneration(config)
        else:
            config = transformers.LlavaConfig(**common, vision_feature_select_strategy="full")
            model = transformers.LlavaForConditionalGeneration(config)
        super().__init__(model, tensors)
        cell = {"height": vision.cell, "width": vision.cell}
        self._processor = PixtralImageProcessorPil(size={"longest_edge": vision.image}, patch_size=cell)
        self._break = tensors[f"{PREFIX}.embed_tokens.weight"][TOKENIZER.id("[IMG_BREAK]")]

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received: mean over queries and heads, summed over the patches of a token."""
        cut = self._processor(image, return_tensors="pt")
        out = self._features(cut["pixel_values"], image_sizes=cut["image_sizes"], output_attentions=True)
        rows, columns = (int(n) // self._vision.cell for n in cut["image_sizes"][0])
        received = np.stack([a[0].numpy().mean(axis=(0, 1)) for a in out.attentions])
        tower = per_token(received, columns, self._vision.merge)
        features = out.pooler_output[0].numpy().reshape(rows, columns, -1)
        breaks = np.broadcast_to(self._break, (rows, 1, len(self._break)))
        spelled = np.concatenate([features, breaks], axis=1).reshape(-1, len(self._break))
        return spelled[:-1], tower


def spell(vision: Sizes, width: int, height: int) -> Spelling:
    """As ``processing_pixtral.py`` writes a picture."""
    ratio = max(width / vision.image, height / vision.image, 1)
    rows, columns = (-(-int(n / ratio) // vision.cell) for n in (height, width))
    return (Grid(rows, columns, "between"), "[IMG_END]")


CASES = standard_cases(
    "[INST]",
    "[/INST]",
    (
        (Drawing(190, 100, 10, 51), (1, 4, 7, 10)),
        (Drawing(60, 201, 7, 52), (0, 4, 6)),
        (Drawing(70, 55, 1, 53), (3, 5)),
        (Drawing(100, 77, 4, 54), (4, 5, 8, 11)),
    ),
)


def text(arch: str, layers: int) -> TextConfig:
    """A Mistral decoder, whose heads are narrower than hidden / heads in the published models."""
    return TextConfig(
        arch,
        hidden=160,
        layers=layers,
        heads=4,
        kv_heads=2,
        ffn=224,
        vocab=len(TOKENIZER.tokens),
        rope_theta=1e6,
        eps=1e-5,
        head_size=32,
    )


def make_row(name: str, text: TextConfig, vision: Sizes, seed: int) -> Row:
    """A model of the given sizes."""
    return Row(
        name=name,
        text=text,
        tokenizer=TOKENIZER,
        spell=partial(spell, vision),
        tower_layers=vision.layers,
        repairs=(),
        cases=CASES,
        seed=seed,
        fill=partial(weights, text, vision),
        write_mmproj=partial(write_mmproj, text, vision),
        reference=partial(PixtralReference, text, vision),
    )


ROW = make_row("pixtral", text("llama", 3), Sizes(hidden=64, layers=3, heads=2, ffn=96, image=112, patch=16), seed=51)
