"""SmolVLM (2504.05299) and Idefics3 (2408.12637): a SigLIP tower over square tiles, pixel shuffle, a Llama decoder.

The two share every layer. Here they differ in what matters to a cut: SmolVLM's tiles are whole patches, and its file
says how long the longest edge is; those of Idefics3 leave a strip of pixels over, and its file says nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from tests.zoo.hf import HfReference, per_token
from tests.zoo.row import RGB, Drawing, Grid, Row, Spelling, standard_cases
from tests.zoo.siglip import SiglipConfig, siglip_weights, write_siglip
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import MERGES, Tokenizer
from tests.zoo.weights import Float32, Weights

__all__ = ["IDEFICS3", "ROW"]

TOWER, CONNECTOR = "model.vision_model", "model.connector.modality_projection.proj.weight"
FAKE, GLOBAL = "<fake_token_around_image>", "<global-img>"
EDGE = 4
"""Tiles along the longest edge."""

TOKENIZER = Tokenizer(
    pre="smollm",
    controls=(
        "<|endoftext|>",
        "<|im_start|>",
        "<end_of_utterance>",
        "<image>",
        FAKE,
        GLOBAL,
        *(f"<row_{r}_col_{c}>" for r in range(1, EDGE + 1) for c in range(1, EDGE + 1)),
    ),
    bos="",
    eos="<end_of_utterance>",
    template=(
        "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}"
        "{% if message['content'][0]['type'] == 'image' %}{{':'}}{% else %}{{': '}}{% endif %}"
        "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{line['text']}}"
        "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
        "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
    ),
    merges=(*MERGES, ("Ċ", "Ċ")),
)


@dataclass(frozen=True)
class Sizes:
    """A model's sizes. ``said``: the file has the longest edge."""

    text: TextConfig
    vision: SiglipConfig
    merge: int
    said: bool

    @property
    def tokens(self) -> int:
        """Along each side of a tile."""
        return self.vision.side // self.merge


def weights(sizes: Sizes, out: Weights) -> None:
    """The whole model by Hugging Face names, but for the decoder, which is called ``language_model``."""
    v = sizes.vision
    siglip_weights(out, TOWER, v, v.side**2)
    out.matrix(CONNECTOR, sizes.text.hidden, v.hidden * sizes.merge**2)
    text_weights(out, sizes.text)


def write_mmproj(sizes: Sizes, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file as ``conversion/smolvlm.py`` does."""
    values = {"clip.vision.projector.scale_factor": sizes.merge}
    if sizes.said:
        values["clip.vision.preproc_image_size"] = EDGE * sizes.vision.image
    write_siglip(
        path,
        "idefics3",
        sizes.vision,
        TOWER,
        tensors,
        width=sizes.text.hidden,
        values=values,
        names={"mm.model.fc.weight": CONNECTOR},
    )


def grid(width: int, height: int, tile: int) -> tuple[int, int]:
    """(rows, columns) of tiles: the longest edge becomes EDGE of them, the other one keeps the aspect and is rounded
    up."""
    long = EDGE * tile
    other = math.ceil(int(long / (max(width, height) / min(width, height))) / tile) or 1
    return (other, EDGE) if width >= height else (EDGE, other)


def spell(sizes: Sizes, width: int, height: int) -> Spelling:
    """As ``processing_smolvlm.py`` writes a picture; one text between two grids."""
    tokens, (rows, columns) = Grid(sizes.tokens, sizes.tokens), grid(width, height, sizes.vision.image)
    parts: list[str | Grid] = []
    for r in range(rows):
        for c in range(columns):
            parts += [("\n" if r and not c else "") + f"{FAKE}<row_{r + 1}_col_{c + 1}>", tokens]
    return (*parts, f"\n\n{FAKE}{GLOBAL}", tokens, FAKE)


class SmolVlmReference(HfReference):
    """The model in transformers."""

    def __init__(self, family: str, sizes: Sizes, tensors: Mapping[str, Float32]) -> None:
        import transformers

        self._sizes = sizes
        config = getattr(transformers, f"{family}Config")(
            vision_config=sizes.vision.hf(),
            text_config={"model_type": "llama", **sizes.text.hf(), "pad_token_id": 0},
            scale_factor=sizes.merge,
            image_token_id=TOKENIZER.id("<image>"),
            attn_implementation="eager",
        )
        model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
        named = {k.replace("language_model", "text_model"): t for k, t in tensors.items()}
        super().__init__(model, named, model.model.text_model)
        tile = sizes.vision.image
        self._processor = getattr(transformers, f"{family}ImageProcessorPil")(
            size={"longest_edge": EDGE * tile}, max_image_size={"longest_edge": tile}
        )

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received: mean over a tile's queries and heads, summed over the patches of a token."""
        cut = self._processor(image, return_row_col_info=True, return_tensors="pt")
        height, width = image.shape[:2]
        if (cut["rows"][0][0], cut["cols"][0][0]) != grid(width, height, self._sizes.vision.image):
            raise AssertionError(f"{width} x {height}: {cut['rows']} x {cut['cols']} tiles")
        out = self._features(cut["pixel_values"], cut["pixel_attention_mask"], output_attentions=True)
        received = np.stack([a.numpy().mean(axis=(1, 2)) for a in out.attentions])  # (layers, tiles, patches)
        tower = per_token(received, self._sizes.tokens, self._sizes.merge)
        return out.pooler_output[0].numpy(), tower.reshape(len(tower), -1)


CASES = standard_cases(
    "<|im_start|>User:",
    "<end_of_utterance>\nAssistant:",
    (
        (Drawing(190, 100, 10, 31), tuple(range(1, 52, 5))),
        (Drawing(60, 201, 7, 32), (0, 4, 6, 17, 35)),
        (Drawing(301, 40, 1, 33), (3, 8, 18)),
        (Drawing(56, 13, 4, 34), (4, 5, 17, 18)),
    ),
    blank=" ",
)


def make_row(name: str, family: str, sizes: Sizes, seed: int) -> Row:
    """``family``: how transformers' classes begin."""
    return Row(
        name=name,
        text=sizes.text,
        tokenizer=TOKENIZER,
        spell=partial(spell, sizes),
        tower_layers=sizes.vision.layers,
        repairs=(),
        cases=CASES,
        seed=seed,
        fill=partial(weights, sizes),
        write_mmproj=partial(write_mmproj, sizes),
        reference=partial(SmolVlmReference, family, sizes),
    )


TEXT = TextConfig("llama", vocab=len(TOKENIZER.tokens), rope_theta=1e5, eps=1e-5)
ROW = make_row(
    "smolvlm",
    "SmolVLM",
    Sizes(TEXT, SiglipConfig(hidden=64, layers=3, heads=2, ffn=96, image=56, patch=14), merge=2, said=True),
    seed=33,
)
IDEFICS3 = make_row(
    "idefics3",
    "Idefics3",
    Sizes(TEXT, SiglipConfig(hidden=64, layers=2, heads=2, ffn=96, image=52, patch=8), merge=3, said=False),
    seed=32,
)
