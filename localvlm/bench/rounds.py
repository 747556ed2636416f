"""All cases in turn, round after round, so that what slows the machine down slows all of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image

from localvlm.bench.cases import PLAIN, Bench, Case, Run
from localvlm.bench.peer import Peer
from localvlm.bench.report import Report, Row, Started
from localvlm.bench.start import Process
from localvlm.bench.start import from_start as timed_from_start
from localvlm.images import Image

__all__ = ["measure"]

PEER = Case("llama-mtmd-cli", "peer")


def measure(
    bench: Bench, report: Report, ways: Sequence[Case], images: Sequence[Image], question: str, runs: int,
    tell: Callable[[str], None], *, peer: str | None = None, from_start: bool = False,
) -> None:  # fmt: skip
    """Fills the report's rows: every case once in each of ``runs`` rounds, every other round in reverse. ``peer``: the
    path of a llama-mtmd-cli. ``tell`` gets what begins.
    """
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        PIL.Image.fromarray(images[0].rgb).save(picture)
        other = None
        if peer is not None:
            files, plain = bench.setting.pair.model, bench.plain.info
            assert files is not None
            setting = bench.setting
            other = Peer(Path(peer).expanduser(), files, picture, question, setting.answer, setting.model, plain)
        tell("preparing")
        bench.prepare(ways, images, question)
        order = [*ways, *([PEER] if other is not None else [])]
        found = {case.name: list[Run]() for case in order}
        processes = {case.name: list[Process]() for case in order}
        for i in range(runs):
            for case in order[:: 1 if i % 2 == 0 else -1]:
                tell(f"round {i + 1} of {runs}: {case.name}")
                if other is not None and case == PEER:
                    run, process = other.run()
                    processes[case.name].append(process)
                    found[case.name].append(run)
                else:
                    found[case.name].append(bench.run(case, images, question))
        report.planned = bench.planned
        plain_runs = tuple(found[PLAIN.name])
        report.rows += [Row(case, tuple(found[case.name]), plain_runs) for case in order]
        if not from_start:
            return
        bench.rest()
        for i in range(runs):
            for case in ways[:: 1 if i % 2 == 0 else -1]:
                if case.way != "downscale":
                    tell(f"from start, round {i + 1} of {runs}: {case.name}")
                    processes[case.name].append(timed_from_start(bench, case, picture, question))
        for name, times in processes.items():
            if times:
                report.started.append(Started(name, tuple(times)))
