"""The promises of SECURITY.md, tried: ``python -m tests.bench [--quick] [--rows R1,I3]``.

Prints a line a row: cases that ran and passed, the slowest case, the most memory that its processes held together.
Leaves with 1 if a case failed, or a row has nothing that ran and no reason for it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from tests.bench.rows import ROWS
from tests.bench.run import Result, run


def line(result: Result) -> str:
    """A row of the printed table."""
    row = result.row
    mark = "FAIL" if result.failed or not result.cases else "pass" if result.ran else "none"
    figures = f"{result.ran:,} | {result.passed:,} | {result.seconds:.1f} s | {result.peak / 1e6:,.0f} MB"
    return f"| {row.id} | {row.what} | {figures} | {mark} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the rows asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about three minutes: no slow tests, short sweeps")
    parser.add_argument("--rows", default="", help="ids, with commas between; all without it")
    parser.add_argument(
        "--jobs", type=int, help="rows at a time; 2 with --quick, else 1, so that times are a row's own"
    )
    parser.add_argument("--damaged", metavar="N", type=int, default=10_000, help="files of row R3, without --quick")
    options = parser.parse_args(arguments)
    os.environ["BENCH_DAMAGED"] = str(options.damaged)
    asked = {name.strip().upper() for name in options.rows.split(",") if name.strip()}
    if unknown := asked - {row.id for row in ROWS}:
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {', '.join(row.id for row in ROWS)}")
    started, results = time.monotonic(), []
    chosen = [row for row in ROWS if not asked or row.id in asked]
    print("| id | what is tried | cases | passed | worst time | peak memory | |\n|---|---|---|---|---|---|---|")
    with ThreadPoolExecutor(options.jobs or (2 if options.quick else 1)) as rows:
        for result in rows.map(lambda row: run(row, quick=options.quick), chosen):
            results.append(result)
            print(line(result), flush=True)
    _notes(results)
    failed = [result for result in results if result.failed or not result.cases]
    ran, passed = sum(r.ran for r in results), sum(r.passed for r in results)
    print(f"\n{len(results)} rows, {ran:,} cases, {passed:,} passed, in {time.monotonic() - started:.0f} s")
    return int(bool(failed))


def _notes(results: Sequence[Result]) -> None:
    """Why cases did not run, and what failed."""
    for result in results:
        for reason, count in result.reasons.items():
            print(f"\n{result.row.id}: {count} not run: {reason}", end="")
        for case in result.failed:
            print(f"\n{result.row.id}: FAILED {case.name[:120]}: {case.reason[:300]}", end="")
        if not result.cases:
            print(f"\n{result.row.id}: FAILED, there is nothing to run", end="")
    print()


if __name__ == "__main__":
    sys.exit(main())
