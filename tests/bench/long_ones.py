"""Sweeps that have commands of their own: long runs, faults, fuzzing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tests import faults as failing
from tests import fuzz as fuzzing
from tests import long as lasting
from tests.bench.run import Case

__all__ = ["faults", "fuzz", "long"]

SEED = 20261129


def long(quick: bool, folder: Path) -> Iterator[Case]:
    """A2: ``python -m tests.long``."""
    report = lasting.run(40 if quick else 5000, SEED)
    for what, miss in report.misses():
        yield Case.of(what, miss)
    for number in range(report.questions):
        yield Case.of(f"question {number}", "", report.seconds / report.questions)


def faults(quick: bool, folder: Path) -> Iterator[Case]:
    """A3: ``python -m tests.faults``."""
    yield from failing.campaign(quick, folder)


def fuzz(quick: bool, folder: Path) -> Iterator[Case]:
    """A4: ``python -m tests.fuzz``, some seconds a target; each finding is a case, and so is each target."""
    for target in fuzzing.TARGETS:
        yield fuzzing.case(target, seconds=1.0 if quick else 60.0, seed=SEED)
