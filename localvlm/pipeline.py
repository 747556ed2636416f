"""From pictures and a question to an answer: the guide looks, tokens are chosen, the model answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import (
    GUIDE_MAX_TOKENS,
    STAGES,
    Answer,
    AskOptions,
    AttentionMap,
    Look,
    Pair,
    TileCounts,
    TokenCounts,
    VlmFiles,
)
from localvlm.early_exit import CONSISTENCY_KEEP, Score, confidence, consistency, exits
from localvlm.engine.api import (
    Completion,
    Encoded,
    Engine,
    ImageLayout,
    ImagePart,
    LoadOptions,
    Message,
    Part,
    SamplingOptions,
    TextPart,
    Vlm,
)
from localvlm.errors import ContextOverflow, EngineCrashed, Interrupted, UnsupportedModel, UsageError
from localvlm.guidance import AGGREGATIONS
from localvlm.images import Image
from localvlm.pruning import Keep, Method, Tokens, mean_kept, method_named, share_of
from localvlm.selection import choose, guiding, joint, method_of, resampled, select

__all__ = ["Answer", "AskOptions", "AttentionMap", "Look", "Pair", "Pipeline", "TileCounts", "TokenCounts", "VlmFiles"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Pipeline:
    """A pair, loaded as far as it is needed."""

    def __init__(
        self, pair: Pair, engine: Engine, *, guide: LoadOptions = LoadOptions(), model: LoadOptions = LoadOptions()
    ) -> None:
        self.pair, self.engine = pair, engine
        self._options = {"guide": guide, "model": model}
        self._loaded: dict[str, Vlm] = {}

    @classmethod
    def open(
        cls,
        pair: Pair,
        options: LoadOptions = LoadOptions(),
        engine: Engine | None = None,
        *,
        guide_image_tokens: int = 0,
    ) -> Pipeline:
        """A pipeline with its own engine unless one is given; nothing is loaded yet. ``guide_image_tokens`` stands for
        ``options.image_tokens`` in the guide if it is not 0.
        """
        if engine is None:
            from localvlm.engine.client import Engine as WorkerEngine

            engine = WorkerEngine()
        guide = replace(options, image_tokens=guide_image_tokens or options.image_tokens)
        return cls(pair, engine, guide=guide, model=options)

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the engine."""
        self._loaded.clear()
        self.engine.close()

    def vlm(self, role: str) -> Vlm:
        """The loaded "guide" or "model".

        Raises:
            UsageError: the pair has none.
        """
        if role in self._loaded and not getattr(self._loaded[role], "alive", True):
            del self._loaded[role]  # its worker died; another is started
        if role not in self._loaded:
            files = self.pair.guide if role == "guide" else self.pair.model
            if files is None:
                raise UsageError(f"no {role} was given", f"pass --{role} and its mmproj file, or --pair")
            self._loaded[role] = self.engine.load(files.model, files.mmproj, self._options[role])
        return self._loaded[role]

    def ask(
        self,
        images: Sequence[Image],
        question: str,
        options: AskOptions = AskOptions(),
        on_text: Callable[[str], None] | None = None,
        on_stage: Callable[[str], None] | None = None,
    ) -> Answer:
        """Answers a question about pictures: the guide alone if its answer is trusted, and then the model is not even
        loaded; else the model, from the image tokens the guide looked at.

        ``on_text`` gets the answer as it comes, ``on_stage`` the name of each stage as it begins.

        Raises:
            UsageError: method or early exit need a guide and there is none.
            ContextOverflow, ImageError, ModelError, EngineCrashed: see :mod:`localvlm.errors`.
            Interrupted: the engine was cancelled; ``partial`` holds the text so far.
        """
        clock = _Clock(on_stage)
        method = method_of(options, len(images))
        may_exit = options.exit_at is not None and bool(images)
        guided = method.aggregation is not None or may_exit
        if guided and self.pair.guide is None:
            what = "early exit" if method.aggregation is None else f"method '{method.name}'"
            raise UsageError(
                f"{what} needs a guide and none was given",
                "pass --guide and --guide-mmproj, or a method without one such as --method grid",
            )
        messages = _messages(images, question, options.system)
        look = layouts = None
        self._load(["guide"] * guided + ["model"] * (not may_exit), clock)
        if guided:
            self._check_fit("guide", images, messages, method, options)
        if not may_exit:
            layouts = self._check_fit("model", images, messages, method, options)
        if guided:
            max_tokens = min(options.max_tokens, options.guide_max_tokens)
            look = self._look(images, messages, max_tokens, clock, check=guiding(method))
            if look.score is not None and exits(look.score, options.exit_at, look.answer.finish):
                seen = AGGREGATIONS[guiding(method).aggregation or "sum"](look.attention)
                final = self._exit(look, options, clock, on_text)
                return replace(final, layouts=look.layouts, saliency=seen)
        if layouts is None:
            self._load(["model"], clock)
            layouts = self._check_fit("model", images, messages, method, options)
        saliency = None
        if look is not None and method.aggregation is not None:
            saliency = self.saliency(look, method.aggregation, layouts)
        kept = choose(method, options, layouts, saliency, self.vlm("model").info)
        answer = self._answer(images, messages, options, kept, look, clock, on_text)
        return replace(answer, layouts=tuple(layouts), saliency=saliency)

    def look(
        self,
        images: Sequence[Image],
        question: str,
        max_tokens: int = GUIDE_MAX_TOKENS,
        *,
        method: str | None = None,
        system: str | None = None,
    ) -> Look:
        """The guide's unpruned answer and its attention; with its score, as ``method`` prunes, if one is named."""
        check = None if method is None else guiding(method_named(method))
        return self._look(images, _messages(images, question, system), max_tokens, _Clock(None), check=check)

    def attention(self, images: Sequence[Image], question: str, max_tokens: int = GUIDE_MAX_TOKENS) -> AttentionMap:
        """The guide's attention (the model's, if there is no guide) as named arrays.

        ``prompt``, ``generated`` (n_layer, n_head, n_image_tokens) float32, summed over rows; ``boxes``
        (n_image_tokens, 4) float32 in pixels of the upright picture; ``tower`` (n_tower_layer, n_image_tokens) float32
        head means; ``token_ids`` (n_prompt,) int32, -1 at image tokens; ``generated_ids`` int32, those fed back;
        ``answer``.
        """
        role = "guide" if self.pair.guide is not None else "model"
        clock = _Clock(None)
        look = self._look(images, _messages(images, question, None), max_tokens, clock, role, tower=True)
        boxes = [e.layout.boxes for e in look.encoded]
        towers = [e.tower for e in look.encoded]
        if any(b is None for b in boxes) or any(t is None for t in towers):
            raise UnsupportedModel(f"where the image tokens of '{self.vlm(role).info.name}' lie is not known")
        return AttentionMap(
            {
                "prompt": look.attention.prompt,
                "generated": look.attention.generated,
                "boxes": np.concatenate([b for b in boxes if b is not None]),
                "tower": np.concatenate([t for t in towers if t is not None], axis=1),
                "token_ids": look.prompt.token_ids,
                "generated_ids": look.answer.ids[: look.answer.fed],
                "answer": np.array(look.answer.text.strip()),
            }
        )

    # stages

    def _load(self, roles: Sequence[str], clock: _Clock) -> None:
        with clock("load"):
            for role in roles:
                self.vlm(role)

    def _check_fit(
        self, role: str, images: Sequence[Image], messages: Sequence[Message], method: Method, options: AskOptions
    ) -> list[ImageLayout]:
        """Token layouts of the pictures in a VLM; refuses a prompt that cannot fit before anything is encoded."""
        vlm = self.vlm(role)
        layouts = [vlm.layout(*image.size) for image in images]
        counts = [layout.n_tokens for layout in layouts]
        parts = [counts[p] if isinstance(p, int) else p for p in vlm.chat(messages)]
        needed = len(vlm.tokenize(parts)) + 1
        layer = options.layer_in(vlm.info.n_layer)
        if role == "model":
            vlm.info.check_layer(layer)
        if role == "model" and method.name != "none" and not layer:
            needed -= sum(counts) - share_of(options.keep, sum(counts))
        if needed > vlm.info.n_ctx:
            raise ContextOverflow(
                f"pictures ({sum(counts)} tokens) and question need {needed} cells and the {role}'s context has "
                f"{vlm.info.n_ctx}",
                "shorten the question, use fewer pictures or raise --ctx-size",
            )
        return layouts

    def _look(
        self,
        images: Sequence[Image],
        messages: Sequence[Message],
        max_tokens: int,
        clock: _Clock,
        role: str = "guide",
        tower: bool = False,
        check: Method | None = None,
    ) -> Look:
        guide = self.vlm(role)
        with clock("guide_encode"):
            encoded = tuple(guide.encode(image.rgb, tower=tower) for image in images)
        try:
            with clock("guide_prefill"):
                prompt = guide.prefill(_parts(guide, messages, encoded, None), tap=True)
            with clock("guide_decode"):
                answer = guide.generate(max_tokens)
            if answer.finish == "cancelled":
                raise Interrupted()
            look = Look(guide.attention(), encoded, prompt, answer)
            if check is not None:
                with clock("guide_prefill"):
                    look = replace(look, score=self._score(guide, messages, look, check))
            return look
        finally:
            _release(guide, encoded)

    def _score(self, guide: Vlm, messages: Sequence[Message], look: Look, method: Method) -> Score:
        """How sure the guide was, and whether it says the same from its own pruned image: one teacher-forced pass."""
        saliency = AGGREGATIONS[method.aggregation or "sum"](look.attention)
        guide.prefill(_parts(guide, messages, look.encoded, select(method, CONSISTENCY_KEEP, look.layouts, saliency)))
        ids = look.answer.ids
        logits = guide.score(ids) if len(ids) else np.empty((0, 0), np.float32)
        return Score(confidence(look.answer.logprobs[: len(ids)]), consistency(logits, ids))

    def _exit(self, look: Look, options: AskOptions, clock: _Clock, on_text: Callable[[str], None] | None) -> Answer:
        """The guide's answer as the final one."""
        text = look.answer.text.strip()
        if on_text is not None:
            on_text(text)
        return Answer(
            text=text,
            answer_ids=tuple(int(t) for t in look.answer.ids),
            kept_indices=(),
            answered_by="guide",
            tokens=TokenCounts(look.prompt.n_image, None, look.prompt.n_past, len(look.answer.ids)),
            ms={**clock.ms, "first_token": clock.elapsed(), "total": clock.elapsed()},
            method=options.method,
            keep=_asked(options.keep),
            pair=self.pair.name,
            tiles=_tiles(look.encoded),
            guide_text=text,
            score=look.score,
            threshold=options.exit_at,
        )

    def saliency(self, look: Look, aggregation: str, layouts: Sequence[ImageLayout]) -> Float32:
        """(N,) scores of the model's image tokens, resampled in image space where the two grids differ."""
        return resampled(AGGREGATIONS[aggregation](look.attention), look.layouts, layouts)

    def _answer(
        self,
        images: Sequence[Image],
        messages: Sequence[Message],
        options: AskOptions,
        kept: list[Int32 | None],
        look: Look | None,
        clock: _Clock,
        on_text: Callable[[str], None] | None,
    ) -> Answer:
        model = self.vlm("model")
        layer = options.layer_in(model.info.n_layer) if any(k is not None for k in kept) else 0
        with clock("encode"):
            needed = [None] * len(images) if layer else kept
            encoded = [model.encode(i.rgb, keep=k) for i, k in zip(images, needed, strict=True)]
        try:
            with clock("prefill"):
                prompt = model.prefill(_parts(model, messages, encoded, kept), layer=layer)
            before = clock.elapsed()
            with clock("decode"):
                sampling = SamplingOptions(options.temp, options.seed)
                draft = self._draft(options, look)
                ids = None if draft is None else draft.ids
                done = model.generate(options.max_tokens, sampling, _without_lead(on_text), draft=ids)
        finally:
            _release(model, encoded)
        if done.finish == "cancelled":
            raise Interrupted(partial=done.text.lstrip())
        chosen = joint([e.layout for e in encoded], kept)
        return Answer(
            text=done.text.strip(),
            answer_ids=tuple(int(t) for t in done.ids),
            kept_indices=chosen,
            answered_by="model",
            tokens=TokenCounts(
                prompt.n_image,
                len(chosen),
                prompt.n_past,
                len(done.ids),
                *_drafted(draft, done),
                mean_kept=mean_kept(prompt.n_image, len(chosen), layer, model.info.n_layer),
            ),
            ms={**clock.ms, "first_token": before + done.first_ms, "total": clock.elapsed()},
            method=options.method,
            keep=_asked(options.keep),
            pair=self.pair.name,
            finish=done.finish,
            layer=layer,
            tiles=_tiles(encoded),
            guide_text=None if look is None else look.answer.text.strip(),
            score=None if look is None else look.score,
            threshold=options.exit_at,
        )

    def _draft(self, options: AskOptions, look: Look | None) -> Completion | None:
        """The guide's answer, where the model may follow it: their tokens must be the same."""
        wanted = method_named(options.method).aggregation is not None if options.draft is None else options.draft
        if look is None or not wanted or self.vlm("guide").info.vocab_hash != self.vlm("model").info.vocab_hash:
            return None
        return look.answer


class _Clock:
    """Milliseconds per stage."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self.ms = dict.fromkeys(STAGES, 0.0)
        self._on_stage = on_stage
        self._started = time.perf_counter()
        self._stage, self._entered = "", 0.0

    def elapsed(self) -> float:
        return (time.perf_counter() - self._started) * 1e3

    def __call__(self, stage: str) -> _Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()
        if self._on_stage is not None:
            self._on_stage(self._stage)

    def __exit__(self, *exc: object) -> None:
        self.ms[self._stage] += (time.perf_counter() - self._entered) * 1e3


def _asked(keep: Keep) -> float | str:
    """A budget as it is told."""
    return 1.0 if keep is None else str(keep) if isinstance(keep, Tokens) else keep


def _messages(images: Sequence[Image], question: str, system: str | None) -> list[Message]:
    return [*([Message("system", system)] if system else []), Message("user", question, len(images))]


def _parts(
    vlm: Vlm, messages: Sequence[Message], encoded: Sequence[Encoded], kept: Sequence[Int32 | None] | None
) -> list[Part]:
    parts: list[Part] = []
    for part in vlm.chat(messages):
        if isinstance(part, TextPart):
            parts.append(part)
        else:
            parts.append(ImagePart(encoded[part], None if kept is None else kept[part]))
    return parts


def _drafted(draft: Completion | None, done: Completion) -> tuple[int, int]:
    """Tokens drafted and accepted, the draft's end counted where the answer had room for it."""
    if draft is None or not done.drafted:
        return 0, 0
    ends = draft.finish == "stop" and done.drafted == len(draft.ids)
    agrees = ends and done.finish == "stop" and len(done.ids) == done.accepted == done.drafted
    return done.drafted + ends, done.accepted + agrees


def _tiles(encoded: Sequence[Encoded]) -> TileCounts:
    return TileCounts(sum(e.layout.n_tiles for e in encoded), sum(e.n_tiles for e in encoded))


def _release(vlm: Vlm, encoded: Sequence[Encoded]) -> None:
    for image in encoded:
        with contextlib.suppress(EngineCrashed, Interrupted):  # the engine is gone, and the picture with it
            vlm.release(image)


def _without_lead(on_text: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Drops white space before the first word of a stream."""
    if on_text is None:
        return None
    begun = False

    def emit(text: str) -> None:
        nonlocal begun
        if not begun:
            text = text.lstrip()
            begun = bool(text)
        if text:
            on_text(text)

    return emit
