"""Proves where image tokens lie: ``python -m tests.maps [FAMILY ...]``.

A white square, as large as a token's box, is put at 40 seeded places of a dark, faintly textured picture. The projected
rows of the picture with and without it are compared (Euclidean distance of each token). A hit is a square whose most
changed token has a box that overlaps it, be it of an overview or of a tile; beside it stands the share of the k most
changed tokens that overlap it, k being the number of tokens that do. Five aspect ratios make tiled families cut
differently; at each, 95 % of the squares must be hit. The zoo's weights are random and its towers mix all patches, so
maps that are wrong on purpose are tried too: boxes rolled by one token, each tile's raster transposed, tiles exchanged.
Over all ratios together each of these must miss the bound (a map that equals the right one, as of a single tile, is
left out). Leaves with 1 if a right map misses the bound or a wrong one does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Engine, LoadOptions, Vlm
from localvlm.engine.families import Block, Tile, describe
from localvlm.engine.gguf_header import read_header
from tests import zoo

__all__ = ["BOUND", "Score", "check"]

BOUND = 0.95
SIZES = ((224, 224), (256, 192), (174, 232), (288, 162), (110, 330))
"""1:1, 4:3, 3:4, 16:9, 1:3."""
Boxes = NDArray[np.float32]
RGB = NDArray[np.uint8]
TileMap = Callable[[Sequence[Tile], int, int], list[Boxes]]
"""Tiles of a width x height picture -> boxes of each tile's rows."""


@dataclass(frozen=True)
class Score:
    """Hits of one map over ``squares``, and the mean share of the k most changed tokens that overlap the square."""

    name: str
    squares: int
    hits: int
    share: float

    @property
    def rate(self) -> float:
        return self.hits / self.squares


def _right(tiles: Sequence[Tile], width: int, height: int) -> list[Boxes]:
    return [t.boxes(width, height) for t in tiles]


def _transposed(tiles: Sequence[Tile], width: int, height: int) -> list[Boxes]:
    """Each tile read column by column."""
    out = []
    for tile in tiles:
        boxes, shows = tile.boxes(width, height), tile.shows()
        raster = boxes[shows].reshape(tile.rows, tile.columns, 4)
        boxes[shows] = raster.swapaxes(0, 1).reshape(-1, 4)
        out.append(boxes)
    return out


def _exchanged(tiles: Sequence[Tile], width: int, height: int) -> list[Boxes]:
    """Each tile with the boxes of the next of its shape."""
    out = _right(tiles, width, height)
    shapes: dict[object, list[int]] = {}
    for i, tile in enumerate(tiles):
        shapes.setdefault((tile.rows, tile.columns, tile.row_end), []).append(i)
    right = list(out)
    for same in shapes.values():
        for here, there in zip(same, [*same[1:], same[0]], strict=True):
            out[here] = right[there]
    return out


def _map(blocks: Sequence[Block], width: int, height: int, tile_map: TileMap) -> Boxes:
    """(n_tokens, 4) boxes of a picture's tokens."""
    found = tile_map([t for b in blocks for t in b.tiles], width, height)
    out = []
    for block in blocks:
        own, found = found[: len(block.tiles)], found[len(block.tiles) :]
        out.append(block.gather(np.concatenate(own), np.float32(0))[block.shows()])
    return np.concatenate(out)


def _maps(blocks: Sequence[Block], width: int, height: int) -> dict[str, Boxes]:
    right = _map(blocks, width, height, _right)
    return {
        "right": right,
        "rolled": np.roll(right, 1, axis=0),
        "transposed": _map(blocks, width, height, _transposed),
        "exchanged": _map(blocks, width, height, _exchanged),
    }


def _overlaps(boxes: Boxes, square: tuple[int, int, int, int]) -> NDArray[np.bool_]:
    x0, y0, x1, y1 = square
    return np.asarray(
        (np.minimum(boxes[:, 2], x1) > np.maximum(boxes[:, 0], x0))
        & (np.minimum(boxes[:, 3], y1) > np.maximum(boxes[:, 1], y0))
    )


def _squares(boxes: Boxes, width: int, height: int, n: int, seed: int) -> Iterator[tuple[int, int, int, int]]:
    """x0, y0, x1, y1 of ``n`` squares within the picture, as large as the median box."""
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    side = min(max(4, round(float(np.median(areas[areas > 0])) ** 0.5)), width, height)
    random = np.random.RandomState(seed)
    for _ in range(n):
        x, y = random.randint(0, width - side + 1), random.randint(0, height - side + 1)
        yield x, y, x + side, y + side


def _changes(
    vlm: Vlm, shows: NDArray[np.bool_], size: tuple[int, int], squares: Sequence[tuple[int, int, int, int]]
) -> Iterator[NDArray[np.float32]]:
    """(n_tokens,) change of each token for each square."""
    width, height = size
    plain = np.random.RandomState(7).randint(0, 13, (height, width, 3)).astype(np.uint8)

    def rows(picture: RGB) -> NDArray[np.float32]:
        encoded = vlm.encode(picture)
        found = vlm.embeddings(encoded)[shows]
        vlm.release(encoded)
        return found

    without = rows(plain)
    for x0, y0, x1, y1 in squares:
        picture = plain.copy()
        picture[y0:y1, x0:x1] = 255
        yield np.linalg.norm(rows(picture) - without, axis=1)


def _score(
    name: str, boxes: Boxes, changes: Sequence[NDArray[np.float32]], squares: Sequence[tuple[int, ...]]
) -> Score:
    hits, shares = 0, []
    for change, square in zip(changes, squares, strict=True):
        over = _overlaps(boxes, square)  # type: ignore[arg-type]
        order = np.argsort(-change)
        hits += bool(over[order[0]])
        shares.append(over[order[: max(1, over.sum())]].mean())
    return Score(name, len(squares), hits, float(np.mean(shares)))


def check(engine: Engine, model: zoo.ZooModel, n: int = 40, sizes: Sequence[tuple[int, int]] = SIZES) -> list[Score]:
    """The right map's score at each size, then the wrong maps' over all sizes together.

    Raises:
        AssertionError: the engine's boxes are not those of the family's tiles.
    """
    family = describe(read_header(model.mmproj))
    assert family.cut is not None
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1))
    right: list[Score] = []
    wrong: dict[str, list[Score]] = {}
    try:
        for width, height in sizes:
            blocks = [part for part in family.cut(width, height) if isinstance(part, Block)]
            maps = _maps(blocks, width, height)
            layout = vlm.layout(width, height)
            assert layout.boxes is not None
            assert np.array_equal(layout.boxes, maps["right"])
            squares = list(_squares(layout.boxes, width, height, n, seed=width))
            shows = np.concatenate([b.shows() for b in blocks])
            changes = list(_changes(vlm, shows, (width, height), squares))
            right.append(_score(f"{width}x{height}", layout.boxes, changes, squares))
            for name, boxes in maps.items():
                if name != "right" and not np.array_equal(boxes, layout.boxes):
                    wrong.setdefault(name, []).append(_score(name, boxes, changes, squares))
    finally:
        vlm.close()
    return right + [
        Score(name, sum(s.squares for s in some), sum(s.hits for s in some), float(np.mean([s.share for s in some])))
        for name, some in wrong.items()
    ]


def misses(scores: Sequence[Score]) -> list[Score]:
    """Right maps under the bound and wrong ones that reach it."""
    return [s for s in scores if (s.rate >= BOUND) is not s.name[0].isdigit()]


def main() -> int:
    parser = argparse.ArgumentParser(prog="maps", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(zoo.FAMILIES)}; default all")
    args = parser.parse_args()
    if unknown := set(args.families) - set(zoo.FAMILIES):
        parser.error(f"unknown family {sorted(unknown)[0]!r}; known are {', '.join(zoo.FAMILIES)}")
    from localvlm.engine.client import Engine as LlamaEngine

    missed = 0
    print(f"{'family':14} {'picture, or wrong map':22} {'hits':>9} {'top k':>7}")
    with tempfile.TemporaryDirectory() as folder, LlamaEngine() as engine:
        for name in args.families or zoo.FAMILIES:
            scores = check(engine, zoo.build(name, Path(folder)))
            bad = misses(scores)
            missed += len(bad)
            for s in scores:
                verdict = "MISS" if s in bad else "ok" if s.name[0].isdigit() else "ok, told apart"
                print(f"{name:14} {s.name:22} {s.hits:4}/{s.squares:4} {s.share:7.1%}  {verdict}", flush=True)
    print(f"{missed} missed" if missed else "all within bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
