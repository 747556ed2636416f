"""The ways to answer a question, what each would take, and the quickest of those that are allowed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from localvlm.answers import GUIDE_MAX_TOKENS, Answer, AskOptions
from localvlm.planning.memory import RateMemory
from localvlm.planning.shapes import View, VlmShape
from localvlm.planning.work import Counts, Speed, expected_tiles, prompt_rows, ratios
from localvlm.pruning import Keep, Tokens, share_of

__all__ = ["ACCURACIES", "GUIDE_TOKENS", "Asked", "Plan", "Planner", "quickest"]

ACCURACIES = ("high", "fast")
"""``high``: a guide that sees up to GUIDE_TOKENS[0] tokens chooses what is kept, or all is. ``fast``: it may see fewer,
or the model's own tower or features choose. GUIDE_KEEPS says what it may be shown of those it sees.
"""
GUIDE_TOKENS = (512, 256)
"""Most image tokens of a guide, from the most accurate on."""
GUIDE_KEEPS: dict[str, tuple[float | None, ...]] = {"high": (None,), "fast": (None, 0.44)}
"""Shares of its tokens that a guide may be shown, by class: 256 of 576 cost half a point on the demo's scenes, and
are not shown to cost less than two (docs/log.md).
"""
ANSWER = 32
"""Tokens of an answer whose length nobody knows."""
AUTO_KEEP = 0.15
"""Share of the tokens that ``keep="auto"`` comes to (21.7 of 144 on the demo's scenes, docs/log.md)."""
CLEARLY = 0.9
"""Share of plain's time below which another plan is taken: predictions are not exact, and plain loses nothing."""
HARDLY = 1.03
"""Times the least total up to which a more accurate plan is taken."""
BEFORE, AFTER = 16, 12
"""Rows of a chat template on either side of pictures and question."""
BYTES = 4
"""Of a token of a question."""


@dataclass(frozen=True)
class Asked:
    """A question, as far as it matters to its time.

    Attributes:
        sizes: (width, height) of each picture.
        exits: share of the questions that the guide's answer is expected to be final for; None: it never is.
        image_tokens: most tokens of a picture, 0: each family's own bound.
        guide_tokens: the same for the guide, where the user said so; None: as accuracy allows.
        guide_keep: what the guide is shown of its tokens, likewise.
        answer: tokens of the answer, where they are known.
        loaded: loading is of no account.
    """

    sizes: tuple[tuple[int, int], ...]
    question: str
    keep: Keep = AskOptions.keep
    max_tokens: int = AskOptions.max_tokens
    guide_max_tokens: int = GUIDE_MAX_TOKENS
    exits: float | None = None
    tile_price: float | None = None
    image_tokens: int = 0
    guide_tokens: int | None = None
    guide_keep: float | Tokens | None = None
    answer: int | None = None
    loaded: bool = False

    @classmethod
    def of(cls, sizes: Iterable[tuple[int, int]], question: str, options: AskOptions, **more: Any) -> Asked:
        """A question as ``options`` ask it; ``more`` of the attributes."""
        return cls(
            tuple(sizes), question + (options.system or ""), options.keep, options.max_tokens, options.guide_max_tokens,
            tile_price=options.tile_price, guide_keep=options.guide_keep, **more,
        )  # fmt: skip

    @property
    def counts(self) -> Counts:
        """Of the text, and of answers of an expected length."""
        answer = min(self.max_tokens, ANSWER) if self.answer is None else self.answer
        after = AFTER + -(-len(self.question.encode()) // BYTES)
        return Counts(BEFORE, after, answer, min(answer, self.guide_max_tokens))


@dataclass(frozen=True)
class Plan:
    """A way to answer.

    Attributes:
        name: for people.
        method: of :class:`AskOptions`.
        guide_tokens: most image tokens of the guide, 0: its own bound; None: it is not asked.
        ms: predicted milliseconds by stage, those that an exit spares less the share of the questions that exit.
        exits: that share.
        guide_keep: what the guide is shown of its tokens; None: all.
    """

    name: str
    method: str
    guide_tokens: int | None = None
    ms: dict[str, float] = field(default_factory=dict)
    exits: float = 0.0
    guide_keep: float | Tokens | None = None

    @property
    def total(self) -> float:
        """Milliseconds to the last token."""
        return sum(self.ms.values())

    def applied(self, options: AskOptions) -> AskOptions:
        """``options`` as this plan has them."""
        if self.method == "none":
            return replace(options, method="none", keep=None, exit_at=None)
        exit_at = None if self.guide_tokens is None else options.exit_at
        return replace(options, method=self.method, exit_at=exit_at, guide_keep=self.guide_keep)


def quickest(plans: Sequence[Plan]) -> Plan:
    """The one of the least total, or one before it that takes hardly longer; or the first of all, which loses nothing,
    where that is not clearly less. From the second on, the most accurate come first.
    """
    least = min(plan.total for plan in plans)
    if least >= CLEARLY * plans[0].total:
        return plans[0]
    return next(plan for plan in plans if plan.total <= HARDLY * least)


class Planner:
    """Plans for one pair on this machine; rates of all types of its weights must be known.

    Args:
        one_tower: guide and model share it, as :meth:`VlmShape.shares_tower` tells.
    """

    def __init__(self, model: VlmShape, guide: VlmShape | None, memory: RateMemory, *, one_tower: bool = False) -> None:
        self._one_tower = one_tower
        self._model = Speed(model, memory)
        self._guide = None if guide is None else Speed(guide, memory)
        self._memory = memory

    def plans(self, asked: Asked, accuracy: str = "high") -> list[Plan]:
        """What the class ``accuracy`` of ACCURACIES allows, plain first; none where the model's family is unknown."""
        if self._views(asked) is None:
            return []
        found = [self.plan(asked, "plain", "none")]
        if self._guide is not None:
            bounds = [b for b in self._bounds(asked, accuracy) if self._guide_views(asked, b) is not None]
            found += [self._guided(asked, bound, keep) for bound in bounds for keep in _shown(asked, accuracy)]
        if accuracy == "fast" and asked.keep != "auto":
            found += [self.plan(asked, name, name) for name in ("fastervlm", "divprune")]
        return found

    def _guided(self, asked: Asked, bound: int, keep: float | Tokens | None) -> Plan:
        names = ["guided", *([f"at most {bound} tokens"] if bound else [])]
        names += [f"shown {keep if isinstance(keep, Tokens) else f'{100 * keep:g} %'}"] if keep is not None else []
        return self.plan(asked, ", ".join(names), "sgl+", bound, keep)

    def plan(
        self,
        asked: Asked,
        name: str,
        method: str,
        guide_tokens: int | None = None,
        guide_keep: float | Tokens | None = None,
    ) -> Plan:
        """What one way takes, with answers of an expected length."""
        views = self._views(asked) or []
        total = sum(view.tokens for view in views)
        kept = None if method == "none" else _kept(asked.keep, total)
        counts = replace(asked.counts, kept=kept)
        n_tiles = sum(len(view.tiles) for view in views)
        if kept is not None and guide_tokens is not None and self._in_common(asked, guide_tokens) < n_tiles:
            opened = self._opened(asked, views, kept) * self._model.correction("tiles")
            counts = replace(counts, tiles=min(max(opened, len(views)), n_tiles))
        return self._told(asked, counts, Plan(name, method, guide_tokens, guide_keep=guide_keep))

    def _opened(self, asked: Asked, views: Sequence[View], kept: int) -> float:
        """Tiles that are encoded for ``kept`` tokens, as far as that is known before any answer."""
        price = self._model.shape.tile_price if asked.tile_price is None else asked.tile_price
        return expected_tiles(sum(len(view.tiles) for view in views), len(views), kept, price)

    def again(self, asked: Asked, plan: Plan, answer: Answer) -> Plan:
        """The same prediction with what could not be known: rows of text, tokens kept, tiles, length of the answer."""
        views = self._views(asked) or []
        kept = None if plan.method == "none" else answer.tokens.kept
        beside = prompt_rows(views, 0, 0, 0)
        text = answer.tokens.prompt - beside - (answer.tokens.kept or 0)
        counts = asked.counts
        if answer.answered_by == "model":
            before = min(counts.before, max(text - 1, 0))
            counts = Counts(before, max(text - before, 1), answer.tokens.generated, counts.guide_answer, kept)
            counts = replace(counts, tiles=float(answer.tiles.encoded))
        if answer.tokens.drafted:
            counts = replace(counts, guide_answer=answer.tokens.drafted)
        might = plan.guide_tokens is not None and asked.exits is not None
        exits = float(answer.answered_by == "guide") if might else None
        told = replace(asked, exits=exits)
        return self._told(told, counts, plan)

    def learn(self, asked: Asked, plan: Plan, answer: Answer) -> None:
        """Remembers how far a plan was off."""
        told = dict(self.again(asked, plan, answer).ms)
        told.pop("load", None)
        if answer.tokens.drafted:  # a draft that was taken over makes any other time
            told.pop("decode", None)
        told.pop("guide_decode", None)  # of a length that is not told
        if answer.tiles.shared:  # what a projector takes tells nothing of its tower
            told.pop("encode", None)
        off = ratios(self._speed, told, answer.ms)
        if plan.guide_tokens is not None and answer.answered_by == "model" and answer.tokens.kept:
            opened = self._opened(asked, self._views(asked) or [], answer.tokens.kept)
            off[self._model.name("tiles")] = answer.tiles.encoded / opened
        self._memory.learn(off)

    def _told(self, asked: Asked, counts: Counts, plan: Plan) -> Plan:
        """A plan with the milliseconds of its stages."""
        guide_tokens = plan.guide_tokens
        exits = (asked.exits or 0.0) if guide_tokens is not None else 0.0
        views = self._views(asked) or []
        seen = [] if guide_tokens is None else self._guide_views(asked, guide_tokens) or []
        shared = 0 if guide_tokens is None else self._in_common(asked, guide_tokens)
        model = self._model.answer(views, counts, shared)
        ms = {stage: (1 - exits) * taken for stage, taken in model.items()}
        load = 0.0 if asked.loaded else (1 - exits) * self._model.load()
        if guide_tokens is not None:
            assert self._guide is not None
            load += 0.0 if asked.loaded else self._guide.load()
            if plan.guide_keep is not None:
                counts = replace(counts, shown=sum(share_of(plan.guide_keep, view.tokens) for view in seen))
            ms = self._guide.look(seen, counts, checked=asked.exits is not None) | ms
        return replace(plan, ms={"load": load} | ms, exits=exits)

    def _in_common(self, asked: Asked, guide_tokens: int) -> int:
        """Tiles for which the tower has run once the guide has looked: all if it sees the same, or the overview."""
        if not self._one_tower:
            return 0
        both = zip(self._guide_views(asked, guide_tokens) or [], self._views(asked) or [], strict=True)
        return sum(
            len(model.tiles) if guide == model else int(len(guide.tiles) == 1 and guide.tiles[0] in model.tiles)
            for guide, model in both
        )

    def _speed(self, stage: str) -> Speed:
        return self._guide if self._guide is not None and stage.startswith("guide_") else self._model

    def _bounds(self, asked: Asked, accuracy: str) -> Sequence[int]:
        """Most image tokens of the guide. Where exits are calibrated, it sees what it saw then."""
        assert self._guide is not None
        if asked.guide_tokens is not None:
            return (asked.guide_tokens,)
        most = GUIDE_TOKENS[: 1 if accuracy == "high" else None]
        allowed = [min(bound, asked.image_tokens or bound) for bound in most]
        if not self._guide_any_size:
            allowed = [asked.image_tokens, *allowed]
        if asked.exits is not None:
            allowed = allowed[:1]
        return self._different(asked, dict.fromkeys(allowed))

    def _different(self, asked: Asked, bounds: Iterable[int]) -> list[int]:
        """Those that change what the guide sees, the first one always."""
        found: dict[tuple[View, ...], int] = {}
        for bound in bounds:
            found.setdefault(tuple(self._guide_views(asked, bound) or ()), bound)
        return list(found.values())

    @cached_property
    def _guide_any_size(self) -> bool:
        return self._guide is not None and self._guide.shape.any_size

    def _views(self, asked: Asked) -> list[View] | None:
        return _views(self._model.shape, asked, asked.image_tokens)

    def _guide_views(self, asked: Asked, bound: int) -> list[View] | None:
        assert self._guide is not None
        return _views(self._guide.shape, asked, bound)


def _views(shape: VlmShape, asked: Asked, bound: int) -> list[View] | None:
    """The pictures as a VLM takes them; None where its family is not known."""
    found = [shape.view(width, height, bound) for width, height in asked.sizes]
    known = [view for view in found if view is not None]
    return known if len(known) == len(found) else None


def _shown(asked: Asked, accuracy: str) -> Sequence[float | Tokens | None]:
    """What a guide may be shown of its tokens; all where exits are calibrated, since it saw all then."""
    if asked.guide_keep is not None or asked.exits is not None:
        return (asked.guide_keep,)
    return GUIDE_KEEPS[accuracy]


def _kept(keep: Keep, total: int) -> int:
    return share_of(AUTO_KEEP if keep == "auto" else keep, total)
