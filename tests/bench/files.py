"""Sweeps over model files: cut short, keys set to extremes, damaged at random."""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.engine.gguf_header import read_header
from localvlm.errors import LocalvlmError, NotGguf
from tests import damage
from tests.bench.run import Case
from tests.damage import Gguf, Runner

__all__ = ["damaged_files", "keys", "known_damage", "truncations"]

PLACES = 64
REFUSED_S = 2.0
DAMAGED, DAMAGED_QUICK = 10_000, 60
FIRST_SEED = 200_000
CORPUS = Path(__file__).parent / "corpus"
ALLOWED = {0, 3, 4, 5, 9}
"""Exit codes that a damaged file may lead to; 0: the value did no harm."""


def truncations(quick: bool, folder: Path) -> Iterator[Case]:
    """R1: the engine's answer to each place, the command line's to some."""
    runner = Runner(folder)
    with Engine() as engine:
        for name, files in damage.pairs(folder / "zoo").items():
            for which in (0, 1):
                raw = files[which].read_bytes()
                places = _places(files[which], raw)
                for n, end in enumerate(places[:: 11 if quick else 1]):
                    cut = list(files)
                    cut[which] = folder / f"cut-{files[which].name}"
                    cut[which].write_bytes(raw[:end])
                    where = f"{name} {('model', 'mmproj')[which]} cut to {end} of {len(raw)} bytes"
                    yield Case.within(REFUSED_S, partial(_refused, engine, cut, cut[which].name, where))
                    if n % (40 if quick else 8) == 0:
                        yield _refused_by_cli(runner, cut, cut[which].name, where)
    runner.close()


def _places(path: Path, raw: bytes) -> list[int]:
    """64 over the file and one beside each boundary of its sections and tensors."""
    header, file = read_header(path), Gguf.parse(raw)
    last = max(t.offset + t.n_bytes for t in header.tensors.values())
    keys_end = len(Gguf(file.values, [], b"").head())
    ends = {0, 4, 8, 24, keys_end, len(file.head()), last - 1, *(t.offset for t in header.tensors.values())}
    ends |= {int(at) for at in np.linspace(1, last - 1, PLACES)}
    return sorted(end for end in ends if end < last)


def _refused(engine: Engine, files: Sequence[Path], name: str, where: str) -> Case:
    worker, started = engine.pid, time.monotonic()
    try:
        engine.load(files[0], files[1], LoadOptions(threads=1)).close()
        miss = "was loaded"
    except NotGguf as error:
        miss = "" if name in error.message and "\n" not in str(error) else f"says {error}"
    except LocalvlmError as error:
        miss = f"{type(error).__name__}: {error}"
    took = time.monotonic() - started
    if worker is not None and engine.pid != worker:
        miss = miss or "the worker is another"
    return Case.of(where, miss, took)


def _refused_by_cli(runner: Runner, files: Sequence[Path], name: str, where: str) -> Case:
    started = time.monotonic()
    code, miss = runner.cli(files[0], files[1])
    one_line = len(runner.message.strip().splitlines()) == 1 and name in runner.message
    if code != "exit 3" or not one_line:
        miss = miss or f"{code}: {runner.message[-200:]}"
    return Case.of(f"{where}, by the command line", miss, time.monotonic() - started)


def keys(quick: bool, folder: Path) -> Iterator[Case]:
    """R2: one key at a time."""
    runner = Runner(folder)
    os.environ["LOCALVLM_WORKER_MEMORY"] = str(damage.MEMORY)
    number = 0
    for name, files in damage.pairs(folder / "zoo").items():
        if not name.endswith("-large"):  # of a pair, the other half has the same keys
            for which in (0, 1):
                file = Gguf.parse(files[which].read_bytes())
                for i, (key, kind, value) in enumerate(file.values):
                    for what, new_kind, new in _extremes(kind, value):
                        number += 1
                        if not quick or number % 12 == 0:
                            changed = Gguf([*file.values], file.tensors, file.data)
                            changed.values[i] = key, new_kind, new
                            path = folder / f"key-{files[which].name}"
                            path.write_bytes(changed.bytes())
                            given = (path, files[1]) if which == 0 else (files[0], path)
                            yield _told(runner, given, f"{name}: {key.decode()} {what}")
    left = runner.orphans()
    yield Case.of("no process is left", "; ".join(left))


def _extremes(kind: int, value: bytes) -> Iterator[tuple[str, int, bytes]]:
    """(what, type, raw value) of those that a key of this type is set to."""
    text = struct.pack("<Q", 3) + b"abc"
    if kind in damage._INTEGERS:
        size = damage._SIZES[kind]
        for number in (0, 1, 2**31 - 1, 2**32 - 1):
            yield f"= {number}", kind, (number % 2 ** (8 * size)).to_bytes(size, "little")
        yield "as text", 8, text
    elif kind == 6:
        for real in (0.0, -1.0, float("inf"), float("nan"), 1e-45):
            yield f"= {real}", kind, struct.pack("<f", real)
        yield "as a number", 4, struct.pack("<I", 1)
    elif kind == 7:
        yield "turned over", kind, bytes([not value[0]])
        yield "as a number", 4, struct.pack("<I", 1)
    elif kind == 8:
        for new in (b"", b"x" * (1 << 20), b"\xff\xfe\0"):
            yield f"of {len(new)} bytes", kind, struct.pack("<Q", len(new)) + new
        yield "as a number", 4, struct.pack("<I", 7)
    elif kind == 9:
        yield "emptied", kind, value[:4] + struct.pack("<Q", 0)
        yield "as a number", 4, struct.pack("<I", 7)


def _told(runner: Runner, files: tuple[Path, Path], what: str) -> Case:
    started = time.monotonic()
    runner.message = ""
    came, miss = runner.api(*files)
    took = time.monotonic() - started
    told = "last words" in runner.message or "SIGKILL" in runner.message or "did not finish" in runner.message
    if "EngineCrashed" in came and not told:
        miss = miss or f"llama.cpp's last words are missing: {runner.message}"
    if took > damage.SLOWEST:
        miss = miss or f"took {took:.0f} s"
    return Case.of(what, miss, took)


def damaged_files(quick: bool, folder: Path) -> Iterator[Case]:
    """R3: by seeds; ``BENCH_DAMAGED`` says how many and ``BENCH_SEED`` from which on."""
    count = DAMAGED_QUICK if quick else int(os.environ.get("BENCH_DAMAGED", DAMAGED))
    first = int(os.environ.get("BENCH_SEED", FIRST_SEED))
    for seed, recipe, outcome in damage.campaign(count, first, folder, cli_every=20 if quick else 10):
        yield Case.of(f"seed {seed}: {recipe}", outcome.miss, outcome.seconds)


def known_damage(quick: bool, folder: Path) -> Iterator[Case]:
    """Files that once ended the worker are refused, or do no harm."""
    runner = Runner(folder)
    seeds = [line.split()[0] for line in (CORPUS / "damage.txt").read_text().splitlines() if line[:1].isdigit()]
    for seed in map(int, seeds):
        recipe, outcome = runner.run(seed, through_cli=False)
        miss = outcome.miss or (outcome.message if "EngineCrashed" in outcome.what else "")
        yield Case.of(f"seed {seed}: {recipe}", miss, outcome.seconds)
    runner.close()
