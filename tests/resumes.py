"""``localvlm eval`` killed and started again: ``python -m tests.resumes [--count 60] [--kills 8] [--pair demo]``.

The demo pair is asked about held-out scenes once without a break, and once while SIGKILL reaches the command and its
worker at random points. Exits non-zero where the two JSON files are not the same byte for byte.
"""

from __future__ import annotations

import argparse
import contextlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from random import Random

import psutil

from localvlm.models.demo import scenes as scene_maker

METHODS = "sgl+,random,divprune,fastv,downscale"


def start(folder: Path, name: str, pair: str) -> psutil.Popen:
    """An evaluation of the scenes in ``folder`` with a journal and a JSON file of its own."""
    command = [
        sys.executable, "-m", "localvlm", "eval", folder / "data.jsonl", "--pair", pair, "--methods", METHODS,
        "--keep", "0.35,0.09", "--max-tokens", "12", "--threads", "1", "--no-timings", "--quiet",
        "--work", folder / name, "--json", folder / f"{name}.json",
    ]  # fmt: skip
    return psutil.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)


def answered(folder: Path, name: str) -> int:
    """Questions in a journal."""
    journal = folder / name / "answers.jsonl"
    return max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0


def kill(child: psutil.Popen) -> bool:
    """Ends a command and its worker at once; False if it had ended by itself."""
    try:
        family = [child, *child.children(recursive=True)]
    except psutil.NoSuchProcess:
        return False
    alive = child.poll() is None
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    child.wait()
    return alive


def run(folder: Path, kills: int, rng: Random, pair: str) -> list[str]:
    """What went wrong, in words."""
    begun = time.monotonic()
    if start(folder, "whole", pair).wait() != 0:
        return ["the uninterrupted run failed"]
    per_question = (time.monotonic() - begun) / answered(folder, "whole")
    done = []
    while len(done) < kills:
        child, before = start(folder, "cut", pair), answered(folder, "cut")
        while child.poll() is None and answered(folder, "cut") == before:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 2 * per_question))
        if not kill(child):
            break
        done.append(answered(folder, "cut"))
        print(f"killed after {done[-1]} questions", file=sys.stderr)
    missed = [] if len(done) == kills else [f"only {len(done)} of {kills} kills came before the end"]
    if start(folder, "cut", pair).wait() != 0:
        return [*missed, "the last run failed"]
    if (folder / "cut.json").read_bytes() != (folder / "whole.json").read_bytes():
        missed.append("the JSON is another one")
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=60)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--seed", type=int, default=20261124)
    parser.add_argument("--pair", default="demo")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        scene_maker.write_set(Path(name), args.seed, args.count)
        missed = run(Path(name), args.kills, Random(args.seed), args.pair)
        size = (Path(name) / "whole.json").stat().st_size
    print(f"{args.count} questions, {args.kills} kills, {size} bytes of JSON: {'MISSED' if missed else 'the same'}")
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
