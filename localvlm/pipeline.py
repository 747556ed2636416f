"""From pictures and a question to an answer: the guide looks, tokens are chosen, the model answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
from localvlm.engine.api import (
    Engine,
    ImageLayout,
    LoadOptions,
    Vlm,
    VlmInfo,
)
from localvlm.engine.gguf_header import parts_of
from localvlm.engine.read_ahead import read_ahead
from localvlm.errors import UnsupportedModel, UsageError
from localvlm.extras import read_gates, read_weights
from localvlm.guidance import AGGREGATIONS
from localvlm.images import Image
from localvlm.pruning import InLlm, Method, Tokens, method_named
from localvlm.selection import guiding, resampled
from localvlm.session import Session, Turn

__all__ = [
    "STAGES",
    "Answer",
    "AskOptions",
    "AttentionMap",
    "Look",
    "Pair",
    "Pipeline",
    "Session",
    "TileCounts",
    "TokenCounts",
    "Turn",
    "VlmFiles",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Pipeline:
    """A pair, loaded as far as it is needed.

    Attributes:
        options: how "guide" and "model" are loaded.
        low_memory: the one is unloaded before the other is loaded.
    """

    def __init__(
        self,
        pair: Pair,
        engine: Engine,
        *,
        guide: LoadOptions = LoadOptions(),
        model: LoadOptions = LoadOptions(),
        low_memory: bool = False,
    ) -> None:
        self.pair, self.engine, self.low_memory = pair, engine, low_memory
        self.options = {"guide": guide, "model": model}
        self._loaded: dict[str, Vlm] = {}
        self._weights: dict[str, Mapping[str, Float32]] = {}
        self._fitted: dict[str, InLlm] = {}

    @classmethod
    def open(
        cls,
        pair: Pair,
        options: LoadOptions = LoadOptions(),
        engine: Engine | None = None,
        *,
        guide_image_tokens: int = 0,
        low_memory: bool = False,
    ) -> Pipeline:
        """A pipeline with its own engine unless one is given; nothing is loaded yet. ``guide_image_tokens`` stands for
        ``options.image_tokens`` in the guide if it is not 0.
        """
        if engine is None:
            from localvlm.engine.client import Engine as WorkerEngine

            engine = WorkerEngine()
        guide = replace(options, image_tokens=guide_image_tokens or options.image_tokens)
        return cls(pair, engine, guide=guide, model=options, low_memory=low_memory)

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
            if not self._loaded:
                order = (files, self.pair.model) if role == "guide" else (files,)
                read_ahead(
                    [path for each in order if each is not None for path in (*parts_of(each.model), each.mmproj)]
                )
            if self.low_memory:
                while self._loaded:
                    self._loaded.popitem()[1].close()
            self._loaded[role] = self.engine.load(files.model, files.mmproj, self.options[role])
        return self._loaded[role]

    @property
    def infos(self) -> dict[str, VlmInfo]:
        """What is loaded now, by role; nothing is loaded for it, and any thread may look."""
        return {role: vlm.info for role, vlm in dict(self._loaded).items()}

    def weights(self, method: Method) -> Mapping[str, Float32] | None:
        """What a method learnt for the model; None: it is not trained.

        Raises:
            UsageError, NotGguf: see :func:`localvlm.extras.read_weights`.
        """
        if method.shapes is None or self.pair.model is None:
            return None
        if method.name not in self._weights:
            shapes = method.shapes(self.vlm("model").info.n_embd)
            self._weights[method.name] = read_weights(self.pair.model.model, method.name, shapes)
        return self._weights[method.name]

    def fitted(self, method: InLlm) -> InLlm:
        """The method with what it learnt for the model, if it is trained.

        Raises:
            UsageError, NotGguf: see :func:`localvlm.extras.read_weights`.
        """
        if method.trained is None or self.pair.model is None:
            return method
        if method.name not in self._fitted:
            info = self.vlm("model").info
            self._fitted[method.name] = method.trained(read_gates(self.pair.model.model, info.n_embd, info.n_layer))
        return self._fitted[method.name]

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
        with self.session(images, history=False) as session:
            return session.ask(question, options, on_text, on_stage)

    def session(self, images: Sequence[Image] = (), *, history: bool = True) -> Session:
        """A conversation about pictures; see :mod:`localvlm.session` for what ``history`` changes. Several may be open,
        and take turns: each goes on from the KV caches as far as the last one left them.
        """
        return Session(self, images, history=history)

    def look(
        self,
        images: Sequence[Image],
        question: str,
        max_tokens: int = GUIDE_MAX_TOKENS,
        *,
        method: str | None = None,
        system: str | None = None,
        keep: float | Tokens | None = None,
    ) -> Look:
        """The guide's answer from ``keep`` of its image tokens (None: all) and its attention; with its score, as
        ``method`` prunes, if one is named.
        """
        check = None if method is None else guiding(method_named(method))
        with self.session(images, history=False) as session:
            return session.look(question, max_tokens, method=check, system=system, keep=keep)

    def attention(self, images: Sequence[Image], question: str, max_tokens: int = GUIDE_MAX_TOKENS) -> AttentionMap:
        """The guide's attention (the model's, if there is no guide) as named arrays.

        ``prompt``, ``generated`` (n_layer, n_head, n_image_tokens) float32, summed over rows; ``boxes``
        (n_image_tokens, 4) float32 in pixels of the upright picture; ``tower`` (n_tower_layer, n_image_tokens) float32
        head means; ``token_ids`` (n_prompt,) int32, -1 at image tokens; ``generated_ids`` int32, those fed back;
        ``answer``.
        """
        role = "guide" if self.pair.guide is not None else "model"
        with self.session(images, history=False) as session:
            look = session.look(question, max_tokens, role=role, tower=True)
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

    def saliency(self, look: Look, aggregation: str, layouts: Sequence[ImageLayout]) -> Float32:
        """(N,) scores of the model's image tokens, resampled in image space where the two grids differ."""
        return resampled(AGGREGATIONS[aggregation](look.attention), look.layouts, layouts)
