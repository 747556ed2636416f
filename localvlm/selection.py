"""Which image tokens the model sees: a method and a budget, over layouts and what the guide attended to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import AskOptions
from localvlm.engine.api import ImageLayout, VlmInfo
from localvlm.errors import UnsupportedModel, UsageError
from localvlm.guidance import spread
from localvlm.pruning import METHODS, InLlm, Inputs, Keep, Kept, Method, Tokens, budget, method_named
from localvlm.pruning.kinds import floor_of

__all__ = [
    "BLIND",
    "Sight",
    "choose",
    "guiding",
    "joint",
    "method_of",
    "on_picture",
    "pick",
    "resampled",
    "select",
    "tiles_in_common",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

BLIND = METHODS["divprune"]
"""Chooses what a guide is shown: of the methods that know no question, the one with which the demo pair is right most
often, and it needs nothing of the tower but its output (docs/log.md)."""


@dataclass(frozen=True)
class Sight:
    """What a method may look at besides the guide's attention; see :class:`localvlm.pruning.Inputs`."""

    features: Float32 | None = None
    tower: Float32 | None = None
    text: Float32 | None = None
    weights: Mapping[str, Float32] | None = None

    def within(self, method: Method | InLlm) -> InLlm | None:
        """What goes on within the LLM with the tokens that ``method`` keeps before it."""
        if isinstance(method, InLlm) or method.within is None or self.features is None or self.weights is None:
            return None
        return method.within(self.features, self.weights)


def method_of(options: AskOptions, n_pictures: int) -> Method | InLlm:
    """The method that a question asks for; "none" where there is nothing to prune.

    Raises:
        UsageError: the budget goes by a guide's attention and the method does not, or a layer is given and the method
            has its own.
    """
    method = method_named(options.method)
    within = isinstance(method, InLlm) or method.within is not None
    if within and (options.layer or options.preset):
        given = f"preset '{options.preset}'" if options.preset else f"layer {options.layer}"
        raise UsageError(
            f"method '{method.name}' says at which layers tokens are dropped, and {given} was given too", "give one"
        )
    if _keeps_all(options.keep) or not n_pictures:
        method = METHODS["none"]
    if options.keep == "auto" and method.aggregation is None and method.name != "none":
        raise UsageError(
            f"keep 'auto' goes by what the guide attends to, and method '{method.name}' does not",
            "pass a share, such as --keep 0.35",
        )
    return method


def guiding(method: Method | InLlm) -> Method:
    """The method by which the guide's own image is pruned: SGL where ``method`` needs no guide."""
    return method if isinstance(method, Method) and method.aggregation is not None else METHODS["sgl+"]


def resampled(scores: Float32, sources: Sequence[ImageLayout], targets: Sequence[ImageLayout]) -> Float32:
    """(N,) scores of the model's image tokens, spread in image space where the guide's grids are others.

    Args:
        scores: (M,) of the guide's image tokens, joint over its pictures.
        sources: layouts of the pictures in the guide.
        targets: those of the same pictures in the model.

    Raises:
        UnsupportedModel: where tokens lie is not known.
    """
    out, at = [], 0
    for source, target in zip(sources, targets, strict=True):
        mass = scores[at : at + source.n_tokens]
        at += source.n_tokens
        if source.boxes is None or target.boxes is None:
            role = "guide" if source.boxes is None else "model"
            raise UnsupportedModel(
                f"where the {role}'s image tokens lie is not known, so they cannot be pruned by attention",
                "use --method none, or a pair of a known family",
            )
        out.append(spread(mass, source.boxes, target.boxes))
    return np.concatenate(out)


def choose(
    method: Method,
    options: AskOptions,
    layouts: Sequence[ImageLayout],
    saliency: Float32 | None,
    model: VlmInfo,
    question: str = "",
    sight: Sight = Sight(),
    opened: frozenset[int] = frozenset(),
) -> list[Kept | None]:
    """Kept tokens per picture, None where all are kept. Where they are dropped at a layer, all tiles are encoded
    and their price is of no account. The words of the ``question`` tell the least of an "auto" budget. ``opened``: see
    :func:`tiles_in_common`.
    """
    n = sum(layout.n_tokens for layout in layouts)
    if method.name == "none" or (isinstance(options.keep, Tokens) and options.keep.n >= n):
        return [None] * len(layouts)
    price = model.tile_price if options.tile_price is None else options.tile_price
    if options.layer_in(model.n_layer):
        price = 0.0
    floor = floor_of(question)
    return list(pick(method, options.keep, layouts, saliency, options.seed, price, floor, sight, opened))


def pick(
    method: Method,
    keep: Keep,
    layouts: Sequence[ImageLayout],
    saliency: Float32 | None,
    seed: int = 0,
    tile_price: float = 0.0,
    floor: float = 0.0,
    sight: Sight = Sight(),
    opened: frozenset[int] = frozenset(),
) -> list[Kept]:
    """Kept tokens per picture; the rest as in :class:`localvlm.pruning.Inputs`."""
    given = {"saliency": saliency, "seed": seed, "tile_price": tile_price, "floor": floor, "opened": opened}
    inputs = _inputs(layouts, sight, **given)
    k = budget(keep, inputs)
    kept = Kept(method.select(inputs, k)) if method.average is None else method.average(inputs, k)
    rows = kept.rows
    return [
        Kept(kept.index[part] - np.int32(first), None if rows is None else rows[part])
        for first, part in _by_picture(kept.index, layouts)
    ]


def select(
    method: Method,
    keep: Keep,
    layouts: Sequence[ImageLayout],
    saliency: Float32 | None,
    seed: int = 0,
    tile_price: float = 0.0,
    opened: frozenset[int] = frozenset(),
) -> list[Int32]:
    """The indices alone of what :func:`pick` keeps."""
    return [kept.index for kept in pick(method, keep, layouts, saliency, seed, tile_price, opened=opened)]


def tiles_in_common(
    guide: VlmInfo, model: VlmInfo, sources: Sequence[ImageLayout], targets: Sequence[ImageLayout]
) -> frozenset[int]:
    """Tiles of the model's layouts, numbered jointly, that the guide's have too, if both have one tower: their tokens
    lie in the same places. What the tower gave for them is there once the guide has looked.
    """
    if not model.tower or guide.tower != model.tower:
        return frozenset()
    found, first = set(), 0
    for source, target in zip(sources, targets, strict=True):
        known = set(_places(source).values())
        places = _places(target)
        found |= {first + tile for tile, place in places.items() if place in known}
        first += max(places, default=0) + 1
    return frozenset(found)


def _places(layout: ImageLayout) -> dict[int, bytes]:
    """Of each tile where its tokens lie; none of a picture of which that is not known."""
    if layout.boxes is None:
        return {}
    tiles = _tiles([layout])
    return {int(tile): layout.boxes[tiles == tile].tobytes() for tile in np.unique(tiles)}


def _inputs(layouts: Sequence[ImageLayout], sight: Sight, **given: Any) -> Inputs:
    counts = [layout.n_tokens for layout in layouts]
    candidates = np.concatenate([on_picture(layout) for layout in layouts])
    return Inputs(
        n=sum(counts),
        candidates=np.flatnonzero(candidates).astype(np.int32),
        grids=tuple(layout.grid for layout in layouts),
        counts=tuple(counts),
        tiles=_tiles(layouts),
        features=sight.features,
        tower=sight.tower,
        text=sight.text,
        weights=sight.weights,
        **given,
    )


def _by_picture(kept: Int32, layouts: Sequence[ImageLayout]) -> list[tuple[int, slice]]:
    """Of each picture its first token's index, and which of the sorted ``kept`` are its own."""
    starts = np.cumsum([0, *(layout.n_tokens for layout in layouts)])
    return [(int(a), slice(*np.searchsorted(kept, (a, b)))) for a, b in pairwise(starts)]


def joint(layouts: Sequence[ImageLayout], kept: Sequence[Int32 | None]) -> tuple[int, ...]:
    """Indices of kept tokens counted over all pictures."""
    out: list[int] = []
    at = 0
    for layout, keep in zip(layouts, kept, strict=True):
        out += range(at, at + layout.n_tokens) if keep is None else (int(i) + at for i in keep)
        at += layout.n_tokens
    return tuple(out)


def _keeps_all(keep: Keep) -> bool:
    return keep is None or (isinstance(keep, (int, float)) and keep >= 1)


def _tiles(layouts: Sequence[ImageLayout]) -> Int32:
    """(N,) the tile of each token, numbered jointly."""
    out, first = [], 0
    for layout in layouts:
        tiles = np.zeros(layout.n_tokens, np.int32) if layout.tiles is None else layout.tiles
        out.append(tiles + np.int32(first))
        first += int(tiles.max(initial=0)) + 1
    return np.concatenate(out)


def on_picture(layout: ImageLayout) -> NDArray[np.bool_]:
    """(n_tokens,) whether a token shows any of the picture."""
    if layout.boxes is None:
        return np.ones(layout.n_tokens, bool)
    b = layout.boxes
    return np.asarray((b[:, 2] > b[:, 0]) & (b[:, 3] > b[:, 1]))
