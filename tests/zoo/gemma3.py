"""Gemma 3 (2503.19786): a SigLIP tower, patches averaged to tokens, a decoder with sliding layers in which the tokens
of a picture see each other in both directions.

Three layers: the last sees everything, the others a window that the prompts are longer than.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import numpy as np

from tests.zoo.row import RGB, Case, Drawing, Grid, Int32, Row, filler
from tests.zoo.siglip import SiglipConfig, siglip_weights, write_siglip
from tests.zoo.text import TextConfig, text_weights
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


class GemmaReference:
    """The model in transformers; torch is imported here and nowhere else in this file."""

    def __init__(self, text: TextConfig, vision: SiglipConfig, tensors: Mapping[str, Float32]) -> None:
        import torch
        from transformers import Gemma3Config, Gemma3ForConditionalGeneration
        from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

        from tests.zoo.reference import Decoder

        self._torch, self._side = torch, vision.side // POOL
        config = Gemma3Config(
            vision_config={**vision.hf(), "vision_use_head": False},
            text_config=text.hf(),
            mm_tokens_per_image=self._side**2,
            image_token_index=TOKENIZER.id("<image_soft_token>"),
            boi_token_index=TOKENIZER.id("<start_of_image>"),
            eoi_token_index=TOKENIZER.id("<end_of_image>"),
            attn_implementation="eager",
        )
        self._model = Gemma3ForConditionalGeneration(config).eval()
        named = {k: torch.from_numpy(t) for k, t in tensors.items()}
        named["lm_head.weight"] = named["model.language_model.embed_tokens.weight"]
        self._model.load_state_dict(named, strict=True)
        self._processor = Gemma3ImageProcessorPil(size={"height": vision.image, "width": vision.image})
        self._decoder = Decoder(self._model, window=text.window)

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received: mean over queries and heads, summed over the patches of a token."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"]
        with self._torch.no_grad():
            out = self._model.model.get_image_features(pixels, return_dict=True, output_attentions=True)
        received = np.stack([a[0].numpy().mean(axis=(0, 1)) for a in out.attentions])
        tower = received.reshape(-1, self._side, POOL, self._side, POOL).sum(axis=(2, 4))
        return out.pooler_output[0].numpy(), tower.reshape(len(tower), -1)

    def encode_stock(self, image: RGB) -> Float32:
        return self.encode(image)[0]

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        return self._decoder.decode(ids, rows, positions)


TURN, ASK = f"{START}user\n", f"{END}\n{START}model\n"
CASES = (
    Case(
        "wide",
        (TURN, 0, f"what is the thing in red?{ASK}"),
        (Drawing(190, 100, 10, 41),),
        fed=(83, 266, 7, 201, 40, 99),
        keep=(tuple(range(1, 25, 3)),),
    ),
    Case(
        "two",
        (f"{TURN}look: ", 0, "and then the other: ", 1, f"what differs?{ASK}"),
        (Drawing(60, 201, 7, 42), Drawing(140, 139, 1, 43)),
        fed=(120, 33, 270, 64),
        keep=((0, 4, 6, 17, 24), (3, 8)),
    ),
    Case(
        "long",
        (f"{TURN}{filler(1, 32)}", 0, f"what is where?{ASK}"),
        (Drawing(31, 77, 4, 44),),
        fed=(),
        keep=((4, 5, 17, 18, 23),),
    ),
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
        hidden=96,
        layers=3,
        heads=3,
        kv_heads=1,
        ffn=160,
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
