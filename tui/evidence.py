"""What is known of the question in hand, and what it draws over its pictures. Knows no widgets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from localvlm.answers import Answer, AskOptions, Look
from localvlm.engine.api import ImageLayout, VlmInfo
from localvlm.errors import LocalvlmError
from localvlm.heatmap import heat_shares
from localvlm.preview import Preview
from localvlm.telling import budget_told

__all__ = ["Evidence", "Marks"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Marks:
    """What is drawn over one picture: ``boxes`` (n, 4) as shares of its sides, ``heat`` (n,) 0..1, ``kept`` indices of
    boxes; None where it is not known. ``total``: its image tokens.
    """

    boxes: Float32 | None = None
    heat: Float32 | None = None
    kept: Int32 | None = None
    total: int = 0


class Evidence:
    """A question's look and answer, as far as they have come.

    Attributes:
        sizes: (width, height) in pixels of the pictures, in order; later ones may not have been asked about.
        note: why there is nothing to show of the tokens kept; "": there is.
        exact: whether the tokens kept are those of the answer, and no preview.
    """

    def __init__(self) -> None:
        self.sizes: list[tuple[int, int]] = []
        self.note, self.exact = "", False
        self._question = ""
        self._look: Look | None = None
        self._answer: Answer | None = None
        self._guide: VlmInfo | None = None
        self._model: VlmInfo | None = None
        self._layouts: dict[tuple[int, int], ImageLayout] = {}
        """The model's, by the size of a picture."""
        self._preview: Preview | None = None

    def loaded(self, guide: VlmInfo | None, model: VlmInfo | None) -> None:
        """Which VLMs answer from now on."""
        if model != self._model:
            self._layouts = {}
        self._guide, self._model, self._preview = guide, model, None

    @property
    def n_asked(self) -> int:
        """Pictures that something is known of: so many of the first."""
        known = self._answer or self._look
        return 0 if known is None else len(known.layouts)

    def begin(self, question: str) -> None:
        """Another question: what the last one left does not hold for it."""
        self._question, self._look, self._answer, self._preview = question, None, None, None

    def looked(self, look: Look) -> None:
        """The guide has looked."""
        self._look, self._preview = look, None

    def answered(self, answer: Answer) -> None:
        """The answer is final."""
        self._answer, self._preview = answer, None
        if answer.answered_by == "model":
            self._layouts |= dict(zip(self.sizes, answer.layouts, strict=False))

    def marks(self, options: AskOptions) -> list[Marks]:
        """Of each picture, as a question with these options would have it; what the answer tells comes first."""
        self.note = ""
        preview = self._tried()
        if preview is None or len(preview.layouts) > len(self.sizes):
            self.exact = False
            return [Marks() for _ in self.sizes]
        saliency, kept = None, self._seen(options, preview.layouts)
        self.exact = kept is not None
        try:
            saliency = preview.saliency(options.method)
            kept = preview.kept(options) if kept is None else kept
        except LocalvlmError as error:
            self.note = f"{error.message}; {error.hint}" if error.hint else error.message
        heat = None if saliency is None else heat_shares(saliency)
        borders = pairwise(np.cumsum([0, *(layout.n_tokens for layout in preview.layouts)]).tolist())
        known = [
            Marks(
                None if layout.boxes is None else (layout.boxes / np.array([*size, *size])).astype(np.float32),
                None if heat is None else heat[start:end],
                None if kept is None else kept[i],
                layout.n_tokens,
            )
            for i, (layout, size, (start, end)) in enumerate(zip(preview.layouts, self.sizes, borders, strict=False))
        ]
        return known + [Marks()] * (len(self.sizes) - len(known))

    def _tried(self) -> Preview | None:
        """On the model's grid if that is known, else on the guide's."""
        if self._preview is None and (layouts := self._known_layouts()):
            of_model = all(size in self._layouts for size in self.sizes[: len(layouts)])
            model = self._model if of_model else None
            self._preview = Preview(
                layouts, self._look, self._answer, question=self._question, guide=self._guide, model=model
            )
        return self._preview

    def _known_layouts(self) -> Sequence[ImageLayout]:
        if self._answer is not None and self._answer.answered_by == "model":
            return self._answer.layouts
        of_model = [self._layouts[size] for size in self.sizes[: self.n_asked] if size in self._layouts]
        if len(of_model) == self.n_asked:
            return of_model
        known = self._look or self._answer
        return () if known is None else known.layouts

    def _seen(self, options: AskOptions, layouts: Sequence[ImageLayout]) -> list[Int32] | None:
        """What the model was given, if these are the options that it was asked with."""
        answer = self._answer
        if answer is None or answer.answered_by != "model":
            return None
        if (answer.method, answer.keep) != (options.method, budget_told(options.keep)):
            return None
        joint = np.array(answer.kept_indices, np.int32)
        borders = np.cumsum([0, *(layout.n_tokens for layout in layouts)])
        return [joint[(joint >= a) & (joint < b)] - np.int32(a) for a, b in pairwise(borders)]
