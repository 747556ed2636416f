"""Runs the targets for some time each, an input a seed, and tells what was found."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

from tests.bench.run import Case
from tests.fuzz import targets

__all__ = ["TARGETS", "Finding", "Fuzzed", "case", "fuzz"]

TARGETS = ("header", "prompt", "sanitizer", "images", "wire", "tap")
_PYTHON: dict[str, Callable[[Path], Callable[[Random], bytes]]] = {
    "header": targets.Header,
    "prompt": targets.Prompt,
    "sanitizer": targets.Sanitize,
    "images": targets.Images,
    "wire": targets.Wire,
}
HUNG_S = 10
"""Seconds of an input after which it counts as hung."""
MAY_LOOP = frozenset(("prompt",))
"""A template is a program, which the client of the worker ends after its time."""
NATIVE = Path(__file__).resolve().parents[2] / "native"
CORPUS = Path(__file__).parent / "corpus"
SOURCES = ("attention", "cells", "check", "cut", "dispatch", "guard", "kernels", "llm", "stage", "tap", "tower")


@dataclass(frozen=True)
class Finding:
    """What an input did that it must not; ``number`` and the seed of the run make it again."""

    number: int
    said: str


@dataclass
class Fuzzed:
    """What a target was put through.

    Attributes:
        stopped: inputs that were ended after their time, where that is allowed.
        reason: why nothing ran.
    """

    target: str
    seed: int
    inputs: int = 0
    seconds: float = 0.0
    slowest: float = 0.0
    stopped: int = 0
    findings: list[Finding] = field(default_factory=list)
    reason: str = ""


class _Hung(BaseException):
    """Raised by the alarm: no `except Exception` takes it."""


def _alarm(*_: object) -> None:
    raise _Hung


def fuzz(target: str, seconds: float, seed: int, first: int = 0, count: int | None = None) -> Fuzzed:
    """Tries inputs ``first``, ``first`` + 1 ... of a seed, for so long or so many."""
    if target == "tap":
        return _fuzz_tap(seconds, seed)
    found, started = Fuzzed(target, seed), time.monotonic()
    before = signal.signal(signal.SIGALRM, _alarm)
    with tempfile.TemporaryDirectory() as folder:
        attempt = _PYTHON[target](Path(folder))
        started = time.monotonic()
        while found.inputs != count and time.monotonic() - started < seconds:
            number = first + found.inputs
            began = time.monotonic()
            signal.alarm(HUNG_S)
            try:
                attempt(Random(f"{target} {seed} {number}"))
            except _Hung:
                found.stopped += 1
                if target not in MAY_LOOP:
                    found.findings.append(Finding(number, f"took over {HUNG_S} s"))
            except Exception as error:  # noqa: BLE001  exactly what is looked for
                found.findings.append(Finding(number, f"{type(error).__name__}: {error}"[:500]))
            finally:
                signal.alarm(0)
            found.inputs += 1
            found.slowest = max(found.slowest, time.monotonic() - began)
    signal.signal(signal.SIGALRM, before)
    found.seconds = time.monotonic() - started
    return found


def _fuzz_tap(seconds: float, seed: int) -> Fuzzed:
    """The native tap, by libFuzzer under ASan and UBSan."""
    found = Fuzzed("tap", seed)
    with tempfile.TemporaryDirectory() as folder:
        program, found.reason = _build_tap(Path(folder))
        if found.reason:
            return found
        corpus = Path(folder) / "corpus"
        shutil.copytree(CORPUS / "tap", corpus)
        limits = [f"-max_total_time={max(1, round(seconds))}", f"-seed={seed % 2**32}", "-rss_limit_mb=3000"]
        command = [program, *limits, "-max_len=1024", "-len_control=0", "-print_final_stats=1", f"{corpus}"]
        environment = {**os.environ, "ASAN_OPTIONS": "allocator_may_return_null=1"}
        started = time.monotonic()
        done = subprocess.run(command, capture_output=True, cwd=folder, env=environment, check=False)
        found.seconds = time.monotonic() - started
        said = done.stderr.decode("utf-8", "replace")
        runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
        found.inputs = int(runs[1]) if runs else 0
        if done.returncode:
            where = re.search(r"SUMMARY: .*|ERROR: .*|runtime error: .*|GGML_ASSERT.*", said)
            input_ = re.search(r"Base64: (\S+)", said)
            found.findings.append(Finding(0, f"{where[0] if where else said[-300:]} {input_[0] if input_ else ''}"))
    return found


def _build_tap(folder: Path) -> tuple[str, str]:
    """(the fuzzer's program, "") or ("", why it cannot be built)."""
    clang, spec = shutil.which("clang"), importlib.util.find_spec("llama_cpp")
    if clang is None or spec is None or spec.origin is None:
        return "", "clang, or llama-cpp-python, is not here"
    package, program = Path(spec.origin).parent, folder / "tap_fuzz"
    libraries = [str(path) for name in ("base", "cpu") for path in package.glob(f"lib/libggml-{name}.so.0")]
    if len(libraries) != 2:
        return "", "llama.cpp's libraries are not those of Linux"
    sources = [f"tests/{name}.c" for name in ("tap_fuzz", "fixture")] + [f"{name}.c" for name in SOURCES]
    flags = [
        "-g",
        "-O1",
        "-std=gnu11",
        "-D_GNU_SOURCE",
        '-DLV_GGML_VERSION=""',
        "-DLV_GGML_OVERHEAD=0",
        "-fno-math-errno",
    ]
    checks = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    places = ["-I.", f"-I{package.parent / 'include'}", f"-Wl,-rpath,{package / 'lib'}", "-lm", "-o", str(program)]
    done = subprocess.run(
        [clang, *flags, *checks, *sources, *libraries, *places], cwd=NATIVE, capture_output=True, text=True, check=False
    )
    if done.returncode and "fuzzer" in done.stderr and "cannot find" in done.stderr:
        return "", "clang has no libFuzzer here"
    return str(program), f"it does not build: {done.stderr[-300:]}" if done.returncode else ""


def case(target: str, seconds: float, seed: int) -> Case:
    """A target as one case of the bench."""
    found = fuzz(target, seconds, seed)
    if found.reason:
        return Case(target, "skipped", 0.0, found.reason)
    miss = "; ".join(f"input {one.number}: {one.said}" for one in found.findings[:3])
    if not found.inputs:
        miss = miss or "no input was tried"
    return Case.of(f"{target}: {found.inputs:,} inputs", miss, found.slowest)
