"""MiniCPM-V 4.6: a SigLIP tower with a merger amid its blocks and one at its end, over the picture and slices of it.

Names and layouts of the projector file are those of ``conversion/minicpm.py``. The published decoder is Qwen3.5; the
one here is a Llama, as the zoo's decoders attend in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tests.zoo.hf import HfReference, per_token
from tests.zoo.row import NUMBER, RGB, Drawing, Grid, Row, Spelling, standard_cases
from tests.zoo.siglip import SiglipConfig, siglip_weights, write_siglip
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import Tokenizer
from tests.zoo.weights import Float32, Weights

__all__ = ["ROW"]

TOWER, INSERTED, FINAL = "model.vision_tower", "model.vision_tower.vit_merger", "model.merger.mlp.0"
TABLE = 70
"""Side of the table of position embeddings, as llama.cpp has it."""
MERGE = 4

TOKENIZER = Tokenizer(
    pre="qwen2",
    controls=(
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<image_id>",
        "</image_id>",
        "<image>",
        "</image>",
        "<slice>",
        "</slice>",
        "<|image_pad|>",
    ),
    bos="",
    eos="<|im_end|>",
    template=(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes. ``inserted``: the block after which the merger stands."""

    text: TextConfig
    vision: SiglipConfig
    inserted: int

    @property
    def cell(self) -> int:
        """Pixels of a token."""
        return self.vision.patch * MERGE


def weights(sizes: Sizes, out: Weights) -> None:
    """The whole model by Hugging Face names (``MiniCPMV4_6ForConditionalGeneration``)."""
    v = sizes.vision
    siglip_weights(out, TOWER, v, TABLE**2)
    four = 4 * v.hidden
    out.attention(f"{INSERTED}.self_attn", v.hidden)
    out.norm(f"{INSERTED}.layer_norm1", v.hidden, bias=True)
    out.norm(f"{INSERTED}.pre_norm", four, bias=True)
    out.linear(f"{INSERTED}.linear_1", 4 * v.ffn, four, bias=True)
    out.linear(f"{INSERTED}.linear_2", v.hidden, 4 * v.ffn, bias=True)
    out.norm(f"{FINAL}.pre_norm", four, bias=True)
    out.linear(f"{FINAL}.linear_1", four, four, bias=True)
    out.linear(f"{FINAL}.linear_2", sizes.text.hidden, four, bias=True)
    text_weights(out, sizes.text)


NAMES = {
    "v.vit_merger.ln1": f"{INSERTED}.layer_norm1",
    "v.vit_merger.attn_q": f"{INSERTED}.self_attn.q_proj",
    "v.vit_merger.attn_k": f"{INSERTED}.self_attn.k_proj",
    "v.vit_merger.attn_v": f"{INSERTED}.self_attn.v_proj",
    "v.vit_merger.attn_out": f"{INSERTED}.self_attn.out_proj",
    "v.vit_merger.ds_ln": f"{INSERTED}.pre_norm",
    "v.vit_merger.ds_ffn_up": f"{INSERTED}.linear_1",
    "v.vit_merger.ds_ffn_down": f"{INSERTED}.linear_2",
    "mm.input_norm": f"{FINAL}.pre_norm",
    "mm.up": f"{FINAL}.linear_1",
    "mm.down": f"{FINAL}.linear_2",
}


def write_mmproj(sizes: Sizes, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file."""
    write_siglip(
        path,
        "minicpmv4_6",
        sizes.vision,
        TOWER,
        tensors,
        width=sizes.text.hidden,
        values={"clip.vision.projector.scale_factor": MERGE, "clip.vision.wa_layer_indexes": [sizes.inserted]},
        names={f"{ours}.{kind}": f"{hf}.{kind}" for ours, hf in NAMES.items() for kind in ("weight", "bias")},
    )


def _tile(sizes: Sizes, width: float, height: float) -> Grid:
    """The tokens of a tile of that aspect: about side^2 pixels."""
    h = int(sizes.vision.image / math.sqrt(width / height))
    w = int(h * (width / height))
    return Grid(max(round(h / sizes.cell), 1), max(round(w / sizes.cell), 1))


def spell(sizes: Sizes, grids: Mapping[tuple[int, int], tuple[int, int]], width: int, height: int) -> Spelling:
    """As ``processing_minicpmv4_6.py`` writes a picture. ``grids``: rows, columns of slices of a picture of that size,
    from its image processor."""
    parts: list[str | Grid] = [f"<image_id>{NUMBER}</image_id><image>", _tile(sizes, width, height)]
    rows, columns = grids.get((width, height), (0, 0))
    before = "</image>"
    for _ in range(rows):
        for c in range(columns):
            tile = _tile(sizes, max(round(width / columns), 1), max(round(height / rows), 1))
            parts += [f"{before}<slice>", tile]
            before = "</slice>\n" if c + 1 == columns else "</slice>"
    return (*parts, before.rstrip())


class MiniCpmReference(HfReference):
    """The model in transformers."""

    def __init__(self, sizes: Sizes, tensors: Mapping[str, Float32]) -> None:
        import transformers

        config = transformers.MiniCPMV4_6Config(
            vision_config={**sizes.vision.hf(), "image_size": TABLE * sizes.vision.patch},
            text_config={"model_type": "llama", **sizes.text.hf()},
            insert_layer_id=sizes.inserted,
            image_size=sizes.vision.image,
            image_token_id=TOKENIZER.id("<|image_pad|>"),
            attn_implementation="eager",
        )
        super().__init__(transformers.MiniCPMV4_6ForConditionalGeneration(config), tensors)
        self._processor = transformers.MiniCPMV4_6ImageProcessorPil(
            scale_resolution=sizes.vision.image, patch_size=sizes.vision.patch
        )
        self._sizes = sizes

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received in the blocks before the merger: mean over a tile's queries and heads, summed over the
        patches of a token."""
        from tests.zoo.reference import recorded_attention

        cut = self._processor(image, return_tensors="pt")
        height, width = image.shape[:2]
        if cut["grids"][0] != list(GRIDS.get((width, height), (0, 0))):
            raise AssertionError(f"{width} x {height}: {cut['grids']} slices")
        with recorded_attention(self._model.model.vision_tower) as layers:
            out = self._features(cut["pixel_values"], cut["target_sizes"])
        tiles = []
        for i, (_, columns) in enumerate(cut["target_sizes"].tolist()):
            received = np.stack([layer[i].mean(axis=(0, 1)) for layer in layers[: self._sizes.inserted + 1]])
            tiles.append(per_token(received, columns // MERGE, MERGE))
        return np.concatenate([rows.numpy() for rows in out.pooler_output]), np.concatenate(tiles, axis=1)


GRIDS = {(190, 100): (2, 3), (120, 141): (2, 2)}
CASES = standard_cases(
    "<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    (
        (Drawing(190, 100, 10, 41), tuple(range(1, 111, 7))),
        (Drawing(120, 141, 7, 42), (0, 4, 6, 17, 35)),
        (Drawing(50, 31, 1, 43), (3, 8, 14)),
        (Drawing(64, 60, 4, 44), (4, 5, 11, 14)),
    ),
)

SIZES = Sizes(
    TextConfig("llama", vocab=len(TOKENIZER.tokens), rope_theta=1e5, eps=1e-5),
    SiglipConfig(hidden=64, layers=4, heads=2, ffn=96, image=64, patch=4),
    inserted=1,
)
ROW = Row(
    name="minicpmv46",
    text=SIZES.text,
    tokenizer=TOKENIZER,
    spell=partial(spell, SIZES, GRIDS),
    tower_layers=SIZES.inserted + 1,
    repairs=(),
    cases=CASES,
    seed=42,
    fill=partial(weights, SIZES),
    write_mmproj=partial(write_mmproj, SIZES),
    reference=partial(MiniCpmReference, SIZES),
)
