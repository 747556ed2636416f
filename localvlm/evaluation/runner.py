"""Asks every question in every way of a plan. What the ways share of a question is made once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.engine.api import Encoded, Message, Part, Prefilled
from localvlm.errors import Interrupted
from localvlm.evaluation.data import Question
from localvlm.evaluation.downscale import pooled_within, resized, shrunk, what_was_done
from localvlm.evaluation.journal import Journal
from localvlm.evaluation.plan import AT_LAYER, BLIND, DOWNSCALE, GUIDE, UNPRUNED, Cell
from localvlm.guidance import AGGREGATIONS
from localvlm.pipeline import Look, Pipeline
from localvlm.pruning import IN_LLM, METHODS, PRESETS, Keep, Need, Tokens, share_of
from localvlm.selection import Sight, pick, resampled
from localvlm.speaker import altered, parts_of, release, sight_of
from localvlm.stepwise import prefill_in_steps

__all__ = ["Outcome", "RunOptions", "ask_all"]

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class RunOptions:
    """What is the same for all questions, as in :class:`localvlm.answers.AskOptions`. Answers are greedy and without
    drafts.
    """

    max_tokens: int = 64
    guide_max_tokens: int = 64
    seed: int = 0
    system: str | None = None
    guide_keep: float | None = None


@dataclass(frozen=True)
class Outcome:
    """One answer and what it took.

    Attributes:
        image: image tokens of the unpruned picture.
        steps: (layer, image tokens from it on), the first at layer 0.
        rows: rows of the prompt that are no image tokens.
        fed: tokens fed after the prompt.
        outputs: rows projected to the vocabulary: the tokens of the answer, and its end.
        ms: by stage of localvlm.answers.STAGES, and "select", the choice of tokens.
        how: what made the tokens fewer, where a method has several ways.
    """

    text: str
    finish: str
    image: int
    steps: tuple[tuple[int, int], ...]
    rows: int
    fed: int
    outputs: int
    ms: dict[str, float]
    how: str = ""


def ask_all(
    pipeline: Pipeline,
    questions: Sequence[Question],
    plan: Sequence[Cell],
    options: RunOptions,
    journal: Journal,
    on_done: Callable[[int], None],
) -> list[dict[str, Outcome]]:
    """For each question the outcome of each cell, by the cell's name; what the journal holds is taken from there.

    ``on_done`` gets the number of questions done so far.

    Raises:
        UsageError: a method was not trained for this model.
        ImageError, ContextOverflow, ModelError, EngineCrashed, StorageError: see :mod:`localvlm.errors`.
        Interrupted: the engine was cancelled; the question it was at is lost.
    """
    methods = [METHODS[cell.method] for cell in plan if cell.method in METHODS]
    needs = frozenset[Need]().union(*(method.needs for method in methods))
    for method in methods:
        pipeline.weights(method)  # those that are missing are told before anything runs
    for within in (IN_LLM[cell.method] for cell in plan if cell.method in IN_LLM):
        pipeline.fitted(within)
    for index, question in enumerate(questions):
        if missing := [cell for cell in plan if cell.name not in journal.of(index)]:
            on_done(index)
            with _asking(pipeline, question, index, options, needs) as asking:
                journal.add(index, {cell.name: asdict(asking.outcome(cell)) for cell in missing})
    on_done(len(questions))
    return [{cell.name: _outcome(journal.of(i)[cell.name]) for cell in plan} for i in range(len(questions))]


def _outcome(entry: dict[str, Any]) -> Outcome:
    return Outcome(**{**entry, "steps": tuple(tuple(step) for step in entry["steps"])})


@contextlib.contextmanager
def _asking(
    pipeline: Pipeline, question: Question, index: int, options: RunOptions, needs: frozenset[Need]
) -> Iterator[_Asking]:
    asking = _Asking(pipeline, question, index, options, needs)
    try:
        yield asking
    finally:
        asking.release()


class _Asking:
    """One question. Pictures are encoded, and the guide looks, when a cell first needs it."""

    def __init__(
        self, pipeline: Pipeline, question: Question, index: int, options: RunOptions, needs: frozenset[Need]
    ) -> None:
        """``needs``: of all methods of the plan."""
        self._pipeline, self._question, self._options, self._needs = pipeline, question, options, needs
        self._seed = options.seed + index
        self._model = pipeline.vlm("model")
        self._pictures = [images.load(name) for name in question.images]
        self._n_image = sum(self._model.layout(*p.size).n_tokens for p in self._pictures)
        self._look: Look | None = None
        self._sight: Sight | None = None
        self._encoded: list[Encoded] = []

    def outcome(self, cell: Cell) -> Outcome:
        """What comes of one cell."""
        if cell == GUIDE:
            return self._of_guide()
        if cell == BLIND:
            return self._answered([], None, {})
        if cell == UNPRUNED:
            return self._answered(self._seen(), None, {})
        if cell.method == DOWNSCALE:
            return self._downscaled(cell.keep or 1.0)
        if cell.method in IN_LLM:
            return self._in_steps(cell)
        return self._pruned(cell)

    def release(self) -> None:
        """Forgets the pictures."""
        release(self._model, self._encoded)
        self._encoded = []

    # ways

    def _of_guide(self) -> Outcome:
        look = self._looked()
        answer, prompt = look.answer, look.prompt
        said, ended = len(answer.ids), answer.finish == "stop"
        return Outcome(
            answer.text.strip(), answer.finish, prompt.n_image, ((0, prompt.n_kept),), prompt.n_past - prompt.n_kept,
            _fed(said, ended), said + ended, self._guide_ms(),
        )  # fmt: skip

    def _pruned(self, cell: Cell) -> Outcome:
        method, saliency, ms = METHODS["sgl+" if cell.method in AT_LAYER else cell.method], None, {}
        encoded = self._seen()
        layouts = [e.layout for e in encoded]
        sight = replace(self._sighted() if method.needs else Sight(), weights=self._pipeline.weights(method))
        look = None if cell.aggregation is None else self._looked()
        before = time.perf_counter()
        if look is not None and cell.aggregation is not None:
            saliency = resampled(AGGREGATIONS[cell.aggregation](look.attention), look.layouts, layouts)
        layer, keep = self._at_layer(cell) if cell.method in AT_LAYER else (0, cell.keep)
        picked = pick(method, keep, layouts, saliency, self._seed, sight=sight)
        ms["select"] = (time.perf_counter() - before) * 1e3
        indices = [kept.index for kept in picked]
        with altered(self._model, encoded, picked) as shown:
            if (within := sight.within(method)) is not None:
                stepped = prefill_in_steps(self._model, self._parts(shown, indices), within, None)
                return self._told(encoded, stepped.prompt, stepped.steps, {"select": ms["select"] + stepped.ms})
            ms = ms if look is None else {**self._guide_ms(), **ms}
            return self._answered(shown, indices, ms, layer=layer)

    def _at_layer(self, cell: Cell) -> tuple[int, Keep]:
        """The layer of the model before which tokens are dropped, and how many stay."""
        n_layer = self._model.info.n_layer
        if cell.method in PRESETS:
            preset = PRESETS[cell.method]
            return preset.layer_in(n_layer), preset.keep
        cuts = IN_LLM["fastv"].cuts(cell.keep or 1.0, self._n_image, n_layer)
        return (cuts[0].layer, Tokens(cuts[0].k)) if cuts else (0, None)

    def _in_steps(self, cell: Cell) -> Outcome:
        encoded = self._seen()
        method = self._pipeline.fitted(IN_LLM[cell.method])
        stepped = prefill_in_steps(self._model, self._parts(encoded, None), method, cell.keep)
        return self._told(encoded, stepped.prompt, stepped.steps, {"select": stepped.ms})

    def _downscaled(self, keep: float) -> Outcome:
        whole, own = self._seen(), list[Encoded]()
        small = list(whole)
        try:
            for i, picture in enumerate(self._pictures):
                if (size := shrunk(self._model.layout, picture.size, keep)) != picture.size:
                    small[i] = self._model.encode(resized(picture, size))
                    own.append(small[i])
            begun = time.perf_counter()
            budgets = [share_of(keep, e.layout.n_tokens) for e in whole]
            picked = [pooled_within(self._model, e, k) for e, k in zip(small, budgets, strict=True)]
            ms = {} if picked == [None] * len(picked) else {"select": (time.perf_counter() - begun) * 1e3}
            how = ", ".join(what_was_done([e.layout for e in whole], [e.layout for e in small], picked))
            with altered(self._model, small, picked) as shown:
                return self._answered(shown, [None if kept is None else kept.index for kept in picked], ms, how)
        finally:
            release(self._model, own)

    # what they share

    def _looked(self) -> Look:
        if self._look is None:
            o = self._options
            longest = min(o.max_tokens, o.guide_max_tokens)
            self._look = self._pipeline.look(
                self._pictures, self._question.text, longest, system=o.system, keep=o.guide_keep
            )
        return self._look

    def _guide_ms(self) -> dict[str, float]:
        look = self._looked()
        return {
            "guide_encode": sum(e.ms for e in look.encoded),
            "guide_prefill": look.prompt.ms,
            "guide_decode": look.answer.ms,
        }

    def _sighted(self) -> Sight:
        if self._sight is None:
            self._sight = sight_of(self._model, self._seen(), self._question.text, self._needs)
        return self._sight

    def _seen(self) -> list[Encoded]:
        for picture in self._pictures[len(self._encoded) :]:
            self._encoded.append(self._model.encode(picture.rgb, tower="tower" in self._needs))
        return self._encoded

    def _answered(
        self,
        encoded: Sequence[Encoded],
        kept: Sequence[Int32 | None] | None,
        ms: dict[str, float],
        how: str = "",
        layer: int = 0,
    ) -> Outcome:
        """The model's answer from ``kept`` tokens of pictures, all of them if None; before ``layer`` from all."""
        prompt = self._model.prefill(self._parts(encoded, kept), layer=layer)
        steps = ((0, prompt.n_image), (layer, prompt.n_kept)) if layer else ((0, prompt.n_kept),)
        return self._told(encoded, prompt, steps, ms, how)

    def _told(
        self,
        encoded: Sequence[Encoded],
        prompt: Prefilled,
        steps: tuple[tuple[int, int], ...],
        ms: dict[str, float],
        how: str = "",
    ) -> Outcome:
        """What the model generates from a prompt, ``steps`` as in :class:`Outcome`."""
        done = self._model.generate(self._options.max_tokens)
        if done.finish == "cancelled":
            raise Interrupted()
        said, ended = len(done.ids), done.finish == "stop"
        return Outcome(
            text=done.text.strip(),
            finish=done.finish,
            image=self._n_image,
            steps=steps,
            rows=len(prompt.token_ids) - prompt.n_image,
            fed=_fed(said, ended),
            outputs=said + ended,
            ms={**ms, "encode": sum(e.ms for e in encoded), "prefill": prompt.ms, "decode": done.ms},
            how=how,
        )

    def _parts(self, encoded: Sequence[Encoded], kept: Sequence[Int32 | None] | None) -> list[Part]:
        """The question's prompt."""
        system = self._options.system
        messages = [Message("system", system)] if system else []
        messages.append(Message("user", self._question.text, len(encoded)))
        return parts_of(self._model, messages, encoded, kept)


def _fed(said: int, ended: bool) -> int:
    """Tokens that were fed to find ``said`` of them, and the end after the last where it came."""
    return said if ended else max(0, said - 1)
