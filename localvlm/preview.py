"""What another setting would keep, told from a look that is over: no VLM runs again.

Exact for a question that stands alone, and for the first of a conversation; later ones keep what the model was given
before as well (:mod:`localvlm.session`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import Answer, AskOptions, Look
from localvlm.engine.api import ImageLayout, VlmInfo
from localvlm.errors import UsageError
from localvlm.guidance import AGGREGATIONS
from localvlm.pruning import InLlm, method_named
from localvlm.pruning.kinds import floor_of
from localvlm.selection import choose, guiding, method_of, pick, resampled, tiles_in_common

__all__ = ["Preview"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Preview:
    """What is known of pictures and a question without running anything.

    Args:
        layouts: where the image tokens lie that are chosen from, picture by picture: those of the model or, to see what
            would be kept on the guide's grid, those of the look.
        look: the guide's, at the same pictures.
        answer: whose saliency stands for a look, where there is none; it is of ``layouts``.
        question: its words tell the least of an "auto" budget.
        guide: if it stays loaded beside the model: tiles that both have then cost nothing.
        model: that ``layouts`` are of; None: it is not loaded, and its tiles have no price.
    """

    def __init__(
        self,
        layouts: Sequence[ImageLayout],
        look: Look | None = None,
        answer: Answer | None = None,
        *,
        question: str = "",
        guide: VlmInfo | None = None,
        model: VlmInfo | None = None,
    ) -> None:
        self.layouts = tuple(layouts)
        self._look, self._question, self._model = look, question, model
        self._saliency: dict[str, Float32 | None] = {}
        if look is None and answer is not None and answer.saliency is not None:
            self._saliency[guiding(method_named(answer.method)).aggregation or "sum"] = answer.saliency
        self._opened = frozenset[int]()
        if look is not None and guide is not None and model is not None:
            self._opened = tiles_in_common(guide, model, look.layouts, self.layouts)

    def saliency(self, method: str) -> Float32 | None:
        """(N,) scores of all image tokens, joint over the pictures, as a method reads the guide's attention, or as
        SGL+ does where it reads none; None: the guide has not looked, or its look does not tell.

        Raises:
            UnsupportedModel: where the image tokens lie is not known.
        """
        return self._scores(guiding(method_named(method)).aggregation or "sum")

    def kept(self, options: AskOptions) -> list[Int32]:
        """Sorted indices of each picture's tokens that the model would be given, counted within the picture.

        Raises:
            UsageError: the method goes by more than attention, or by a look that was not taken, or does not fit the
                budget.
            UnsupportedModel: where the image tokens lie is not known.
        """
        method = method_of(options, len(self.layouts))
        if isinstance(method, InLlm):
            raise UsageError(f"{method.name} drops tokens between the model's layers", "ask to see which")
        if method.needs or method.within is not None:
            raise UsageError(f"{method.name} goes by the model's own features", "ask to see which tokens it keeps")
        saliency = None if method.aggregation is None else self._scores(method.aggregation)
        if method.aggregation is not None and saliency is None:
            raise UsageError(f"{method.name} goes by a look that the guide has not taken", "ask to see its effect")
        if self._model is not None:
            found = choose(method, options, self.layouts, saliency, self._model, self._question, opened=self._opened)
        elif method.name == "none":
            found = [None] * len(self.layouts)
        else:
            price, floor = options.tile_price or 0.0, floor_of(self._question)
            found = [*pick(method, options.keep, self.layouts, saliency, options.seed, price, floor)]
        all_of = [np.arange(layout.n_tokens, dtype=np.int32) for layout in self.layouts]
        return [a if kept is None else kept.index for a, kept in zip(all_of, found, strict=True)]

    def _scores(self, aggregation: str) -> Float32 | None:
        if aggregation not in self._saliency:
            self._saliency[aggregation] = self._read(aggregation)
        return self._saliency[aggregation]

    def _read(self, aggregation: str) -> Float32 | None:
        if self._look is None:
            return None
        try:
            scores = AGGREGATIONS[aggregation](self._look.attention)
        except ValueError:  # a reduction that the tap was not asked for
            return None
        return resampled(scores, self._look.layouts, self.layouts)
