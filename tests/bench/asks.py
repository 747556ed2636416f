"""Sweeps over whole questions: Ctrl-C at any time, killed workers, memory that is too little or was predicted."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random

import psutil

import localvlm
from tests import kills as killing
from tests import memory as measured
from tests import zoo
from tests.bench.run import Case
from tests.damage import Gguf

__all__ = ["ctrl_c", "half_memory", "kills", "memory"]

ASK = (
    sys.executable,
    "-m",
    "localvlm",
    "ask",
    "--pair",
    "demo",
    "--threads",
    "1",
    "--max-tokens",
    "32",
    "--layer",
    "2",
)
QUESTION = ("example", "What is on the picture?")
ANSWERED_S = 2.0
"""A second, and what others on the machine add."""
PLACES, PLACES_QUICK = 50, 6
SEED = 20261129
PACKAGE = Path(localvlm.__file__).resolve().parent
STARTING = r'localvlm/__init__\.py"|localvlm/__main__\.py", line \d+, in <module>\n.*_signal'
"""What runs before a Ctrl-C is the system's to answer."""
OURS = re.compile(rf'File "{re.escape(str(PACKAGE.parent))}/(?!{STARTING})(localvlm|models|tui)/')
"""A file of ours in a traceback."""
BIG = (32_768, 49_152)
"""Shape of a tensor of 3.2 GB, which costs the disk nothing: nobody writes it."""


def ctrl_c(quick: bool, folder: Path) -> Iterator[Case]:
    """C1: SIGINT at random times of a question that takes as long as it takes here."""
    started = time.monotonic()
    subprocess.run([*ASK, *QUESTION], capture_output=True, check=True, timeout=120)
    whole, random = time.monotonic() - started, Random(SEED)
    for i in range(PLACES_QUICK if quick else PLACES):
        delay = random.random() * 1.05 * whole
        yield Case.within(ANSWERED_S, partial(_interrupted, f"{i}: after {delay:.3f} of {whole:.3f} s", delay))


def _interrupted(name: str, delay: float) -> Case:
    process = subprocess.Popen([*ASK, *QUESTION], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(delay)
    children = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.send_signal(signal.SIGINT)
    sent = time.monotonic()
    try:
        out, err = process.communicate(timeout=30)
    except subprocess.TimeoutExpired:
        process.kill()
        return Case.of(name, "hung", 30.0)
    took = time.monotonic() - sent
    if "Traceback" in err and not OURS.search(err):
        return Case(name, "skipped", took, "Python itself was starting, before __main__ could ready it for a Ctrl-C")
    _, alive = psutil.wait_procs(children, timeout=5)
    miss = f"left behind: {[p.pid for p in alive]}" if alive else ""
    if "Traceback" in err or "Exception" in err:
        miss = f"says {err[-300:]}"
    elif process.returncode not in (0, 130, -signal.SIGINT):
        miss = f"exit {process.returncode}: {err[-200:]}"
    elif out and not out.endswith("\n"):
        miss = f"the answer ends in {out[-20:]!r}"
    return Case.of(name, miss, took)


def kills(quick: bool, folder: Path) -> Iterator[Case]:
    """R8: three signals in all stages of a question."""
    for kill in killing.campaign(4 if quick else 21, 1, folder):
        yield Case.of(f"{kill.number.name} in {kill.stage}{', too late' if kill.late else ''}", kill.miss)


def half_memory(quick: bool, folder: Path) -> Iterator[Case]:
    """M2: a model of 3.2 GB, in an address space and in a worker of half of that."""
    model, mmproj = _big(folder)
    ask = [sys.executable, "-m", "localvlm", "ask", "-m", str(model), "--mmproj", str(mmproj), "--method", "none"]
    limit = BIG[0] * BIG[1]  # bytes: half of 2 a number
    if shutil.which("prlimit") is None:
        yield Case("prlimit --as", "skipped", 0.0, "there is no prlimit here")
    else:
        yield _refused("prlimit --as", [f"prlimit --as={limit}".split(), ask], {})
    yield _refused("LOCALVLM_WORKER_MEMORY", [ask], {"LOCALVLM_WORKER_MEMORY": str(limit)})


def _refused(name: str, parts: list[list[str]], environment: dict[str, str]) -> Case:
    started = time.monotonic()
    command = [word for part in parts for word in part] + [*QUESTION]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )
    said = done.stderr
    miss = "" if done.returncode == 5 and not done.stdout else f"exit {done.returncode}: {said[-300:]}"
    for words in ("weights 3.2 GB", "cache ", "are free", "--max-memory 0"):
        if words not in said:
            miss = miss or f"nothing of {words!r} in {said[-300:]}"
    return Case.of(name, miss, time.monotonic() - started)


def _big(folder: Path) -> tuple[Path, Path]:
    """A pair of the zoo whose model has one more tensor, of which the disk holds nothing."""
    half = zoo.build("llava15", folder)
    file = Gguf.parse(half.model.read_bytes())
    place = -(-len(file.data) // 32) * 32
    file.tensors.append((b"more.weight", list(BIG), 1, place))
    path = folder / "big.gguf"
    with path.open("wb") as out:
        out.write(file.bytes())
        out.truncate(len(file.head()) + place + 2 * BIG[0] * BIG[1])
    return path, half.mmproj


def memory(quick: bool, folder: Path) -> Iterator[Case]:
    """M1: those of `python -m tests.memory`, and one with a quantized KV cache."""
    cases = list(measured.own_cases(folder))
    cases.append(replace(cases[0], name="demo, q8_0", options=replace(cases[0].options, kv_type="q8_0")))
    for case in cases[2:4] if quick else cases:
        started = time.monotonic()
        found = measured.measure(case)
        miss = "" if found.ok else f"{found.off:+.1%}"
        yield Case.of(f"{case.name} {found.off:+.1%}", miss, time.monotonic() - started)
