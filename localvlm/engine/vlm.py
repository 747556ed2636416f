"""One VLM on llama.cpp, in the worker's own process: encode, prefill, decode, attention."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import (
    Attention,
    Completion,
    Encoded,
    ImageLayout,
    LoadOptions,
    Message,
    Part,
    Paused,
    Prefilled,
    Reuse,
    SamplingOptions,
    TextPart,
    VlmInfo,
)
from localvlm.engine.cache import Cache
from localvlm.engine.chat import render
from localvlm.engine.decoding import Decoder
from localvlm.engine.draft_memory import DraftMemory
from localvlm.engine.gguf_header import Header, check_pair, parts_of, read_header, read_model
from localvlm.engine.llama import Model, thread_count
from localvlm.engine.native import Tap
from localvlm.engine.pauses import StagedPrompts
from localvlm.engine.shared_tower import Towers
from localvlm.engine.token_table import TokenTable
from localvlm.engine.tower import Picture, VisionTower
from localvlm.errors import Interrupted, UnsupportedModel, UsageError

__all__ = ["LlamaVlm"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


class LlamaVlm:
    """Implements :class:`localvlm.engine.api.Vlm`."""

    def __init__(
        self,
        model: Path,
        mmproj: Path,
        options: LoadOptions,
        cancelled: Callable[[], bool] = lambda: False,
        towers: Towers | None = None,
    ) -> None:
        """``towers``: of all VLMs of the process, so that one that several of them carry runs once for a tile."""
        text, vision = read_header(model), read_header(mmproj)
        check_pair(text, vision)
        self._model = Model(model, options, text, cancelled)
        with contextlib.ExitStack() as undo:  # weights may be gigabytes: none stay behind a load that fails
            undo.callback(self._model.close)
            self.tower = VisionTower(mmproj, self._model, options, vision, towers or Towers())
            undo.callback(self.tower.close)
            if cancelled():
                raise Interrupted()
            self._open(model, text, options, undo)
            undo.pop_all()

    def _open(self, model: Path, text: Header, options: LoadOptions, undo: contextlib.ExitStack) -> None:
        vocabulary = self._model.vocabulary
        self._options, self._header = options, text
        self._cache = self._new_cache()
        undo.callback(self._cache.tap.close)
        undo.callback(self._cache.close)
        self._table = TokenTable.open(text, self._model.n_embd_input)
        self._memory = DraftMemory.of(text, options)
        self._prompts, self._decoder = self._over(self._cache)
        self._apart: Cache | None = None
        """For what is scored after another prompt."""
        tokens = text.array_hashes.get("tokenizer.ggml.tokens", "") + text.array_hashes.get("tokenizer.ggml.merges", "")
        self._info = VlmInfo(
            name=text.text("general.name")[:100] or model.stem,
            architecture=text.architecture,
            family=self.tower.family.name,
            n_layer=self._model.n_layer,
            n_head=self._model.n_head,
            n_embd=self._model.n_embd,
            n_vocab=vocabulary.size,
            n_ctx=self._cache.context.n_ctx,
            n_params=self._model.n_params,
            mrope=self._model.mrope,
            chat_template=text.text("tokenizer.chat_template") or None,
            bos=vocabulary.text(vocabulary.bos) if not vocabulary.add_bos else "",
            eos=vocabulary.text(vocabulary.eos),
            tower_layers=self.tower.tower.n_layer,
            tower_cls=self.tower.tower.cls,
            repairs=self.tower.repair_names,
            notes=self.tower.family.notes,
            runs=f"{self._cache.context.runs}; {self.tower.runs}",
            vocab_hash=hashlib.sha256(tokens.encode()).hexdigest()[:16],
            tile_price=self.tower.price(read_model(model) if parts_of(model)[1:] else text),
            tower=self.tower.fingerprint,
        )
        self._pictures: dict[int, Picture] = {}
        self._next_picture = 1

    def _new_cache(self) -> Cache:
        tap = Tap(self._model.path.name, thread_count(self._options), self._options.gpu_layers != 0)
        with contextlib.ExitStack() as undo:
            undo.callback(tap.close)
            tap.configure(self._model.n_layer, self._model.n_head)
            cache = Cache(self._model, self._options, self._header, tap, self.tower.causal)
            undo.pop_all()
        return cache

    def _over(self, cache: Cache) -> tuple[StagedPrompts, Decoder]:
        """What fills a cache and what goes on from it."""
        compact, causal = self._options.compact_positions, self.tower.causal
        prompts = StagedPrompts(self._model, cache, self._picture, causal, self._table, compact, self._embedded)
        return prompts, Decoder(self._model, cache, self._memory)

    @property
    def info(self) -> VlmInfo:
        return self._info

    @property
    def _caches(self) -> list[Cache]:
        return [self._cache] if (apart := self._apart) is None else [self._cache, apart]

    def close(self) -> None:
        self._pictures.clear()
        for cache in self._caches:
            cache.close()
        self.tower.close()
        for cache in self._caches:
            cache.tap.close()
        self._model.close()

    def cancel(self) -> None:
        """Stops the graph in progress, from any thread."""
        for cache in self._caches:
            cache.cancel()
        self.tower.tap.cancel()

    def cancel_reset(self) -> None:
        for cache in self._caches:
            cache.cancel_reset()
        self.tower.tap.cancel_reset()

    # pictures

    def layout(self, width: int, height: int) -> ImageLayout:
        return self.tower.lay_out(width, height).layout

    def encode(
        self, image: NDArray[np.uint8], *, tower: bool = False, keep: Int32 | None = None, onto: Encoded | None = None
    ) -> Encoded:
        begun = None if onto is None else self._picture(onto)
        if begun is not None and begun.size != (size := image.shape[1::-1]):
            raise UsageError(f"the picture is {size[0]}x{size[1]} and was {begun.size[0]}x{begun.size[1]}")
        picture = self.tower.encode(image, tower, keep, begun)
        number = self._next_picture if onto is None else onto.id
        self._next_picture = max(self._next_picture, number + 1)
        self._pictures[number] = picture
        seen = picture.tower if tower else None  # else some tiles of it may be missing
        return Encoded(number, picture.layout, picture.ms, seen, picture.n_encoded, picture.shared)

    def release(self, image: Encoded) -> None:
        self._pictures.pop(image.id, None)

    def embeddings(self, image: Encoded) -> Float32:
        picture = self._picture(image)
        out = np.full((len(picture.places), self._model.n_embd_input), np.nan, np.float32)
        here = np.flatnonzero(np.isin(picture.places[:, 0], list(picture.tiles))).astype(np.int32)
        out[here] = picture.at(here)
        return out

    def features(self, image: Encoded) -> Float32:
        picture = self._picture(image)
        if picture.n_encoded < picture.layout.n_tiles:
            raise UsageError(f"picture {image.id} has tiles that were not encoded", "encode all of it")
        return picture.at(picture.rows_of(np.arange(picture.layout.n_tokens, dtype=np.int32)))

    def altered(self, image: Encoded, tokens: Int32, rows: Float32) -> Encoded:
        picture = self._picture(image)
        n, width = picture.layout.n_tokens, self._model.n_embd_input
        if rows.shape != (len(tokens), width) or (len(tokens) and not 0 <= tokens.min() <= tokens.max() < n):
            raise UsageError(
                f"{len(tokens)} tokens of 0..{n - 1} and rows of shape {rows.shape}, {width} wide, were given"
            )
        number, self._next_picture = self._next_picture, self._next_picture + 1
        self._pictures[number] = picture.with_rows(tokens, rows)
        return replace(image, id=number)

    def embed(self, text: str) -> Float32:
        return self._embedded(np.array(self._model.vocabulary.tokenize_run([(text, False)]), np.int32))

    def _embedded(self, ids: Int32) -> Float32:
        try:
            return (self._table or TokenTable(self._header, self._model.n_embd_input)).rows(ids)
        except (KeyError, NotImplementedError, ValueError) as error:
            raise UnsupportedModel(f"embeddings of '{self._info.name}' cannot be read: {error}") from None

    def _picture(self, image: Encoded) -> Picture:
        found = self._pictures.get(image.id)
        if found is None:
            raise UsageError(f"picture {image.id} is not in the engine any more", "encode it again")
        return found

    # prompts

    def chat(self, messages: Sequence[Message]) -> list[TextPart | int]:
        return render(messages, self._info.chat_template, self._info.family, self._info.bos, self._info.eos)

    def tokenize(self, parts: Sequence[TextPart | int]) -> Int32:
        return self._prompts.tokenize(parts)

    def prefill(
        self,
        parts: Sequence[Part],
        *,
        tap: bool = False,
        layer: int = 0,
        reuse: Reuse = "nothing",
        since: int = 0,
    ) -> Prefilled:
        self._info.check_layer(layer)
        return self._prompts.prefill(parts, tap, reuse, since, layer)

    def pause(
        self, parts: Sequence[Part], layer: int, *, attend: Sequence[int] | None = (-1,), hidden: bool = False
    ) -> Paused:
        self._info.check_layer(layer)
        return self._prompts.pause(parts, layer, attend, hidden)

    def resume(
        self,
        keep: Int32 | None,
        rows: Float32 | None = None,
        *,
        layer: int,
        attend: Sequence[int] | None = (-1,),
        hidden: bool = False,
    ) -> Paused:
        self._info.check_layer(layer)
        return self._prompts.resume(keep, rows, layer, attend, hidden)

    def finish(self, keep: Int32 | None, rows: Float32 | None = None) -> Prefilled:
        return self._prompts.finish(keep, rows)

    # decoding

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_text: Callable[[str], None] | None = None,
        draft: Int32 | None = None,
    ) -> Completion:
        return self._decoder.generate(max_tokens, sampling, on_text, draft)

    def feed(self, ids: Int32) -> None:
        self._decoder.feed(ids)

    def score(self, ids: Int32, parts: Sequence[Part] | None = None) -> Float32:
        if parts is None:
            return self._decoder.score(ids)
        if self._apart is None:
            self._apart = self._new_cache()
            if self._cache.tap.cancelled:  # while the other was not there to be told
                raise Interrupted()
        prompts, decoder = self._over(self._apart)
        prompts.prefill(parts, tap=False, reuse="nothing", since=0)
        return decoder.score(ids)

    def logits(self) -> Float32:
        return self._cache.logits

    def attention(self) -> Attention:
        if not self._cache.tapping:
            raise UsageError("no attention was recorded: prefill with tap=True first")
        read, rows = self._cache.tap.read, self._cache.tap.rows
        return Attention(
            prompt=read(0, 0),
            generated=read(1, 0),
            last=read(2, 0),
            weighted=(read(0, 1), read(1, 1), read(2, 1)),
            maximum=(read(0, 2), read(1, 2), read(2, 2)),
            rows=(rows(0), rows(1)),
        )
