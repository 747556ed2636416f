"""Whole processes: ``python -m localvlm.bench.start`` answers one question from nothing, as its standard input says."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localvlm.answers import Pair, VlmFiles
from localvlm.bench.cases import Bench, Case, Prepared, Setting
from localvlm.engine.api import LoadOptions
from localvlm.errors import EngineCrashed
from localvlm.images import load

__all__ = ["Process", "from_start"]


@dataclass(frozen=True)
class Process:
    """Seconds from the start of a process to the first token of its answer (None: not known) and to its end, and the
    most bytes that its worker held, of this case alone.
    """

    first: float | None
    whole: float
    peak: int | None


def from_start(bench: Bench, case: Case, picture: Path, question: str) -> Process:
    """One answer by a process of its own.

    Raises:
        EngineCrashed: it failed.
    """
    order = json.dumps(_packed(bench, case, picture, question))
    command = [sys.executable, "-m", "localvlm.bench.start"]
    began = time.monotonic()  # the same clock in all processes
    done = subprocess.run(command, input=order, capture_output=True, text=True, check=False)
    whole = time.monotonic() - began
    if done.returncode:
        raise EngineCrashed(f"case '{case.name}' failed from its start: {done.stderr.strip()[-300:]}")
    told = json.loads(done.stdout)
    return Process(told["first"] - began, whole, told["peak"])


def _packed(bench: Bench, case: Case, picture: Path, question: str) -> dict[str, Any]:
    setting = bench.setting
    files = {role: getattr(setting.pair, role) for role in ("guide", "model")}
    return {
        "files": {role: found and [str(found.model), str(found.mmproj)] for role, found in files.items()},
        "guide": asdict(setting.guide),
        "model": asdict(setting.model),
        "answer": setting.answer,
        "case": asdict(case),
        "prepared": asdict(bench.prepared(case)),
        "picture": str(picture),
        "question": question,
    }


def _answer(order: dict[str, Any]) -> dict[str, Any]:
    """When the first token came, and the worker's peak."""
    from localvlm.engine.client import Engine

    files = {role: found and VlmFiles(*map(Path, found)) for role, found in order["files"].items()}
    options = {role: LoadOptions(**order[role]) for role in ("guide", "model")}
    setting = Setting(Pair(None, **files), **options, answer=order["answer"])
    case = Case(**order["case"])
    with Bench(setting, Engine) as bench:
        bench.know(case, Prepared(**order["prepared"]))
        picture = load(order["picture"])
        began = time.monotonic()
        run = bench.run(case, [picture], order["question"])
        total = time.monotonic() - began  # loading included, which the first token of plain's clock may not be
        return {"first": began + total - (run.total_ms - run.first_ms) / 1e3, "peak": run.peak}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_answer(json.load(sys.stdin))))
