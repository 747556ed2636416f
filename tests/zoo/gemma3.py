"""Gemma 3 (2503.19786): a SigLIP tower, patches averaged to tokens, a decoder with sliding layers in which the tokens
of a picture see each other in both directions.

Three layers: the last sees everything, the others a window that the prompts are longer than.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from tests.zoo.hf import HfReference, per_token
from tests.zoo.row import RGB, Drawing, Grid, Row, filler, standard_cases
from tests.zoo.siglip import SiglipConfig, siglip_weights, write_siglip
from tests.zoo.text import PREFIX, TextConfig, text_weights
from tests.zoo.tokenizer import MERGES, Tokenizer
from tests.zoo.weights import Float32, Weights

__all__ = ["ROW"]

TOWER = "model.vision_tower"
PROJECTOR = "model.multi_modal_projector"
NORM, PROJECTION = f"{PROJECTOR}.mm_soft_emb_norm.weight", f"{PROJECTOR}.mm_input_projection_weight"
POOL = 2
START, END = "<start_of_turn>", "<end_of_turn>"

TOKENIZER = Tokenizer(
    pre="qwen2",
    controls=("<pad>", "<eos>", "<bos>", START, END, "<start_of_image>", "<end_of_image>", "<image_soft_token>"),
    bos="<bos>",
    eos=END,
    template=(
        "{{ bos_token }}{% for m in messages %}"
        "<start_of_turn>{% if m.role == 'assistant' %}model{% else %}{{ m.role }}{% endif %}\n"
        "{% if m.content is string %}{{ m.content | trim }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}<start_of_image>{% else %}{{ c.text | trim }}{% endif %}"
        "{% endfor %}{% endif %}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    merges=(*MERGES, ("Ċ", "Ċ"), ("ĊĊ", "Ċ")),
)


def weights(text: TextConfig, vision: SiglipConfig, out: Weights) -> None:
    """The whole model by Hugging Face names (``Gemma3ForConditionalGeneration``), but for SigLIP's unused head."""
    v = vision
    siglip_weights(out, TOWER, v, v.side**2)
    out.normal(NORM, v.hidden, std=0.1)  # multiplied by 1 + weight
    out.matrix(PROJECTION, text.hidden, v.hidden)
    out.tensors[PROJECTION] = np.ascontiguousarray(out.tensors[PROJECTION].T)
    text_weights(out, text)


def write_mmproj(text: TextConfig, vision: SiglipConfig, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file as ``conversion/gemma.py`` does."""
    write_siglip(
        path,
        "gemma3",
        vision,
        TOWER,
        {**tensors, NORM: tensors[NORM] + np.float32(1)},
        width=text.hidden,
        values={"clip.vision.projector.scale_factor": POOL},
        names={"mm.soft_emb_norm.weight": NORM, "mm.input_projection.weight": PROJECTION},
    )


class GemmaReference(HfReference):
    """The model in transformers."""

    def __init__(self, text: TextConfig, vision: SiglipConfig, tensors: Mapping[str, Float32]) -> None:
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        self._side = vision.side // POOL
        config = Gemma3Config(
            vision_config={**vision.hf(), "vision_use_head": False},
            text_config=text.hf(),
            mm_tokens_per_image=self._side**2,
            image_token_index=TOKENIZER.id("<image_soft_token>"),
            boi_token_index=TOKENIZER.id("<start_of_image>"),
            eoi_token_index=TOKENIZER.id("<end_of_image>"),
            attn_implementation="eager",
        )
        tied = {**tensors, "lm_head.weight": tensors[f"{PREFIX}.embed_tokens.weight"]}
        super().__init__(Gemma3ForConditionalGeneration(config), tied, window=text.window)
        self._processor = Gemma3ImageProcessorPil(size={"height": vision.image, "width": vision.image})

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received: mean over queries and heads, summed over the patches of a token."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"]
        out = self._features(pixels, output_attentions=True)
        received = np.stack([a[0].numpy().mean(axis=(0, 1)) for a in out.attentions])
        return out.pooler_output[0].numpy(), per_token(received, self._side, POOL)


CASES = standard_cases(
    f"{START}user\n",
    f"{END}\n{START}model\n",
    (
        (Drawing(190, 100, 10, 41), tuple(range(1, 25, 3))),
        (Drawing(60, 201, 7, 42), (0, 4, 6, 17, 24)),
        (Drawing(140, 139, 1, 43), (3, 8)),
        (Drawing(31, 77, 4, 44), (4, 5, 17, 18, 23)),
    ),
    long=(filler(1, 32), "what is where?"),
)


def make_row(name: str, text: TextConfig, vision: SiglipConfig, seed: int) -> Row:
    """A Gemma 3 of the given sizes."""
    side = vision.side // POOL
    return Row(
        name=name,
        text=text,
        tokenizer=TOKENIZER,
        spell=lambda width, height: ("\n\n<start_of_image>", Grid(side, side), "<end_of_image>\n\n"),
        tower_layers=vision.layers,
        repairs=(),
        cases=CASES,
        seed=seed,
        fill=partial(weights, text, vision),
        write_mmproj=partial(write_mmproj, text, vision),
        reference=partial(GemmaReference, text, vision),
    )


ROW = make_row(
    "gemma3",
    TextConfig(
        "gemma3",
        vocab=len(TOKENIZER.tokens),
        rope_theta=1e6,
        eps=1e-6,
        head_size=48,
        qk_norm=True,
        window=192,
    ),
    SiglipConfig(hidden=64, layers=3, heads=2, ffn=96, image=140, patch=14),
    seed=41,
)
