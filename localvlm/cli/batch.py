"""``localvlm ask --jsonl``: one question about many pictures, a line of JSON each."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App
from localvlm.cli.fit import check_fit
from localvlm.cli.inputs import EXAMPLE, left_out, readable
from localvlm.cli.output import Reporter, answer_json, data_of
from localvlm.cli.plan import plan_answer, say
from localvlm.errors import ContextOverflow, EngineCrashed, LocalvlmError, NotEnoughMemory

if TYPE_CHECKING:
    from localvlm.images import Image
    from localvlm.pipeline import AskOptions, Pair
    from localvlm.sources import Source

__all__ = ["ask_each"]


class _Batch:
    """Pictures that are to be asked about, and those that could not be."""

    def __init__(self, left: Sequence[Source], reporter: Reporter) -> None:
        self._left, self._reporter = left, reporter
        self.failed: list[LocalvlmError] = []
        self._unfit = self._answered = False

    def pictures(self) -> Iterator[tuple[str, Image]]:
        """Those that can be read, one by one, by name."""
        return readable(self._left, self._reporter, self.fail)

    def fail(self, name: str, error: LocalvlmError) -> None:
        """Goes on without this one.

        Raises:
            EngineCrashed: for the second time in a row; it is not the picture then.
            NotEnoughMemory: likewise, and no picture had an answer yet.
        """
        unfit = isinstance(error, EngineCrashed) or (isinstance(error, NotEnoughMemory) and not self._answered)
        if self._unfit and unfit:
            raise error
        self._unfit = unfit
        self.failed.append(error)
        self._reporter.note(f"{name!r} is left out: {error}")

    def succeed(self) -> None:
        """Notes an answer."""
        self._unfit, self._answered = False, True


def ask_each(
    ctx: click.Context,
    target: Path,
    found: Sequence[Source],
    question: str,
    pair: Pair,
    options: AskOptions,
    reporter: Reporter,
) -> None:
    """Asks about each picture alone, and adds what is answered to ``target`` at once. Those that have an answer to this
    question there are left out, but not what was on standard input, in the clipboard or on the screen: that is another
    picture by now. How to answer is planned by the first picture.

    Raises:
        ImageError, DownloadError, ContextOverflow, EngineCrashed, NotEnoughMemory: some had no answer; all others have.
        UsageError, StorageError: see :class:`localvlm.json_lines.JsonLines`.
    """
    from localvlm.json_lines import JsonLines

    named = {source.name: source for source in found}
    with JsonLines(target, "name another file") as lines:
        there = {line.get("image") for line in lines.lines if line.get("question") == question and "answer" in line}
        left = [source for name, source in named.items() if name not in there or not _lasts(source)]
        before = len(named) - len(left)
        batch = _Batch(left, reporter)
        try:
            done = before
            for name, shown in _answers(ctx, batch, question, pair, options, reporter, (before, len(named))):
                lines.add({"image": name, "question": question, **shown})
                done += 1
        finally:
            reporter.clear()
            known = f", {before} of them from before" if before else ""
            reporter.note(f"{done} of {len(named)} pictures have answers in {str(target)!r}{known}")
    if batch.failed:
        raise left_out(batch.failed, "the same command asks about them again")


def _lasts(source: Source) -> bool:
    """Whether its name means the same picture another time."""
    from localvlm.sources import is_url

    return source.path is not None or is_url(source.name) or source.name == EXAMPLE


def _answers(
    ctx: click.Context,
    batch: _Batch,
    question: str,
    pair: Pair,
    options: AskOptions,
    reporter: Reporter,
    counts: tuple[int, int],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of pictures, and their answers as ``--json`` has them. ``counts``: answered before, and all."""
    pictures = batch.pictures()
    if (first := next(pictures, None)) is None:
        return
    planned = plan_answer(ctx, pair, [first[1]], question, options, reporter)
    if reporter.verbose:
        say(planned, reporter)
    progress = reporter.progress(*counts, "pictures")
    with ctx.ensure_object(App).pipeline(pair, ctx.params) as pipeline:
        try:
            check_fit(pipeline, ctx.params, reporter, [first[1]], question, planned.options)
        except NotEnoughMemory as error:
            check_fit(pipeline, ctx.params, reporter, None, question, planned.options)  # fits but for this picture
            batch.fail(first[0], error)
        else:
            pictures = chain([first], pictures)
        for done, (name, picture) in enumerate(pictures, counts[0]):
            progress(done)
            try:
                answer = pipeline.ask([picture], question, planned.options)
            except (ContextOverflow, EngineCrashed, NotEnoughMemory) as error:
                batch.fail(name, error)
                continue
            batch.succeed()
            yield name, json.loads(answer_json(answer, data_of(answer, options)))
