"""A vision tower that two VLMs share runs once: what the second one's encoding takes, and that not one bit differs.

    python -m tests.shared_tower [--runs 5] [--threads 1]

For each family of the zoo and each pair that comes along, a picture is encoded by the one VLM and then by the other,
which has the same tower and a projector of its own; and by the other after the one has seen another picture. The zoo's
towers are so small that what is not tower (reading pixels, the projector) shows. Leaves with 1 where rows differ.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import Encoded, LoadOptions
from localvlm.engine.client import Engine
from localvlm.engine.gguf_header import read_header
from localvlm.pipeline import VlmFiles
from tests import zoo

DEMO = Path(__file__).parents[1] / "models" / "demo" / "example.png"
PAIRS = ("demo", "demo-tiles")
RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class Found:
    """Of one picture: tiles, those of them that the second VLM had of the first, the largest difference of its rows and
    of its tower's attention from those it gives alone, and the milliseconds its encoding took alone and then.
    """

    tiles: int
    shared: int
    rows: float
    attention: float
    alone_ms: float
    ms: float


def with_other_projector(mmproj: Path, to: Path) -> Path:
    """Writes a projector file with the same tower: every other tensor's numbers (F32) stand in reverse order."""
    data = bytearray(mmproj.read_bytes())
    for tensor in read_header(mmproj).tensors.values():
        if not tensor.name.startswith("v."):
            here = slice(tensor.offset, tensor.offset + tensor.n_bytes)
            data[here] = np.frombuffer(data[here], np.float32)[::-1].tobytes()
    to.write_bytes(data)
    return to


def compare(
    first: VlmFiles, second: VlmFiles, pixels: RGB, *, threads: int = 1, tower: bool = True, runs: int = 1
) -> Found:
    """``tower``: with the tower's attention."""
    alone_ms, ms = [], []
    for _ in range(runs):
        alone, rows = _second(first, second, 255 - pixels, pixels, threads, tower)
        found, then = _second(first, second, pixels, pixels, threads, tower)
        alone_ms.append(alone.ms)
        ms.append(found.ms)
    assert alone.shared == 0
    off, seen = float(np.abs(then - rows).max()), 0.0
    if found.tower is not None and alone.tower is not None:
        seen = float(np.nanmax(np.abs(found.tower - alone.tower)))
    return Found(found.n_tiles, found.shared, off, seen, float(np.median(alone_ms)), float(np.median(ms)))


def _second(
    first: VlmFiles, second: VlmFiles, before: RGB, pixels: RGB, threads: int, tower: bool
) -> tuple[Encoded, NDArray[np.float32]]:
    """What the second VLM makes of a picture after the first has encoded ``before``, in a fresh process."""
    with Engine() as engine:
        one, other = (engine.load(half.model, half.mmproj, LoadOptions(threads=threads)) for half in (first, second))
        one.encode(before, tower=tower)
        encoded = other.encode(pixels, tower=tower)
        return encoded, other.embeddings(encoded)


def halves(model: zoo.ZooModel, folder: Path) -> tuple[VlmFiles, VlmFiles]:
    """A model of the zoo, and the same with another projector."""
    other = with_other_projector(model.mmproj, folder / f"other-{model.mmproj.name}")
    return VlmFiles(model.model, other), VlmFiles(model.model, model.mmproj)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    differ = False
    print(f"{'':16s}{'tiles':>6s}{'shared':>7s}{'alone ms':>10s}{'ms':>8s}{'ratio':>7s}  rows and attention off by")

    def tell(name: str, first: VlmFiles, second: VlmFiles, pixels: RGB) -> None:
        nonlocal differ
        found = compare(first, second, pixels, threads=args.threads, runs=args.runs)
        differ |= max(found.rows, found.attention) > 0
        print(f"{name:16s}{found.tiles:6d}{found.shared:7d}{found.alone_ms:10.1f}{found.ms:8.1f}"
              f"{found.ms / found.alone_ms:7.2f}  {found.rows}, {found.attention}", flush=True)  # fmt: skip

    for name in PAIRS:
        pair = pair_named(name)
        assert pair.guide is not None
        assert pair.model is not None
        tell(name, pair.guide, pair.model, images.load(DEMO).rgb)
    with tempfile.TemporaryDirectory() as folder:
        for name, row in zoo.FAMILIES.items():
            model = zoo.build(name, Path(folder))
            tell(name, *halves(model, Path(folder)), row.cases[0].images[0].pixels())
    return differ


if __name__ == "__main__":
    sys.exit(main())
