"""Runs one sweep of the bench: ``python -m tests.bench.sweeps NAME [--quick]``.

A sweep yields cases as it goes; they go to the file ``BENCH_CASES``, or to the screen.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from tests.bench.run import Case

__all__ = ["SWEEPS", "cases"]

Sweep = Callable[[bool, Path], Iterator[Case]]
SWEEPS = {
    "ctrl_c": "asks",
    "damaged_files": "files",
    "faults": "long_ones",
    "fuzz": "long_ones",
    "half_memory": "asks",
    "keys": "files",
    "kills": "asks",
    "known_damage": "files",
    "long": "long_ones",
    "markers": "prompts",
    "memory": "asks",
    "retold": "prompts",
    "specials": "prompts",
    "truncations": "files",
}
"""Modules of this package by what they have."""


def cases(name: str, *, quick: bool, folder: Path) -> Iterator[Case]:
    """The cases of a sweep. What it raises is the last of them."""
    from importlib import import_module

    sweep: Sweep = getattr(import_module(f"tests.bench.{SWEEPS[name]}"), name)
    try:
        yield from sweep(quick, folder)
    except Exception as error:  # noqa: BLE001  a sweep that breaks is a case that failed
        yield Case(name, "failed", 0.0, f"{type(error).__name__}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs it; 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(SWEEPS))
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it in what it starts in the background
    out, failed = os.environ.get("BENCH_CASES"), 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["LOCALVLM_HOME"] = str(Path(folder) / "home")
        for case in cases(options.name, quick=options.quick, folder=Path(folder)):
            failed += case.outcome == "failed"
            if out:
                with Path(out).open("a") as file:
                    file.write(json.dumps(asdict(case)) + "\n")
            else:
                print(f"{case.outcome:8}{case.seconds:6.2f} s  {case.name}  {case.reason}")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
