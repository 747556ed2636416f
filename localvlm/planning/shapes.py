"""What a VLM computes, counted from the headers of its files: weights by type, patches, tokens, batches."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from localvlm.answers import VlmFiles
from localvlm.engine.families import Block, Family, describe
from localvlm.engine.gguf_header import Header, TensorInfo, parts_of, read_model
from localvlm.engine.plausible import read_projector
from localvlm.engine.price import tile_price
from localvlm.engine.shared_tower import same_tower

__all__ = ["Llm", "Run", "Tower", "View", "VlmShape", "stamp", "takes_any_size", "view_of", "weights_by_type"]

MINOR = 0.05
"""Share of the weights below which a type counts as the commonest one: it is not worth a sample of its own."""
WINDOW = 64
"""Patches of a window of a tower that attends within windows (Qwen2.5-VL: 112 pixels, 8 x 8 patches)."""
MULTIPLE = 256
"""Of the columns of a feed-forward part, to which it is rounded: blocks of weights have as many."""
_CONTROL = re.compile(r"<[^<>]+>|\[[^][]+\]|[^<\[\s]+|\s+")
"""Roughly a token each, of the texts between tiles."""


@dataclass(frozen=True)
class Llm:
    """What a row costs in an LLM.

    Attributes:
        blocks: weights of the matrices that each row meets, all layers together; of experts, those used. By type and
            shape of a layer: "Q4_0 4096 11008 128 32 32" (width, feed-forward, channels of a head, heads, those of
            keys), since wider matrices take another time a weight.
        head: those of the output's matrix, which rows with logits meet; types that no block has count as the commonest.
        width: channels of the queries, all heads together.
    """

    blocks: Mapping[str, float]
    head: Mapping[str, float]
    n_layer: int
    width: int


@dataclass(frozen=True)
class Tower:
    """What a tile costs in a vision tower.

    Attributes:
        patch: weights of the blocks that run, which each patch meets, by type.
        token: those of the projector, which each token meets.
        width: channels of the queries.
        full, windowed: blocks that attend to the whole tile, and within windows.
    """

    patch: Mapping[str, float]
    token: Mapping[str, float]
    width: int
    full: int
    windowed: int = 0

    def pairs(self, patches: int) -> float:
        """Pairs of patches that attend to each other, all blocks together."""
        return float(patches) * (self.full * patches + self.windowed * min(patches, WINDOW))


@dataclass(frozen=True)
class Run:
    """Consecutive rows of a prompt, of a picture or of text."""

    rows: int
    image: bool


@dataclass(frozen=True)
class View:
    """A picture as a VLM takes it.

    Attributes:
        tokens: image tokens, ends of rows left out.
        runs: its part of the prompt.
        tiles: (patches, tokens) of each pass of the tower.
    """

    tokens: int
    runs: tuple[Run, ...]
    tiles: tuple[tuple[int, int], ...]


class VlmShape:
    """The shapes of one VLM's two files.

    Args:
        files: read at once, their headers alone.

    Raises:
        ModelError: one cannot be read, or is damaged.
    """

    def __init__(self, files: VlmFiles) -> None:
        self.files = files
        self._model, self._mmproj = read_model(files.model), read_projector(files.mmproj)
        self._seen: dict[tuple[int, int, int], View | None] = {}
        self.n_bytes = sum(path.stat().st_size for path in (*parts_of(files.model), files.mmproj))

    @property
    def headers(self) -> tuple[Header, Header]:
        """Of the model's file and the projector's."""
        return self._model, self._mmproj

    @cached_property
    def llm(self) -> Llm:
        return _llm(self._model)

    @cached_property
    def tower(self) -> Tower:
        family, mmproj = self.family(0), self._mmproj
        blocks = family.tower.n_layer
        full = blocks if family.tower.full_layers is None else len(family.tower.full_layers)
        return Tower(
            weights_by_type(mmproj, ("v.patch_embd", *(f"v.blk.{i}." for i in range(blocks)))),
            weights_by_type(mmproj, ("mm.",)),
            mmproj.integer("clip.vision.embedding_length"),
            full,
            blocks - full,
        )

    @cached_property
    def tile_price(self) -> float:
        """See :func:`localvlm.engine.price.tile_price`."""
        return tile_price(self._model, self._mmproj, self.family(0).tower)

    def family(self, max_tokens: int) -> Family:
        """How it cuts pictures, bounded to ``max_tokens`` if that is not 0."""
        return describe(self._mmproj, max_tokens)

    @property
    def any_size(self) -> bool:
        """See :func:`takes_any_size`."""
        return takes_any_size(self._mmproj)

    def shares_tower(self, other: VlmShape) -> bool:
        """Whether both have one vision tower, run in one way: a tile is then encoded once for both."""
        family = self.family(0)
        return family.name == other.family(0).name and same_tower(self._mmproj, other._mmproj, family.row_end)

    def view(self, width: int, height: int, max_tokens: int = 0) -> View | None:
        """A width x height picture; None where the family is not known."""
        key = width, height, max_tokens
        if key not in self._seen:
            self._seen[key] = self._view(*key)
        return self._seen[key]

    def _view(self, width: int, height: int, max_tokens: int) -> View | None:
        return view_of(self.family(max_tokens), width, height)


def takes_any_size(mmproj: Header) -> bool:
    """Whether a tower takes pictures of any size: fewer tokens are then a coarser picture, not fewer tiles."""
    few, more = (view_of(describe(mmproj, bound), 4096, 4096) for bound in (16, 256))
    return few is not None and more is not None and len(more.tiles) == 1 and few.tokens < more.tokens


def view_of(family: Family, width: int, height: int) -> View | None:
    """A width x height picture, as a family takes it; None where it is not known how."""
    if family.cut is None:
        return None
    tokens, runs, tiles = 0, [], []
    patch, merge = family.tower.patch, family.tower.merge**2
    for part in family.cut(width, height):
        if not isinstance(part, Block):
            runs.append(Run(len(_CONTROL.findall(part)), image=False))
            continue
        runs.append(Run(part.n, image=True))
        tokens += int(part.shows().sum())
        for tile in part.tiles:
            x0, y0, x1, y1 = tile.crop
            patches = ((x1 - x0) // patch) * ((y1 - y0) // patch)
            tiles.append((patches, patches // merge))
    return View(tokens, tuple(runs), tuple(tiles))


def _llm(header: Header) -> Llm:
    arch = header.architecture
    output = "output.weight" if "output.weight" in header.tensors else "token_embd.weight"
    layers, width = header.integer(f"{arch}.block_count"), header.integer(f"{arch}.embedding_length")
    heads = max(header.integer(f"{arch}.attention.head_count", 1), 1)
    keys = header.integer(f"{arch}.attention.head_count_kv", heads)
    channels = header.integer(f"{arch}.attention.key_length", width // heads)
    found, head = weights_by_type(header, ("blk.",), _used(header)), weights_by_type(header, (output,))
    ffn = (sum(found.values()) / max(layers, 1) / max(width, 1) - 2 * channels * (heads + keys)) / 3
    shape = f"{width} {max(round(ffn / MULTIPLE), 1) * MULTIPLE} {channels} {heads} {keys}"
    blocks = {f"{name} {shape}": n for name, n in found.items()}
    main = max(blocks, key=lambda name: blocks[name], default="")
    outputs = {f"{name} {shape}": n for name, n in head.items()}
    return Llm(blocks, {name if name in blocks else main: n for name, n in outputs.items()}, layers, heads * channels)


def _used(header: Header) -> float:
    """Share of the experts that a row meets."""
    arch = header.architecture
    return header.integer(f"{arch}.expert_used_count", 1) / max(header.integer(f"{arch}.expert_count", 1), 1)


def weights_by_type(header: Header, prefixes: tuple[str, ...], experts: float = 1.0) -> dict[str, float]:
    """Weights of the matrices whose names begin so, by type name; those of experts in the share ``experts``."""
    found: dict[str, float] = {}
    for tensor in _matrices(header, prefixes):
        used = experts if "_exps." in tensor.name else 1.0
        name = _type_name(tensor.type)
        found[name] = found.get(name, 0.0) + math.prod(tensor.shape) * used
    main = max(found, key=lambda name: found[name], default="")
    for name in [name for name, n in found.items() if n < MINOR * sum(found.values())]:
        found[main] += found.pop(name)
    return found


def _matrices(header: Header, prefixes: tuple[str, ...]) -> Iterable[TensorInfo]:
    return (t for name, t in header.tensors.items() if name.startswith(prefixes) and len(t.shape) > 1)


def _type_name(number: int) -> str:
    from gguf.constants import GGMLQuantizationType

    return str(GGMLQuantizationType(number).name)


def stamp(path: Path) -> str:
    """Name, size and time of a file: what tells that it is still the same."""
    found = path.stat()
    return f"{path.name} {found.st_size} {found.st_mtime_ns}"
