"""Memory as it is predicted and as workers take it: ``python -m tests.memory [FILES ...]``.

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
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localvlm.answers import AskOptions, Pair
from localvlm.bench.machine import Peak
from localvlm.catalog import pair_named, vlm_files
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.images import Image
from localvlm.memory import Asked, Need, pair_need, table
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

    @property
    def asked(self) -> Asked:
        return Asked((self.size,), text=len(QUESTION), max_tokens=TOKENS, kept=KEEP if self.pair.guide else 1.0)


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
    method, keep = ("sgl+", KEEP) if case.pair.guide else ("none", None)
    options = AskOptions(method=method, keep=keep, max_tokens=TOKENS, guide_max_tokens=TOKENS)
    with Engine() as engine, Pipeline(case.pair, engine, guide=case.options, model=case.options) as pipeline:
        pipeline.ask([Image(pixels, "noise")], QUESTION, options)
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
    yield Case("zoo llava15, a large picture", _alone(guide.model), (2000, 1500))


def _alone(model: Path) -> Pair:
    return Pair(model.stem, None, vlm_files(model, None, "--mmproj"))


def _pair(guide: Path, model: Path) -> Pair:
    files = [vlm_files(path, None, "--mmproj") for path in (guide, model)]
    return Pair(f"{guide.stem}+{model.stem}", files[0], files[1])


def _given(text: str, options: LoadOptions, size: tuple[int, int]) -> Case:
    paths = [Path(part) for part in text.split("+")]
    pair = _pair(*paths) if len(paths) == 2 else _alone(paths[0])
    return Case(str(pair.name), pair, size, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*")
    parser.add_argument("--kv-type", default="f16")
    parser.add_argument("--size", type=int, nargs=2, default=(336, 336))
    args = parser.parse_args(arguments)
    options = LoadOptions(threads=1, kv_type=args.kv_type)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        cases = [_given(text, options, tuple(args.size)) for text in args.files] or own_cases(Path(folder))
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
