"""What Qwen2-VL, Qwen2.5-VL and Qwen3-VL have in common: a tower for pictures of any size, a 2x2 merger, M-RoPE.

Names and layouts of the projector file are those of ``conversion/qwenvl.py`` and ``qwen3vl.py``: the 3-D patch
convolution becomes two 2-D ones, which llama.cpp adds for a still picture. Every tensor is F32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.hf import HfReference
from tests.zoo.mmproj import Values, write_projector
from tests.zoo.row import RGB, Case, Drawing, Grid, Int32, Row, Spelling, standard_cases
from tests.zoo.text import TextConfig, text_weights
from tests.zoo.tokenizer import MERGES, Tokenizer
from tests.zoo.weights import SHARP, Float32, Weights

__all__ = ["EPS", "MERGE", "TOKENIZER", "VOCAB", "VisionConfig", "make_cases", "make_row"]

TOWER = "model.visual"
MERGE = 2
EPS = 1e-6
"""transformers fixes it in the tower; llama.cpp reads it from the file."""
MOST = 1024
"""The engine's bound on the tokens of a picture; the published one is 16384."""

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
VOCAB = 256 + len(MERGES) + len(TOKENIZER.controls)


def token_ids() -> dict[str, int]:
    """Arguments of the Hugging Face configuration."""
    names = {"image": "image_pad", "video": "video_pad", "vision_start": "vision_start", "vision_end": "vision_end"}
    return {f"{hf}_token_id": TOKENIZER.id(f"<|{name}|>") for hf, name in names.items()}


@dataclass(frozen=True)
class VisionConfig:
    """A tower.

    Attributes:
        projector: llama.cpp's name of the family.
        mlp: transformers' names of a block's matrices -> llama.cpp's.
        merger: transformers' names of the merger's norm and its two matrices.
        grids: (width, height) of the cases' pictures -> rows and columns of tokens, checked against transformers'
            processor where the expected values are made.
        values: more keys of the projector file; ``gelu`` is said apart.
        hf: more arguments of the Hugging Face configuration.
        mean, std: of the pixels, each channel.
        norm_bias: LayerNorm, and not RMSNorm.
        split: qkv is split in the projector file.
        least: fewest tokens of a picture.
        window: pixels along a window; 0: all blocks attend to the whole picture.
        side: patches along a side of the table of position embeddings; 0: none, and no bias of patches either.
        deepstack: blocks whose outputs go into the decoder's first layers.
    """

    projector: str
    mlp: Mapping[str, str]
    merger: tuple[str, str, str]
    grids: Mapping[tuple[int, int], tuple[int, int]]
    hidden: int = 64
    layers: int = 4
    heads: int = 2
    ffn: int = 96
    patch: int = 14
    values: Values = field(default_factory=dict)
    hf: Mapping[str, Any] = field(default_factory=dict)
    gelu: bool = False
    eps: float = EPS
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    norm_bias: bool = True
    split: bool = True
    least: int = 4
    window: int = 0
    side: int = 0
    deepstack: tuple[int, ...] = ()

    @property
    def image(self) -> int:
        """What the projector file says, 560 where nothing depends on it."""
        return self.side * self.patch or 560

    @property
    def cell(self) -> int:
        """Pixels along a token."""
        return self.patch * MERGE

    @property
    def blocks(self) -> dict[str, str]:
        """transformers' names of a block's parts -> llama.cpp's."""
        return {"norm1": "ln1", "norm2": "ln2", "attn.qkv": "attn_qkv", "attn.proj": "attn_out", **self.mlp}

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Rows and columns of a picture's tokens."""
        return self.grids.get((width, height), (height // self.cell, width // self.cell))


def _merger(out: Weights, parts: tuple[str, str, str], norm: int, merged: int, width: int, bias: bool) -> None:
    out.norm(f"{TOWER}.{parts[0]}", norm, bias=bias)
    out.linear(f"{TOWER}.{parts[1]}", merged, merged, bias=True)
    out.linear(f"{TOWER}.{parts[2]}", width, merged, bias=True)


def _deeper(vision: VisionConfig, i: int) -> tuple[str, str, str]:
    """Names of the merger of the i-th deepstack features."""
    norm, first, second = (name.replace("merger", f"deepstack_merger_list.{i}") for name in vision.merger)
    return norm, first, second


def weights(text: TextConfig, vision: VisionConfig, out: Weights) -> None:
    """The whole model by Hugging Face names."""
    v = vision
    out.matrix(f"{TOWER}.patch_embed.proj.weight", v.hidden, 3, 2, v.patch, v.patch, gain=2.0)
    if v.side:
        out.bias(f"{TOWER}.patch_embed.proj.bias", v.hidden)
        out.normal(f"{TOWER}.pos_embed.weight", v.side**2, v.hidden, std=1.0)
    for i in range(v.layers):
        for hf, ours in v.blocks.items():
            name = f"{TOWER}.blocks.{i}.{hf}"
            if ours.startswith("ln"):
                out.norm(name, v.hidden, bias=v.norm_bias)
            elif ours == "attn_qkv":
                out.linear(name, 3 * v.hidden, v.hidden, bias=True)
                out.tensors[f"{name}.weight"][: 2 * v.hidden] *= np.float32(SHARP)
            else:
                wide = {"ffn_up": (v.ffn, v.hidden), "ffn_gate": (v.ffn, v.hidden), "ffn_down": (v.hidden, v.ffn)}
                out.linear(name, *wide.get(ours, (v.hidden, v.hidden)), bias=True)
    merged = v.hidden * MERGE**2
    _merger(out, v.merger, v.hidden, merged, text.hidden, v.norm_bias)
    for i in range(len(v.deepstack)):
        _merger(out, _deeper(v, i), merged, merged, text.hidden, v.norm_bias)
    text_weights(out, text)


def _mmproj_tensors(vision: VisionConfig, tensors: Mapping[str, Float32]) -> dict[str, Float32]:
    """The projector file's tensors by llama.cpp names."""
    v = vision
    names = {"patch_embed.proj": "v.patch_embd", "pos_embed": "v.position_embd"}
    names |= dict(zip(v.merger, ("v.post_ln", "mm.0", "mm.2"), strict=True))
    for i in range(v.layers):
        names |= {f"blocks.{i}.{hf}": f"v.blk.{i}.{ours}" for hf, ours in v.blocks.items()}
    for i, block in enumerate(v.deepstack):
        ours = (f"v.deepstack.{block}.{part}" for part in ("norm", "fc1", "fc2"))
        names |= dict(zip(_deeper(v, i), ours, strict=True))
    out: dict[str, Float32] = {}
    for hf, name in names.items():
        for kind in ("weight", "bias"):
            tensor = tensors.get(f"{TOWER}.{hf}.{kind}")
            if tensor is None:
                continue
            if v.split and name.endswith("attn_qkv"):
                for letter, part in zip("qkv", np.split(tensor, 3), strict=True):
                    out[f"{name.replace('qkv', letter)}.{kind}"] = part
            elif tensor.ndim == 5:  # (hidden, 3, frames, patch, patch)
                out[f"{name}.weight"], out[f"{name}.weight.1"] = tensor[:, :, 0], tensor[:, :, 1]
            else:
                out[f"{name}.{kind}"] = tensor
    return out


def write_mmproj(text: TextConfig, vision: VisionConfig, path: Path, tensors: Mapping[str, Float32]) -> None:
    """Writes the projector file."""
    v, values = vision, dict(vision.values)
    if v.deepstack:
        values["clip.vision.is_deepstack_layers"] = [i in v.deepstack for i in range(v.layers)]
    ours = _mmproj_tensors(v, tensors)
    write_projector(path, v.projector, v, ours, width=text.hidden, mean=v.mean, std=v.std, values=values, gelu=v.gelu)


class QwenReference(HfReference):
    """The model in transformers."""

    def __init__(self, family: str, text: TextConfig, vision: VisionConfig, tensors: Mapping[str, Float32]) -> None:
        import transformers
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        v = self._vision = vision
        tower = {
            "depth": v.layers,
            "hidden_size": v.hidden,
            "intermediate_size": v.ffn,
            "num_heads": v.heads,
            "out_hidden_size": text.hidden,
            "patch_size": v.patch,
            **v.hf,
        }
        config = getattr(transformers, f"{family}Config")(
            vision_config=tower, text_config=text.hf(), attn_implementation="eager", **token_ids()
        )
        super().__init__(getattr(transformers, f"{family}ForConditionalGeneration")(config), tensors)
        self._processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch,
            merge_size=MERGE,
            image_mean=list(vision.mean),
            image_std=list(vision.std),
            size={"shortest_edge": vision.least * vision.cell**2, "longest_edge": MOST * vision.cell**2},
        )

    def encode(self, image: RGB) -> tuple[Float32, Float32]:
        """Attention received: mean over queries and heads, summed over the 2x2 patches of a token, tokens in raster
        order."""
        from PIL import Image

        from tests.zoo.reference import recorded_attention

        visual, v = self._model.model.visual, self._vision
        batch = self._processor(images=Image.fromarray(image), return_tensors="pt")
        thw = batch["image_grid_thw"]
        grid = (int(thw[0, 1]) // MERGE, int(thw[0, 2]) // MERGE)
        assert grid == v.grid(image.shape[1], image.shape[0]), f"transformers has {grid} for {image.shape}"
        with self._torch.no_grad(), recorded_attention(visual) as layers:
            out = visual(batch["pixel_values"], grid_thw=thw)
        rows = self._torch.cat([out.pooler_output, *(out.deepstack_features if v.deepstack else ())], dim=1)
        received = np.stack([np.concatenate([a.mean(axis=0).sum(axis=0) for a in chunks]) for chunks in layers])
        per_token = (received / received.shape[1]).reshape(len(layers), -1, MERGE**2).sum(axis=2)
        tower = np.empty_like(per_token)
        tower[:, self._order(thw)] = per_token
        return rows.numpy(), tower

    def _order(self, thw: Any) -> Int32:
        """(n_tokens,) where in the raster each token of the tower is."""
        from transformers.vision_utils import get_vision_window_index

        if not self._vision.window:
            return np.arange(int(thw.prod()) // MERGE**2, dtype=np.int32)
        v = self._vision
        order, _ = get_vision_window_index(thw, spatial_merge_size=MERGE, window_size=v.window, patch_size=v.patch)
        return order.numpy().astype(np.int32)


START, ASK = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"


def make_cases(*pictures: tuple[Drawing, tuple[int, ...]]) -> tuple[Case, ...]:
    """Cases of four pictures and the tokens kept of each; any more are asked about together."""
    some = standard_cases(START, ASK, pictures)
    if len(pictures) == 4:
        return some
    drawings, keeps = zip(*pictures[4:], strict=True)
    between = [part for i in range(len(drawings)) for part in (f"{i}: ", i)]
    return (*some, Case("shapes", (START, *between, f"which is the red one?{ASK}"), drawings, (71,), keeps))


def _spell(vision: VisionConfig, width: int, height: int) -> Spelling:
    return ("<|vision_start|>", Grid(*vision.grid(width, height)), "<|vision_end|>")


def make_row(name: str, text: TextConfig, vision: VisionConfig, family: str, seed: int, cases: tuple[Case, ...]) -> Row:
    """A model of the given sizes; ``family``: how transformers' classes begin."""
    return Row(
        name=name,
        text=text,
        tokenizer=TOKENIZER,
        spell=partial(_spell, vision),
        tower_layers=vision.layers,
        repairs=(),
        cases=cases,
        seed=seed,
        fill=partial(weights, text, vision),
        write_mmproj=partial(write_mmproj, text, vision),
        reference=partial(QwenReference, family, text, vision),
    )
