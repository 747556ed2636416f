"""The tiled pair: a picture whole and in 2 x 2 tiles of full size, as LLaVA-NeXT has it, and the rows of its prompt.

A view is what the tower sees: the overview, then the tiles in raster order. In the prompt come the tokens of the
overview, then those of all tiles row by row across the picture, with a row end after each row (`LAYOUT`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from .data import ALPHABET, GRID, Split, labels, pixels, shrunk
from .optim import Optimisers
from .scenes import draw_scene
from .tower import N_PATCHES, WIDTH, Tower, losses
from .world import CARD, COLOURS, KINDS, PATCH, TILE, Scene, Stream, Thing, sample_tagged, scene_rng

ACROSS = 2  # tiles a side
VIEWS = 1 + ACROSS**2
FINE = PATCH // ACROSS  # pixels of SIDE that one token of a tile covers
MOST = 16  # labelled things or tags a view
ROW_END = VIEWS * N_PATCHES  # in LAYOUT


def _layout() -> np.ndarray:
    tiles = np.arange(N_PATCHES, ROW_END).reshape(ACROSS, ACROSS, GRID, GRID).swapaxes(1, 2)
    raster = tiles.reshape(ACROSS * GRID, ACROSS * GRID)
    ended = np.pad(raster, ((0, 0), (0, 1)), constant_values=ROW_END)
    return np.concatenate([np.arange(N_PATCHES), ended.ravel()])


LAYOUT = _layout()
"""Index among the tokens of all views, view by view, of every row of the picture in the prompt; ROW_END: a row end."""


@dataclass(frozen=True)
class TiledSplit(Split):
    """Scenes with tags; `crowded` ones teach the tower faster."""

    shape: ClassVar[tuple[int, ...]] = (VIEWS, *Split.shape)

    def scene(self, index: int) -> Scene:
        """Scene `index`."""
        rng = scene_rng(self.stream, self.seed, index)
        return sample_tagged(rng, self.crowded)

    def drawn(self, index: int) -> np.ndarray:
        """The views of scene `index`."""
        image = draw_scene(self.scene(index))
        return np.concatenate([shrunk(image, index)[None], cut(np.asarray(image))])


CROWDED = TiledSplit("tiles-crowded", Stream.TRAIN, 5, 2400, crowded=True)
TRAIN = TiledSplit("tiles-train", Stream.TRAIN, 4, 2400)
VALIDATION = TiledSplit("tiles-validation", Stream.VALIDATION, 4, 200)


def cut(image: np.ndarray) -> np.ndarray:
    """(384, 384, 3) -> the tiles, (4, 192, 192, 3)."""
    return image.reshape(ACROSS, TILE, ACROSS, TILE, 3).swapaxes(1, 2).reshape(-1, TILE, TILE, 3)


def place_of(tag: Thing) -> tuple[int, int]:
    """The view that shows a tag at full size, and its centre's patch there."""
    view = 1 + int(tag.y // TILE) * ACROSS + int(tag.x // TILE)
    return view, int(tag.y % TILE // FINE) * GRID + int(tag.x % TILE // FINE)


def tiled_labels(scene: Scene, most: int = MOST) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Labels of the views: `data.labels`, (VIEWS, most, 6) and (VIEWS, N_PRESENT), in tiles of tags alone, as cards;
    and the colours of the tags as the overview shows them, (VIEWS, N_PATCHES), 0 for none.
    """
    plain, seen = labels(scene)
    rows = np.full((VIEWS, most, 6), -1, np.int64)
    present = np.zeros((VIEWS, len(seen)), np.float32)
    rows[0, : len(plain)], present[0] = plain, seen
    distant = np.zeros((VIEWS, N_PATCHES), np.int64)
    filled = [0] * VIEWS
    for tag in scene.tags:
        view, patch = place_of(tag)
        chars = [ALPHABET.index(c) + 1 for c in tag.text.upper()] + [0] * (3 - len(tag.text))
        colour = COLOURS.index(tag.colour)
        rows[view, filled[view]] = patch, KINDS.index(CARD), colour, *chars
        filled[view] += 1
        present[view, colour * len(KINDS) + KINDS.index(CARD)] = 1
        distant[0, int(tag.y // PATCH) * GRID + int(tag.x // PATCH)] = colour + 1
    return rows, present, distant


class TiledTower(Tower):
    """The tower with a head more: the colour of the tag that a patch of the overview shows from afar, 0 for none."""

    def __init__(self) -> None:
        super().__init__()
        self.heads["distant"] = nn.Linear(WIDTH, 1 + len(COLOURS))


def tower_batch(pools: list[np.ndarray], rng: np.random.Generator, size: int = 10) -> list[torch.Tensor]:
    """Views and their labels: all of `size` crowded scenes; of as many others the overview or a tile."""
    parts: list[tuple[np.ndarray, ...]] = []
    for split, pool in zip((CROWDED, TRAIN), pools, strict=True):
        for i in np.sort(rng.choice(len(pool), size, replace=False)):
            views = np.arange(VIEWS) if split.crowded else [rng.integers(VIEWS) * rng.integers(2)]
            things, present, distant = tiled_labels(split.scene(int(i)))
            if split.crowded:  # several tags may lie on one patch of the overview
                distant[0] = -1
            parts.append(tuple(a[views] for a in (pool[i], things, present, distant)))
    return [torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True)]


def train_tower(work: Path, steps: int, rate: Callable[[int], float], save: Callable[..., None]) -> None:
    """Teach the trained tower to read tags in tiles and to see them from afar, and that what a tile shows of things is
    ground; the first steps teach the heads alone.
    """
    torch.manual_seed(0)
    tower, path = TiledTower(), work / "tiles-tower.pt"
    optimisers = Optimisers(tower, 0.006, 1e-3)
    step, spent = 0, 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        tower.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        step, spent = state["step"], state["cpu_seconds"]
    else:
        tower.load_state_dict(torch.load(work / "tower.pt", weights_only=True)["model"], strict=False)
        fit_heads(tower, work)
    pools, start = [pixels(s, work) for s in (CROWDED, TRAIN)], time.process_time()
    while step < steps:
        views, rows, present, distant = tower_batch(pools, np.random.default_rng([13, step]))
        out = tower.rows(views)
        loss, stats = losses(tower, out, rows, present)
        known, tagged = distant >= 0, distant[distant >= 0] > 0
        far = functional.cross_entropy(tower.heads["distant"](out[:, 1:][known]), distant[known], reduction="none")
        (loss + far[tagged].sum() / 8 + 4 * far[~tagged].mean()).backward()
        optimisers.step(rate(step))
        step += 1
        if step % 10 == 0 or step == steps:
            told = " ".join(f"{k} {v:.3f}" for k, v in stats.items())
            used = spent + time.process_time() - start
            print(f"tiles-tower {step} loss {loss.item():.3f} {told} cpu {used:.0f}s", flush=True)
        if step % 50 == 0 or step == steps:
            save(path, model=tower.state_dict(), optimisers=optimisers.state_dict(), step=step,
                 cpu_seconds=spent + time.process_time() - start)  # fmt: skip


def fit_heads(tower: TiledTower, work: Path, scenes: int = 600) -> None:
    """Fit the heads to the frozen tower, which files do not keep, on overviews."""
    pool, adam = pixels(TRAIN, work), torch.optim.AdamW(tower.heads.parameters(), 5e-3)
    found = [tiled_labels(TRAIN.scene(i)) for i in range(scenes)]
    with torch.no_grad():
        seen = torch.cat([tower.rows(torch.from_numpy(pool[i : i + 50, 0])) for i in range(0, scenes, 50)])
    things, present = (torch.from_numpy(np.stack([f[k][0] for f in found])) for k in (0, 1))
    for step in range(400):
        some = torch.from_numpy(np.random.default_rng([17, step]).choice(scenes, 64, replace=False))
        loss, stats = losses(tower, seen[some], things[some], present[some])
        loss.backward()
        adam.step()
        adam.zero_grad()
    print("heads", stats, flush=True)
