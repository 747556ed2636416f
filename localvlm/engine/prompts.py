"""Prompts: parts laid out as rows, cut into batches and run into a cache, as far as it does not hold them already."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Encoded, ImagePart, Part, Prefilled, Reuse, TextPart
from localvlm.engine.cache import Cache
from localvlm.engine.families import NUMBER
from localvlm.engine.llama import Model
from localvlm.engine.native import REDUCTIONS
from localvlm.engine.rows import SOURCE, Placed, PromptRows, Run, lay_rows
from localvlm.engine.staged import Batch, Segment
from localvlm.engine.token_table import TokenTable
from localvlm.engine.tower import Picture
from localvlm.errors import ContextOverflow, Interrupted, UnsupportedModel, UsageError

__all__ = ["Prompts", "check_encoded", "prefilled"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class Prompts:
    """Fills the cache of one VLM.

    Args:
        picture: finds what was encoded.
        causal: rows of a picture do not see those after them.
        table: embeddings of text rows, where they can be given so.
        compact: rows of a pruned prompt are numbered without gaps.

    Raises:
        UnsupportedModel: they cannot be.
    """

    def __init__(
        self,
        model: Model,
        cache: Cache,
        picture: Callable[[Encoded], Picture],
        causal: bool,
        table: TokenTable | None,
        compact: bool,
    ) -> None:
        if compact and model.mrope:
            raise UnsupportedModel(
                f"'{model.path.name}' places image tokens by row and column, which cannot be numbered without gaps",
                "pass --positions true",
            )
        self._model, self._cache, self._picture = model, cache, picture
        self._causal, self._table, self._compact = causal, table, compact
        self._checked = False

    def tokenize(self, parts: Sequence[TextPart | int]) -> Int32:
        """See :meth:`localvlm.engine.api.Vlm.tokenize`."""
        vocabulary = self._model.vocabulary
        out: list[int] = [vocabulary.bos] if vocabulary.add_bos else []
        run: list[tuple[str, bool]] = []
        for part in (*parts, 0):
            if isinstance(part, TextPart):
                run.append((part.text, part.special))
                continue
            if run:
                out += vocabulary.tokenize_run(run)
                run = []
            out += [-1] * part
        return np.array(out, np.int32)

    def prefill(self, parts: Sequence[Part], tap: bool, reuse: Reuse, since: int) -> Prefilled:
        """See :meth:`localvlm.engine.api.Vlm.prefill`; for a layer, :class:`localvlm.engine.pauses.StagedPrompts`."""
        started = time.perf_counter()
        cache, rows = self._cache, self._rows(*self._tokenized(parts, since))
        self._check_room(rows)
        batches = self._batches(rows)
        stay = self._reusable(rows, batches, tap, reuse)
        if stay > cache.prompt:
            cache.settle()
        cache.last = None
        cache.keep(stay)
        cache.context.reserve(rows.n)
        cache.tapping = tap
        try:
            with self._recording(cache.main, rows if tap else None):
                for run in batches:
                    if run.stop > stay:
                        run = replace(run, start=max(run.start, stay))
                        batch = self._batch(rows, run, rows.classes * tap)
                        cache.main.run(batch, None, tap)
                        cache.ran(rows.keys[run.start : run.stop])
        except Interrupted:
            cache.keep(self._outside(rows, len(cache.keys)) if self._model.forgets else 0)
            raise
        cache.filled(rows)
        return prefilled(rows, started, rows.n - stay)

    def _check_room(self, rows: PromptRows) -> None:
        if not rows.n:
            raise UsageError("the prompt is empty")
        if rows.n + 1 > (n_ctx := self._cache.context.n_ctx):
            raise ContextOverflow(
                f"the prompt takes {rows.n} cells ({rows.n_kept} of them image tokens) and the context has {n_ctx}",
                "shorten the question, lower --keep or raise --ctx-size",
            )

    @contextlib.contextmanager
    def _recording(self, segment: Segment, rows: PromptRows | None, reductions: int = REDUCTIONS) -> Iterator[None]:
        """Records the attention of a segment to the image tokens of ``rows``, None: not; checks it the first time."""
        if rows is None:
            yield
            return
        segment.tap.reset(rows.n_image, reductions)
        segment.tap.check(not self._checked)
        try:
            yield
        finally:
            segment.tap.check(False)
        self._checked = True

    # what the cache holds already

    def _reusable(self, rows: PromptRows, batches: Sequence[Run], tap: bool, reuse: Reuse) -> int:
        """How many leading rows need not be run. The last one always is, for its logits, and so are those whose
        attention is recorded.
        """
        cache = self._cache
        if reuse == "nothing" or cache.staged or tap != cache.tapping or cache.context.lost:
            return 0
        n = min(len(cache.keys), rows.n - 1)
        if tap and rows.classes.any():
            n = min(n, int(rows.classes.argmax()))
        n = _agreeing(rows.keys[:n], cache.keys[:n])
        if reuse == "batches":
            same = _agreeing(np.array([b.stop for b in batches]), np.array(cache.stops))
            ends = [b.stop for b in batches[:same] if b.stop <= n]
            n = max((end for end in ends if self._outside(rows, end) == end), default=0)
        else:
            n = self._outside(rows, n)
        return n if self._model.forgets or n == len(cache.keys) else 0

    def _outside(self, rows: PromptRows, n: int) -> int:
        """The last place up to row ``n`` where a cache can be cut: not within rows that share a t or see each other, be
        they of the prompt or those that the cache holds.
        """
        if self._causal and not self._model.mrope:
            return n
        for source in (rows.source, self._cache.keys[:, SOURCE]):
            if 0 < n < len(source) and source[n] >= 0:
                others = np.flatnonzero(source[:n] != source[n])
                n = int(others[-1]) + 1 if len(others) else 0
        return n

    # rows

    def _rows(self, laid: Sequence[Sequence[int] | Placed], first: int) -> PromptRows:
        return self._numbered(lay_rows(laid, first))

    def _numbered(self, rows: PromptRows) -> PromptRows:
        return rows.compact() if self._compact else rows

    def _tokenized(self, parts: Sequence[Part], since: int) -> tuple[list[Sequence[int] | Placed], int]:
        """Token ids and pictures of a prompt, and where those of ``parts[since:]``, which are recorded, begin."""
        vocabulary = self._model.vocabulary
        laid: list[Sequence[int] | Placed] = []
        if vocabulary.add_bos:
            laid.append([vocabulary.bos])
        run: list[tuple[str, bool]] = []
        n_pictures, first, border = 0, 0, -1
        for i, part in enumerate(parts):
            if i == since:
                border = len(run)
            if isinstance(part, TextPart):
                run.append((part.text, part.special))
                continue
            picture, before, after = self._picture(part.image), "", ""
            if part.again is None:
                before, after = picture.before.replace(NUMBER, str(n_pictures)), picture.after
                n_pictures += 1
            elif self._model.mrope or not 0 <= part.again < n_pictures:
                raise UsageError(f"picture {part.again} of this prompt cannot get more tokens here")
            first = self._lay_text(laid, [*run, (before, True)], border, first)
            border = -1
            laid.append(Placed(picture, _checked_keep(part, picture), part.image.id, part.again))
            run = [(after, True)]
        return laid, self._lay_text(laid, run, border, first)

    def _lay_text(
        self, laid: list[Sequence[int] | Placed], run: list[tuple[str, bool]], border: int, first: int
    ) -> int:
        """Adds adjacent texts. Where ``run[border:]`` is the first that is recorded (-1: it is not here), its index in
        ``laid``; else ``first``. Tokens that span the border are recorded.
        """
        ids = self._model.vocabulary.tokenize_run(run)
        if border < 0:
            laid.append(ids)
            return first
        head = self._model.vocabulary.tokenize_run(run[:border])
        same = _agreeing(np.array(ids), np.array(head))
        laid += [ids[:same], ids[same:]]
        return len(laid) - 1

    def _batches(self, rows: PromptRows) -> list[Run]:
        """Cuts the rows into batches: unpruned prompts as llama.cpp's own helper does (so that answers agree bit for
        bit), pruned ones into as few as possible, text rows given as embeddings.
        """
        merge = rows.n_kept < rows.n_image and self._table is not None and self._causal
        runs = [Run(0, rows.n, None)] if merge else list(rows.runs)
        step = self._cache.context.n_batch
        if not self._causal and (most := max((r.stop - r.start for r in runs if r.picture), default=0)) > step:
            raise UnsupportedModel(
                f"a picture takes {most} rows, which this model reads at once, and a batch holds {step}",
                "lower --keep or --image-max-tokens",
            )
        return [Run(i, min(i + step, r.stop), r.picture) for r in runs for i in range(r.start, r.stop, step)]

    def _embedded(self, rows: PromptRows, run: Run, given: Float32 | None) -> Float32 | None:
        """(n, width) rows of a batch that holds image tokens, None for one of text alone; of image tokens those that
        are ``given`` (rows.n, n_embd), if any are.
        """
        span = slice(run.start, run.stop)
        image = rows.local[span] >= 0
        if not image.any():
            return None
        out = np.empty((run.stop - run.start, self._model.n_embd_input), np.float32)
        for part in rows.runs:
            lo, hi = max(part.start, run.start), min(part.stop, run.stop)
            if part.picture is not None and lo < hi:
                out[lo - run.start : hi - run.start] = part.picture.at(rows.local[lo:hi])
        if given is not None:
            shows = rows.image[span] >= 0
            out[shows, : given.shape[1]] = given[span][shows]
        if not image.all():
            assert self._table is not None
            out[~image] = self._table.rows(rows.ids[span][~image])
        return out

    def _batch(self, rows: PromptRows, run: Run, classes: NDArray[np.uint8], given: Float32 | None = None) -> Batch:
        span = slice(run.start, run.stop)
        embedded = self._embedded(rows, run, given)
        outputs = np.zeros(run.stop - run.start, np.int8)
        outputs[-1] = run.stop == rows.n
        positions, true = np.arange(run.start, run.stop, dtype=np.int32), np.ascontiguousarray(rows.positions[span, 0])
        if self._model.mrope and embedded is None:
            positions = true
        elif self._model.mrope:
            places = rows.positions[span].T.reshape(-1)
            positions = np.concatenate([places, np.zeros(len(outputs), np.int32)]).astype(np.int32)
        moves = None if self._model.mrope else true
        return Batch(rows.ids[span], embedded, positions, moves, outputs, rows.image[span], classes[span])


def prefilled(rows: PromptRows, started: float, n_run: int) -> Prefilled:
    """What a prefill that ``started`` (s) ago, and is done now, returns."""
    ms = (time.perf_counter() - started) * 1e3
    return Prefilled(rows.all_ids, rows.n_image, rows.n_kept, rows.n, ms, n_run)


def _agreeing(a: NDArray[np.integer[Any]], b: NDArray[np.integer[Any]]) -> int:
    """How many leading entries, or rows, are the same."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    where = np.flatnonzero(differ.reshape(n, -1).any(axis=1) if n else differ)
    return int(where[0]) if len(where) else n


def _checked_keep(part: ImagePart, picture: Picture) -> Int32 | None:
    keep, n = None if part.keep is None else np.asarray(part.keep, np.int32), part.image.layout.n_tokens
    if keep is not None and len(keep) and (keep.min() < 0 or keep.max() >= n or np.any(np.diff(keep) <= 0)):
        raise UsageError(f"kept indices must be sorted, without repeats and within 0..{n - 1}")
    check_encoded(picture, keep)
    return None if keep is None or len(keep) == n else keep


def check_encoded(picture: Picture, keep: Int32 | None) -> None:
    """Raises UsageError if a tile of the tokens ``keep``, or of all, was not encoded."""
    if absent := picture.needs(keep) - picture.tiles.keys():
        raise UsageError(f"tokens of tile {min(absent)} are asked for, and it was not encoded", "encode it too")
