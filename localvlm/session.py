"""Questions about pictures, one after the other: the guide looks, tokens are chosen, the model answers.

Pictures are encoded once for each VLM, and KV caches are gone on with where their rows agree. A conversation is of one
of two modes:

- **independent**: each question stands alone. Answers are those of separate runs, bit for bit.
- **history**: turns stay. The guide sees the whole conversation. The model keeps the rows it has; a question adds the
  tokens chosen for it that are not among them, before its own text and at their true positions. Where rows cannot be
  added behind text (M-RoPE), the first question that wants others has all of them prefilled, in order and once for all;
  with tokens dropped at a layer, each turn is prefilled anew.

In history the guide must pay. Plain llama.cpp, which keeps its cache too, prefills all N image tokens once. Here the
model has been given C of them, and the guide has cost G of the model's rows. It looks again only if G and another look
like the last are within M - C, where M is N less a RESERVE, and a question gets at most M - C - G new tokens. So once
the first look has paid, C + G exceeds M by no more than a look takes longer than the one before. The first look at a
picture is always taken, and what it chooses of it given: else the picture would not be seen. The bound does not hold
where rows cannot be added behind text: there, the C of before come on top of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import Answer, AskOptions, Look
from localvlm.clock import Clock
from localvlm.early_exit import CONSISTENCY_KEEP, exits
from localvlm.engine.api import (
    Completion,
    ImageLayout,
    Message,
    Reuse,
    SamplingOptions,
)
from localvlm.errors import ContextOverflow, Interrupted, UsageError
from localvlm.given import Given
from localvlm.guidance import AGGREGATIONS
from localvlm.images import Image
from localvlm.looking import look_at
from localvlm.pruning import InLlm, Kept, Method, Tokens, method_named, share_of
from localvlm.schema import told
from localvlm.selection import Sight, choose, guiding, joint, method_of, resampled, tiles_in_common
from localvlm.speaker import Speaker, altered, parts_given, sight_of
from localvlm.stepwise import Stepped, prefill_in_steps
from localvlm.telling import answer_of_guide, budget_told, tile_counts, token_counts, without_lead

if TYPE_CHECKING:
    from localvlm.pipeline import Pipeline

__all__ = ["Session", "Turn"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

RESERVE = 0.1
"""Share of the image tokens that pruning must save for good: rows that come in small batches, turn by turn, take up to
a seventh longer than those of one large batch.
"""
DECODED = 5
"""Prefilled rows that a decoded token costs as much as, at most: a batch reads the weights once for all its rows."""


@dataclass(frozen=True)
class Turn:
    """``images``: those that came with the question."""

    question: str
    images: tuple[Image, ...]
    answer: Answer


class Session:
    """A conversation about pictures. A context manager: leaving it forgets the pictures.

    Attributes:
        turns: what was asked and answered so far, oldest first. A question that failed or was cancelled is not there,
            and the next one can be asked.
        waiting: pictures that no question has come with yet: they come with the next one, and may be taken out of here.
    """

    def __init__(self, pipeline: Pipeline, images: Sequence[Image] = (), *, history: bool = True) -> None:
        self._pipeline, self._history = pipeline, history
        self._guide, self._model = Speaker(pipeline, "guide"), Speaker(pipeline, "model")
        self.turns: list[Turn] = []
        self.waiting = list(images)
        self._given = Given()
        self._before: list[Given] = []
        """What was given before each turn."""
        self._spent = self._last = 0.0
        """What the guide's looks cost, rows times parameters: all of them, and the last one without its pictures."""

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Forgets the pictures."""
        self._guide.release()
        self._model.release()

    def add(self, image: Image) -> None:
        """Shows another picture, with the next question."""
        self.waiting.append(image)

    def restore(self, turns: Sequence[Turn]) -> None:
        """Begins with what was asked and answered before, in another session or process, in place of what there is.
        Nothing is encoded or prefilled until the next question; what the model is given is then chosen anew.
        """
        self.turns, self._before, self._given = list(turns), [Given()] * len(turns), Given()
        self._spent = self._last = 0.0

    def undo(self) -> Turn:
        """Takes the last turn back; its pictures come with the next question.

        Raises:
            UsageError: there is none.
        """
        if not self.turns:
            raise UsageError("there is no turn to take back")
        turn, self._given = self.turns.pop(), self._before.pop()
        self.waiting[:0] = turn.images
        return turn

    @property
    def images(self) -> list[Image]:
        """All pictures, in the order in which they came."""
        return [image for turn in self.turns for image in turn.images] + self.waiting

    def ask(
        self,
        question: str,
        options: AskOptions = AskOptions(),
        on_text: Callable[[str], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
        on_look: Callable[[Look], None] | None = None,
    ) -> Answer:
        """Answers a question about the pictures: the guide alone if its answer is trusted, and then the model is not
        even loaded; else the model, from the image tokens the guide looked at.

        ``on_text`` gets the answer as it comes, ``on_stage`` the name of each stage as it begins, ``on_look`` what the
        guide saw and said, before its answer is final or the model begins.

        Raises:
            UsageError: method or early exit need a guide and there is none, or a conversation is asked nothing.
            ContextOverflow, ImageError, ModelError, EngineCrashed: see :mod:`localvlm.errors`.
            Interrupted: the engine was cancelled; ``partial`` holds the text so far.
        """
        if self._history and not question:
            raise UsageError("the question is empty", "ask something")
        clock, images = Clock(on_stage), self.images
        method = method_of(options, len(images))
        may_exit = options.exit_at is not None and bool(images)
        guided = may_exit or (method.aggregation is not None and self._guide_pays())
        if guided and self._pipeline.pair.guide is None:
            what = "early exit" if method.aggregation is None else f"method '{method.name}'"
            raise UsageError(
                f"{what} needs a guide and none was given",
                "pass --guide and --guide-mmproj, or a method without one such as --method grid",
            )
        messages = self._messages(told(question, options.schema), options.system)
        look = layouts = None
        later = may_exit or (guided and self._pipeline.low_memory)
        self._load(["guide"] * guided + ["model"] * (not later), clock)
        if guided:
            self._check_fit("guide", messages, method, options)
        if not later:
            layouts = self._check_fit("model", messages, method, options)
        if guided:
            max_tokens = min(options.max_tokens, options.guide_max_tokens)
            check = guiding(method) if may_exit else None
            before = self._guide.n_tiles
            look = self._look(messages, max_tokens, clock, keep=options.guide_keep, check=check, schema=options.schema)
            self._looked(look, self._guide.n_tiles - before)
            if on_look is not None:
                on_look(look)
            if look.score is not None and exits(look.score, options.exit_at, look.answer.finish):
                seen = AGGREGATIONS[guiding(method).aggregation or "sum"](look.attention)
                final = answer_of_guide(look, options, clock, self._pipeline.pair.name)
                if on_text is not None:
                    on_text(final.text)
                return self._remember(told(question, options.schema), replace(final, saliency=seen), self._given)
        if layouts is None:
            self._load(["model"], clock)
            layouts = self._check_fit("model", messages, method, options)
        answer, given = self._by_model(question, messages, method, options, layouts, look, clock, on_text)
        return self._remember(told(question, options.schema), answer, given)

    def look(
        self,
        question: str,
        max_tokens: int,
        *,
        method: Method | None = None,
        system: str | None = None,
        role: str = "guide",
        keep: float | Tokens | None = None,
        tower: bool = False,
    ) -> Look:
        """What the guide (or the model) says from ``keep`` of its image tokens (None: all); with its score, as
        ``method`` prunes, if one is given. Leaves no turn.
        """
        messages = self._messages(question, system)
        return self._look(messages, max_tokens, Clock(None), role=role, keep=keep, tower=tower, check=method)

    def _remember(self, question: str, answer: Answer, given: Given) -> Answer:
        self.turns.append(Turn(question, tuple(self.waiting), answer))
        self._before.append(self._given)
        self.waiting = []
        if self._history:
            self._given = given
        return answer

    # prompts

    def _messages(self, question: str, system: str | None) -> list[Message]:
        messages = [Message("system", system)] if system else []
        if not self._history:
            return [*messages, Message("user", question, len(self.images))]
        for turn in self.turns:
            messages.append(Message("user", turn.question, len(turn.images)))
            messages.append(Message("assistant", turn.answer.text))
        return [*messages, Message("user", question, len(self.waiting))]

    @property
    def _reuse(self) -> Reuse:
        return "rows" if self._history else "batches"

    # what the model is given

    def _chosen(
        self, kept: Sequence[Int32 | None] | None, saliency: Float32 | None, counts: Sequence[int], layer: int
    ) -> Given:
        """The image tokens that the model sees, with those chosen now. None: the guide did not look, and the tokens
        that it attended to most so far fill the room there is.
        """
        before = self._given if self._history else Given()
        known = before.seen(np.zeros(sum(counts), np.float32) if saliency is None else saliency, counts)
        begun = any(len(tokens) for tokens in before.tokens)
        led = begun and (saliency is not None or kept is None)
        room = max(0, int(self._room(counts))) if led else None
        wanted = [None] * len(counts) if kept is None else kept
        if begun and layer:
            return known.more(len(self.turns), wanted, room, in_order=True)
        later = known.more(len(self.turns), wanted, room)
        added = any(len(now) > len(then) for now, then in zip(later.tokens, before.tokens, strict=False))
        if added and self._model.vlm.info.mrope:
            return known.more(len(self.turns), [None] * len(counts), in_order=True)
        return later

    def _room(self, counts: Sequence[int], more: float = 0.0) -> float:
        """Image tokens that the model may still be given, ``more`` spent on the guide."""
        spent = (self._spent + more) / max(self._model.vlm.info.n_params, 1)
        return (1 - RESERVE) * sum(counts) - sum(map(len, self._given.tokens)) - spent

    def _guide_pays(self) -> bool:
        """Whether another look costs no more than what pruning has saved. The first at a picture is always taken."""
        given = self._given.tokens
        if len(given) < len(self.images) or not all(map(len, given)):
            return True
        counts = [self._model.vlm.layout(*image.size).n_tokens for image in self.images]
        return self._room(counts, self._last) >= 0

    def _looked(self, look: Look, tiles: int) -> None:
        """Notes what a look of the guide cost, for which ``tiles`` were encoded."""
        guide = self._guide.vlm.info
        text = look.prompt.n_past - look.prompt.n_kept
        checked = 0
        if look.score is not None:
            checked = text + round(CONSISTENCY_KEEP * look.prompt.n_image) + len(look.answer.ids)
        rows = look.prompt.n_run + DECODED * len(look.answer.ids) + checked
        self._last = guide.n_params * (rows - look.prompt.n_run + self._text_run(look, text))
        self._spent += guide.n_params * (rows + guide.tile_price * tiles)

    def _text_run(self, look: Look, text: int) -> int:
        """Rows of text that a look ran, as far as that is told: those of pictures may have been there."""
        n_run = look.prompt.n_run
        of_pictures = sum(look.shown[len(look.encoded) - len(self.waiting) :])
        return min(n_run - of_pictures if n_run >= of_pictures else n_run, text)

    # stages

    def _load(self, roles: Sequence[str], clock: Clock) -> None:
        with clock("load"):
            for role in roles:
                self._pipeline.vlm(role)

    def _check_fit(
        self, role: str, messages: Sequence[Message], method: Method | InLlm, options: AskOptions
    ) -> list[ImageLayout]:
        """Token layouts of the pictures in a VLM; refuses a prompt that cannot fit before anything is encoded."""
        vlm = self._pipeline.vlm(role)
        layouts = [vlm.layout(*image.size) for image in self.images]
        counts = [layout.n_tokens for layout in layouts]
        parts = [counts[p] if isinstance(p, int) else p for p in vlm.chat(messages)]
        needed, most = len(vlm.tokenize(parts)) + 1, sum(counts)
        layer = options.layer_in(vlm.info.n_layer)
        if role == "guide":
            needed -= sum(n - share_of(options.guide_keep, n) for n in counts)
        else:
            vlm.info.check_layer(layer)
        if role == "model" and isinstance(method, Method) and method.name != "none" and not layer:
            given = sum(map(len, self._given.tokens))
            most = min(most, given + share_of(options.keep, most)) if not (given and vlm.info.mrope) else most
            needed -= sum(counts) - most
        if needed > vlm.info.n_ctx:
            what = f"{len(self.turns)} turns, their" if self._history and self.turns else "the"
            raise ContextOverflow(
                f"{what} pictures ({sum(counts)} tokens) and question need {needed} cells and the {role}'s context has "
                f"{vlm.info.n_ctx}",
                "start a new conversation or raise --ctx-size"
                if self._history and self.turns
                else "shorten the question, use fewer pictures or raise --ctx-size",
            )
        return layouts

    def _seen(self, question: str, method: Method | InLlm, clock: Clock) -> Sight:
        """What a method goes by that asks for more than the guide's attention: of all tiles, encoded for it."""
        if isinstance(method, InLlm) or not method.needs:
            return Sight()
        if method.average is not None and self._history and self.turns:
            raise UsageError(
                f"method '{method.name}' averages tokens, which cannot be added to in later turns",
                "ask each question apart",
            )
        with clock("encode"):
            encoded = self._model.encode(self.images, tower="tower" in method.needs)
            sight = sight_of(self._model.vlm, encoded, question, method.needs)
            return replace(sight, weights=self._pipeline.weights(method))

    def _look(
        self,
        messages: Sequence[Message],
        max_tokens: int,
        clock: Clock,
        *,
        role: str = "guide",
        keep: float | Tokens | None = None,
        tower: bool = False,
        check: Method | None = None,
        schema: str = "",
    ) -> Look:
        speaker, follows = self._guide if role == "guide" else self._model, bool(self._history and self.turns)
        return look_at(
            speaker, self.images, messages, max_tokens, clock,
            keep=keep, tower=tower, check=check, reuse=self._reuse, last_alone=follows, schema=schema,
        )  # fmt: skip

    def _by_model(
        self,
        question: str,
        messages: Sequence[Message],
        method: Method | InLlm,
        options: AskOptions,
        layouts: Sequence[ImageLayout],
        look: Look | None,
        clock: Clock,
        on_text: Callable[[str], None] | None,
    ) -> tuple[Answer, Given]:
        """The model's answer from the tokens that ``method`` chooses, and what it was given with it."""
        saliency = picked = kept = None
        sight = self._seen(question, method, clock)
        if look is not None and method.aggregation is not None:
            saliency = resampled(AGGREGATIONS[method.aggregation](look.attention), look.layouts, layouts)
        if isinstance(method, Method) and (look is not None or method.aggregation is None):
            model, opened = self._model.vlm.info, frozenset[int]()
            if look is not None and not self._pipeline.low_memory:
                opened = tiles_in_common(self._guide.info, model, look.layouts, layouts)
            picked = choose(method, options, layouts, saliency, model, question, sight, opened)
            kept = [None if found is None else found.index for found in picked]
        counts = [layout.n_tokens for layout in layouts]
        if isinstance(method, InLlm):
            given = Given().seen(np.zeros(sum(counts), np.float32), counts).more(0, [None] * len(counts))
        else:
            given = self._chosen(kept, saliency, counts, options.layer_in(self._model.vlm.info.n_layer))
        within = self._pipeline.fitted(method) if isinstance(method, InLlm) else sight.within(method)
        answer = self._answer(messages, within, options, given, picked, look, clock, on_text)
        earlier = 0 if isinstance(method, InLlm) or not self._history else sum(map(len, self._given.tokens))
        answer = replace(answer, layouts=tuple(layouts), saliency=saliency, earlier=earlier)
        return answer, self._given if isinstance(method, InLlm) else given

    def _answer(
        self,
        messages: Sequence[Message],
        within: InLlm | None,
        options: AskOptions,
        given: Given,
        picked: Sequence[Kept | None] | None,
        look: Look | None,
        clock: Clock,
        on_text: Callable[[str], None] | None,
    ) -> Answer:
        model, kept = self._model.vlm, given.tokens
        pruned = any(len(k) < len(a) for k, a in zip(kept, given.attended, strict=True))
        layer = options.layer_in(model.info.n_layer) if pruned else 0
        with clock("encode"):
            encoded = self._model.encode(self.images, None if layer else kept)
        with clock("prefill"), altered(model, encoded, picked) as shown:
            parts = parts_given(model, messages, shown, given)
            if within is not None:
                stepped = prefill_in_steps(model, parts, within, options.keep)
            else:
                prompt = model.prefill(parts, layer=layer, reuse=self._reuse)
                stepped = Stepped.at_once(prompt, joint([e.layout for e in encoded], kept), layer)
        prompt = stepped.prompt
        before = clock.elapsed()
        with clock("decode"):
            sampling = SamplingOptions(options.temp, options.seed, schema=options.schema)
            draft = self._draft(options, look)
            ids = None if draft is None else draft.ids
            done = model.generate(options.max_tokens, sampling, without_lead(on_text), draft=ids)
        if done.finish == "cancelled":
            raise Interrupted(partial=done.text.lstrip())
        return Answer(
            text=done.text.strip(),
            answer_ids=tuple(int(t) for t in done.ids),
            kept_indices=stepped.kept,
            answered_by="model",
            tokens=token_counts(stepped, draft, done, look, model.info.n_layer),
            ran=(0 if look is None else look.prompt.n_run, prompt.n_run),
            ms={**clock.ms, "first_token": before + done.first_ms, "total": clock.elapsed()},
            method=options.method,
            keep=budget_told(options.keep),
            pair=self._pipeline.pair.name,
            finish=done.finish,
            layer=layer,
            steps=stepped.steps,
            tiles=tile_counts(encoded),
            guide_text=None if look is None else look.answer.text.strip(),
            score=None if look is None else look.score,
            threshold=options.exit_at,
        )

    def _draft(self, options: AskOptions, look: Look | None) -> Completion | None:
        """The guide's answer, where the model may follow it: their tokens must be the same."""
        wanted = method_named(options.method).aggregation is not None if options.draft is None else options.draft
        if look is None or not wanted or self._guide.info.vocab_hash != self._model.info.vocab_hash:
            return None
        return look.answer
