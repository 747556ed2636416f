"""What goes to stdout and what to stderr: the answer alone to the one, everything else to the other."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from localvlm.errors import LocalvlmError
from localvlm.sanitize import Sanitizer, sanitize
from localvlm.stage_names import STAGE_NAMES

if TYPE_CHECKING:
    from localvlm.pipeline import Answer, AskOptions

__all__ = ["AnswerPrinter", "Reporter", "answer_json", "data_of", "print_error", "print_table"]

_BAR = 24
"""Characters of a progress bar."""


def print_error(error: LocalvlmError) -> None:
    """One sentence and the next step, on stderr."""
    hint = f" ({error.hint})" if error.hint else ""
    sys.stderr.write(f"localvlm: {_one_line(error.message)}{_one_line(hint)}\n")


def _one_line(text: str) -> str:
    return " ".join(sanitize(text).split("\n"))


NARROW = 18
"""Characters of a column below which wrapping it reads no better."""


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Columns on stdout. On a terminal the last one is wrapped within itself, where there is room for it."""
    import shutil
    import textwrap

    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    before = sum(widths[:-1]) + 2 * (len(widths) - 1)
    columns = shutil.get_terminal_size().columns if sys.stdout.isatty() else 0
    room = columns - before if columns - before >= NARROW else 0
    for *row, last in rows:
        parts = textwrap.wrap(last, room, break_on_hyphens=False) if 0 < room < len(last) else [last]
        line = "".join(f"{cell.ljust(width)}  " for cell, width in zip(row, widths, strict=False))
        for part in parts:
            sys.stdout.write((line + part).rstrip() + "\n")
            line = " " * before


class Reporter:
    """Progress and notes on stderr. Progress needs a terminal; ``quiet`` silences all."""

    def __init__(self, *, quiet: bool = False, verbose: int = 0) -> None:
        self.quiet, self.verbose = quiet, verbose
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self.terminal = terminal and not quiet
        self._line = False

    def stage(self, name: str) -> None:
        """Shows the stage that begins, in place of the one before."""
        if self.terminal and not self.verbose:
            sys.stderr.write(f"\r\x1b[K{STAGE_NAMES.get(name, name)} ...")
            sys.stderr.flush()
            self._line = True

    def progress(self, before: int, n: int, things: str) -> Callable[[int], None]:
        """Shows how many of ``n`` things are done, and the time left; ``before``: those done in earlier runs."""
        started = time.monotonic()

        def show(done: int) -> None:
            filled = _BAR * done // n
            left = ""
            if done > before:
                seconds = (time.monotonic() - started) / (done - before) * (n - done)
                left = f", {seconds / 60:.0f} min left" if seconds >= 90 else f", {seconds:.0f} s left"
            self.stage(f"[{'#' * filled}{'.' * (_BAR - filled)}] {done} of {n} {things}{left}")

        return show

    def clear(self) -> None:
        """Removes the progress line."""
        if self._line:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._line = False

    def note(self, text: str) -> None:
        """A line the user should see."""
        if not self.quiet:
            self.clear()
            sys.stderr.write(_one_line(text) + "\n")

    def summary(self, answer: Answer) -> None:
        """Who answered from how much, after the answer."""
        tokens = answer.tokens
        if answer.finish == "length":
            self.note(f"answer cut at {tokens.generated} tokens; --max-tokens raises the limit")
        if len(answer.steps) > 1 and not answer.layer and isinstance(answer.keep, float):
            share = (tokens.mean_kept or 0.0) / tokens.image
            if share > answer.keep + 0.5 / tokens.image:
                kept = f"{share:.0%} of the image tokens here, the mean over the layers"
                self.note(f"method '{answer.method}' keeps {kept}")
        if self.verbose:
            self._details(answer)
        elif self.terminal:
            seconds = answer.ms["total"] / 1e3
            self.note(f"{answer.answered_by} · {_seen(answer)} image tokens · {seconds:.1f} s")

    def _details(self, answer: Answer) -> None:
        tokens = answer.tokens
        self.note(f"method: {answer.method}, keep {answer.keep}, answered by the {answer.answered_by}")
        if len(answer.steps) > 1 and tokens.mean_kept is not None:
            mean = f"{tokens.mean_kept:.1f} of {tokens.image} image tokens a layer on average"
            where = f"layer: dropped before {answer.layer}" if answer.layer else f"layers: {_steps(answer)}"
            self.note(f"{where}, {mean} ({tokens.mean_kept / tokens.image:.0%})")
        if answer.guide_text is not None:
            self.note(f"guide's answer: {answer.guide_text}")
        if (score := answer.score) is not None:
            threshold = "off" if answer.threshold is None else f"at {answer.threshold:.4f}"
            self.note(
                f"score: confidence {score.confidence:.4f}, consistency {score.consistency:.4f}, combined "
                f"{score.combined:.4f}, exit {threshold}"
            )
        drafted = f", {tokens.accepted} of {tokens.drafted} drafted accepted" if tokens.drafted else ""
        guide = "" if tokens.guide is None else f" ({tokens.guide} of the guide's)"
        self.note(
            f"tokens: {_seen(answer)} image{guide}, {tokens.prompt} prompt, {tokens.generated} generated{drafted}"
        )
        shared = f", tower shared for {answer.tiles.shared}" if answer.tiles.shared else ""
        self.note(f"tiles: {answer.tiles.encoded} of {answer.tiles.total} encoded{shared}")
        self.note("ms: " + ", ".join(f"{stage} {ms:.0f}" for stage, ms in answer.ms.items()))


def _steps(answer: Answer) -> str:
    """How many image tokens are left from which layer on."""
    return ", ".join(f"{n} from {layer} on" for layer, n in answer.steps[1:])


def _seen(answer: Answer) -> str:
    """Image tokens that who answered saw, of its own."""
    tokens = answer.tokens
    return f"{next(n for n in (tokens.kept, tokens.guide, tokens.image) if n is not None)} of {tokens.image}"


class AnswerPrinter:
    """Writes an answer to stdout as it comes, safe for a terminal, without blank ends, with one newline at the end."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._sanitizer = Sanitizer()
        self._held = ""  # white space that may turn out to be the end
        self._started = False

    def feed(self, text: str) -> None:
        """Prints the next piece."""
        text = self._held + self._sanitizer.feed(text)
        if not self._started:
            text = text.lstrip()
        shown = text.rstrip()
        self._held = text[len(shown) :]
        if shown:
            self._reporter.clear()
            self._started = True
            sys.stdout.write(shown)
            sys.stdout.flush()

    def finish(self) -> None:
        """Ends the line."""
        self._reporter.clear()
        sys.stdout.write("\n")
        sys.stdout.flush()

    def abandon(self) -> None:
        """Ends the line if anything was printed."""
        if self._started:
            self.finish()


def data_of(answer: Answer, options: AskOptions) -> dict[str, object]:
    """What a schema made of the answer, for --json, null where it was cut; and the line by which the models know it."""
    import json

    from localvlm.schema import told

    if not options.schema:
        return {}
    line = {"schema_line": told("", options.schema)}
    try:
        return {"data": json.loads(answer.text), **line}
    except ValueError:
        return {"data": None, **line}


def answer_json(answer: Answer, more: Mapping[str, object] | None = None) -> str:
    """One JSON object in ASCII, so that nothing in the answer can drive a terminal; ``more`` keys at its end."""
    import dataclasses
    import json

    shown: dict[str, object] = {}
    if (score := answer.score) is not None:
        shown["score"] = {
            "confidence": score.confidence,
            "consistency": score.consistency,
            "combined": score.combined,
            "threshold": answer.threshold,
        }
    return json.dumps(
        {
            "answer": answer.text,
            "answer_ids": list(answer.answer_ids),
            "kept_indices": list(answer.kept_indices),
            "answered_by": answer.answered_by,
            "finish": answer.finish,
            "tokens": dataclasses.asdict(answer.tokens),
            "tiles": dataclasses.asdict(answer.tiles),
            "ms": {stage: round(ms, 3) for stage, ms in answer.ms.items()},
            "method": answer.method,
            "keep": answer.keep,
            "layer": answer.layer,
            "steps": [list(step) for step in answer.steps],
            "pair": answer.pair,
            **shown,
            **(more or {}),
        }
    )
