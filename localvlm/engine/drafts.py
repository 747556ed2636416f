"""Decoding along a draft: likely tokens are run several to a batch, and the answer stays that of one row at a time.

A batch goes through other kernels than a single row, so its logits, and the keys and values it leaves in the cache, may
differ in the last bits. Which sizes do depends on the model's quantization, the build, the threads and the length of
the cache, not on the values; so each size is measured once, for each padded length of the cache, on a draft that proved
right. :mod:`localvlm.engine.draft_memory` keeps that for later runs:

- **exact**: a size whose logits are those of single rows, bit for bit. Only sizes measured so are used as such.
- **loose**: where no size is exact. A decision counts only if the likeliest token leads the next by more than
  ``Deviations.tolerance``. At a closer one, and wherever the answer leaves the draft, every loose cell is made anew,
  row by row, before anything more is decided. So the tolerance covers the decisions inside a draft, all later ones are
  made on cells of single rows, and a loose draft saves time only if the answer follows it to its end.

The last rows of a draft may be filled up to a size with rows that are forgotten at once: see ``FILLED``. No row sees
those after it, and they stay within the padded length, so what is true of a size is true of it filled.

Leviathan et al., Fast Inference from Transformers via Speculative Decoding (2211.17192), greedy case.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CELLS", "SIZES", "Deviations", "Follower", "Measured", "agreed", "lead_of"]

Float32 = NDArray[np.float32]
Measured = tuple[tuple[int, ...], int]
"""Padded cells in use of each context, and rows of a batch over them."""

SIZES = (16, 8, 4, 3, 2)
"""Rows of a batch along a draft, largest first."""
FILLED = {16: 13, 8: 7}
"""Rows from which on a batch is filled up to a size. llama.cpp's kernels of repacked weights run 16 rows together, then
4, then one by one. Seconds of a 7B in Q4_0 on 2 cores: 16 rows take 1.65, 15 rows 1.97, 8 + 4 + 1 rows 1.80 and 8 + 4
rows 1.61; 8 rows take 1.05, as 4 + 3 rows do; 4 rows 0.56, and 3 rows 0.49.
"""
CELLS = 256
"""llama.cpp pads the cells that attention runs over to a multiple of this; a batch never crosses one."""
SAFETY = 4.0
"""A deviation this many times the largest one measured is reckoned with."""


class Deviations:
    """Largest differences between logits of batches and of single rows, measured on one context.

    Args:
        known: what was measured before.
        keep: gets all that is known after each measurement.
    """

    def __init__(
        self, known: Mapping[Measured, float] = {}, keep: Callable[[Mapping[Measured, float]], None] | None = None
    ) -> None:
        self._measured, self._keep = dict(known), keep

    def of(self, n_kv: tuple[int, ...], size: int) -> float | None:
        """That of batches of ``size`` rows over ``n_kv`` cells; 0.0 if they are exact, None if it is not known."""
        return self._measured.get((n_kv, size))

    def measure(self, n_kv: tuple[int, ...], single: Float32, batch: Float32) -> float:
        """Notes and returns the deviation of (n, n_vocab) logits."""
        deviation = 0.0 if np.array_equal(single, batch) else float(np.abs(single - batch).max())
        self._measured[n_kv, len(single)] = deviation
        if self._keep is not None:
            self._keep(self._measured)
        return deviation

    @property
    def tolerance(self) -> float:
        """Least lead, in logits, of a decision that counts on loose cells: both tokens may be off, either way."""
        return 2 * SAFETY * max(self._measured.values(), default=0.0)


class Follower:
    """The logits after each token of an answer, looked ahead of along a draft.

    Args:
        feed: runs token ids as one batch; (n, n_vocab) logits, row i those after token i.
        forget: removes that many of the last cells.
        draft: the likely answer; empty for none, and every token is then fed by itself.
        cells: taken before the answer in each context that runs the tokens. n_ctx: those each has.
        lead: by how much, in logits, the token that (n_vocab,) logits decide for leads the next; None: the likeliest.
    """

    def __init__(
        self,
        feed: Callable[[Sequence[int]], Float32],
        forget: Callable[[int], None],
        draft: Sequence[int],
        cells: Sequence[int],
        n_ctx: int,
        deviations: Deviations,
        lead: Callable[[Float32], float] | None = None,
    ) -> None:
        self._feed, self._forget, self._deviations, self._lead = feed, forget, deviations, lead or lead_of
        self._draft = list(draft)
        self._at = 0
        """Tokens of the draft that were taken."""
        self._cells, self._n_ctx = np.array(cells), n_ctx
        self._ahead: deque[Float32] = deque()
        """Logits after the next tokens of the draft, whose cells are taken already."""
        self._loose: int | None = None
        """Place in the draft of the first token whose cell is loose."""
        self._size = self._wanted = 0
        """Rows of the batch that is being measured, 0: none is; and those of the draft among them."""
        self._single: list[Float32] = []
        """The logits of its tokens so far, as single rows give them."""
        self._measured = False

    def after(self, token: int) -> Float32:
        """(n_vocab,) logits after the answer's next token."""
        if self._at == len(self._draft) or token != self._draft[self._at]:
            self._measure_reached()
            self.leave()
            alone: Float32 = self._run([token])[0]
            return alone
        if not self._ahead:
            self._look_ahead()
        self._at += 1
        row = self._ahead.popleft()
        if self._size:
            self._compare(row)
        elif self._loose is not None and not self._lead(row) > self._deviations.tolerance:
            return self.leave()[-1]
        return row

    def finish(self) -> None:
        """Removes what was looked ahead of in vain. Cells of the answer may stay loose: :meth:`leave` mends them."""
        self._drop(len(self._ahead))
        self._ahead.clear()

    def leave(self) -> list[Float32]:
        """Gives the draft up and makes loose cells anew; their logits."""
        self.finish()
        again = self._draft[self._loose : self._at] if self._loose is not None else []
        self._drop(len(again))
        self._loose, self._size, self._draft = None, 0, self._draft[: self._at]
        self._single.clear()
        return [self._run([token])[0] for token in again]

    def _look_ahead(self) -> None:
        n_kv = self._n_kv()
        size = self._exact(n_kv, self._wanted - len(self._single)) if self._size else self._choose(n_kv)
        if self._size == 0 and self._deviations.of(n_kv, size) and self._loose is None:
            self._loose = self._at
        self._ahead.extend(self._run_filled(self._draft[self._at : self._at + size], size))

    def _choose(self, n_kv: tuple[int, ...]) -> int:
        """Rows of the next batch: the largest exact size, else the largest loose one, else 1. One size of which nothing
        is known is measured for each answer, so that a single question pays for one batch at most.
        """
        left = len(self._draft) - self._at
        room = min(*(n_kv - self._cells), *(self._n_ctx - self._cells))
        fitting = [size for size in SIZES if size <= room and left >= FILLED.get(size, size)]
        known = {size: self._deviations.of(n_kv, size) for size in fitting}
        for size, deviation in known.items():
            if deviation == 0.0:
                return size
            if deviation is None and not self._measured and self._loose is None:
                self._measured, self._size, self._wanted = True, size, min(size, left)
                return self._exact(n_kv, self._wanted)
        return next((size for size, deviation in known.items() if deviation is not None), 1)

    def _exact(self, n_kv: tuple[int, ...], most: int) -> int:
        """Rows of the largest batch up to ``most`` that are those of single ones."""
        return next((size for size in SIZES if size <= most and self._deviations.of(n_kv, size) == 0.0), 1)

    def _compare(self, row: Float32) -> None:
        """Takes the next row of a measurement; after the last one, runs the same tokens as a batch."""
        self._single.append(row)
        if len(self._single) == self._wanted:
            self._measure(self._size)

    def _measure_reached(self) -> None:
        """Where the answer leaves the draft in a measurement: of the sizes that it came to, the largest is measured."""
        self._drop(len(self._ahead))
        self._ahead.clear()
        n_kv, reached = self._n_kv(0), len(self._single)
        size = next((size for size in SIZES if size <= reached and self._deviations.of(n_kv, size) is None), 0)
        if size:
            self._measure(size)

    def _measure(self, size: int) -> None:
        """Runs the last ``size`` tokens again, as a batch; what the answer lacks of so many runs alone before, too."""
        n_kv, reached = self._n_kv(0), min(size, len(self._single))
        ids = _filled(self._draft[self._at - reached : self._at], size)
        for token in ids[reached:]:
            self._ahead.append(self._run([token])[0])
        self._single += self._ahead
        self._ahead.clear()
        self._drop(size)
        batch = self._run(ids)
        self._drop(size - reached)
        if self._deviations.measure(n_kv, np.stack(self._single[-size:]), batch) and self._loose is None:
            self._loose = self._at - reached
        self._size = 0
        self._single.clear()

    def _n_kv(self, more: int = 1) -> tuple[int, ...]:
        return tuple(-(-(int(cells) + more) // CELLS) * CELLS for cells in self._cells)

    def _run_filled(self, ids: Sequence[int], size: int) -> Float32:
        """(n, n_vocab) logits after ``ids``, run in a batch of ``size``."""
        rows = self._run(_filled(ids, size))
        self._drop(size - len(ids))
        return rows[: len(ids)]

    def _run(self, ids: Sequence[int]) -> Float32:
        rows = self._feed(ids)
        self._cells += len(ids)
        return rows

    def _drop(self, n: int) -> None:
        if n:
            self._forget(n)
            self._cells -= n


def _filled(ids: Sequence[int], size: int) -> list[int]:
    """``ids`` and the last of them again, ``size`` in all."""
    return [*ids, *[ids[-1]] * (size - len(ids))]


def agreed(ids: Sequence[object], draft: Sequence[object]) -> int:
    """How many tokens of ``draft`` an answer took over."""
    return next((i for i, (a, b) in enumerate(zip(ids, draft, strict=False)) if a != b), min(len(ids), len(draft)))


def lead_of(logits: Float32) -> float:
    """By how much the likeliest token leads the next, in logits."""
    second, first = np.partition(logits, -2)[-2:]
    return float(first - second)
