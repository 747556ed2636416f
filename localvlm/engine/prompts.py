"""Prompts: parts laid out as rows, cut into batches and run into a cache, as far as it does not hold them already."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Encoded, ImagePart, Part, Prefilled, Reuse, TextPart
from localvlm.engine.cache import Cache
from localvlm.engine.families import NUMBER
from localvlm.engine.llama import Model
from localvlm.engine.rows import Placed, PromptRows, Run, lay_rows
from localvlm.engine.token_table import TokenTable
from localvlm.engine.tower import Picture
from localvlm.errors import ContextOverflow, Interrupted, UnsupportedModel, UsageError

__all__ = ["Prompts"]

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

    def prefill(self, parts: Sequence[Part], tap: bool, layer: int, reuse: Reuse, since: int) -> Prefilled:
        """See :meth:`localvlm.engine.api.Vlm.prefill`."""
        started = time.perf_counter()
        cache = self._cache
        laid, first = self._tokenized(parts, since)
        rows = self._rows(laid, first)
        whole = self._rows([_whole(part) for part in laid], first) if layer else rows
        if not rows.n:
            raise UsageError("the prompt is empty")
        if whole.n + 1 > cache.context.n_ctx:
            raise ContextOverflow(
                f"the prompt takes {whole.n} cells ({whole.n_kept} of them image tokens) and the context has "
                f"{cache.context.n_ctx}",
                "shorten the question, lower --keep or raise --ctx-size",
            )
        batches = self._batches(rows)
        stay = 0 if layer else self._reusable(rows, batches, tap, reuse)
        if stay > cache.prompt:
            cache.mend()
        cache.last = None
        cache.keep(stay)
        cache.context.reserve(rows.n)
        cache.tapping = tap
        if tap:
            cache.tap.reset(rows.n_image)
            cache.tap.check(not self._checked)
        try:
            hidden = self._run_front(layer, whole, rows) if layer else None
            cache.layer = layer
            for run in batches:
                if run.stop > stay:
                    run = replace(run, start=max(run.start, stay))
                    self._run_rows(rows, run, None if hidden is None else hidden[run.start : run.stop])
                    cache.ran(rows.keys[run.start : run.stop])
        except Interrupted:
            cache.keep(0 if layer or not self._model.forgets else self._outside(rows, len(cache.keys)))
            raise
        finally:
            cache.tap.check(False)
        self._checked = self._checked or tap
        cache.filled(rows)
        ms = (time.perf_counter() - started) * 1e3
        return Prefilled(rows.all_ids, rows.n_image, rows.n_kept, rows.n, ms, rows.n - stay)

    # what the cache holds already

    def _reusable(self, rows: PromptRows, batches: Sequence[Run], tap: bool, reuse: Reuse) -> int:
        """How many leading rows need not be run. The last one always is, for its logits, and so are those whose
        attention is recorded.
        """
        cache = self._cache
        if reuse == "nothing" or cache.layer or tap != cache.tapping:
            return 0
        n = min(len(cache.keys), rows.n - 1)
        if tap and rows.classes.any():
            n = min(n, int(rows.classes.argmax()))
        n = _agreeing(rows.keys[:n], cache.keys[:n])
        if reuse == "batches":
            same = _agreeing(np.array([b.stop for b in batches]), np.array(cache.stops))
            n = max((b.stop for b in batches[:same] if b.stop <= n), default=0)
        else:
            n = self._outside(rows, n)
        return n if self._model.forgets or n == len(cache.keys) else 0

    def _outside(self, rows: PromptRows, n: int) -> int:
        """The last place up to row ``n`` where a cache can be cut: not within rows that share a t or see each other."""
        for run in rows.runs:
            if run.picture is not None and run.start < n < run.stop and (self._model.mrope or not self._causal):
                return run.start
        return n

    # rows

    def _rows(self, laid: Sequence[Sequence[int] | Placed], first: int) -> PromptRows:
        rows = lay_rows(laid, first)
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

    def _embedded(self, rows: PromptRows, run: Run) -> Float32 | None:
        """(n, width) rows of a batch that holds image tokens, None for one of text alone."""
        span = slice(run.start, run.stop)
        image = rows.local[span] >= 0
        if not image.any():
            return None
        out = np.empty((run.stop - run.start, self._model.n_embd_input), np.float32)
        for part in rows.runs:
            lo, hi = max(part.start, run.start), min(part.stop, run.stop)
            if part.picture is not None and lo < hi:
                out[lo - run.start : hi - run.start] = part.picture.at(rows.local[lo:hi])
        if not image.all():
            assert self._table is not None
            out[~image] = self._table.rows(rows.ids[span][~image])
        return out

    def _inputs(self, rows: PromptRows, run: Run) -> tuple[Float32 | None, Int32]:
        """Embedding rows, None for a batch of text alone, and batch positions; see :meth:`Context.decode`."""
        embedded = self._embedded(rows, run)
        if not self._model.mrope:
            return embedded, np.arange(run.start, run.stop, dtype=np.int32)
        places = rows.positions[run.start : run.stop]
        if embedded is None:
            return None, np.ascontiguousarray(places[:, 0])
        return embedded, np.concatenate([places.T.reshape(-1), np.zeros(len(places), np.int32)]).astype(np.int32)

    # runs

    def _run_front(self, layer: int, whole: PromptRows, rows: PromptRows) -> Float32:
        """(rows.n, n_embd) what the layers below ``layer`` give on the whole prompt, at the rows that stay."""
        front, hidden = self._cache.opened_front(whole.n), []
        stays = (whole.image < 0) | np.isin(whole.image, rows.image)
        for run in self._batches(whole):
            embedded, positions = self._inputs(whole, run)
            tokens = None if embedded is not None else np.ascontiguousarray(whole.ids[run.start : run.stop])
            with self._cache.attending(front.context, embedded):
                found = front.decode(layer, tokens, embedded, positions, run.stop - run.start)
            hidden.append(found[stays[run.start : run.stop]])
        front.at = whole.next_position if self._model.mrope else whole.n
        return np.concatenate(hidden)

    def _run_rows(self, rows: PromptRows, run: Run, hidden: Float32 | None) -> None:
        span = slice(run.start, run.stop)
        embedded, positions = self._inputs(rows, run)
        outputs = np.zeros(run.stop - run.start, np.int8)
        outputs[-1] = run.stop == rows.n
        true = None if self._model.mrope else np.ascontiguousarray(rows.positions[span, 0])
        cache = self._cache
        classes = rows.classes[span] * cache.tapping
        with cache.attending(cache.context, embedded):
            cache.run(rows.ids[span], embedded, positions, outputs, rows.image[span], classes, true, hidden)


def _agreeing(a: NDArray[np.integer[Any]], b: NDArray[np.integer[Any]]) -> int:
    """How many leading entries, or rows, are the same."""
    n = min(len(a), len(b))
    differ = a[:n] != b[:n]
    where = np.flatnonzero(differ.reshape(n, -1).any(axis=1) if n else differ)
    return int(where[0]) if len(where) else n


def _whole(part: Sequence[int] | Placed) -> Sequence[int] | Placed:
    """With nothing pruned."""
    if not isinstance(part, Placed):
        return part
    if part.again is not None:
        raise UsageError("more tokens of a picture cannot go into a prompt that is pruned at a layer")
    _check_encoded(part.picture, None)
    return replace(part, keep=None)


def _checked_keep(part: ImagePart, picture: Picture) -> Int32 | None:
    keep, n = None if part.keep is None else np.asarray(part.keep, np.int32), part.image.layout.n_tokens
    if keep is not None and len(keep) and (keep.min() < 0 or keep.max() >= n or np.any(np.diff(keep) <= 0)):
        raise UsageError(f"kept indices must be sorted, without repeats and within 0..{n - 1}")
    _check_encoded(picture, keep)
    return None if keep is None or len(keep) == n else keep


def _check_encoded(picture: Picture, keep: Int32 | None) -> None:
    if absent := picture.needs(keep) - picture.tiles.keys():
        raise UsageError(f"tokens of tile {min(absent)} are asked for, and it was not encoded", "encode it too")
