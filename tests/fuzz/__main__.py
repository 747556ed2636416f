"""Seeded fuzzing: ``python -m tests.fuzz [--minutes N] [--target NAME] [--seed N] [--input N]``.

Each target runs for its share of the minutes. Inputs come from the seed alone: ``--target T --seed S --input N`` makes
one again. The tap is fuzzed by libFuzzer, from the inputs in ``tests/fuzz/corpus/tap``. Leaves with 1 if something was
found.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from tests.fuzz.run import TARGETS, fuzz


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints a line a target, and each finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--target", choices=TARGETS, action="append")
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--input", type=int, help="tries this one alone")
    options = parser.parse_args(arguments)
    chosen, failed = options.target or TARGETS, False
    for target in chosen:
        first, count = (0, None) if options.input is None else (options.input, 1)
        found = fuzz(target, 60 * options.minutes / len(chosen), options.seed, first, count)
        if found.reason:
            print(f"{target}: not run: {found.reason}")
            continue
        stopped = f", {found.stopped} ended after their time" if found.stopped else ""
        print(
            f"{target}: {found.inputs:,} inputs in {found.seconds:.0f} s, seed {found.seed}, slowest "
            f"{found.slowest:.2f} s{stopped}, {len(found.findings)} findings",
            flush=True,
        )
        for one in found.findings[:20]:
            print(f"  input {one.number}: {one.said}")
        failed |= bool(found.findings)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
