"""Runs rows of the bench, each part in a process of its own whose time and memory are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from tests.bench.rows import TESTS, Row, nodes_of

__all__ = ["Case", "Result", "run"]

LOOK_S = 0.1
"""Seconds between two looks at the memory of a row's processes."""


@dataclass(frozen=True)
class Case:
    """One thing tried; ``outcome`` is that of pytest, ``reason`` why it failed or did not run."""

    name: str
    outcome: str = "passed"
    seconds: float = 0.0
    reason: str = ""

    @classmethod
    def of(cls, name: str, miss: str, seconds: float = 0.0) -> Case:
        """Passed unless something is ``miss``."""
        return cls(name, "failed" if miss else "passed", seconds, miss)

    @classmethod
    def within(cls, bound: float, attempt: Callable[[], Case], tries: int = 3) -> Case:
        """The first attempt that took at most ``bound`` seconds: a slow one may tell of what else the machine does."""
        for _ in range(tries):
            case = attempt()
            if case.outcome != "passed" or case.seconds <= bound:
                return case
        return replace(
            case, outcome="failed", reason=f"took {case.seconds:.1f} s, {bound:g} were allowed, {tries} times"
        )


@dataclass
class Result:
    """What came of a row.

    Attributes:
        seconds: of its slowest case.
        peak: bytes that its processes held together at most, pages that they share counted for each.
    """

    row: Row
    cases: list[Case] = field(default_factory=list)
    peak: int = 0
    took: float = 0.0

    @property
    def ran(self) -> int:
        return sum(case.outcome != "skipped" for case in self.cases)

    @property
    def passed(self) -> int:
        return sum(case.outcome == "passed" for case in self.cases)

    @property
    def failed(self) -> list[Case]:
        return [case for case in self.cases if case.outcome == "failed"]

    @property
    def reasons(self) -> dict[str, int]:
        """Why cases did not run, and how many."""
        found: dict[str, int] = {}
        for case in self.cases:
            if case.outcome == "skipped":
                why = case.reason.removeprefix("Skipped: ")
                found[why] = found.get(why, 0) + 1
        return found

    @property
    def seconds(self) -> float:
        return max((case.seconds for case in self.cases), default=0.0)


def run(row: Row, *, quick: bool) -> Result:
    """Runs the tests and sweeps of a row."""
    result, started = Result(row), time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "cases.jsonl"
        for command in _commands(row, quick, Path(folder)):
            out.touch()
            code = _watched(command, out, result)
            found = [Case(**json.loads(line)) for line in out.read_text().splitlines()]
            out.unlink()
            result.cases += found
            if code not in (0, 5) and not any(case.outcome == "failed" for case in found):
                result.cases.append(Case(" ".join(command[1:4]), "failed", 0.0, f"left with {code}"))
    result.took = time.monotonic() - started
    return result


def _commands(row: Row, quick: bool, folder: Path) -> list[list[str]]:
    out = []
    if nodes := nodes_of(row):
        which = [] if quick else ["-m", "not gpu and not network"]
        places = [str(TESTS / node) for node in nodes]
        quiet = ["-q", "-p", "no:cacheprovider", "-p", "tests.bench.plugin", "--basetemp", str(folder / "pytest")]
        out.append([sys.executable, "-m", "pytest", *quiet, *_plugins(nodes), *which, *places])
    pace = ["--quick"] if quick else []
    return out + [[sys.executable, "-m", "tests.bench.sweeps", name, *pace] for name in row.sweeps]


def _plugins(nodes: Sequence[str]) -> list[str]:
    """Those that these tests need: all that are installed take seconds to load, once a row."""
    if any(node.startswith("tui/") for node in nodes):
        return []
    return ["--disable-plugin-autoload", "-p", "pytest_timeout"]


def _watched(command: Sequence[str], out: Path, result: Result) -> int:
    """Runs a command to its end; its processes' memory goes into ``result``."""
    environment = {**os.environ, "BENCH_CASES": str(out)}
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(command, cwd=TESTS.parent, env=environment, stdout=said, stderr=subprocess.STDOUT)
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            result.peak = max(result.peak, _held(watched))
            time.sleep(LOOK_S)
        if process.returncode not in (0, 5) and os.environ.get("BENCH_VERBOSE"):
            said.seek(0)
            sys.stderr.write(said.read().decode("utf-8", "replace"))
        return process.returncode


def _held(process: psutil.Process) -> int:
    total = 0
    try:
        for one in (process, *process.children(recursive=True)):
            total += one.memory_info().rss
    except psutil.Error:  # it ended meanwhile
        pass
    return total
