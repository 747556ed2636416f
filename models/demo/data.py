"""Training data on disk: rendered scenes at tower size, their patch labels, and the tower's features in half precision.

A data set is a number of scenes of the TRAIN (or VALIDATION) stream; scene `i` is drawn again from its seed whenever
its questions are needed, so only pictures and features are stored.
"""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image

from .scenes import draw_scene
from .world import CARD, COLOURS, KINDS, PATCH, SIDE, Scene, Stream, sample_scene, scene_rng

TOWER_SIDE = 192
GRID = SIDE // PATCH  # patches a side
ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"
N_CHARS = len(ALPHABET) + 1  # class 0: no character
N_PRESENT = len(COLOURS) * len(KINDS)
_FILTERS = (
    Image.Resampling.BICUBIC, Image.Resampling.BICUBIC, Image.Resampling.BICUBIC,
    Image.Resampling.BILINEAR, Image.Resampling.BOX, Image.Resampling.LANCZOS,
)  # fmt: skip


def shrunk(image: Image.Image, index: int) -> np.ndarray:
    """A picture at tower size, by one of several filters."""
    return np.asarray(image.resize((TOWER_SIDE, TOWER_SIDE), _FILTERS[(index * 7919) % len(_FILTERS)]))


@dataclass(frozen=True)
class Split:
    """Scenes 0..count-1 of one stream and seed; `crowded` ones fill the board, to teach the tower faster."""

    name: str
    stream: Stream
    seed: int
    count: int
    crowded: bool = False
    shape: ClassVar[tuple[int, ...]] = (TOWER_SIDE, TOWER_SIDE, 3)

    def scene(self, index: int) -> Scene:
        """Scene `index`."""
        rng = scene_rng(self.stream, self.seed, index)
        return sample_scene(rng, 9, 4) if self.crowded else sample_scene(rng)

    def drawn(self, index: int) -> np.ndarray:
        """What the tower sees of scene `index`, uint8 of `shape`; the filter varies."""
        return shrunk(draw_scene(self.scene(index)), index)


CROWDED = Split("crowded", Stream.TRAIN, 2, 10_000, crowded=True)
TRAIN = Split("train", Stream.TRAIN, 1, 24_000)
VALIDATION = Split("validation", Stream.VALIDATION, 1, 600)


def labels(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """Patch labels (9, 6) int64, a row a thing: patch, kind, colour, three characters; -1 rows pad.

    And what is present, (N_PRESENT,) float32.
    """
    rows = np.full((9, 6), -1, np.int64)
    present = np.zeros(N_PRESENT, np.float32)
    for row, thing in zip(rows, scene.things, strict=False):
        kind, colour = KINDS.index(thing.kind), COLOURS.index(thing.colour)
        row[:3] = int(thing.y // PATCH) * GRID + int(thing.x // PATCH), kind, colour
        if thing.kind == CARD:
            row[3:] = [ALPHABET.index(c) + 1 for c in thing.text.upper()] + [0] * (3 - len(thing.text))
        present[colour * len(KINDS) + kind] = 1
    return rows, present


def _render(job: tuple[Split, Path, int, int]) -> int:
    split, path, start, stop = job
    pixels = np.lib.format.open_memmap(path, "r+")
    for index in range(start, stop):
        pixels[index] = split.drawn(index)
    return stop


def render(split: Split, work: Path, processes: int | None = None) -> None:
    """Draw a split into `work/<name>.npy`, (count, *shape) uint8, unless it is there."""
    done = work / f"{split.name}.npy"
    if done.exists():
        return
    path = done.with_suffix(".part")
    np.lib.format.open_memmap(path, "w+", np.uint8, (split.count, *split.shape)).flush()
    jobs = [(split, path, i, min(i + 500, split.count)) for i in range(0, split.count, 500)]
    with ProcessPoolExecutor(processes or os.cpu_count()) as pool:
        for _ in pool.map(_render, jobs):
            pass
    path.rename(done)


def pixels(split: Split, work: Path) -> np.ndarray:
    """The rendered split, memory-mapped."""
    return np.load(work / f"{split.name}.npy", mmap_mode="r")


def features(split: Split, work: Path) -> np.ndarray:
    """The tower's features of a split, (count, 144, width) float16, memory-mapped."""
    return np.load(work / f"{split.name}.features.npy", mmap_mode="r")
