"""InternVL 2.5 and 3 (2412.05271, 2504.10479): a ViT with CLS and layer scale, pixel shuffle, a Qwen2 decoder.

Names and layouts of the projector file are those of ``conversion/internvl.py``. The tower is the 300M one: llama.cpp
takes only a file of 45 blocks and a width of 3200 for the 6B one, which has RMS norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from tests.zoo.hf import HfReference, per_token
from tests.zoo.mmproj import VitSizes, write_projector
from tests.zoo.row import RGB, Drawing, Grid, Row, Spelling, standard_cases
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import Tokenizer
from tests.zoo.weights import Float32, Weights

__all__ = ["ROW"]

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
TOWER, PROJECTOR = "model.vision_tower", "model.multi_modal_projector"
MERGE, MOST = 2, 12

TOKENIZER = Tokenizer(
    pre="qwen2",
    controls=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>"),
    bos="",
    eos="<|im_end|>",
    template=(
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for c in m.content %}{% if c.type == 'image' %}{{ '<IMG_CONTEXT>\n' }}{% else %}{{ c.text }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
)


def weights(text: TextConfig, vision: VitSizes, out: Weights) -> None:
    """The whole model by Hugging Face names (``InternVLForConditionalGeneration``)."""
    v = vision
    out.normal(f"{TOWER}.embeddings.cls_token", 1, 1, v.hidden, std=1.0)
    out.normal(f"{TOWER}.embeddings.position_embeddings", 1, v.side**2 + 1, v.hidden, std=1.0)
    out.matrix(f"{TOWER}.embeddings.patch_embeddings.projection.weight", v.hidden, 3, v.patch, v.patch, gain=2.0)
    out.bias(f"{TOWER}.embeddings.patch_embeddings.projection.bias", v.hidden)
    for i in range(v.layers):
        layer = f"{TOWER}.encoder.layer.{i}"
        out.attention(f"{layer}.attention", v.hidden, out="projection_layer")
        for name in ("layernorm_before", "layernorm_after"):
            out.norm(f"{layer}.{name}", v.hidden, bias=True)
        for name in ("lambda_1", "lambda_2"):
            out.normal(f"{layer}.{name}", v.hidden, std=0.2, mean=0.7)
        out.linear(f"{layer}.mlp.fc1", v.ffn, v.hidden, bias=True)
        out.linear(f"{layer}.mlp.fc2", v.hidden, v.ffn, bias=True)
    out.norm(f"{PROJECTOR}.layer_norm", v.hidden * MERGE**2, bias=True)
    out.linear(f"{PROJECTOR}.linear_1", text.hidden, v.hidden * MERGE**2, bias=True)
    out.linear(f"{PROJECTOR}.linear_2", text.hidden, text.hidden, bias=True)
    text_weights(out, text)


NAMES = {
    f"{TOWER}.embeddings.patch_embeddings.projection": "v.patch_embd",
    f"{PROJECTOR}.layer_norm": "mm.model.mlp.0",
    f"{PROJECTOR}.linear_1": "mm.model.mlp.1",
    f"{PROJECTOR}.linear_2": "mm.model.mlp.3",
}
BLOCK_NAMES = {
    "attention.q_proj": "attn_q",
    "attention.k_proj": "attn_k",
    "attention.v_proj": "attn_v",
    "attention.projection_layer": "attn_out",
    "layernorm_before": "ln1",
    "layernorm_after": "ln2",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


def write_mmproj(text: TextConfig, vision: VitSizes, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file."""
    out = {
        "v.class_embd": tensors[f"{TOWER}.embeddings.cls_token"],
        "v.position_embd.weight": tensors[f"{TOWER}.embeddings.position_embeddings"],
    }
    names = dict(NAMES)
    for i in range(vision.layers):
        layer = f"{TOWER}.encoder.layer.{i}"
        names |= {f"{layer}.{hf}": f"v.blk.{i}.{ours}" for hf, ours in BLOCK_NAMES.items()}
        out |= {f"v.blk.{i}.ls{k}.weight": tensors[f"{layer}.lambda_{k}"] for k in (1, 2)}
    out |= {f"{ours}.{kind}": tensors[f"{hf}.{kind}"] for hf, ours in names.items() for kind in ("weight", "bias")}
    values = {
        "clip.vision.projector.scale_factor": MERGE,
        "clip.vision.preproc_min_tiles": 1,
        "clip.vision.preproc_max_tiles": MOST,
    }
    write_projector(path, "internvl", vision, out, width=text.hidden, mean=MEAN, std=STD, values=values)


class InternVlReference(HfReference):
    """The model in transformers."""

    def __init__(self, text: TextConfig, vision: VitSizes, tensors: Mapping[str, Float32]) -> None:
        from transformers import GotOcr2ImageProcessorPil, InternVLConfig, InternVLForConditionalGeneration

        self._vision = vision
        config = InternVLConfig(
            vision_config={**vision.hf(), "attention_bias": True},
            text_config={"model_type": "qwen2", **text.hf()},
            image_token_id=TOKENIZER.id("<IMG_CONTEXT>"),
            image_seq_length=(vision.side // MERGE) ** 2,
            tie_word_embeddings=False,
            attn_implementation="eager",
        )
        super().__init__(InternVLForConditionalGeneration(config), tensors)
        size = {"height": vision.image, "width": vision.image}
        self._processor = GotOcr2ImageProcessorPil(
            size=size, image_mean=MEAN, image_std=STD, crop_to_patches=True, max_patches=MOST
        )

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """CLS attention, head means, summed over the patches of a token; all tiles' rows one after another."""
        pixels = self._processor(image, return_tensors="pt")["pixel_values"]
        tiles = n_tiles(image.shape[1], image.shape[0], self._vision.image)
        if len(pixels) != tiles + (tiles > 1):
            raise AssertionError(f"{image.shape[1]} x {image.shape[0]}: {len(pixels)} tiles")
        out = self._features(pixels, output_attentions=True)
        cls = np.stack([a.numpy()[:, :, 0, 1:].mean(axis=1) for a in out.attentions])  # (layers, tiles, patches)
        tower = per_token(cls, self._vision.side // MERGE, MERGE)
        return out.pooler_output.flatten(0, 1).numpy(), tower.reshape(len(tower), -1)

    def encode_stock(self, image: RGB) -> Float32:
        """llama.cpp appends CLS after the N patches but adds position rows in file order: patch i gets row i, CLS row
        N."""
        table = self._model.model.vision_tower.embeddings.position_embeddings
        right = table.detach().clone()
        try:
            table.data = right.roll(1, dims=1)
            return self.encode(image)[0]
        finally:
            table.data = right


def n_tiles(width: int, height: int, side: int) -> int:
    """Tiles of a picture without the last one: the nearest aspect; of equals the most that the picture fills by half,
    or else the fewest."""
    grids = [(c, r) for c in range(1, MOST + 1) for r in range(1, MOST + 1) if c * r <= MOST]
    off = {g: abs(Fraction(width, height) - Fraction(*g)) for g in grids}
    nearest = sorted(c * r for c, r in grids if off[c, r] == min(off.values()))
    return max((n for n in nearest if 2 * width * height > n * side**2), default=nearest[0])


def spell(vision: VitSizes, width: int, height: int) -> Spelling:
    """As ``processing_internvl.py`` writes a picture; the tokens of all tiles stand one after another."""
    tiles = n_tiles(width, height, vision.image)
    per_tile = (vision.side // MERGE) ** 2
    return ("<img>", Grid(tiles + 1 if tiles > 1 else 1, per_tile), "</img>")


CASES = standard_cases(
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    (
        (Drawing(190, 100, 10, 41), tuple(range(1, 36, 4))),
        (Drawing(60, 201, 7, 42), (0, 4, 6, 13, 15)),
        (Drawing(50, 57, 1, 43), (1, 2)),
        (Drawing(130, 130, 14, 44), (4, 5, 17, 18, 38)),
    ),
    after="\n",
)
TEXT = TextConfig("qwen2", vocab=len(TOKENIZER.tokens), rope_theta=1e6, eps=1e-6, qkv_bias=True)
VISION = VitSizes(hidden=64, layers=3, heads=2, ffn=96, image=56)
ROW = Row(
    name="internvl",
    text=TEXT,
    tokenizer=TOKENIZER,
    spell=partial(spell, VISION),
    tower_layers=VISION.layers,
    repairs=("internvl-positions",),
    cases=CASES,
    seed=41,
    fill=partial(weights, TEXT, VISION),
    write_mmproj=partial(write_mmproj, TEXT, VISION),
    reference=partial(InternVlReference, TEXT, VISION),
)
