"""Accuracy of the demo pair against tokens kept: fixed shares, and budgets that hold a share of the guide's attention.

    python -m tests.budgets [--count 500] [--seed 20261123] [--method sgl+]

Prints one line a budget, from few tokens to many, and exits non-zero if ``--keep auto`` is more than a point less
accurate than ``--keep 0.35``, beyond chance, or keeps as many tokens. Each answer is a real prefill of the kept tokens.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import Encoded, ImagePart, LoadOptions, Vlm
from localvlm.pipeline import AskOptions, Pipeline
from localvlm.pruning import method_named, share_of
from localvlm.pruning.base import AUTO_SHARE, holding, top
from tests.scenes import MAX_TOKENS, Tally, make, normal, say

FIXED = (0.05, 0.09, 0.2, 0.35, 0.5, 0.64)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95, 0.98)
DEFAULT, AUTO = "keep 0.35", f"holds {AUTO_SHARE:g}"


@dataclass
class Curve:
    """What each budget kept and whether the answers were right, question by question."""

    tally: Tally = field(default_factory=Tally)
    kept: dict[str, list[int]] = field(default_factory=dict)

    def mean(self, budget: str, kind: str | None = None) -> float:
        """Mean number of tokens."""
        pairs = zip(self.kept[budget], self.tally.types, strict=True)
        return float(np.mean([k for k, t in pairs if kind in (None, t)]))


def _budgets(n: int, saliency: NDArray[np.float32]) -> dict[str, int]:
    fixed = {f"keep {share:g}": share_of(share, n) for share in FIXED}
    return fixed | {f"holds {share:g}": holding(share, n, saliency) for share in sorted({*SHARES, AUTO_SHARE})}


def _answers(
    model: Vlm, question: str, seen: Encoded, saliency: NDArray[np.float32], counts: set[int]
) -> dict[int, str]:
    """The model's answer from each number of tokens."""
    everything = np.arange(len(saliency), dtype=np.int32)
    return {k: normal(say(model, question, [ImagePart(seen, top(saliency, everything, k))])) for k in sorted(counts)}


def run(rows: Sequence[dict[str, str]], folder: Path, method: str, threads: int = 0) -> Curve:
    """Asks every question of ``rows`` (image, question, answer, type) with every budget."""
    curve = Curve()
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        model = pipeline.vlm("model")
        for row in rows:
            picture = images.load(folder / row["image"])
            look = pipeline.look([picture], row["question"], MAX_TOKENS)
            seen = model.encode(picture.rgb)
            saliency = pipeline.saliency(look, method_named(method).aggregation or "sum", [seen.layout])
            budgets = _budgets(len(saliency), saliency)
            answers = _answers(model, row["question"], seen, saliency, set(budgets.values()))
            curve.tally.types.append(row["type"])
            for name, k in budgets.items():
                curve.kept.setdefault(name, []).append(k)
                curve.tally.add(name, answers[k] == normal(row["answer"]))
            model.release(seen)
    return curve


def table(curve: Curve) -> str:
    """Mean tokens and exact match in %, over all questions and by type."""
    kinds = sorted(set(curve.tally.types))
    lines = [f"{'':12s}{'tokens':>8s}{'all':>7s}" + "".join(f"{kind:>16s}" for kind in kinds)]
    for name in sorted(curve.kept, key=curve.mean):
        cells = "".join(f"{curve.tally.percent(name, k):8.1f} ({curve.mean(name, k):5.1f})" for k in kinds)
        lines.append(f"{name:12s}{curve.mean(name):8.1f}{curve.tally.percent(name):7.1f}{cells}")
    return "\n".join(lines)


def misses(curve: Curve) -> list[str]:
    """Targets that are not reached, in words."""
    out = []
    mean, half = curve.tally.difference(AUTO, DEFAULT)
    if mean + half < -1:
        out.append(f"auto is {-mean:.1f} points below {DEFAULT}, wanted at most 1")
    if curve.mean(AUTO) >= curve.mean(DEFAULT):
        out.append(f"auto keeps {curve.mean(AUTO):.1f} tokens, wanted under {curve.mean(DEFAULT):.1f}")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=20261123)
    parser.add_argument("--method", choices=("sgl+", "sgl"), default=AskOptions().method)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        rows = [r for r in make(args.count, args.seed, Path(name)) if r["type"] != "describe"]
        curve = run(rows, Path(name), args.method, args.threads)
    print(f"{args.count} held-out scenes, seed {args.seed}, {args.method}: mean tokens, exact match in %")
    print(table(curve))
    mean, half = curve.tally.difference(AUTO, DEFAULT)
    print(f"{AUTO} - {DEFAULT}: {mean:+.1f} +- {half:.1f} points (paired 95 %)")
    missed = misses(curve)
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
