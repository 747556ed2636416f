"""Fit the tiled pair: the trained guide and model go on with pictures of overview and tiles, much of it left out."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import data, text, tiles
from .data import GRID
from .fit import BUDGET, Batch, Fitting, collate, examined, hidden_ground, tally, told
from .lm import Size, Vlm
from .questions import TYPES
from .tiles import ACROSS, FINE, LAYOUT, ROW_END
from .tower import N_PATCHES
from .world import Scene, scene_rng

MIX = {
    "caption": 0.2, "describe": 0.3, "colour": 0.3, "shape": 0.3, "where": 0.4, "read": 1.2,
    "exist": 1.0, "relation": 1.2, "step": 0.2, "count": 2.5, "small": 4.0, "spot": 0.5,
}  # fmt: skip
WHOLE, OVERVIEW = 0.08, 0.12  # shares of batches of whole pictures, and of overviews alone


class TiledVlm(Vlm):
    """With a row end. Features have a channel more, which is 1 where a row is a row end."""

    def __init__(self, size: Size, vocabulary: int) -> None:
        super().__init__(size, vocabulary)
        self.row_end = nn.Parameter(torch.randn(size.width) * 0.5)

    def project(self, features: Tensor) -> Tensor:
        """(batch, n, tower width + 1) -> (batch, n, width)."""
        return torch.where(features[..., -1:] > 0, self.row_end, super().project(features[..., :-1]))


def near_tags(scene: Scene) -> np.ndarray:
    """Places in LAYOUT of the tokens that show a tag at full size, (744,) bool."""
    near = np.zeros((ACROSS * GRID, ACROSS * GRID + 1), bool)
    for tag in scene.tags:
        row, column = int(tag.y // FINE), int(tag.x // FINE)
        near[row - 1 : row + 2, column - 1 : column + 2] = True
    return np.concatenate([np.zeros(N_PATCHES, bool), near.ravel()])


def untagged(scene: Scene) -> np.ndarray:
    """Places in LAYOUT of one tile without a tag, none where all have one, (744,) bool."""
    spare = sorted({1, 2, 3, 4} - {tiles.place_of(tag)[0] for tag in scene.tags})
    view = np.minimum(LAYOUT // N_PATCHES, tiles.VIEWS)
    return view == spare[scene.paint % len(spare)] if spare else np.zeros(len(LAYOUT), bool)


def shown(scene: Scene, rng: np.random.Generator, share: float) -> np.ndarray:
    """Places in LAYOUT of the rows that a training picture has: `share` of the tiles, tags always; sometimes a part of
    the overview's ground and a tile without tags are left out too.
    """
    keep = rng.random(len(LAYOUT)) < share
    if rng.random() < 0.8:  # localvlm never leaves row ends out
        keep |= LAYOUT == ROW_END
    if share < 1 and rng.random() < 0.3:
        keep &= ~untagged(scene)
    keep |= near_tags(scene)
    keep[:N_PATCHES] = True
    if share < 1 and rng.random() < 0.4:
        keep[:N_PATCHES] = ~hidden_ground(scene, rng)
    return np.flatnonzero(keep)


def gathered(views: np.ndarray, places: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Features of the rows at those places of each picture, and the places, padded with -1, as `collate` takes them.

    views: (batch, VIEWS, 144, width).
    """
    most = max(len(p) for p in places)
    out = np.zeros((len(places), most, views.shape[-1] + 1), np.float32)
    padded = np.full((len(places), most), -1, np.int64)
    for i, (place, tokens) in enumerate(zip(places, views, strict=True)):
        index = LAYOUT[place]
        end = index == ROW_END
        out[i, : len(place), :-1][~end] = tokens.reshape(-1, views.shape[-1])[index[~end]]
        out[i, : len(place), -1] = end
        padded[i, : len(place)] = place
    return out, padded


def training_batch(pool: np.ndarray, size: int, step: int, blind_small: bool) -> Batch:
    """The batch of that step. Where it shows overviews alone, `small` is asked only if `blind_small`."""
    rng = np.random.default_rng([19, size, step])
    kind = rng.random()
    if kind < WHOLE:
        size = max(1, size // 2)
    picked = np.sort(rng.choice(len(pool), size, replace=False))
    found = [tiles.TRAIN.scene(int(i)) for i in picked]
    mix, length, views = dict(MIX), len(LAYOUT), pool[picked]
    if WHOLE <= kind < WHOLE + OVERVIEW:
        if not blind_small:
            del mix["small"]
        places = [np.flatnonzero(~hidden_ground(s, rng) | (rng.random() < 0.5)) for s in found]
        if rng.random() < 0.6:
            length = N_PATCHES  # as if cut without tiles; else as if all of them were left out
        else:
            ends = np.flatnonzero(LAYOUT == ROW_END)
            places = [np.concatenate([p, ends]) for p in places]
    else:
        share = 1.0 if kind < WHOLE else float(rng.uniform(0.03, 0.5))
        places = [shown(s, rng, share) for s in found]
    features, padded = gathered(views, places)
    return collate(features, [text.branches(s, rng, mix, BUDGET) for s in found], padded, length)


def accuracy(vlm: Vlm, work: Path, images: int = 60, share: float = 1.0) -> dict[str, float]:
    """Exact match by type on validation scenes, with `share` of the tiles; 0: on overviews alone."""
    pool = data.features(tiles.VALIDATION, work)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, images, 10):
        rows, places = [], []
        for i in range(start, start + 10):
            rng, scene = scene_rng(tiles.VALIDATION.stream, 9, i), tiles.VALIDATION.scene(i)
            rows.append(examined(scene, rng, (*TYPES, *TYPES, "small", "small", "spot")))
            places.append(shown(scene, np.random.default_rng(i), share) if share else np.arange(N_PATCHES))
        features, padded = gathered(pool[start : start + 10], places)
        tally(vlm, collate(features, rows, padded, len(LAYOUT) if share else N_PATCHES), asked, right)
    out = {k: right[k] / asked[k] for k in asked}
    out["plain"] = sum(right[t] for t in TYPES) / sum(asked[t] for t in TYPES)
    return out


class TiledFitting(Fitting):
    """Goes on from the plain guide or model."""

    pair = "tiles-"

    def features(self) -> np.ndarray:
        """The training scenes' features, all views."""
        return data.features(tiles.TRAIN, self.work)

    def fresh(self, size: Size) -> Vlm:
        """A model of that size before training."""
        return TiledVlm(size, text.tokenizer().get_vocab_size())

    def start(self) -> dict[str, Any]:
        """The state to go on from: the plain one's at first."""
        if self.path.exists():
            return super().start()
        plain = torch.load(self.work / f"{self.plan.which}.pt", weights_only=True)
        width = plain["ema"]["norm.weight"].shape[0]
        state = plain["ema"] | {"row_end": torch.randn(width) * plain["ema"]["embed.weight"].std()}
        return {"model": state, "ema": state, "layers": plain["layers"], "step": 0, "cpu_seconds": 0.0}

    def batch(self, step: int) -> Batch:
        """The batch of that step."""
        return training_batch(self.pool, self.plan.batch, step, self.plan.which == "guide")

    def told(self) -> str:
        """Accuracies of the present weights: with a third of the tiles, on overviews alone."""
        parts = (accuracy(self.vlm, self.work, 40, share) for share in (0.33, 0.0))
        return " | overview: ".join(told(p) for p in parts)
