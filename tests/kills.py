"""The worker killed at many points of a question: ``python -m tests.kills [--points 20] [--seed N]``.

A pipeline with a pair of the zoo answers while SIGKILL, SIGABRT or SIGSEGV reaches its worker in one stage after the
other. Each time the question must end in EngineCrashed that names the signal, within a second, the same pipeline must
then give the answer it gives unharmed, and no process may stay behind. A kill that was told later is tried again: that
may tell of what else the machine does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import psutil

from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.errors import EngineCrashed
from localvlm.images import Image
from localvlm.pipeline import Answer, AskOptions, Pair, Pipeline, VlmFiles
from tests import zoo

SIGNALS = (signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV)
STAGES = ("load", "guide_encode", "guide_prefill", "guide_decode", "encode", "prefill", "decode")
TOLD_S, TRIES = 1.0, 3
QUESTION = "what is the thing in red?"
OPTIONS = AskOptions(keep=0.5, max_tokens=64)
PICTURE = Image(np.random.RandomState(5).randint(0, 256, (300, 400, 3)).astype(np.uint8), "picture")


@dataclass
class Kill:
    """One signal and what came of it, told ``seconds`` later; ``miss`` is empty if all is well, ``late`` if the answer
    came first.
    """

    stage: str
    number: signal.Signals
    said: str = ""
    late: bool = False
    miss: str = ""
    seconds: float = 0.0


def open_pipeline(directory: Path, family: str) -> tuple[Pipeline, Engine]:
    guide, model = zoo.pair(directory, family)
    files = (VlmFiles(half.model, half.mmproj) for half in (guide, model))
    engine = Engine()
    return Pipeline.open(Pair("zoo", *files), LoadOptions(threads=1), engine), engine


def ask(pipeline: Pipeline, on_stage=None) -> Answer:
    return pipeline.ask([PICTURE], QUESTION, OPTIONS, on_stage=on_stage)


class Shooter:
    """Sends a signal to the engine's worker some seconds after a stage begins."""

    def __init__(self, engine: Engine, kill: Kill, delay: float) -> None:
        self._engine, self._kill, self._delay = engine, kill, delay
        self._thread: threading.Thread | None = None
        self.sent = 0.0

    def on_stage(self, stage: str) -> None:
        if stage == self._kill.stage and self._thread is None:
            self._thread = threading.Thread(target=self._shoot)
            self._thread.start()

    def _shoot(self) -> None:
        while self._engine.pid is None:
            time.sleep(0.0005)
        time.sleep(self._delay)
        self.sent = time.monotonic()
        os.kill(self._engine.pid, self._kill.number)

    def join(self) -> None:
        if self._thread is not None:
            self._thread.join()


def kill_once(directory: Path, family: str, kill: Kill, delay: float, want: Answer) -> None:
    """Sends the signal ``delay`` seconds into the stage; fills in ``kill``."""
    pipeline, engine = open_pipeline(directory, family)
    shooter = Shooter(engine, kill, delay)
    with pipeline:
        try:
            ask(pipeline, shooter.on_stage)
            kill.late = True
        except EngineCrashed as error:
            kill.said, kill.seconds = error.message, time.monotonic() - shooter.sent
            if not kill.said.startswith(f"the engine was ended by {kill.number.name} during"):
                kill.miss = f"the signal is not named: {kill.said}"
        except Exception as error:  # noqa: BLE001  exactly what is looked for
            kill.miss = f"{type(error).__name__}: {error}"
        shooter.join()
        kill.miss = kill.miss or ("" if kill.late else ask_again(pipeline, want))
    left = psutil.Process().children(recursive=True)
    if left:
        kill.miss = kill.miss or f"left behind: {[p.pid for p in left]}"


def ask_again(pipeline: Pipeline, want: Answer) -> str:
    """What is wrong with the answer after the crash, "" if nothing is."""
    try:
        got = ask(pipeline)
    except Exception as error:  # noqa: BLE001
        return f"asked again: {type(error).__name__}: {error}"
    same = (got.answer_ids, got.kept_indices) == (want.answer_ids, want.kept_indices)
    return "" if same else "asked again, the answer is another"


def campaign(points: int, seed: int, directory: Path) -> Iterator[Kill]:
    """One kill after another, stage by stage, at a random moment of the time that the stage takes."""
    random = Random(seed)
    unharmed: dict[str, Answer] = {}
    for family in ("llava15", "qwen25vl"):
        runs = []
        for _ in range(2):  # the first may have waited for the disk, and its times say when to send a signal
            with open_pipeline(directory, family)[0] as pipeline:
                runs.append(ask(pipeline))
        unharmed[family] = min(runs, key=lambda answer: answer.ms["total"])
    for i in range(points):
        family = ("llava15", "qwen25vl")[i // len(STAGES) % 2]
        stage, number, want = STAGES[i % len(STAGES)], SIGNALS[i % len(SIGNALS)], unharmed[family]
        delay = random.random() * 0.8 * want.ms[stage] / 1e3
        for _ in range(TRIES):
            kill = Kill(stage, number)
            kill_once(directory, family, kill, delay, want)
            if kill.miss or kill.seconds <= TOLD_S:
                break
        else:
            kill.miss = f"told only {kill.seconds:.1f} s later, {TRIES} times"
        yield kill


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    kills, started = [], time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for kill in campaign(options.points, options.seed, Path(directory)):
            kills.append(kill)
            print(f"{kill.stage:14} {kill.number.name:8} {kill.miss or ('too late' if kill.late else kill.said[:90])}")
    missed, late = sum(bool(k.miss) for k in kills), sum(k.late for k in kills)
    took = time.monotonic() - started
    survived = len(kills) - missed - late
    print(f"{len(kills)} kills in {took:.0f} s: {survived} told and survived, {late} too late, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
