"""One process that answers for hours: ``python -m tests.long [--questions 5000] [--seed N] [--threads 1]``.

The demo pair is opened once and asked about one held-out picture after the other, a conversation of five turns each.
Memory of both processes must stay flat, no descriptor, thread or file may be left of a question, and a set of questions
must get at the middle and the end the answers it got at the start, token for token.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

from localvlm.answers import AskOptions
from localvlm.catalog import pair_named
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.pipeline import Pipeline
from tests.layers import anonymous
from tests.session import Scene, held_out

__all__ = ["Report", "run"]

TURNS = 5
SCENES = 40
KNOWN = 8
"""Questions that are asked at the start, the middle and the end."""
SAMPLES = 200
WARM = 0.25
"""Share of the questions after which memory should be what it will be."""
SLOPE = 1024.0
"""Bytes a question that a process may grow on the average after that: 5 MB in 5,000."""
SLACK = 4 << 20
"""Bytes that a short run may be off whatever its length."""


@dataclass(frozen=True)
class Sample:
    """Both processes after some questions: bytes, descriptors and threads of (client, worker)."""

    questions: int
    held: tuple[int, int]
    descriptors: tuple[int, int]
    threads: tuple[int, int]


@dataclass
class Report:
    """What a run showed.

    Attributes:
        answers: to the known questions, each time that they were asked.
        fresh: a worker of its own gave, at the end.
    """

    questions: int = 0
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    answers: list[list[tuple[object, ...]]] = field(default_factory=list)
    fresh: list[tuple[object, ...]] = field(default_factory=list)

    def slope(self, process: int) -> float:
        """Bytes a question, by least squares over the samples after the warm-up. 0: client, 1: worker."""
        warm = [s for s in self.samples if s.questions >= WARM * self.questions]
        return float(np.polyfit([s.questions for s in warm], [s.held[process] for s in warm], 1)[0])

    def misses(self) -> Iterator[tuple[str, str]]:
        """(what is looked at, what is wrong with it or nothing)."""
        warm = [s for s in self.samples if s.questions >= WARM * self.questions]
        for process, name in enumerate(("client", "worker")):
            slope = self.slope(process)
            grown = slope * self.questions * (1 - WARM)
            flat = slope <= SLOPE or grown <= SLACK
            yield f"memory of the {name} {slope:+.0f} B a question", "" if flat else f"{grown / 1e6:.1f} MB more"
            for what in ("descriptors", "threads"):
                counts = [getattr(s, what)[process] for s in warm]
                most = max(counts[len(counts) // 2 :])
                leaked = most > max(counts[: len(counts) // 2 + 1])
                yield f"{what} of the {name}: {most}", f"from {counts[0]} to {most}" * leaked
        for when, later in zip(("middle", "end"), self.answers[1:], strict=True):
            same = sum(a == b for a, b in zip(self.answers[0], later, strict=True))
            yield f"answers at the {when}: {same} of {len(later)} the same", "" if same == len(later) else "others"
        same = sum(a == b for a, b in zip(self.answers[0], self.fresh, strict=True))
        yield f"answers of a fresh process: {same} of {len(self.fresh)} the same", "" if same == KNOWN else "others"


def run(questions: int, seed: int, threads: int = 1, tell: bool = False) -> Report:
    """Asks so many questions, known ones not counted."""
    report, started = Report(questions), time.monotonic()
    scenes = held_out(SCENES, seed, TURNS)
    options, every = AskOptions(max_tokens=8), max(1, questions // SAMPLES)
    with _opened(threads) as pipeline:
        report.answers.append(_known(pipeline, scenes))
        asked = 0
        for scene in _forever(scenes):
            with pipeline.session([scene.image]) as session:
                for text, _ in scene.asked[:TURNS]:
                    if asked == questions:
                        break
                    session.ask(text, options)
                    asked += 1
                    if asked % every == 0:
                        report.samples.append(_sample(pipeline, asked))
                        if tell and len(report.samples) % (SAMPLES // 10) == 0:
                            print(f"{asked:,} questions, {time.monotonic() - started:.0f} s: {report.samples[-1]}")
                    if asked == questions // 2:
                        report.answers.append(_known(pipeline, scenes))
            if asked == questions:
                break
        report.answers.append(_known(pipeline, scenes))
    with _opened(threads) as pipeline:
        report.fresh = _known(pipeline, scenes)
    report.seconds = time.monotonic() - started
    return report


def _opened(threads: int) -> Pipeline:
    return Pipeline.open(pair_named("demo"), LoadOptions(threads=threads), Engine())


def _forever(scenes: Sequence[Scene]) -> Iterator[Scene]:
    while True:
        yield from scenes


def _known(pipeline: Pipeline, scenes: Sequence[Scene]) -> list[tuple[object, ...]]:
    found = []
    for scene in scenes[:KNOWN]:
        answer = pipeline.ask([scene.image], scene.asked[0][0], AskOptions(max_tokens=8))
        found.append((answer.answer_ids, answer.kept_indices, answer.answered_by, answer.text))
    return found


def _sample(pipeline: Pipeline, questions: int) -> Sample:
    client, worker = psutil.Process(), psutil.Process(pipeline.engine.pid)  # type: ignore[attr-defined]
    both = client, worker
    return Sample(
        questions,
        (_held(client), _held(worker)),
        (client.num_fds(), worker.num_fds()),
        (threading.active_count(), both[1].num_threads()),
    )


def _held(process: psutil.Process) -> int:
    """Bytes of its own."""
    return int(anonymous(process.pid) * 2**20) if sys.platform == "linux" else int(process.memory_info().rss)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints what it finds; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=20261129)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    report = run(options.questions, options.seed, options.threads, tell=True)
    failed = False
    for what, miss in report.misses():
        print(f"{what}{'  MISSED: ' + miss if miss else ''}")
        failed |= bool(miss)
    first, last = report.samples[0], report.samples[-1]
    for process, name in enumerate(("client", "worker")):
        began, ended = (sample.held[process] / 1e6 for sample in (first, last))
        print(f"{name}: {began:.1f} MB at question {first.questions}, {ended:.1f} MB at the end")
    print(f"{report.questions:,} questions in {report.seconds:.0f} s, seed {options.seed}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
