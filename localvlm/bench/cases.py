"""What is measured: one question about one picture, answered in several ways in turn, each through llama.cpp's kernels.

Weights may be random, and then what a guide attends to and answers is not what a trained one would. So what the time
hangs on is fixed, and told beside the figures: answers have one length, and go on past their end; whether the guide's
answer is final is set by the threshold; a draft is either the guide's, of which nothing is accepted as a rule, or the
model's own answer; and of a tiled picture a given number of tiles is encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import STAGES as CLOCKED
from localvlm.answers import Answer, AskOptions, Pair
from localvlm.bench.fixed import FixedEngine
from localvlm.bench.machine import Peak
from localvlm.clock import Clock
from localvlm.engine.api import Completion, Encoded, Engine, LoadOptions, Message, Prefilled, TextPart, Vlm
from localvlm.engine.drafts import SIZES
from localvlm.errors import ModelError, UsageError
from localvlm.evaluation.downscale import pooled_within, resized, shrunk
from localvlm.images import Image
from localvlm.pipeline import Pipeline
from localvlm.planning.shapes import VlmShape
from localvlm.pruning import METHODS, share_of
from localvlm.selection import select, tiles_in_common
from localvlm.speaker import altered, parts_of, release

__all__ = ["PLAIN", "STAGES", "Bench", "Case", "Run", "Setting", "answer_of", "cases", "drawn", "question_of"]

Int32 = NDArray[np.int32]

STAGES = (*CLOCKED[1:4], "select", *CLOCKED[4:7])
"""Parts of an answer's time: those that are clocked, and "select", which is all else: layouts, prompts, the choice of
tokens."""
NEVER, ALWAYS = 2.0, 0.0
"""Scores from which a guide's answer is final; no score is over 1."""
HIGHEST_PRICE = 20
"""Binary logarithm of the price that is tried last."""
LONGEST_QUESTION = 4096


@dataclass(frozen=True)
class Case:
    """A way to answer.

    Attributes:
        way: "plain" (llama.cpp on the large model, without the tap), "downscale", "ours" or "peer".
        keep: share of the image tokens; None: all.
        exits: the guide's answer is final.
        replay: the model's own answer is its draft.
        tiles: the guide sees the overview, and so many tiles of the model are encoded, or more if the kept tokens
            cannot be of so few; 0: it sees all.
        guide_keep: share of its image tokens that the guide is shown; None: all.
        planned: as ``localvlm ask`` plans it (:mod:`localvlm.bench.plan`).
        forced: what was not left to the weights.
    """

    name: str
    way: str
    keep: float | None = None
    exits: bool = False
    replay: bool = False
    tiles: int = 0
    guide_keep: float | None = None
    planned: bool = False
    forced: str = ""

    @property
    def shared(self) -> Case:
        """What cases have in common for which the same is to be found out."""
        return replace(self, name="", exits=False, replay=False, forced="")


PLAIN = Case("plain llama.cpp", "plain")


def cases(
    keeps: Sequence[float], n_tiles: int, most_tiles: int, looks: Sequence[float | None] = (None,), *,
    guided: bool = True,
) -> list[Case]:  # fmt: skip
    """All of them, for a picture of ``n_tiles`` tiles; ``most_tiles`` are encoded where the guide sees the overview.
    ``looks``: shares of its image tokens that the guide is shown.
    """
    found = [PLAIN, Case("all tokens", "ours")]
    if guided:
        found.append(Case("default plan", "ours", planned=True, forced="plan"))
    for keep in keeps:
        at = f"{100 * keep:g} %"
        found.append(Case(f"downscale, {at}", "downscale", keep))
        for look in looks if guided else ():
            case = Case(f"guided, {at}{_looking(look)}", "ours", keep, guide_keep=look, forced="no exit")
            replayed = replace(case, name=f"{case.name}, own answer replayed", replay=True, forced="no exit, draft")
            found += [case, replayed]
            if n_tiles > 1:
                found.append(replace(case, name=f"{case.name}, overview", tiles=most_tiles, forced="no exit, tiles"))
    for look in looks if guided else ():
        case = Case(f"early exit{_looking(look)}", "ours", keeps[0], exits=True, guide_keep=look, forced="exit")
        found.append(case)
        if n_tiles > 1:
            found.append(replace(case, name=f"{case.name}, overview", tiles=most_tiles))
    return found


def _looking(look: float | None) -> str:
    return "" if look is None else f", guide sees {100 * look:g} %"


@dataclass(frozen=True)
class Setting:
    """``guide``, ``model``: how the two are loaded; ``answer``: tokens of each answer."""

    pair: Pair
    guide: LoadOptions = field(default_factory=LoadOptions)
    model: LoadOptions = field(default_factory=LoadOptions)
    answer: int = 16


@dataclass(frozen=True)
class Run:
    """One answer.

    Attributes:
        ms: by STAGES.
        first_ms, total_ms: from the question to the first token of the answer and to the last.
        image: image tokens of the model; kept: those it saw, None if the guide answered.
        prompt: rows that the VLM that answered was given.
        drafted, accepted: tokens of the draft, and those taken over.
        tiles, encoded: tiles of the pictures in the VLM that answered, and those that it encoded.
        peak: most bytes that the worker held.
    """

    ms: dict[str, float]
    first_ms: float
    total_ms: float
    image: int
    kept: int | None
    prompt: int
    generated: int
    drafted: int = 0
    accepted: int = 0
    tiles: int = 1
    encoded: int = 1
    peak: int | None = None


@dataclass
class Prepared:
    """What was found out for cases before they are measured.

    Attributes:
        draft: the model's own answer, for those that replay it.
        price: of a tile, at which kept tokens are of as few tiles as they must be.
        guide_tokens: most that the guide sees of a picture.
        asked: how a planned case asks, of :class:`AskOptions`.
    """

    draft: list[int] | None = None
    price: float | None = None
    guide_tokens: int = 0
    asked: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Two workers, so that the memory of each can be told: one of plain llama.cpp, one of ours. Pictures that were kept
    on disk are not looked at. A context manager.
    """

    def __init__(self, setting: Setting, engine: Callable[[], Engine]) -> None:
        assert setting.pair.model is not None
        anew = {role: replace(getattr(setting, role), image_cache=0) for role in ("guide", "model")}
        self.setting, self._files, self.new_engine = replace(setting, **anew), setting.pair.model, engine
        guide = setting.pair.guide
        self.bare = FixedEngine(engine(), None)
        self.ours = FixedEngine(engine(), None if guide is None else guide.model)
        self._pipelines: dict[int, Pipeline] = {}
        self._prepared: dict[Case, Prepared] = {}
        self.planned: Answer | None = None
        """The latest answer of a case that is run as it was planned."""

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exc: object) -> None:
        self.rest()

    def rest(self) -> None:
        """Lets go of all models; they are loaded again when they are asked for."""
        self._pipelines.clear()
        self.bare.close()
        self.ours.close()

    @property
    def plain(self) -> Vlm:
        """The large model on llama.cpp as it is."""
        options = replace(self.setting.model, tap=False, stock_tower=True)
        return self.bare.load(self._files.model, self._files.mmproj, options)

    @property
    def model(self) -> Vlm:
        """The large model of ours."""
        return self.ours.load(self._files.model, self._files.mmproj, self.setting.model)

    def pipeline(self, guide_tokens: int = 0) -> Pipeline:
        """Ours; ``guide_tokens`` bounds what the guide sees of a picture, 0 does not."""
        if guide_tokens not in self._pipelines:
            s = self.setting
            guide = replace(s.guide, image_tokens=guide_tokens or s.guide.image_tokens)
            self._pipelines[guide_tokens] = Pipeline(s.pair, self.ours, guide=guide, model=s.model)
        return self._pipelines[guide_tokens]

    @contextmanager
    def answering(self, n: int) -> Iterator[None]:
        """With answers of ``n`` tokens."""
        before, self.setting = self.setting, replace(self.setting, answer=n)
        try:
            yield
        finally:
            self.setting = before

    @contextmanager
    def saying(self, text: str) -> Iterator[None]:
        """With that text for all answers of the model, which take the time that they take."""
        self.bare.fixed.text = self.ours.fixed.text = text
        try:
            yield
        finally:
            self.bare.fixed.text = self.ours.fixed.text = None

    # preparing

    def prepare(self, found: Sequence[Case], images: Sequence[Image], question: str) -> None:
        """Reads all weights once, and finds what the cases need to know: by one answer for all that share a budget and
        the tiles.
        """
        for case in found:
            if case.way == "ours" and (case.tiles or case.replay) and case.shared not in self._prepared:
                like = [other for other in found if other.shared == case.shared]
                self._prepared[case.shared] = Prepared()
                self._find_out(case.shared, images, question, draft=any(other.replay for other in like),
                               price=bool(case.tiles) and not all(other.exits for other in like))  # fmt: skip
        used = {"plain": [self.plain], "downscale": [self.model], "ours": [self.model]}
        looking = (case for case in found if case.way == "ours" and (case.planned or case.keep is not None))
        used["ours"] += [self.pipeline(self.prepared(case).guide_tokens).vlm("guide") for case in looking]
        for vlm in dict.fromkeys(vlm for case in found for vlm in used[case.way]):
            vlm.release(vlm.encode(images[0].rgb, keep=np.zeros(1, np.int32)))  # one tile of perhaps many
            vlm.prefill(parts_of(vlm, [Message("user", question)], []))
            vlm.generate(1)

    def prepared(self, case: Case) -> Prepared:
        """What was found out for a case."""
        return self._prepared.get(case.shared, Prepared())

    def know(self, case: Case, found: Prepared) -> None:
        """Takes over what was found out elsewhere."""
        self._prepared[case.shared] = found

    def _find_out(self, case: Case, images: Sequence[Image], question: str, *, draft: bool, price: bool) -> None:
        out = self._prepared[case]
        if case.tiles:
            out.guide_tokens = self._overview(images[0])
        if not (draft or price):
            return
        self.ours.fixed.repeats = len(SIZES) * draft  # each answer measures one size of batches along a draft
        answer = self._ask(case, images, question)
        self.ours.fixed.repeats = 0
        if price:
            guide, model = self.pipeline(out.guide_tokens).vlm("guide"), self.model
            seen = [guide.layout(*image.size) for image in images]
            out.price = _price(case, answer, tiles_in_common(guide.info, model.info, seen, answer.layouts))
        if draft:
            assert self.ours.fixed.last is not None
            out.draft = self.ours.fixed.last.ids.tolist()

    def _overview(self, image: Image) -> int:
        """Tokens of one of the guide's tiles; by its headers where they tell, as a guide loaded twice takes twice."""
        assert self.setting.pair.guide is not None
        with suppress(ModelError):
            view = VlmShape(self.setting.pair.guide).view(*image.size, self.setting.guide.image_tokens)
            if view is not None:
                return -(-view.tokens // len(view.tiles))
        layout = self.pipeline().vlm("guide").layout(*image.size)
        return -(-layout.n_tokens // layout.n_tiles)

    # runs

    def run(self, case: Case, images: Sequence[Image], question: str) -> Run:
        """One answer, of which nothing is encoded and no row is in a KV cache yet."""
        self.ours.forget()
        peak = Peak(self.bare.engine if case.way == "plain" else self.ours.engine)
        peak.begin()
        if case.way == "plain":
            done = self._plain(images, question)
        elif case.way == "downscale":
            done = self._downscaled(case.keep or 1.0, images, question)
        else:
            answer = self._ask(case, images, question)
            self.planned = answer if case.planned else self.planned
            done = _run_of(answer, self.ours.fixed.last)
        return replace(done, peak=peak.read())

    def _plain(self, images: Sequence[Image], question: str) -> Run:
        clock, vlm, seen = Clock(None), self.plain, list[Encoded]()
        try:
            with clock("encode"):
                seen += (vlm.encode(image.rgb) for image in images)
            with clock("prefill"):
                prompt = vlm.prefill(parts_of(vlm, [Message("user", question, len(seen))], seen))
            return self._answered(vlm, clock, seen, prompt, prompt.n_image)
        finally:
            release(vlm, seen)

    def _downscaled(self, keep: float, images: Sequence[Image], question: str) -> Run:
        """From smaller pictures, or where the tower's are of one size, from means over areas."""
        vlm = self.model
        sizes = [shrunk(vlm.layout, image.size, keep) for image in images]
        budgets = [share_of(keep, vlm.layout(*image.size).n_tokens) for image in images]
        clock, seen = Clock(None), list[Encoded]()
        try:
            with clock("encode"):
                seen += (vlm.encode(resized(image, size)) for image, size in zip(images, sizes, strict=True))
            picked = [pooled_within(vlm, e, k) for e, k in zip(seen, budgets, strict=True)]
            with clock("prefill"), altered(vlm, seen, picked) as shown:
                kept = [None if found is None else found.index for found in picked]
                prompt = vlm.prefill(parts_of(vlm, [Message("user", question, len(shown))], shown, kept))
            return self._answered(vlm, clock, seen, prompt, sum(vlm.layout(*i.size).n_tokens for i in images))
        finally:
            release(vlm, seen)

    def _answered(self, vlm: Vlm, clock: Clock, seen: Sequence[Encoded], prompt: Prefilled, image: int) -> Run:
        """Generates after ``prompt``; ``image``: tokens of the pictures as they were given."""
        before = clock.elapsed()
        with clock("decode"):
            done = vlm.generate(self.setting.answer)
        total = clock.elapsed()
        tiles = sum(e.layout.n_tiles for e in seen)
        return Run(
            _stages(clock.ms, total), before + done.first_ms, total, image, prompt.n_kept, prompt.n_past,
            len(done.ids), tiles=tiles, encoded=tiles,
        )  # fmt: skip

    def _ask(self, case: Case, images: Sequence[Image], question: str) -> Answer:
        with self._fixed(case) as prepared:
            return self.pipeline(prepared.guide_tokens).ask(images, question, self.options(case))

    def options(self, case: Case) -> AskOptions:
        """How a case of ours asks."""
        prepared = self.prepared(case)
        if case.planned:
            return AskOptions(**prepared.asked)
        may_exit = case.keep is not None and self.setting.pair.guide is not None
        return AskOptions(
            method="none" if case.keep is None else "sgl+",
            keep=case.keep,
            max_tokens=self.setting.answer,
            guide_max_tokens=self.setting.answer,
            exit_at=(ALWAYS if case.exits else NEVER) if may_exit else None,
            tile_price=prepared.price,
            guide_keep=case.guide_keep,
        )

    @contextmanager
    def _fixed(self, case: Case) -> Iterator[Prepared]:
        """The model with the draft and the tiles of a case, and without afterwards."""
        prepared, fixed = self.prepared(case), self.ours.fixed
        if case.replay and prepared.draft is not None:
            fixed.draft = np.array(prepared.draft, np.int32)
        fixed.tiles = case.tiles
        try:
            yield prepared
        finally:
            fixed.draft, fixed.tiles = None, 0


def _run_of(answer: Answer, last: Completion | None) -> Run:
    done = None if answer.answered_by == "guide" else last
    return Run(
        ms=_stages(answer.ms, answer.ms["total"]),
        first_ms=answer.ms["first_token"],
        total_ms=answer.ms["total"],
        image=answer.tokens.image,
        kept=answer.tokens.kept,
        prompt=answer.tokens.prompt,
        generated=answer.tokens.generated,
        drafted=0 if done is None else done.drafted,
        accepted=0 if done is None else done.accepted,
        tiles=answer.tiles.total,
        encoded=answer.tiles.encoded,
    )


def _stages(ms: dict[str, float], total: float) -> dict[str, float]:
    clocked = {stage: ms[stage] for stage in STAGES if stage != "select"}
    return {stage: clocked.get(stage, max(0.0, total - sum(clocked.values()))) for stage in STAGES}


def _price(case: Case, answer: Answer, opened: frozenset[int]) -> float:
    """The least price of a tile, of powers of two, at which the kept tokens are of no more tiles than asked for, or of
    as few as any price brings them to.
    """
    found: dict[float, int] = {}
    for price in (float(1 << i) for i in range(HIGHEST_PRICE)):
        kept = select(METHODS["sgl+"], case.keep, answer.layouts, answer.saliency, tile_price=price, opened=opened)
        tiles = (layout.tiles for layout in answer.layouts)
        found[price] = sum(len(np.unique(t[k])) for t, k in zip(tiles, kept, strict=True) if t is not None)
        if found[price] <= case.tiles:
            break
    return min(found, key=lambda price: found[price])


def question_of(vlm: Vlm, n: int) -> str:
    """A question that makes ``n`` rows of text with the chat template, or the shortest if the template has more."""

    def rows(text: str) -> int:
        parts = vlm.chat([Message("user", text, 1)])
        return len(vlm.tokenize([0 if isinstance(p, int) else p for p in parts]))

    return _shortest(lambda text: rows(text) >= n, f"no question of {n} tokens was found", "lower --text")


def answer_of(vlm: Vlm, n: int) -> str:
    """A text of ``n`` tokens."""
    none = len(vlm.tokenize([]))

    def enough(text: str) -> bool:
        return len(vlm.tokenize([TextPart(text)])) - none >= n

    return _shortest(enough, f"no answer of {n} tokens was found", "lower --answer")


def _shortest(enough: Callable[[str], bool], *otherwise: str) -> str:
    for length in range(1, LONGEST_QUESTION):
        text = ("a b c d e f g h " * (length // 16 + 1))[:length]
        if not text.endswith(" ") and enough(text):
            return text
    raise UsageError(*otherwise)


def drawn(width: int, height: int, seed: int = 0) -> Image:
    """A picture of coloured rectangles on noise."""
    rng = np.random.default_rng(seed)
    rgb = rng.integers(96, 160, (height, width, 3), dtype=np.uint8)
    for x, y, w, h in rng.random((12, 4)):
        left, top = int(x * width), int(y * height)
        rgb[top : top + int(h * height / 3) + 1, left : left + int(w * width / 3) + 1] = rng.integers(0, 256, 3)
    return Image(rgb, f"drawn, {width}x{height}")
