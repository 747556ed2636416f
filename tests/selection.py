"""What a method's choice costs: ``python -m tests.selection [--n 3000] [--width 4096] [--keep 300] [--rounds 5]``.

Every method that chooses before the LLM, against one n x n x width product in float32, measured in turn in the same
process; medians. Exits non-zero where a choice takes longer than that product, or scope's longer than three.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from localvlm.pruning import METHODS, Inputs, Method

LIMITS = {"scope": 3.0}
"""Products that a method may take; 1 for all others."""


def tokens(n: int, width: int, seed: int) -> Inputs:
    """One picture's tokens in clusters of eight, as neighbours are alike; the tower looks at few of them."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((max(2, n // 8), width), np.float32)
    features = centres[rng.integers(len(centres), size=n)] + 0.4 * rng.standard_normal((n, width), np.float32)
    return Inputs(
        n=n,
        candidates=np.arange(n, dtype=np.int32),
        grids=(None,),
        counts=(n,),
        saliency=rng.random(n, np.float32),
        features=features,
        tower=rng.random((24, n), np.float32) ** 3,
        text=rng.standard_normal((20, width), np.float32),
    )


UNTRAINED = [name for name, method in METHODS.items() if method.shapes is None]


def seconds(run: Callable[[], object]) -> float:
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def choice(method: Method, given: Inputs, k: int) -> Callable[[], object]:
    chosen = method.select if method.average is None else method.average
    return lambda: chosen(given, k)


def measured(given: Inputs, k: int, rounds: int, names: Sequence[str]) -> dict[str, list[float]]:
    """Seconds of each round, of the product and of each method by name; a first round is left out."""
    assert given.features is not None
    left, right = given.features, given.features.copy()  # of one array with itself, BLAS does half the work
    runs = {"product": lambda: left @ right.T, **{name: choice(METHODS[name], given, k) for name in names}}
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            took = seconds(run)
            if number:
                found[name].append(took)
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--keep", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", default=",".join(UNTRAINED))
    args = parser.parse_args(argv)
    found = measured(tokens(args.n, args.width, args.seed), args.keep, args.rounds, args.methods.split(","))
    product = statistics.median(found["product"])
    print(f"{args.keep} of {args.n} tokens, {args.width} wide; {args.rounds} rounds\n{'':12}  seconds  products")
    missed = []
    for name, took in found.items():
        median = statistics.median(took)
        print(f"{name:12}  {median:7.3f}  {median / product:8.2f}")
        if median > LIMITS.get(name, 1.0) * product and name != "product":
            missed.append(f"{name} takes {median / product:.2f} products, {LIMITS.get(name, 1.0):g} allowed")
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
