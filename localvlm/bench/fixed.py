"""An engine whose answers have the length, the draft and the encoded tiles that a measurement fixes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import (
    Completion,
    Encoded,
    Engine,
    LoadOptions,
    Part,
    Prefilled,
    SamplingOptions,
    TextPart,
    Vlm,
)

__all__ = ["Fixed", "FixedEngine"]

Int32 = NDArray[np.int32]


@dataclass
class Fixed:
    """What is fixed of the model, and what came of it.

    Attributes:
        draft: in place of the one given.
        tiles: of a picture encoded in part, tiles that are encoded at least.
        text: in place of the answers' own.
        repeats: times that each answer is given again along itself, so that what drafts depend on is measured.
        last: what was generated last.
    """

    draft: Int32 | None = None
    tiles: int = 0
    text: str | None = None
    repeats: int = 0
    last: Completion | None = None


class FixedVlm:
    """A VLM that answers past the end of its answers, up to the length asked for.

    Args:
        vlm: the one that works.
        fixed: what else is fixed. None: it is a guide, whose answer of that length counts as one that ended.
    """

    def __init__(self, vlm: Vlm, fixed: Fixed | None) -> None:
        self.vlm, self._fixed = vlm, fixed
        self._parts: list[Part] = []
        """Of the last prompt."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self.vlm, name)

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_text: Callable[[str], None] | None = None,
        draft: Int32 | None = None,
    ) -> Completion:
        """See :meth:`localvlm.engine.api.Vlm.generate`."""
        sampling, fixed = replace(sampling, past_end=True), self._fixed
        if fixed is None:
            done = self.vlm.generate(max_tokens, sampling, on_text, draft)
            return replace(done, finish="stop") if done.finish == "length" else done
        likely = draft if fixed.draft is None else fixed.draft
        fixed.last = done = self.vlm.generate(max_tokens, sampling, on_text, likely)
        for _ in range(fixed.repeats):
            self.vlm.prefill(self._parts, reuse="rows")
            self.vlm.generate(max_tokens, sampling, draft=done.ids)
        return done if fixed.text is None else replace(done, text=fixed.text)

    def prefill(self, parts: Sequence[Part], **options: Any) -> Prefilled:
        """See :meth:`localvlm.engine.api.Vlm.prefill`."""
        self._parts = list(parts)
        return self.vlm.prefill(parts, **options)

    def encode(
        self, image: NDArray[np.uint8], *, tower: bool = False, keep: Int32 | None = None, onto: Encoded | None = None
    ) -> Encoded:
        """See :meth:`localvlm.engine.api.Vlm.encode`."""
        if self._fixed is not None and self._fixed.tiles and keep is not None:
            keep = _in_more_tiles(keep, self.vlm.layout(image.shape[1], image.shape[0]).tiles, self._fixed.tiles)
        return self.vlm.encode(image, tower=tower, keep=keep, onto=onto)


def _in_more_tiles(keep: Int32, tiles: Int32 | None, least: int) -> Int32:
    """``keep``, and the first tokens of other tiles, so that there are ``least``."""
    if tiles is None:
        return keep
    numbers, first = np.unique(tiles, return_index=True)
    others = first[~np.isin(numbers, tiles[keep])]
    more = others[: max(0, least - (len(numbers) - len(others)))]
    return np.union1d(keep, more).astype(np.int32)


class FixedEngine:
    """Loads each VLM once for the same files and options; that of the file ``guide`` is the guide."""

    def __init__(self, engine: Engine, guide: Path | None) -> None:
        self.engine, self._guide = engine, guide
        self.fixed = Fixed()
        self._loaded: dict[tuple[Path, Path, LoadOptions], FixedVlm] = {}

    def load(self, model: Path, mmproj: Path, options: LoadOptions = LoadOptions()) -> Vlm:
        """See :meth:`localvlm.engine.api.Engine.load`."""
        key = model, mmproj, options
        if key not in self._loaded:
            self._loaded[key] = FixedVlm(self.engine.load(*key), None if model == self._guide else self.fixed)
        return cast(Vlm, self._loaded[key])

    def forget(self) -> None:
        """Leaves nothing in the KV caches that a prompt could go on with."""
        for loaded in self._loaded.values():
            loaded.vlm.prefill([TextPart("-")])

    def cancel(self) -> None:
        """See :meth:`localvlm.engine.api.Engine.cancel`."""
        self.engine.cancel()

    def close(self) -> None:
        """Ends the engine."""
        self._loaded.clear()
        self.engine.close()

    def __enter__(self) -> FixedEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
