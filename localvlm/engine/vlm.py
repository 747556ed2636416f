"""One VLM on llama.cpp, in the worker's own process: encode, prefill, decode, attention."""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import (
    Attention,
    Completion,
    Encoded,
    ImageLayout,
    ImagePart,
    LoadOptions,
    Message,
    Part,
    Prefilled,
    SamplingOptions,
    TextPart,
    VlmInfo,
)
from localvlm.engine.chat import render
from localvlm.engine.drafts import Deviations, Follower, agreed
from localvlm.engine.families import NUMBER
from localvlm.engine.gguf_header import Header, check_pair, read_header
from localvlm.engine.llama import MAX_OUTPUTS, Context, Model, thread_count
from localvlm.engine.native import ROW_GENERATED, Tap
from localvlm.engine.rows import Placed, PromptRows, Run, lay_rows
from localvlm.engine.sampling import Sampler
from localvlm.engine.staged import Front
from localvlm.engine.token_table import TokenTable
from localvlm.engine.tower import Picture, VisionTower
from localvlm.errors import ContextOverflow, Interrupted, UnsupportedModel, UsageError

__all__ = ["LlamaVlm"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class LlamaVlm:
    """Implements :class:`localvlm.engine.api.Vlm`."""

    def __init__(
        self, model: Path, mmproj: Path, options: LoadOptions, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        text, vision = read_header(model), read_header(mmproj)
        check_pair(text, vision)
        self._model = Model(model, options, text, cancelled)
        with contextlib.ExitStack() as undo:  # weights may be gigabytes: none stay behind a load that fails
            undo.callback(self._model.close)
            self.tower = VisionTower(mmproj, self._model, options, vision)
            undo.callback(self.tower.close)
            if cancelled():
                raise Interrupted()
            self._open(model, text, options)
            undo.pop_all()

    def _open(self, model: Path, text: Header, options: LoadOptions) -> None:
        self.tap = Tap(model.name, thread_count(options), options.gpu_layers != 0)
        self.tap.configure(self._model.n_layer, self._model.n_head)
        self._context = Context(self._model, options, self.tap)
        self._table = TokenTable.open(text, self._model.n_embd_input)
        self._vocab = self._model.vocabulary
        tokens = text.array_hashes.get("tokenizer.ggml.tokens", "") + text.array_hashes.get("tokenizer.ggml.merges", "")
        self._info = VlmInfo(
            name=text.text("general.name")[:100] or model.stem,
            architecture=text.architecture,
            family=self.tower.family.name,
            n_layer=self._model.n_layer,
            n_head=self._model.n_head,
            n_embd=self._model.n_embd,
            n_vocab=self._vocab.size,
            n_ctx=self._context.n_ctx,
            n_params=self._model.n_params,
            mrope=self._model.mrope,
            chat_template=text.text("tokenizer.chat_template") or None,
            bos=self._vocab.text(self._vocab.bos) if not self._vocab.add_bos else "",
            eos=self._vocab.text(self._vocab.eos),
            tower_layers=self.tower.tower.n_layer,
            tower_cls=self.tower.tower.cls,
            repairs=self.tower.repair_names,
            notes=self.tower.family.notes,
            vocab_hash=hashlib.sha256(tokens.encode()).hexdigest()[:16],
        )
        self._options, self._header = options, text
        self._front: Front | None = None
        self._pictures: dict[int, Picture] = {}
        self._next_picture = 1
        self._checked = False
        self._deviations: dict[int, Deviations] = {}
        """Of drafts, for each layer at which prompts were pruned."""
        self._reset()

    def _reset(self) -> None:
        self._cells = 0
        """KV cells in use."""
        self._at = 0
        """Batch position of the next row: compact, or the true t of an M-RoPE model."""
        self._shift = 0
        """True position minus batch position, for models with one number a token."""
        self._tapping = False
        self._layer = 0
        """Where the rows of the prompt were pruned; 0 = before the first layer, without a front."""
        self._last: Float32 | None = None

    @property
    def info(self) -> VlmInfo:
        return self._info

    def close(self) -> None:
        if self._front is not None:
            self._front.close()
        self._context.close()
        self.tower.close()
        self.tap.close()
        self._model.close()

    def cancel(self) -> None:
        """Stops the graph in progress, from any thread."""
        if (front := self._front) is not None:
            front.tap.cancel()
        self.tap.cancel()
        self.tower.tap.cancel()

    def cancel_reset(self) -> None:
        if self._front is not None:
            self._front.tap.cancel_reset()
        self.tap.cancel_reset()
        self.tower.tap.cancel_reset()

    # pictures

    def layout(self, width: int, height: int) -> ImageLayout:
        return self.tower.lay_out(width, height).layout

    def encode(self, image: NDArray[np.uint8], *, tower: bool = False) -> Encoded:
        picture = self.tower.encode(image, tower)
        number, self._next_picture = self._next_picture, self._next_picture + 1
        self._pictures[number] = picture
        return Encoded(number, picture.layout, picture.ms, picture.tower)

    def release(self, image: Encoded) -> None:
        self._pictures.pop(image.id, None)

    def embeddings(self, image: Encoded) -> Float32:
        rows = self._picture(image).rows
        assert rows is not None
        return rows

    def _picture(self, image: Encoded) -> Picture:
        found = self._pictures.get(image.id)
        if found is None:
            raise UsageError(f"picture {image.id} is not in the engine any more", "encode it again")
        return found

    # prompts

    def chat(self, messages: Sequence[Message]) -> list[TextPart | int]:
        return render(messages, self._info.chat_template, self._info.family, self._info.bos, self._info.eos)

    def tokenize(self, parts: Sequence[TextPart | int]) -> Int32:
        out: list[int] = [self._vocab.bos] if self._vocab.add_bos else []
        run: list[tuple[str, bool]] = []
        for part in (*parts, 0):
            if isinstance(part, TextPart):
                run.append((part.text, part.special))
                continue
            if run:
                out += self._vocab.tokenize_run(run)
                run = []
            out += [-1] * part
        return np.array(out, np.int32)

    def _lay(self, parts: Sequence[Part]) -> PromptRows:
        laid: list[Sequence[int] | Placed] = []
        if self._vocab.add_bos:
            laid.append([self._vocab.bos])
        run: list[tuple[str, bool]] = []
        n_pictures = 0
        for part in parts:
            if isinstance(part, TextPart):
                run.append((part.text, part.special))
                continue
            picture = self._picture(part.image)
            before = picture.before.replace(NUMBER, str(n_pictures))
            n_pictures += 1
            laid.append(self._vocab.tokenize_run([*run, (before, True)]))
            laid.append(Placed(picture, self._checked_keep(part)))
            run = [(picture.after, True)]
        laid.append(self._vocab.tokenize_run(run))
        return lay_rows(laid)

    @staticmethod
    def _checked_keep(part: ImagePart) -> Int32 | None:
        if part.keep is None:
            return None
        keep = np.asarray(part.keep, np.int32)
        n = part.image.layout.n_tokens
        if len(keep) and (keep.min() < 0 or keep.max() >= n or np.any(np.diff(keep) <= 0)):
            raise UsageError(f"kept indices must be sorted, without repeats and within 0..{n - 1}")
        return None if len(keep) == n else keep

    def prefill(self, parts: Sequence[Part], *, tap: bool = False, layer: int = 0) -> Prefilled:
        started = time.perf_counter()
        self._info.check_layer(layer)
        rows = self._lay(parts)
        whole = self._lay([replace(p, keep=None) if isinstance(p, ImagePart) else p for p in parts]) if layer else rows
        if not rows.n:
            raise UsageError("the prompt is empty")
        if whole.n + 1 > self._context.n_ctx:
            raise ContextOverflow(
                f"the prompt takes {whole.n} cells ({whole.n_kept} of them image tokens) and the context has "
                f"{self._context.n_ctx}",
                "shorten the question, lower --keep or raise --ctx-size",
            )
        self._clear()
        self._tapping = tap
        if tap:
            self.tap.reset(rows.n_image)
            self.tap.check(not self._checked)
        try:
            hidden = self._run_front(layer, whole, rows) if layer else None
            self._layer = layer
            for run in self._batches(rows):
                self._run_rows(rows, run, None if hidden is None else hidden[run.start : run.stop])
        except Interrupted:
            self._clear()
            raise
        finally:
            self.tap.check(False)
        self._checked = self._checked or tap
        self._cells, self._last = rows.n, self._context.logits()
        self._at = rows.next_position if self._model.mrope else rows.n
        self._shift = 0 if self._model.mrope else rows.next_position - rows.n
        ms = (time.perf_counter() - started) * 1e3
        return Prefilled(rows.all_ids, rows.n_image, rows.n_kept, self._cells, ms)

    def _clear(self) -> None:
        self._reset()
        self._context.clear()
        if self._front is not None:
            self._front.clear()

    def _run_front(self, layer: int, whole: PromptRows, rows: PromptRows) -> Float32:
        """(rows.n, n_embd) what the layers below ``layer`` give on the whole prompt, at the rows that stay."""
        if self._front is None:
            self._front = Front(self._model, self._options, self._header)
            if self.tap.cancelled:  # while the front was not there to be told
                raise Interrupted()
        front, hidden = self._front, []
        stays = (whole.image < 0) | np.isin(whole.image, rows.image)
        for run in self._batches(whole):
            embedded, positions = self._inputs(whole, run)
            tokens = None if embedded is not None else np.ascontiguousarray(whole.ids[run.start : run.stop])
            with self._attending(front.context, embedded):
                found = front.decode(layer, tokens, embedded, positions, run.stop - run.start)
            hidden.append(found[stays[run.start : run.stop]])
        front.at = whole.next_position if self._model.mrope else whole.n
        return np.concatenate(hidden)

    def _batches(self, rows: PromptRows) -> list[Run]:
        """Cuts the rows into batches: unpruned prompts as llama.cpp's own helper does (so that answers agree bit for
        bit), pruned ones into as few as possible, text rows given as embeddings.
        """
        merge = rows.n_kept < rows.n_image and self._table is not None and self.tower.causal
        runs = [Run(0, rows.n, None)] if merge else list(rows.runs)
        step = self._context.n_batch
        if not self.tower.causal and (most := max((r.stop - r.start for r in runs if r.picture), default=0)) > step:
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
                assert part.picture.rows is not None
                out[lo - run.start : hi - run.start] = part.picture.rows[rows.local[lo:hi]]
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

    def _run_rows(self, rows: PromptRows, run: Run, hidden: Float32 | None) -> None:
        span = slice(run.start, run.stop)
        embedded, positions = self._inputs(rows, run)
        outputs = np.zeros(run.stop - run.start, np.int8)
        outputs[-1] = run.stop == rows.n
        true = None if self._model.mrope else np.ascontiguousarray(rows.positions[span, 0])
        classes = rows.classes[span] * self._tapping
        with self._attending(self._context, embedded):
            self._decode(rows.ids[span], embedded, positions, outputs, rows.image[span], classes, true, hidden)

    @contextlib.contextmanager
    def _attending(self, context: Context, embedded: Float32 | None) -> Iterator[None]:
        """Rows of a picture see each other in both directions where the model was trained so."""
        import llama_cpp

        if self.tower.causal or embedded is None:
            yield
            return
        llama_cpp.llama_set_causal_attn(context.handle, False)
        try:
            yield
        finally:
            llama_cpp.llama_set_causal_attn(context.handle, True)

    def _decode(
        self,
        ids: Int32,
        embedded: Float32 | None,
        positions: Int32,
        outputs: NDArray[np.int8],
        image: Int32,
        classes: NDArray[np.uint8],
        true: Int32 | None,
        hidden: Float32 | None,
    ) -> None:
        """One batch, from ``hidden`` rows on if a front gave them. The tap stands aside unless attention is recorded,
        positions differ from the batch's own or layers are left out.
        """
        moved = true is not None and not np.array_equal(true, positions)
        tokens = np.ascontiguousarray(ids) if embedded is None else None
        if not (self._tapping or moved or hidden is not None):
            self._context.decode(tokens, embedded, positions, outputs)
            return
        if not self._tapping:  # the tap then counts no image tokens
            image = np.full_like(image, -1)
        self.tap.begin(np.ascontiguousarray(image), np.ascontiguousarray(classes), true if moved else None)
        try:
            if hidden is not None:
                self.tap.stage(self._layer, self._model.n_embd, np.ascontiguousarray(hidden))
            self._context.decode(tokens, embedded, positions, outputs)
        finally:
            self.tap.end()

    # decoding

    @property
    def _front_in_use(self) -> Front | None:
        return self._front if self._layer else None

    @property
    def _taken(self) -> int:
        """KV cells in use, of the front where it runs: it has all rows."""
        front = self._front_in_use
        return self._cells if front is None else front.cells

    def _feed(self, ids: Sequence[int] | Int32, generated: bool, outputs: NDArray[np.int8]) -> None:
        n = len(ids)
        if self._taken + n > self._context.n_ctx:
            raise ContextOverflow(
                f"{self._taken} cells are taken, {n} more were asked for and the context has {self._context.n_ctx}",
                "raise --ctx-size",
            )
        tokens, front = np.asarray(ids, np.int32), self._front_in_use
        hidden = None if front is None else front.feed(self._layer, tokens)
        positions = np.arange(self._at, self._at + n, dtype=np.int32)
        classes = np.full(n, ROW_GENERATED if generated and self._tapping else 0, np.uint8)
        none = np.full(n, -1, np.int32)
        true = None if self._model.mrope else positions + np.int32(self._shift)
        try:
            self._decode(tokens, None, positions, outputs, none, classes, true, hidden)
        except Interrupted:
            self._context.trim(self._at)
            if front is not None:
                front.rewind(n)
            raise
        self._at += n
        self._cells += n

    def feed(self, ids: Int32) -> None:
        self._need_prefill()
        for token in ids:
            self._feed([int(token)], True, np.ones(1, np.int8))
            self._last = self._context.logits()

    def _need_prefill(self) -> None:
        if self._last is None:
            raise UsageError("nothing has been prefilled yet")

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_text: Callable[[str], None] | None = None,
        draft: Int32 | None = None,
    ) -> Completion:
        self._need_prefill()
        started = time.perf_counter()
        sampler = Sampler(sampling)
        likely = self._usable(draft, max_tokens, sampling)
        taken, n_ctx, front = self._taken, self._context.n_ctx, self._front_in_use
        fed_back = likely[: max_tokens - 1]
        cells = (self._cells,) if front is None else (self._cells, front.cells)
        deviations = self._deviations.setdefault(self._layer, Deviations())
        follower = Follower(self._run_on, self._forget, fed_back, cells, n_ctx, deviations)
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        ids: list[int] = []
        logprobs: list[float] = []
        pieces: list[str] = []
        finish, first_ms, fed = "length", 0.0, 0
        try:
            while len(ids) < max_tokens:
                assert self._last is not None
                token, logprob = sampler.pick(self._last)
                logprobs.append(logprob)
                if self._vocab.ends(token):
                    finish = "stop"
                    break
                ids.append(token)
                first_ms = first_ms or (time.perf_counter() - started) * 1e3
                self._emit(decoder.decode(self._vocab.piece(token)), pieces, on_text)
                if len(ids) == max_tokens or taken + fed >= n_ctx:
                    break
                self._last = follower.after(token)
                fed += 1
            follower.finish()
        except Interrupted:
            finish = "cancelled"
        self._emit(decoder.decode(b"", True), pieces, on_text)
        ms = (time.perf_counter() - started) * 1e3
        text = "".join(pieces)
        return Completion(
            text,
            np.array(ids, np.int32),
            np.array(logprobs, np.float32),
            finish,
            ms,
            first_ms or ms,
            fed,
            drafted=len(likely),
            accepted=agreed(ids, likely),
        )

    def _usable(self, draft: Int32 | None, max_tokens: int, sampling: SamplingOptions) -> list[int]:
        """The part of a draft that this answer can take over."""
        if draft is None or sampling.temp > 0 or self._tapping or not self._model.forgets:
            return []
        if len(draft) and (min(draft) < 0 or max(draft) >= self._vocab.size):
            raise UsageError(f"the draft's tokens must be within 0..{self._vocab.size - 1}")
        return [int(token) for token in draft[:max_tokens]]

    def _run_on(self, ids: Sequence[int]) -> Float32:
        """Feeds generated tokens as one batch; (n, n_vocab) logits after each."""
        self._feed(ids, True, np.ones(len(ids), np.int8))
        return np.stack([self._context.logits(i) for i in range(len(ids))])

    def _forget(self, n: int) -> None:
        """Takes back the last ``n`` tokens."""
        self._context.trim(self._at - n)
        self._at -= n
        self._cells -= n
        if (front := self._front_in_use) is not None:
            front.rewind(n)

    @staticmethod
    def _emit(piece: str, pieces: list[str], on_text: Callable[[str], None] | None) -> None:
        if piece:
            pieces.append(piece)
            if on_text:
                on_text(piece)

    def score(self, ids: Int32) -> Float32:
        self._need_prefill()
        assert self._last is not None
        at, cells, tapping = self._at, self._cells, self._tapping
        out = [self._last[None]]
        self._tapping = False
        try:
            for start in range(0, len(ids) - 1, MAX_OUTPUTS):
                chunk = np.asarray(ids[start : min(start + MAX_OUTPUTS, len(ids) - 1)], np.int32)
                self._feed(chunk, False, np.ones(len(chunk), np.int8))
                out.append(np.stack([self._context.logits(i) for i in range(len(chunk))]))
        finally:
            self._context.trim(at)
            if (front := self._front_in_use) is not None:
                front.rewind(self._at - at)
            self._at, self._cells, self._tapping = at, cells, tapping
        return np.concatenate(out)[: len(ids)]

    def logits(self) -> Float32:
        self._need_prefill()
        assert self._last is not None
        return self._last

    def attention(self) -> Attention:
        if not self._tapping:
            raise UsageError("no attention was recorded: prefill with tap=True first")
        read = self.tap.read
        return Attention(
            prompt=read(0, 0),
            generated=read(1, 0),
            last=read(2, 0),
            weighted=(read(0, 1), read(1, 1), read(2, 1)),
            maximum=(read(0, 2), read(1, 2), read(2, 2)),
            rows=(self.tap.rows(0), self.tap.rows(1)),
        )
