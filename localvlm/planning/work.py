"""What a question makes a VLM do, and the milliseconds of each stage."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from localvlm.early_exit import CONSISTENCY_KEEP
from localvlm.planning.memory import RateMemory
from localvlm.planning.rates import STEP
from localvlm.planning.shapes import Run, View, VlmShape, stamp

__all__ = ["Counts", "Speed", "expected_ends", "expected_tiles", "prompt_batches", "prompt_rows", "ratios"]

ALIKE = 2.7e-5
"""Milliseconds for each pair of a guide's tokens where it is shown some: 0.22 s of 2,880 tokens were measured."""

ALONG = 4.4
"""Kept tokens that share a line: 11 of 24 lines have one of 65, 22 have one of 252; on the demo's tiled scenes 11 to
13 and 20 to 22 were counted (docs/log.md).
"""


@dataclass(frozen=True)
class Counts:
    """Of one question.

    Attributes:
        before, after: rows of text on either side of the pictures.
        kept: image tokens that the model sees; None: all.
        tiles: passes of the model's tower; None: all.
        answer, guide_answer: tokens of the answers.
        shown: image tokens that the guide is shown of its own; None: all.
    """

    before: int
    after: int
    answer: int
    guide_answer: int
    kept: int | None = None
    tiles: float | None = None
    shown: int | None = None


class Speed:
    """How fast this machine runs one VLM."""

    def __init__(self, shape: VlmShape, memory: RateMemory) -> None:
        self.shape, self._memory, self._rates = shape, memory, memory.rates
        files = shape.files
        self._digest = hashlib.sha256(f"{stamp(files.model)} {stamp(files.mmproj)}".encode()).hexdigest()[:16]

    def name(self, stage: str) -> str:
        """By which it is remembered how far a stage was off."""
        return f"{self._digest} {stage.removeprefix('guide_')}"

    def load(self) -> float:
        return self._rates.load * self.shape.n_bytes * 1e3

    def encode(self, views: Sequence[View], tiles: float | None = None, shared: float = 0) -> float:
        """``tiles``: how many of them; None: all. ``shared``: for so many of those, the other VLM's tower has run."""
        each = [tile for view in views for tile in view.tiles]
        n = len(each) if tiles is None else tiles
        whole, projected = (
            sum(self._rates.tile_of(self.shape.tower, *tile, shared=ran) for tile in each) / max(len(each), 1)
            for ran in (False, True)
        )
        shared = min(shared, n)
        return self._corrected("encode", whole * (n - shared)) + projected * shared * 1e3

    def prefill(self, batches: Sequence[int]) -> float:
        return self._corrected("prefill", self._rates.prompt(self.shape.llm, batches))

    def check(self, rows: int, answer: int) -> float:
        """A pruned prompt, and the answer after it in one batch."""
        after = max(answer - 1, 0)
        seconds = self._rates.prompt(self.shape.llm, _steps(rows))
        return self._corrected("prefill", seconds + self._rates.batch(self.shape.llm, after, rows, after))

    def decode(self, tokens: int, before: int) -> float:
        return self._corrected("decode", self._rates.decoded(self.shape.llm, tokens, before))

    def look(self, views: Sequence[View], counts: Counts, *, checked: bool) -> dict[str, float]:
        """The stages of a guide: it sees all, or what is chosen blind to the question, answers, and where that may be
        final its answer is checked on what it looked at most.
        """
        tokens = sum(view.tokens for view in views)
        rows = prompt_rows(views, counts.before, counts.after, counts.shown)
        read = self.prefill(self._batches(views, counts, counts.shown))
        if counts.shown is not None:
            read += ALIKE * tokens**2
        if checked:
            few = math.ceil(CONSISTENCY_KEEP * tokens)
            read += self.check(prompt_rows(views, counts.before, counts.after, few), counts.guide_answer)
        return {
            "guide_encode": self.encode(views),
            "guide_prefill": read,
            "guide_decode": self.decode(counts.guide_answer, rows),
        }

    def answer(self, views: Sequence[View], counts: Counts, shared: float = 0) -> dict[str, float]:
        """The stages of a model; ``shared`` as of :meth:`encode`."""
        rows = prompt_rows(views, counts.before, counts.after, counts.kept)
        return {
            "encode": self.encode(views, counts.tiles, shared),
            "prefill": self.prefill(self._batches(views, counts, counts.kept)),
            "decode": self.decode(counts.answer, rows),
        }

    def _batches(self, views: Sequence[View], counts: Counts, kept: int | None) -> list[int]:
        """Rows of each batch of a prompt: one that is pruned has no borders between pictures and text."""
        if kept is None:
            return prompt_batches(views, counts.before, counts.after)
        return _steps(prompt_rows(views, counts.before, counts.after, kept))

    def correction(self, stage: str) -> float:
        """By how much earlier answers were off."""
        return self._memory.correction(self.name(stage))

    def _corrected(self, stage: str, seconds: float) -> float:
        return seconds * 1e3 * self.correction(stage)


def prompt_rows(views: Sequence[View], before: int, after: int, kept: int | None = None) -> int:
    """Rows of a prompt; ``kept`` stand for its image tokens, and texts between them stay."""
    rows = before + after + sum(run.rows for view in views for run in view.runs)
    if kept is None:
        return rows
    image = sum(run.rows for view in views for run in view.runs if run.image)
    ends = image - sum(view.tokens for view in views)
    return rows - image + kept + round(expected_ends(ends, kept))


def prompt_batches(views: Sequence[View], before: int, after: int) -> list[int]:
    """Rows of each batch of an unpruned prompt: pictures and texts apart, as llama.cpp's own helper has it."""
    runs = [Run(before, image=False), *(run for view in views for run in view.runs), Run(after, image=False)]
    joined: list[Run] = []
    for run in runs:
        if joined and not joined[-1].image and not run.image:
            run = Run(joined.pop().rows + run.rows, image=False)
        joined.append(run)
    return [n for run in joined for n in _steps(run.rows)]


def _steps(rows: int) -> list[int]:
    return [min(STEP, rows - i) for i in range(0, rows, STEP)]


def expected_tiles(total: int, pictures: int, kept: int, price: float) -> float:
    """Tiles that are encoded for ``kept`` tokens where each costs as much as ``price`` of them.

    Each picture has one, of the others 1 - exp(-kept / price). That is 3.4 of 5 at 0.9 prices and 4.9 at 3.5; on the
    demo's scenes 3.2 to 3.9 and 4.8 to 4.9 were counted (docs/log.md).
    """
    if price <= 0:
        return float(total)
    return pictures + (total - pictures) * -math.expm1(-kept / price)


def expected_ends(total: int, kept: int) -> float:
    """Ends of lines, of ``total``, that stay with ``kept`` tokens: kept ones lie together, ALONG a line as a rule."""
    return total * -math.expm1(-kept / (ALONG * total)) if total else 0.0


def ratios(speeds: Callable[[str], Speed], told: dict[str, float], took: dict[str, float]) -> dict[str, float]:
    """What stages took over what was told of them, by the names of :meth:`Speed.name`; corrections taken out."""
    found = {}
    for stage, ms in told.items():
        if ms > 0 and took.get(stage, 0.0) > 0:
            speed = speeds(stage)
            found[speed.name(stage)] = took[stage] / ms * speed.correction(stage)
    return found
