"""An engine without llama.cpp: scripted answers, plausible attention, failures on demand.

For tests, documentation and demonstrations of the layers above. One token is one byte; a picture becomes a raster of
tokens whose attention peaks where the script says::

    engine = FakeEngine(Script(answer="red", focus=(0.5, 0.0, 1.0, 0.5)))
    with Pipeline.open(pair, engine=engine) as pipeline:
        pipeline.ask(images, "What colour is the star?")
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

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
    Paused,
    Prefilled,
    Reuse,
    SamplingOptions,
    TextPart,
    VlmInfo,
)
from localvlm.engine.devices import check_gpu
from localvlm.engine.drafts import agreed
from localvlm.engine.fake_staged import FakeStages, directions
from localvlm.errors import ContextOverflow, EngineCrashed, Interrupted, LocalvlmError, UsageError

__all__ = ["FakeEngine", "FakeVlm", "Script"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

BOS, EOS = 256, 257
N_VOCAB = 258
_TICK_S = 0.01
"""How often a slow answer looks whether it was cancelled."""


@dataclass(frozen=True)
class Script:
    """How one fake VLM behaves."""

    answer: str = "red"
    """What it answers to everything."""
    pruned_answer: str | None = None
    """What it answers from a part of the image tokens, if that is something else."""
    focus: tuple[float, float, float, float] = (0.5, 0.0, 1.0, 0.5)
    """x0, y0, x1, y1 as shares of the picture: where its attention peaks."""
    grid: tuple[int, int] = (12, 12)
    """(rows, columns) of image tokens, for pictures of any shape."""
    tiles: tuple[int, int] = (0, 0)
    """(rows, columns) of tiles that show the picture again, ``grid`` tokens each; LoadOptions.image_tokens bounds them
    away."""
    n_layer: int = 4
    n_head: int = 2
    tower_layers: int = 3
    n_ctx: int = 4096
    token_s: float = 0.0
    """Seconds a generated token takes."""
    encode_s: float = 0.0
    """Seconds the tower takes for a tile."""
    tile_price: float = 0.0
    """Told as VlmInfo.tile_price."""
    tower: str = ""
    """Told as VlmInfo.tower."""
    logprob: float = -0.1
    """Log probability of every generated token."""
    load_error: LocalvlmError | None = None
    """Raised instead of loading."""
    n_params: int = 0
    gpus: tuple[str, ...] = ()
    """Those that layers can be put on."""
    crash_at: int | None = None
    """The step (load, each encode, prefill, each generated token: 0, 1, 2, ...) at which the engine dies."""


class FakeEngine:
    """Implements :class:`localvlm.engine.api.Engine`. Model files need not exist.

    Args:
        scripts: one for all VLMs, or one by the stem of the model's file name.
    """

    def __init__(self, scripts: Script | Mapping[str, Script] = Script()) -> None:
        self._scripts = scripts
        self._cancelled = False
        self.alive = True
        self.loaded: list[FakeVlm] = []
        """Every VLM loaded so far, for tests to look at."""

    def load(self, model: Path, mmproj: Path, options: LoadOptions = LoadOptions()) -> FakeVlm:  # noqa: ARG002
        """See :meth:`localvlm.engine.api.Engine.load`."""
        script = self._scripts if isinstance(self._scripts, Script) else self._scripts[model.stem]
        if script.load_error is not None:
            raise script.load_error
        check_gpu(options.gpu_layers, script.gpus, ("fake",))
        if not self.alive:
            for dead in self.loaded:
                dead.gone = True
        self.alive = True
        vlm = FakeVlm(self, model.stem, script, options)
        vlm.step("load")
        self.loaded.append(vlm)
        return vlm

    def cancel(self) -> None:
        """See :meth:`localvlm.engine.api.Engine.cancel`."""
        self._cancelled = True

    def take_cancel(self) -> bool:
        """Whether :meth:`cancel` was called since the last time this was asked."""
        taken, self._cancelled = self._cancelled, False
        return taken

    def wait(self, seconds: float) -> bool:
        """Waits as work would; True if it was cancelled."""
        end = time.monotonic() + seconds
        while not self._cancelled and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, _TICK_S))
        return self.take_cancel()

    def kill(self) -> None:
        """Ends the engine at once."""
        self.alive = False

    def check(self) -> None:
        """See :meth:`localvlm.engine.client.Engine.check`."""
        if not self.alive:
            raise EngineCrashed("the engine was ended by SIGKILL while it waited", "this one was told to")

    def close(self) -> None:
        """See :meth:`localvlm.engine.api.Engine.close`."""
        self.alive = False

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class FakeVlm:
    """Implements :class:`localvlm.engine.api.Vlm` after a script."""

    def __init__(self, engine: FakeEngine, name: str, script: Script, options: LoadOptions) -> None:
        self._engine, self._script, self.options = engine, script, options
        self.gone = False
        """It was closed, or its engine died and another was started."""
        self._steps = 0
        self._images: dict[int, set[int]] = {}
        self._tiles = script.tiles
        most, one = options.image_tokens, script.grid[0] * script.grid[1]
        if most and one * (1 + script.tiles[0] * script.tiles[1]) > most:
            self._tiles = 0, 0
        self._next_image = 1
        self._prompt: list[tuple[ImageLayout, Int32 | None]] = []
        self._cells: list[tuple[int, int]] = []
        """What the cache holds: (picture, token); (0, id) for text."""
        self._rows = [0, 0]
        self._tapped = False
        self._answer = script.answer.encode("utf-8", "surrogatepass")
        self._fed = 0
        self._stages: FakeStages | None = None
        self._info = VlmInfo(
            name=name,
            architecture="fake",
            family="llava",
            n_layer=script.n_layer,
            n_head=script.n_head,
            n_embd=8,
            n_vocab=N_VOCAB,
            n_ctx=options.n_ctx or script.n_ctx,
            n_params=script.n_params,
            mrope=False,
            chat_template=None,
            bos="",
            eos="",
            tower_layers=script.tower_layers,
            tower_cls=True,
            vocab_hash="bytes",
            tile_price=script.tile_price,
            tower=script.tower,
        )

    @property
    def info(self) -> VlmInfo:
        """What the script describes."""
        return self._info

    @property
    def alive(self) -> bool:
        """Whether its engine runs."""
        return self._engine.alive and not self.gone

    def step(self, name: str) -> None:
        """Counts one step; dies at the one that the script names."""
        if not self.alive:
            raise EngineCrashed(f"'{self._info.name}' was in an engine that has ended", "load it again")
        if self._steps == self._script.crash_at:
            self._engine.alive = False
            raise EngineCrashed(f"the engine was ended by SIGABRT during '{name}'", "this one was scripted")
        self._steps += 1

    # pictures

    def layout(self, width: int, height: int) -> ImageLayout:
        """A raster over the whole picture, and then one over each tile."""
        down, across = self._tiles
        views = [(0.0, 0.0, width, height)]
        for r, c in np.ndindex(down, across):
            views.append((c * width / across, r * height / down, (c + 1) * width / across, (r + 1) * height / down))
        boxes = np.concatenate([_raster(*self._script.grid, *view) for view in views])
        n, n_tiles = len(boxes), len(views)
        grid = self._script.grid if n_tiles == 1 else None
        return ImageLayout(n, boxes, grid, n, n_tiles, np.arange(n, dtype=np.int32) // np.int32(n // n_tiles))

    def encode(
        self,
        image: NDArray[np.uint8],
        *,
        tower: bool = False,
        keep: Int32 | None = None,
        onto: Encoded | None = None,
    ) -> Encoded:
        """Takes as long as the script says."""
        self.step("encode")
        height, width, _ = image.shape
        layout = self.layout(width, height)
        if onto is not None and not np.array_equal(onto.layout.boxes, layout.boxes):  # type: ignore[arg-type]
            raise UsageError(f"the picture is {width}x{height} and was of another size")
        number = self._next_image if onto is None else onto.id
        self._next_image = max(self._next_image, number + 1)
        encoded = self._images.setdefault(number, set()) if onto is None else self._encoded(onto)
        absent = _tiles_of(layout, keep) - encoded
        if self._engine.wait(self._script.encode_s * len(absent)):
            raise Interrupted()
        encoded |= absent
        seen = np.tile(self._looked_at(layout), (self._script.tower_layers, 1)) if tower else None
        return Encoded(number, layout, self._script.encode_s * len(absent) * 1e3, seen, len(encoded))

    def _encoded(self, image: Encoded) -> set[int]:
        if image.id not in self._images:
            raise UsageError(f"picture {image.id} is not in the engine any more")
        return self._images[image.id]

    def release(self, image: Encoded) -> None:
        """Forgets a picture."""
        self._images.pop(image.id, None)

    def embeddings(self, image: Encoded) -> Float32:
        """Numbers that differ from token to token."""
        layout = image.layout
        assert layout.tiles is not None
        ramp = np.arange(layout.n_tokens, dtype=np.float32)
        ramp[~np.isin(layout.tiles, list(self._encoded(image)))] = np.nan
        return np.repeat(ramp[:, None], self._info.n_embd, axis=1)

    def features(self, image: Encoded) -> Float32:
        """Directions that differ from token to token."""
        self._encoded(image)
        angles = np.arange(image.layout.n_tokens)[:, None] * np.arange(1, self._info.n_embd + 1)
        return np.asarray(np.cos(angles), np.float32)

    def altered(self, image: Encoded, tokens: Int32, rows: Float32) -> Encoded:  # noqa: ARG002
        """Another number for the same picture."""
        number, self._next_image = self._next_image, self._next_image + 1
        self._images[number] = set(self._encoded(image))
        return replace(image, id=number)

    def embed(self, text: str) -> Float32:
        """Directions that differ from byte to byte."""
        return directions(np.frombuffer(text.encode("utf-8", "surrogatepass"), np.uint8), self._info.n_embd)

    # prompts

    def chat(self, messages: Sequence[Message]) -> list[TextPart | int]:
        """``ROLE: [pictures] text`` line by line."""
        parts: list[TextPart | int] = []
        pictures = 0
        for message in messages:
            parts.append(TextPart(f"{message.role.upper()}: ", special=True))
            parts += range(pictures, pictures + message.n_images)
            pictures += message.n_images
            parts += [TextPart(message.text)] if message.text else []
            parts.append(TextPart("\n", special=True))
        return [*parts, TextPart("ASSISTANT:", special=True)]

    def tokenize(self, parts: Sequence[TextPart | int]) -> Int32:
        """One token per byte."""
        ids = [BOS]
        for part in parts:
            ids += part.text.encode("utf-8", "surrogatepass") if isinstance(part, TextPart) else [-1] * part
        return np.array(ids, np.int32)

    def prefill(
        self,
        parts: Sequence[Part],
        *,
        tap: bool = False,
        layer: int = 0,
        reuse: Reuse = "nothing",
        since: int = 0,
    ) -> Prefilled:
        """Counts rows; remembers the pictures for :meth:`attention`. ``layer`` is checked, and changes nothing."""
        self.step("prefill")
        self._stages = None
        if not 0 <= layer < self._info.n_layer:
            raise UsageError(f"layer {layer} is not within 0..{self._info.n_layer - 1}")
        for p in parts:
            if isinstance(p, ImagePart) and (
                absent := _tiles_of(p.image.layout, None if layer else p.keep) - self._encoded(p.image)
            ):
                raise UsageError(f"tokens of tile {min(absent)} are asked for, and it was not encoded")
        placed = [p for p in parts if isinstance(p, TextPart) or p.again is None]
        pictures = [p for p in placed if isinstance(p, ImagePart)]
        ids = self.tokenize([p if isinstance(p, TextPart) else p.image.layout.n_tokens for p in placed])
        cells = self._laid(parts)
        n_image, n_kept = int((ids == -1).sum()), sum(picture > 0 for picture, _ in cells)
        if len(cells) >= self._info.n_ctx:
            raise ContextOverflow(f"the prompt needs {len(cells) + 1} cells and the context has {self._info.n_ctx}")
        before = 0 if reuse == "nothing" or tap != self._tapped else agreed(cells[:-1], self._cells)
        asked = sum(len(self.tokenize([p])) - 1 for p in parts[since:] if isinstance(p, TextPart))
        last_image = int(np.flatnonzero(ids == -1).max(initial=0))
        self._rows, self._tapped = [min(asked, len(ids) - 1 - last_image), 0], tap
        self._prompt = [(p.image.layout, p.keep) for p in pictures]
        self._cells, self._fed = cells, 0
        self._answer = self._said(n_kept < n_image)
        return Prefilled(ids, n_image, n_kept, len(cells), 0.0, len(cells) - before)

    def pause(
        self, parts: Sequence[Part], layer: int, *, attend: Sequence[int] | None = (-1,), hidden: bool = False
    ) -> Paused:
        """Counts rows as :meth:`prefill` does."""
        self._info.check_layer(layer)
        if any(isinstance(p, ImagePart) and p.again is not None for p in parts):
            raise UsageError("more tokens of a picture cannot go into a prompt that is pruned at a layer")
        ids = self.prefill(parts).token_ids
        image, rows, first = [np.zeros(0, np.int32)], [np.zeros((0, self._info.n_embd), np.float32)], 0
        for p in (p for p in parts if isinstance(p, ImagePart)):
            n = p.image.layout.n_tokens
            image.append(np.asarray(np.arange(n) if p.keep is None else p.keep, np.int32) + np.int32(first))
            rows.append(self.features(p.image))
            first += n
        stages = FakeStages(self._info, ids, np.concatenate(image), np.concatenate(rows), self._row())
        paused, self._stages = stages.at(layer, attend, hidden), stages
        return paused

    def _waiting(self) -> FakeStages:
        if self._stages is None:
            raise UsageError("no prompt is paused")
        return self._stages

    def resume(
        self,
        keep: Int32 | None,
        rows: Float32 | None = None,
        *,
        layer: int,
        attend: Sequence[int] | None = (-1,),
        hidden: bool = False,
    ) -> Paused:
        """Forgets tokens and takes rows; nothing else changes from layer to layer."""
        return self._waiting().resume(keep, rows, layer, attend, hidden)

    def finish(self, keep: Int32 | None, rows: Float32 | None = None) -> Prefilled:
        """The answer is that of a pruned prompt if any token has gone."""
        stages = self._waiting()
        n_kept, ids = stages.go(keep, rows), stages.paused.token_ids
        n_image, self._stages = int((ids == -1).sum()), None
        self._answer = self._said(n_kept < n_image)
        stays = iter(np.isin(stages.began, stages.paused.image))
        self._cells = [cell for cell in self._cells if not cell[0] or next(stays)]
        return Prefilled(ids, n_image, n_kept, len(self._cells), 0.0, len(self._cells))

    def _decodes(self) -> None:
        if self._stages is not None:
            raise UsageError("the prompt is paused", "finish it")

    def _laid(self, parts: Sequence[Part]) -> list[tuple[int, int]]:
        """What each cell of a prompt holds."""
        cells = [(0, BOS)]
        for part in parts:
            if isinstance(part, TextPart):
                cells += [(0, int(i)) for i in self.tokenize([part])[1:]]
            else:
                kept = range(part.image.layout.n_tokens) if part.keep is None else part.keep
                cells += [(part.image.id, int(i)) for i in kept]
        return cells

    def _said(self, pruned: bool) -> bytes:
        said = self._script.pruned_answer if pruned else None
        return (self._script.answer if said is None else said).encode("utf-8", "surrogatepass")

    # answers

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_text: Callable[[str], None] | None = None,
        draft: Int32 | None = None,
    ) -> Completion:
        """The scripted answer, character by character."""
        self._decodes()
        ids = list(self._answer[:max_tokens])
        finish = "length" if len(self._answer) > max_tokens else "stop"
        text, cut = "", None
        for character in bytes(ids).decode("utf-8", "ignore"):
            if self._engine.wait(self._script.token_s):
                finish, cut = "cancelled", len(text.encode())
                break
            self.step("generate")
            text += character
            if on_text is not None:
                on_text(character)
        ids = ids[:cut]
        self._fed = self._rows[1] = max(0, len(ids) - 1)
        self._cells += [(0, i) for i in ids[:-1]]
        n_logprobs = len(ids) + (finish == "stop")
        logprobs = np.full(n_logprobs, self._script.logprob, np.float32)
        ms = self._script.token_s * 1e3
        likely = [] if draft is None or sampling.temp > 0 or self._tapped else [int(t) for t in draft[:max_tokens]]
        counts = len(likely), agreed(ids, likely)
        return Completion(text, np.array(ids, np.int32), logprobs, finish, ms * len(text), ms, self._fed, *counts)

    def feed(self, ids: Int32) -> None:
        """Counts fed tokens as generated rows."""
        self._decodes()
        self._fed += len(ids)
        self._rows[1] += len(ids)

    def score(self, ids: Int32, parts: Sequence[Part] | None = None) -> Float32:
        """Logits that predict the scripted answer, whatever ``ids`` are."""
        fed, answer = self._fed, self._answer
        if parts is None:
            self._decodes()
        else:
            self.step("score")
            pictures = [p for p in parts if isinstance(p, ImagePart)]
            pruned = any(p.keep is not None and len(p.keep) < p.image.layout.n_tokens for p in pictures)
            fed, answer = 0, self._said(pruned)
        return np.stack([_predicting(answer, fed + i) for i in range(len(ids))])

    def logits(self) -> Float32:
        """Logits that predict the next byte of the answer."""
        self._decodes()
        return _predicting(self._answer, self._fed)

    # attention

    def _looked_at(self, layout: ImageLayout) -> Float32:
        """(n_tokens,) probabilities that sum to 1, most of it on the focus."""
        assert layout.boxes is not None
        x0, y0, x1, y1 = layout.boxes.T
        fx0, fy0, fx1, fy1 = self._script.focus
        width, height = x1.max(), y1.max()
        wide = np.clip(np.minimum(x1, fx1 * width) - np.maximum(x0, fx0 * width), 0, None)
        tall = np.clip(np.minimum(y1, fy1 * height) - np.maximum(y0, fy0 * height), 0, None)
        area = (wide * tall).astype(np.float32)
        share = area / max(float(area.sum()), 1e-6) * 0.8 + 0.2 / layout.n_tokens
        return np.asarray(share, np.float32)

    def attention(self) -> Attention:
        """Half of every row's attention on the pictures, later layers sharper."""
        if not self._tapped:
            raise LocalvlmError("nothing was recorded", "prefill with tap=True")
        row = self._row()
        prompt, generated = row * self._rows[0], row * self._rows[1]
        largest = (row, row * min(1, self._rows[1]), row)
        return Attention(prompt, generated, row, (prompt, generated, row), largest, (self._rows[0], self._rows[1]))

    def _row(self) -> Float32:
        """(n_layer, n_head, n_image) attention of one row, half of it on the pictures."""
        shape = self._script.n_layer, self._script.n_head
        if not self._prompt:
            return np.zeros((*shape, 0), np.float32)
        peaked = np.concatenate([self._looked_at(layout) for layout, _ in self._prompt])
        there = np.concatenate([_mask(layout.n_tokens, keep) for layout, keep in self._prompt])
        peaked /= peaked.sum()
        even = np.full_like(peaked, 1 / len(peaked))
        sharp = np.linspace(0.2, 1.0, self._script.n_layer, dtype=np.float32)[:, None, None]
        mixed = 0.5 * (sharp * peaked + (1 - sharp) * even)
        return np.broadcast_to(mixed * there, (*shape, len(peaked))).astype(np.float32)

    def close(self) -> None:
        """Forgets the pictures; nothing can be asked of it any more."""
        self._images.clear()
        self.gone = True


def _raster(rows: int, columns: int, x0: float, y0: float, x1: float, y1: float) -> Float32:
    """(rows * columns, 4) boxes of the cells of a rectangle."""
    x, y = np.linspace(x0, x1, columns + 1, dtype=np.float32), np.linspace(y0, y1, rows + 1, dtype=np.float32)
    cells = [*np.meshgrid(x[:-1], y[:-1]), *np.meshgrid(x[1:], y[1:])]
    return np.stack(cells, axis=-1).reshape(-1, 4)


def _mask(n: int, keep: Int32 | None) -> Float32:
    """(n,) 1 at tokens that are kept, 0 at others."""
    return np.ones(n, np.float32) if keep is None else np.isin(np.arange(n), keep).astype(np.float32)


def _tiles_of(layout: ImageLayout, keep: Int32 | None) -> set[int]:
    """The tiles that make the tokens ``keep``, or all."""
    assert layout.tiles is not None
    return set((layout.tiles if keep is None else layout.tiles[keep]).tolist())


def _predicting(answer: bytes, at: int) -> Float32:
    """(N_VOCAB,) logits that predict a byte of the answer, or its end."""
    out = np.zeros(N_VOCAB, np.float32)
    out[answer[at] if at < len(answer) else EOS] = 10.0
    return out
