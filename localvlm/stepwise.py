"""A method within the LLM, run on a VLM: the prompt waits before layers, the method looks, and tokens leave."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import ImagePart, Part, Paused, Prefilled, Vlm
from localvlm.pruning import InLlm, Keep, Kept, Seen, Tokens

__all__ = ["Stepped", "prefill_in_steps"]

Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Stepped:
    """A prefilled prompt, some image tokens of which left on the way.

    Attributes:
        prompt: as after :meth:`Vlm.prefill`; its ``ms`` are those of the model alone.
        steps: (layer, image tokens from it on), the first at layer 0.
        kept: indices of the image tokens that enter the last layer, joint over all pictures. Some of them may stand for
            others too, merged into their rows.
        ms: that the choice of tokens took.
    """

    prompt: Prefilled
    steps: tuple[tuple[int, int], ...]
    kept: tuple[int, ...]
    ms: float = 0.0

    @classmethod
    def at_once(cls, prompt: Prefilled, kept: tuple[int, ...], layer: int) -> Stepped:
        """With all but ``kept`` dropped before ``layer``."""
        return cls(prompt, ((0, prompt.n_image), (layer, len(kept))) if layer else ((0, len(kept)),), kept)


def prefill_in_steps(vlm: Vlm, parts: Sequence[Part], method: InLlm, keep: Keep) -> Stepped:
    """Runs a prompt through the layers as ``method`` has them pruned; ``keep`` is the mean over the layers.

    Raises:
        As :meth:`Vlm.pause`, :meth:`Vlm.resume` and :meth:`Vlm.finish`.
    """
    begun = time.perf_counter()
    there = _image_tokens(parts)
    cuts = method.cuts(_share(keep, len(there)), len(there), vlm.info.n_layer)
    if not cuts:
        return Stepped(vlm.prefill(parts), ((0, len(there)),), tuple(there.tolist()))
    chooser = _Chooser(method)
    paused = chooser.first(vlm, parts, cuts[0].layer)
    steps = [(0, len(there))]
    for cut, after in zip(cuts, [*cuts[1:], None], strict=True):
        kept = chooser.choose(paused, cut.k)
        there, stay = paused.image[kept.index], None
        if len(there) < steps[-1][1]:
            steps.append((cut.layer, len(there)))
            stay = there
        if after is None or not len(there):
            break
        paused = vlm.resume(stay, kept.rows, layer=after.layer, attend=chooser.attend, hidden=method.hidden)
    prompt = vlm.finish(stay, kept.rows)
    ms = (time.perf_counter() - begun) * 1e3 - chooser.ms
    return Stepped(replace(prompt, ms=ms), tuple(steps), tuple(there.tolist()), chooser.ms)


class _Chooser:
    """A method on one prompt; ``ms``: that it took so far; ``attend``: the rows of text that rate."""

    def __init__(self, method: InLlm) -> None:
        self._method = method
        self.attend: tuple[int, ...] = (-1,)
        self.ms = 0.0

    def first(self, vlm: Vlm, parts: Sequence[Part], layer: int) -> Paused:
        """Before ``layer``, the first where tokens leave."""
        hidden = self._method.hidden
        if self._method.raters is None:
            return vlm.pause(parts, layer, attend=self.attend, hidden=hidden)
        entering = vlm.pause(parts, 0, attend=(), hidden=True)
        assert entering.hidden is not None
        assert entering.text is not None
        begun = time.perf_counter()
        self.attend = tuple(self._method.raters(entering.hidden, entering.text))
        self.ms += (time.perf_counter() - begun) * 1e3
        return vlm.resume(None, layer=layer, attend=self.attend, hidden=hidden)

    def choose(self, paused: Paused, k: int) -> Kept:
        """Which of the image tokens there stay, counted among them."""
        assert paused.attention is not None
        begun = time.perf_counter()
        kept = self._method.select(Seen(paused.layer, paused.attention, paused.hidden, paused.text), k)
        self.ms += (time.perf_counter() - begun) * 1e3
        return kept


def _image_tokens(parts: Sequence[Part]) -> Int32:
    """Those of a prompt, joint over its pictures."""
    found, first = [np.zeros(0, np.int32)], 0
    for part in parts:
        if isinstance(part, ImagePart):
            n = part.image.layout.n_tokens
            found.append((np.arange(n, dtype=np.int32) if part.keep is None else part.keep) + np.int32(first))
            first += n
    return np.concatenate(found)


def _share(keep: Keep, n: int) -> float:
    """Of n, as the mean over the layers."""
    assert keep != "auto"  # it goes by a guide's attention
    return min(1.0, keep.n / max(n, 1)) if isinstance(keep, Tokens) else 1.0 if keep is None else float(keep)
