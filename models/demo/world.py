"""What a scene is made of: things on an invisible 3 x 3 board. Knows nothing of pixels or of questions."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import IntEnum

import numpy as np

COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "black")
SHAPES = ("circle", "square", "triangle", "star", "heart", "diamond", "cross", "moon")
CARD = "card"
TAG = "tag"  # a card of a third of the size, with a word: no thing, neither counted nor listed
KINDS = (*SHAPES, CARD)
PLACES = (
    "top left", "top center", "top right",
    "center left", "center", "center right",
    "bottom left", "bottom center", "bottom right",
)  # fmt: skip
WORDS = (
    "ant", "bag", "bed", "box", "bus", "cat", "cow", "cup", "dog", "egg", "fan", "fox", "gas", "hat", "ice", "jam",
    "key", "lip", "map", "net", "oak", "pen", "pig", "rat", "rug", "sun", "tea", "toy", "van", "web", "yes", "zoo",
)  # fmt: skip

SIDE = 384  # pixels of a drawn scene
PATCH = 32  # pixels of SIDE that one image token of the tower covers
CELL = 128  # pixels of one of the 3 x 3 cells
TAG_SIZES = 14.0, 15.5  # height of a tag, pixels of SIDE
TILE = SIDE // 2  # pixels of SIDE of one of the 2 x 2 tiles, which the tower sees at full size


class Stream(IntEnum):
    """The random streams. A stream is part of every seed, so no held-out scene shares a seed with a training scene."""

    TRAIN = 0
    HELD_OUT = 1
    VALIDATION = 2


@dataclass(frozen=True)
class Thing:
    """One thing in a scene."""

    kind: str  # of KINDS
    colour: str  # of COLOURS; of a card, the colour of its frame
    cell: int  # 0..8, raster order
    x: float  # centre, pixels of SIDE
    y: float
    size: float  # width and height in pixels; of a card, the height
    angle: float  # degrees
    text: str = ""  # of a card: two digits, or one of WORDS

    @property
    def name(self) -> str:
        """Colour and kind, unique in a scene."""
        return f"{self.colour} {self.kind}"

    @property
    def place(self) -> str:
        """The cell in words."""
        return PLACES[self.cell]

    @property
    def row(self) -> int:
        """0 for the top row."""
        return self.cell // 3

    @property
    def column(self) -> int:
        """0 for the left column."""
        return self.cell % 3


@dataclass(frozen=True)
class Scene:
    """Things in raster order, at most one a cell, no two of the same name; the seed of the background; tags, no two
    of the same colour.
    """

    things: tuple[Thing, ...]
    paint: int
    tags: tuple[Thing, ...] = ()

    def at(self, cell: int) -> Thing | None:
        """The thing in that cell."""
        return next((t for t in self.things if t.cell == cell), None)

    def of_kind(self, kind: str) -> list[Thing]:
        """All things of that kind."""
        return [t for t in self.things if t.kind == kind]

    def of_colour(self, colour: str) -> list[Thing]:
        """All things of that colour, cards by their frame."""
        return [t for t in self.things if t.colour == colour]


def scene_rng(stream: Stream, seed: int, index: int) -> np.random.Generator:
    """The generator of scene `index` of a data set: equal arguments give an equal scene on every machine."""
    return np.random.default_rng([int(stream), seed, index])


def _names(rng: np.random.Generator, n_shapes: int, n_cards: int) -> list[tuple[str, str]]:
    """Distinct (colour, kind) pairs, the cards last; often two or three share a colour or a kind, to be counted."""
    pairs: list[tuple[str, str]] = []
    theme = rng.random()
    shared = int(rng.integers(2, 4))
    colour, kind = str(rng.choice(COLOURS)), str(rng.choice(SHAPES))
    while len(pairs) < n_shapes:
        pair = (str(rng.choice(COLOURS)), str(rng.choice(SHAPES)))
        if len(pairs) < shared:
            pair = (colour, pair[1]) if theme < 0.4 else (pair[0], kind) if theme < 0.8 else pair
        if pair not in pairs:
            pairs.append(pair)
    return pairs + [(str(frame), CARD) for frame in rng.choice(COLOURS, n_cards, replace=False)]


def _text(rng: np.random.Generator) -> str:
    return str(rng.integers(10, 100)) if rng.random() < 0.5 else str(rng.choice(WORDS))


def _place(rng: np.random.Generator, cell: int, kind: str, colour: str) -> Thing:
    """A thing near the middle of its cell: its centre lies well inside one of the four inner patches."""
    column, row = rng.integers(1, 3, 2)
    dx, dy = rng.uniform(-9, 9, 2)
    x = (cell % 3) * CELL + (column + 0.5) * PATCH + dx
    y = (cell // 3) * CELL + (row + 0.5) * PATCH + dy
    if kind == CARD:
        return Thing(kind, colour, cell, x, y, float(rng.uniform(42, 48)), float(rng.uniform(-3, 3)), _text(rng))
    return Thing(kind, colour, cell, x, y, float(rng.uniform(42, 66)), float(rng.uniform(-12, 12)))


def sample_scene(rng: np.random.Generator, n_things: int | None = None, n_cards: int | None = None) -> Scene:
    """A random scene: 4 to 7 things, one or two of them cards, unless told otherwise."""
    n_things = int(rng.integers(4, 8)) if n_things is None else n_things
    n_cards = int(rng.integers(1, 3)) if n_cards is None else n_cards
    pairs = _names(rng, n_things - n_cards, n_cards)
    cells = rng.permutation(9)[:n_things]
    things = [_place(rng, int(c), kind, colour) for c, (colour, kind) in zip(cells, pairs, strict=True)]
    return Scene(tuple(sorted(things, key=lambda t: t.cell)), int(rng.integers(2**31)))


def _reach(thing: Thing) -> tuple[float, float]:
    """Half the width and half the height that a thing takes at most, turned as it is."""
    wide = thing.kind in (CARD, TAG)
    return (1.01 if wide else 0.62) * thing.size, 0.62 * thing.size


def _tag(rng: np.random.Generator, colour: str, taken: list[Thing]) -> Thing | None:
    """A tag on free ground: inside one cell and one tile, its centre well inside one patch of that tile."""
    fine = PATCH // 2
    word = str(rng.choice(WORDS))
    tag = Thing(TAG, colour, 0, 0, 0, float(rng.uniform(*TAG_SIZES)), float(rng.uniform(-3, 3)), word)
    width, height = (n + fine // 2 for n in _reach(tag))
    y, x = (np.mgrid[: SIDE // fine, : SIDE // fine] + 0.5) * fine
    free = (np.abs(x % TILE - TILE / 2) < TILE / 2 - width) & (np.abs(y % TILE - TILE / 2) < TILE / 2 - height)
    free &= (np.abs(x % CELL - CELL / 2) < CELL / 2 - fine) & (np.abs(y % CELL - CELL / 2) < CELL / 2 - fine)
    for other in taken:
        w, h = _reach(other)
        free &= (np.abs(x - other.x) > width + w) | (np.abs(y - other.y) > height + h)
    if not free.any():
        return None
    row, column = np.argwhere(free)[int(rng.integers(free.sum()))]
    dx, dy = rng.uniform(-4.5, 4.5, 2)
    cell = int(y[row, column] // CELL) * 3 + int(x[row, column] // CELL)
    return replace(tag, cell=cell, x=float(x[row, column] + dx), y=float(y[row, column] + dy))


def sample_tagged(rng: np.random.Generator, crowded: bool = False) -> Scene:
    """A random scene with one to three tags of different colours; a crowded one is full of cards and tags."""
    if crowded:
        scene, colours = sample_scene(rng, 9, 4), rng.choice(COLOURS, 24)
    else:
        scene, colours = sample_scene(rng), rng.choice(COLOURS, int(rng.integers(1, 4)), replace=False)
    tags: list[Thing] = []
    for colour in colours:
        tag = _tag(rng, str(colour), [*scene.things, *tags])
        tags += [tag] if tag else []
    return replace(scene, tags=tuple(tags)) if tags else sample_tagged(rng, crowded)
