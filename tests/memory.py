"""Memory as it is predicted and as workers take it: ``python -m tests.memory [FILES ...] [--shapes NAMES]``.

Each of FILES is a model, or a guide and a model as GUIDE+MODEL; projectors lie beside them. Without any, pairs of the
zoo and those that come along are loaded. Each runs in a worker of its own: a picture is encoded, a prompt prefilled,
some tokens are decoded; the most that the worker held (the high-water mark of its resident set, Linux) stands beside
:attr:`localvlm.memory.Need.resident`. Leaves with 1 where a prediction is off by more than 10 %, or under by more than
3 %.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from localvlm.answers import AskOptions, Pair
from localvlm.bench.machine import Peak
from localvlm.bench.presets import PRESETS
from localvlm.bench.shapes import write_vlm
from localvlm.catalog import pair_named, vlm_files
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.images import Image
from localvlm.memory import Asked, Need, asked_of, pair_need, table
from localvlm.pipeline import Pipeline
from localvlm.room import told
from tests import zoo

__all__ = ["OVER", "UNDER", "Case", "Found", "measure", "own_cases"]

OVER, UNDER = 0.10, 0.03
ONE = LoadOptions(threads=1)
KEEP, TOKENS = 0.35, 8
QUESTION = "What is the thing in red, and what lies beside it?"


@dataclass(frozen=True)
class Case:
    """A pair, or one VLM of it, and how it is loaded and asked."""

    name: str
    pair: Pair
    size: tuple[int, int] = (336, 336)
    options: LoadOptions = ONE
    method: str = ""
    layer: int = 0

    @property
    def how(self) -> AskOptions:
        """By default a guide chooses, and without one nothing leaves."""
        method = self.method or ("sgl+" if self.pair.guide else "none")
        keep = None if method == "none" else KEEP
        return AskOptions(method=method, keep=keep, layer=self.layer, max_tokens=TOKENS, guide_max_tokens=TOKENS)

    @property
    def asked(self) -> Asked:
        return replace(asked_of(self.how), sizes=(self.size,), text=len(QUESTION))


@dataclass(frozen=True)
class Found:
    """Bytes predicted, and the most a worker held."""

    case: Case
    need: Need
    peak: int

    @property
    def off(self) -> float:
        """Share that the prediction is over; under if it is negative."""
        return self.need.resident / self.peak - 1

    @property
    def ok(self) -> bool:
        return -UNDER <= self.off <= OVER


def measure(case: Case) -> Found:
    """Predicts, then asks."""
    need = pair_need(case.pair, case.options, case.options, case.asked)
    width, height = case.size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)
    with Engine() as engine, Pipeline(case.pair, engine, guide=case.options, model=case.options) as pipeline:
        pipeline.ask([Image(pixels, "noise")], QUESTION, case.how)
        peak = Peak(engine).read()
    assert peak is not None
    return Found(case, need, peak)


def own_cases(folder: Path) -> Iterator[Case]:
    """Those that need no other files."""
    for name in ("demo", "demo-tiles"):
        yield Case(name, pair_named(name))
    for family in ("qwen25vl", "smolvlm", "gemma3"):
        model = zoo.build(family, folder)
        yield Case(f"zoo {family}", _alone(model.model))
    guide, model = zoo.pair(folder)
    yield Case("zoo llava15, a pair", _pair(guide.model, model.model))
    for method in ("fastv", "sparsevlm", "pyramiddrop"):
        yield Case(f"demo's model, {method}", Pair("demo", None, pair_named("demo").model), method=method)
    yield Case("demo, --layer 6", pair_named("demo"), layer=6)
    yield Case("zoo llava15, a large picture", _alone(guide.model), (2000, 1500))


def shape_cases(folder: Path, names: Sequence[str]) -> Iterator[Case]:
    """VLMs of the presets of `localvlm bench`, of real shapes and random weights; their files stay in ``folder``.
    Each is asked with nothing pruned, and with a method that drops tokens between its layers.
    """
    for name in names:
        shape, size = _SHAPES[name]
        vlm = _alone(write_vlm(folder, shape)[0])
        yield Case(f"{name} ({shape.quant})", vlm, size)
        for method in ("fastv", "sparsevlm"):
            yield Case(f"{name}, {method}", vlm, size, method=method)


_SHAPES = {vlm.name: (vlm, preset.size) for preset in PRESETS.values() for vlm in (preset.guide, preset.model)}


def _alone(model: Path) -> Pair:
    return Pair(model.stem, None, vlm_files(model, None, "--mmproj"))


def _pair(guide: Path, model: Path) -> Pair:
    files = [vlm_files(path, None, "--mmproj") for path in (guide, model)]
    return Pair(f"{guide.stem}+{model.stem}", files[0], files[1])


def _given(text: str, options: LoadOptions, size: tuple[int, int], method: str, layer: int) -> Case:
    paths = [Path(part) for part in text.split("+")]
    pair = _pair(*paths) if len(paths) == 2 else _alone(paths[0])
    return Case(str(pair.name), pair, size, options, method, layer)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--shapes", nargs="*", default=[], choices=sorted(_SHAPES), metavar="NAME")
    parser.add_argument("--folder", type=Path, help="where the files of --shapes stay")
    parser.add_argument("--method", default="")
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--size", type=int, nargs=2, default=(336, 336))
    args = parser.parse_args(arguments)
    options = LoadOptions(threads=1, kv_type=args.kv_type)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        size = args.size[0], args.size[1]
        given = [_given(text, options, size, args.method, args.layer) for text in args.files]
        shaped = shape_cases(args.folder or Path(folder), args.shapes)
        cases = given or shaped if args.files or args.shapes else own_cases(Path(folder))
        print("| what | predicted | measured | off | parts |\n|---|---|---|---|---|")
        for case in cases:
            found = measure(case)
            failed += not found.ok
            mark = "" if found.ok else " MISSED"
            sizes = f"{told(found.need.resident)} | {told(found.peak)} | {found.off:+.1%}{mark}"
            print(f"| {case.name} | {sizes} | {table(found.need)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
