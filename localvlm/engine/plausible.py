"""Values of GGUF headers that would end llama.cpp: refused here, with the key or tensor that is wrong.

llama.cpp checks language models well and projectors hardly: a wrong type or shape in one is a failed assertion, or a
read beyond the end of memory. Shapes are checked for known families alone, so that no sound file is refused.
"""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import NoReturn

from localvlm.engine.gguf_header import Header, TensorInfo, read_header, shown, strings_of
from localvlm.errors import NotGguf

__all__ = ["check_model", "check_projector", "read_projector"]

MAX_LAYERS = 512
MAX_WIDTH = 1 << 18
_U32, _F32, _BOOL, _STRING = 4, 6, 7, 8
_TYPES = {
    "general.name": _STRING,
    "general.description": _STRING,
    "clip.projector_type": _STRING,
    "clip.vision.projector_type": _STRING,
    "clip.vision.mm_patch_merge_type": _STRING,
    "clip.has_vision_encoder": _BOOL,
    "clip.has_audio_encoder": _BOOL,
    "clip.use_gelu": _BOOL,
    "clip.use_silu": _BOOL,
    "clip.vision.attention.layer_norm_epsilon": _F32,
    "clip.vision.attention.head_count": _U32,
    "clip.vision.attention.head_count_kv": _U32,
    "clip.vision.attention.head_dim": _U32,
    "clip.vision.block_count": _U32,
    "clip.vision.embedding_length": _U32,
    "clip.vision.feed_forward_length": _U32,
    "clip.vision.image_size": _U32,
    "clip.vision.image_min_pixels": _U32,
    "clip.vision.image_max_pixels": _U32,
    "clip.vision.n_wa_pattern": _U32,
    "clip.vision.patch_size": _U32,
    "clip.vision.preproc_image_size": _U32,
    "clip.vision.preproc_max_tiles": _U32,
    "clip.vision.preproc_min_tiles": _U32,
    "clip.vision.projection_dim": _U32,
    "clip.vision.projector.scale_factor": _U32,
    "clip.vision.spatial_merge_size": _U32,
    "clip.vision.window_size": _U32,
}
"""What llama.cpp's projector loader (``tools/mtmd/clip.cpp``) reads each key as; another type aborts it."""
_LISTS = ("clip.vision.feature_layer", "clip.vision.image_grid_pinpoints", "clip.vision.wa_layer_indexes")
"""Arrays that it reads as integers, whatever they are."""
_VISION = "clip.vision"
_PLAIN = (0, 1, 30)
"""F32, F16, BF16."""
_BLOCK = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_out", "ln1", "ln2", "ffn_up", "ffn_gate", "ffn_down")
"""Tensors of a tower's block: every block has one, or none has."""


_LLAVA = ("llava", "llava-next")
_TURNED = ("qwen2vl", "qwen2.5vl", "qwen3vl")
"""Families whose towers turn queries and keys by row and column, in quarters of a head."""


class _Check:
    """Refuses values of one header."""

    def __init__(self, header: Header) -> None:
        self.header = header

    def fail(self, what: str) -> NoReturn:
        raise NotGguf(f"'{self.header.path.name}' is damaged: {shown(what, 400)}", "download it again")

    def between(self, key: str, low: int, high: int, *, required: bool = True) -> int:
        """The integer under ``key``, or 0 where it is absent and not required."""
        value = self.header.values.get(key)
        if value is None and not required:
            return 0
        if isinstance(value, tuple) and value:
            value = max(value)  # one a layer
        if not isinstance(value, int) or not low <= value <= high:
            self.fail(f"'{key}' is {str(value)[:40]}, not {low} to {high}")
        return value

    def integers(self, key: str) -> tuple[int, ...]:
        """The array of integers under ``key``; empty where it is absent."""
        value = self.header.values.get(key)
        if isinstance(value, tuple) and any(isinstance(v, float) for v in value):
            self.fail(f"'{key}' is {str(list(value[:4]))[:40]}, which are no integers")
        return self.header.integers(key)

    def epsilon(self, key: str) -> None:
        value = self.header.values.get(key)
        if isinstance(value, float) and not (math.isfinite(value) and 0 <= value < 1):
            self.fail(f"'{key}' is {value}, not 0 to 1")

    def heads(self, prefix: str) -> int:
        """Width of a head, or 0 where it is said apart or differs by layer."""
        width = self.between(f"{prefix}.embedding_length", 1, MAX_WIDTH)
        count = self.between(f"{prefix}.attention.head_count", 1, width)
        if isinstance(self.header.values[f"{prefix}.attention.head_count"], tuple):
            return 0
        if any(f"{prefix}.attention.{k}" in self.header.values for k in ("head_dim", "key_length")):
            return 0
        if width % count:
            self.fail(f"'{prefix}.embedding_length' is {width}, which its {count} heads do not divide")
        return width // count

    def shape(self, name: str, *want: int) -> None:
        tensor = self.header.tensors.get(name)
        if tensor is not None and tensor.shape != want:
            self.fail(f"tensor '{name}' has shape {list(tensor.shape)}, not {list(want)}")

    def matrix(self, name: str, fan_in: int, required: bool = True) -> int:
        """Output width of the matrix ``name``.weight; its bias must fit."""
        weight = self.header.tensors.get(f"{name}.weight")
        if weight is None:
            if required:
                self.fail(f"tensor '{name}.weight' is missing")
            return 0
        if len(weight.shape) != 2 or (fan_in and weight.shape[0] != fan_in):
            self.fail(f"tensor '{name}.weight' has shape {list(weight.shape)}, not [{fan_in}, ...]")
        self.shape(f"{name}.bias", weight.shape[1])
        return weight.shape[1]


def check_model(model: Header) -> None:
    """Refuses a language model that would end llama.cpp.

    Raises:
        NotGguf: damaged; the message names the key.
    """
    check, prefix = _Check(model), model.architecture
    check.between(f"{prefix}.block_count", 1, MAX_LAYERS)
    head = check.heads(prefix)
    rotated = check.between(f"{prefix}.rope.dimension_count", 1, MAX_WIDTH, required=False)
    exact = prefix in ("llama", "qwen2", "qwen2vl")
    if head and (rotated > head or (exact and rotated not in (0, head))):
        check.fail(f"'{prefix}.rope.dimension_count' is {rotated} and a head has {head}")
    for name in ("layer_norm_rms_epsilon", "layer_norm_epsilon"):
        check.epsilon(f"{prefix}.attention.{name}")
    tokens = "tokenizer.ggml"
    if model.text(f"{tokens}.model") == "llama" and f"{tokens}.scores" not in model.array_lengths:
        check.fail(f"'{tokens}.model' is 'llama' and '{tokens}.scores' is missing")
    sections = check.integers(f"{prefix}.rope.dimension_sections")
    if sections and not (min(sections) >= 0 < max(sections[:3])):
        check.fail(f"'{prefix}.rope.dimension_sections' is {list(sections)[:4]}, which turns nothing")
    _check_tokens(check, f"{tokens}.tokens")


def _check_tokens(check: _Check, key: str) -> None:
    """llama.cpp ends where two tokens are spelled alike; empty ones it tells apart by itself."""
    if key not in check.header.string_places:
        return
    found = [token for token in strings_of(check.header, key) if token]
    if len(set(found)) < len(found):
        token = next(t for t, count in Counter(found).items() if count > 1)
        check.fail(f"two tokens of '{key}' are {token[:40].decode('utf-8', 'replace')!r}")


def read_projector(path: Path) -> Header:
    """The header of a projector by whose sizes a family can cut pictures. A file in the wrong role, or for sound alone,
    is left to :func:`localvlm.engine.gguf_header.check_pair`.

    Raises:
        ModelNotFound, NotGguf: see :func:`localvlm.engine.gguf_header.read_header`; or its sizes make no sense.
    """
    header = read_header(path)
    if header.is_projector and header.values.get("clip.has_vision_encoder", False):
        _check_sizes(_Check(header))
    return header


def _check_sizes(check: _Check) -> None:
    """Types of keys, and what families calculate with."""
    types = check.header.types
    for key, kind in _TYPES.items():
        if types.get(key, kind) != kind:
            check.fail(f"'{key}' has type {types[key]}, not {kind}")
    for key in _LISTS:
        check.integers(key)
    check.between(f"{_VISION}.embedding_length", 1, MAX_WIDTH)
    check.between(f"{_VISION}.block_count", 1, MAX_LAYERS)
    check.between(f"{_VISION}.image_size", 1, 1 << 14)
    check.between(f"{_VISION}.patch_size", 1, 1 << 10)
    check.between(f"{_VISION}.spatial_merge_size", 1, 16, required=False)
    check.between(f"{_VISION}.projector.scale_factor", 1, 64, required=False)


def check_projector(mmproj: Header) -> None:
    """Refuses a projector that would end llama.cpp, as far as its header tells.

    Raises:
        NotGguf: damaged; the message names the key or the tensor.
    """
    from localvlm.engine.families import describe

    check, vision = _Check(mmproj), _VISION
    _check_sizes(check)
    width, blocks = mmproj.integer(f"{vision}.embedding_length"), mmproj.integer(f"{vision}.block_count")
    size, patch = mmproj.integer(f"{vision}.image_size"), mmproj.integer(f"{vision}.patch_size")
    check.epsilon(f"{vision}.attention.layer_norm_epsilon")
    head = check.heads(vision)
    family = describe(mmproj)
    tower = family.tower
    if family.name == "unknown":
        return
    _check_blocks(check, blocks, width)
    embedder = mmproj.tensors.get("v.patch_embd.weight")
    if embedder is None or embedder.shape != (patch, patch, 3, width):
        check.fail(f"'v.patch_embd.weight' has shape {list(embedder.shape) if embedder else None}, not that of a patch")
    if family.name in _LLAVA:
        _check_llava(check, width, (size // patch) ** 2 + tower.cls)
    if family.name in _TURNED:
        _check_turned(check, vision, head)
    if family.name in (*_LLAVA, *_TURNED):
        layers = len(mmproj.integers(f"{vision}.feature_layer")) or 1  # side by side
        wide = check.matrix("mm.0", width * tower.merge**2 * layers)
        out = check.matrix("mm.2", wide, required="mm.3.weight" not in mmproj.tensors)  # Yi-VL has norms between
        if family.row_end:
            check.shape(family.row_end, out)
    if family.name == "qwen2.5vl":
        check.between(f"{vision}.n_wa_pattern", 2, blocks)
        out = mmproj.tensors["mm.2.weight"].shape[1]
        check.between(f"{vision}.projection_dim", out, out)
    elif family.name == "qwen3vl":
        _check_qwen3(check, blocks, width)


def _check_llava(check: _Check, width: int, places: int) -> None:
    """CLIP's table of ``places``, and biases that its graph adds without asking."""
    tensors = check.header.tensors
    check.shape("v.position_embd.weight", width, places)
    for name in ("v.class_embd", "v.pre_ln.weight", "v.pre_ln.bias"):
        check.shape(name, width)
    needed = [f"{layer}.bias" for layer in ("mm.0", "mm.2") if f"{layer}.weight" in tensors]
    if missing := [name for name in ("v.position_embd.weight", *needed) if name not in tensors]:
        check.fail(f"tensor '{missing[0]}' is missing")


def _check_turned(check: _Check, vision: str, head: int) -> None:
    """Numbers of a ``head`` in quarters; and a second embedding of patches, for the second frame, like the first."""
    if head % 4:
        check.fail(f"'{vision}.attention.head_count' leaves {head} numbers a head, which cannot be turned by y and x")
    first, second = (check.header.tensors.get(f"v.patch_embd.weight{n}") for n in ("", ".1"))
    if first is None or second is None or first.shape != second.shape:
        check.fail("tensor 'v.patch_embd.weight.1' is missing, or of another shape than 'v.patch_embd.weight'")


def _check_qwen3(check: _Check, blocks: int, width: int) -> None:
    """A square table of position embeddings, and deepstack's mergers."""
    table = check.header.tensors.get("v.position_embd.weight")
    if table is None or len(table.shape) != 2 or table.shape != (width, math.isqrt(table.shape[1]) ** 2):
        check.fail(f"'v.position_embd.weight' has shape {list(table.shape) if table else None}, not that of a square")
    if "v.patch_embd.bias" not in check.header.tensors:
        check.fail("tensor 'v.patch_embd.bias' is missing")
    check.shape("v.patch_embd.bias", width)
    for place in (f"v.deepstack.{i}" for i in range(blocks)):
        if f"{place}.fc1.weight" in check.header.tensors:
            check.shape(f"{place}.norm.weight", 4 * width)
            check.shape(f"{place}.norm.bias", 4 * width)
            check.matrix(f"{place}.fc2", check.matrix(f"{place}.fc1", 4 * width))


def _check_blocks(check: _Check, blocks: int, width: int) -> None:
    """Every block of the tower has the tensors, and the shapes, of the others."""
    tensors = check.header.tensors
    for tensor in tensors.values():
        if len(tensor.shape) == 1 and tensor.type not in _PLAIN:
            check.fail(f"tensor '{tensor.name}' is a vector of type {tensor.type}, which nothing can add")
    for name in (f"{part}.{kind}" for part in _BLOCK for kind in ("weight", "bias")):
        found: dict[int, TensorInfo] = {i: t for i in range(blocks) if (t := tensors.get(f"v.blk.{i}.{name}"))}
        if found and len(found) < blocks:
            missing = next(i for i in range(blocks) if i not in found)
            check.fail(f"tensor 'v.blk.{missing}.{name}' is missing")
    for i in range(blocks):
        for part in _BLOCK:
            place = f"v.blk.{i}.{part}"
            if part.startswith("ln"):
                check.shape(f"{place}.weight", width)
                check.shape(f"{place}.bias", width)
            elif part.startswith("attn"):
                check.matrix(place, width, required=False)
            elif check.matrix(place, 0, required=False):
                if width not in tensors[f"{place}.weight"].shape:
                    check.fail(f"tensor '{place}.weight' has shape {list(tensors[f'{place}.weight'].shape)}")
                if tensors[f"{place}.weight"].shape != tensors[f"v.blk.0.{part}.weight"].shape:
                    check.fail(f"tensor '{place}.weight' differs in shape from the first block's")
