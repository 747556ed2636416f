"""A short sample of this machine: small VLMs are run through the same engine, and rates are fitted to their times."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil

from localvlm.engine.api import Engine, LoadOptions, TextPart, Vlm
from localvlm.engine.llama import thread_count
from localvlm.planning.minis import MiniLlm, MiniTower, write
from localvlm.planning.rates import KNOTS, TILED, Rates, cells_of, increasing

__all__ = ["SHARE", "Disturbed", "sample"]

REPEATS = 3
"""Of a measurement; the shortest counts, since other work only ever adds."""
SPARE = MiniLlm("F32", 128, 32, 8)
"""All but free of weights: what a layer takes at least. Beside towers it costs nothing."""
FEW = 2
"""Layers of the same that tell what a batch takes beside its layers."""
LEAN = MiniLlm("F16", 1024, 32, 2)
"""All but free of a feed-forward part: attention shows."""
DEEP, BATCH = 1024, 256
"""Cells before a batch of so many rows, to tell attention from weights."""
NEAR = 8
"""Cells of a shallow prompt, the least that has text."""
_SMALL = MiniTower("F16", 128, 256, 1, 4)
_TOWER = MiniTower("F16", 1024, 4096, 2, 32)
_SIDES = (10, 32)
"""Patches of the two towers that tell attention from weights."""
CACHE, DEEPEST = 64 << 20, 24
"""Bytes of layers that outgrow a CPU's caches, as those of a real LLM do; and most layers."""
_WATCHED = 32
"""Rows of batches from which on all threads have work all the time."""
SHARE, _SHORTEST = 0.75, 0.3
"""Of the threads' time, what the worker must have had; and seconds that tell it, as processes are clocked coarsely."""
_LEAST = 1e-18
"""Of a rate, where noise would make it 0 or less."""
_MOST = 20
"""Weights that a channel of a cell takes as long as, at most: more is noise. Two products, in half precision."""


class Disturbed(Exception):
    """Other work took the processor."""


def full(name: str) -> MiniLlm:
    """As many layers of a type and shape (:class:`localvlm.planning.shapes.Llm`) as outgrow a CPU's caches; a little
    larger where blocks of the type ask for it.
    """
    import gguf

    kind, *sizes = name.split()
    width, ffn, head, heads, keys = map(int, sizes)
    block, n_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    width = -(-width // block) * block
    heads += -heads % (block // math.gcd(block, head))
    one = MiniLlm(kind, width, ffn, 1, head, heads, keys if heads % keys == 0 else heads)
    return replace(one, layers=max(FEW, min(-(-CACHE * block // (one.weights * n_bytes)), DEEPEST)))


def sample(
    engine: Engine,
    options: LoadOptions,
    known: Rates = Rates(),
    llms: Sequence[str] = (),
    towers: Sequence[str] = (),
    on_part: Callable[[str], None] | None = None,
) -> Rates:
    """``known``, with rates of more weights: of LLMs by type and shape, of towers by type. ``on_part`` gets the name of
    what is timed.

    Raises:
        Interrupted: the engine was cancelled.
        Disturbed: what was found is not what the machine takes.
    """
    tell = on_part or (lambda _: None)
    options = replace(options, n_ctx=0, image_tokens=0, cache="", compact_positions=False)
    with tempfile.TemporaryDirectory(prefix="localvlm-") as name:
        bench = _Bench(engine, options, Path(name))
        rates = known
        if not known.layer:
            tell("attention")
            rates = bench.overheads(rates)
        for kind in llms:
            tell(kind)
            rates = replace(rates, rows={**rates.rows, kind: bench.rows(rates, full(kind))}, load=bench.load)
        for kind in towers:
            tell(f"tower {kind}")
            patch, pair = bench.tower(rates, kind)
            rates = replace(rates, patch={**rates.patch, kind: patch}, pair=rates.pair or pair)
        if bench.share < SHARE:
            raise Disturbed("other work took the processor while this machine was timed")
        return rates


class _Bench:
    """Times small VLMs."""

    def __init__(self, engine: Engine, options: LoadOptions, folder: Path) -> None:
        self._engine, self._options, self._folder = engine, options, folder
        self.load = 0.0
        """Seconds a byte of the last LLM took to load."""
        self._watched = self._used = 0.0
        """Seconds of large batches, and those of the worker's threads in them."""

    @property
    def share(self) -> float:
        """Of its threads' time that the worker had; 1 where that cannot be told."""
        had = self._used / max(self._watched, 1e-9) / thread_count(self._options)
        return had if self._watched >= _SHORTEST and self._clock() else 1.0

    def _clock(self) -> float:
        """Seconds that the worker's threads have run; 0 for an engine without one."""
        pid = getattr(self._engine, "pid", None)
        times = None if pid is None else psutil.Process(pid).cpu_times()
        return 0.0 if times is None else float(times.user + times.system)

    def overheads(self, rates: Rates) -> Rates:
        """What a layer and a tile take at least, and what attention does."""
        vlm = self._load(replace(SPARE, layers=FEW), _SMALL)
        few = _one(vlm, NEAR)
        vlm.close()
        vlm = self._load(SPARE, _SMALL)
        layer = max((_one(vlm, NEAR) - few) / (SPARE.layers - FEW), _LEAST)
        step = max(few - FEW * layer, _LEAST)
        tile = max(_encoding(vlm, _SMALL), _LEAST)
        vlm.close()
        vlm = self._load(LEAN, _SMALL)
        near, many = _one(vlm, NEAR), _batch(vlm, BATCH, 0)
        after = _batch(vlm, BATCH, DEEP)
        far = _one(vlm, DEEP)
        vlm.close()
        channels = LEAN.width * LEAN.layers
        most = _MOST * many / (BATCH * LEAN.weights)
        row = min((far - near) / ((DEEP - NEAR) * channels), most)
        tiled = min((after - many) / (BATCH * DEEP * channels), most)
        return replace(rates, layer=layer, step=step, tile=tile, cell=(max(row, _LEAST), max(tiled, _LEAST)))

    def rows(self, rates: Rates, shape: MiniLlm) -> tuple[float, ...]:
        """Seconds a weight takes, by KNOTS."""
        vlm = self._load(shape, _SMALL)
        found: list[float] = []
        for rows in KNOTS:
            if rows == _WATCHED:
                began, used = time.perf_counter(), self._clock()
            taken = _one(vlm, NEAR) if rows == 1 else _batch(vlm, rows, 0, 1 if rows == KNOTS[-1] else REPEATS)
            cells = cells_of(rows, NEAR - 1 if rows == 1 else 0)
            attended = rates.cell[rows >= TILED] * cells * shape.queries * shape.layers
            beside = rates.step + rates.layer * shape.layers + attended
            once = found[0] * shape.trimmed if found else 0.0
            found.append(max((taken - beside - once) / (shape.weights - shape.trimmed * bool(found)), _LEAST))
        self._watched += time.perf_counter() - began
        self._used += self._clock() - used
        vlm.close()
        return increasing(found)

    def tower(self, rates: Rates, kind: str) -> tuple[float, float]:
        """Seconds that a patch takes for a weight, and for another patch and a channel."""
        taken = []
        for side in _SIDES:
            shape = replace(_TOWER, kind=kind, side=side)
            vlm = self._load(SPARE, shape)
            taken.append(max(_encoding(vlm, shape) - rates.tile, 0.0) / side**2)
            vlm.close()
        few, many = (side**2 for side in _SIDES)
        pair = rates.pair or (taken[1] - taken[0]) / ((many - few) * shape.width * shape.layers)
        pair = max(min(pair, _MOST * taken[0] / shape.weights), _LEAST)
        patch = (taken[1] - pair * many * shape.width * shape.layers) / shape.weights
        return max(patch, _LEAST), pair

    def _load(self, llm: MiniLlm, tower: MiniTower) -> Vlm:
        files = write(self._folder, "mini", llm, tower)
        started = time.perf_counter()
        vlm = self._engine.load(files.model, files.mmproj, self._options)
        self.load = (time.perf_counter() - started) / files.model.stat().st_size
        return vlm


def _text(vlm: Vlm, rows: int) -> list[TextPart]:
    """A text that has as many rows."""
    beside = len(vlm.tokenize([TextPart("x")])) - 1
    return [TextPart("x" * max(1, rows - beside))]


def _one(vlm: Vlm, cells: int) -> float:
    """Seconds of one row after ``cells`` - 1 others: of a prompt that is there, the last is run again."""
    text = _text(vlm, cells)
    vlm.prefill(text, reuse="rows")
    return min(vlm.prefill(text, reuse="rows").ms for _ in range(2 * REPEATS)) / 1e3


def _batch(vlm: Vlm, rows: int, before: int, repeats: int = REPEATS) -> float:
    """Seconds of a batch after ``before`` cells."""
    first, whole = _text(vlm, before), _text(vlm, before + rows)
    taken = []
    for _ in range(repeats):
        if before:
            vlm.prefill(first, reuse="rows")
        taken.append(vlm.prefill(whole, reuse="rows" if before else "nothing").ms)
    return min(taken) / 1e3


def _encoding(vlm: Vlm, shape: MiniTower) -> float:
    """Seconds of a picture of exactly the tower's size."""
    side = shape.side * shape.patch
    picture = np.zeros((side, side, 3), np.uint8)
    taken = []
    for _ in range(REPEATS):
        encoded = vlm.encode(picture)
        taken.append(encoded.ms)
        vlm.release(encoded)
    return min(taken) / 1e3
