"""The demo pair with image tokens dropped at a layer: accuracy, retention, LLM FLOPs and time by layer and share kept,
and compact positions against true ones. Run by ``python -m tests.layers``.
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.cost import LlmShape
from localvlm.engine.api import ImagePart, LoadOptions, Message, TextPart, Vlm
from localvlm.pipeline import Pipeline
from localvlm.pruning import PRESETS, mean_kept
from localvlm.pruning.base import top
from tests import scenes

__all__ = ["Cell", "Positions", "Table", "flops", "misses", "positions", "table"]

LAYERS = (0, 1, 2, 5, 8)
KEEPS = (0.05, 0.09, 0.20, 0.35, 0.40)
WHERE_KEEPS = (0.05, 0.09, 0.20, 0.35)
PAPER = {"paper-64": 1.001, "paper-35": 0.984, "paper-9": 0.896}
"""Accuracy as a share of the unpruned model's that the paper reaches (arXiv 2412.03324, table 1)."""
NOISE = 2.0
"""Points below that which so few questions may come out."""
Cell = tuple[int, float]
"""The layer before which tokens are dropped, and the share kept."""
PLAIN: Cell = (0, 1.0)


def flops(shape: LlmShape, layer: int, whole: int, pruned: int, fed: int) -> int:
    """LLM FLOPs of an answer: ``whole`` prompt rows below ``layer``, ``pruned`` ones from there on, ``fed`` after."""
    return shape.flops([whole] * layer + [pruned] * (shape.n_layer - layer), fed, fed + 1)


@dataclass
class Table:
    """Right or wrong, FLOPs and ms of each question, by cell. ``retention``: mean over layers."""

    n_layer: int
    right: dict[Cell, list[bool]] = field(default_factory=dict)
    flops: dict[Cell, int] = field(default_factory=dict)
    ms: dict[Cell, float] = field(default_factory=dict)
    retention: dict[Cell, float] = field(default_factory=dict)

    def add(self, cell: Cell, right: bool, cost: int, ms: float, retention: float) -> None:
        self.right.setdefault(cell, []).append(right)
        self.flops[cell] = self.flops.get(cell, 0) + cost
        self.ms[cell] = self.ms.get(cell, 0.0) + ms
        self.retention[cell] = retention

    def percent(self, cell: Cell) -> float:
        return 100 * float(np.mean(self.right[cell]))

    def preset(self, name: str) -> Cell:
        return PRESETS[name].layer_in(self.n_layer), PRESETS[name].keep

    def __str__(self) -> str:
        names = {self.preset(name): name for name in PRESETS} | {PLAIN: "plain"}
        lines = ["layer  keep retention accuracy  FLOPs   time"]
        for cell in sorted(self.right, key=lambda c: (c != PLAIN, c)):
            ratios = f"{self.flops[cell] / self.flops[PLAIN]:6.2f} {self.ms[cell] / self.ms[PLAIN]:6.2f}"
            shares = f"{cell[1]:5.0%} {self.retention[cell]:9.1%} {self.percent(cell):8.1f}"
            lines.append(f"{cell[0]:5} {shares} {ratios}  {names.get(cell, '')}".rstrip())
        return "\n".join(lines)


class _Question:
    """One question of the demo pair, at which the guide has looked; asked of a model in any setting."""

    def __init__(self, pipeline: Pipeline, row: Mapping[str, str], folder: Path) -> None:
        self._picture, self._text, self._want = images.load(folder / row["image"]), row["question"], row["answer"]
        layout = pipeline.vlm("model").layout(*self._picture.size)
        look = pipeline.look([self._picture], self._text, scenes.MAX_TOKENS)
        self.n = layout.n_tokens
        self._saliency = pipeline.saliency(look, "sum", [layout])

    def kept(self, keep: float) -> NDArray[np.int32]:
        return top(self._saliency, np.arange(self.n, dtype=np.int32), max(1, round(keep * self.n)))

    @contextmanager
    def of(self, model: Vlm) -> Iterator[Callable[[int, float], tuple[bool, int, int, int, float]]]:
        """Asks at a layer and a share: right or wrong; rows of the prompt, unpruned and pruned; tokens fed; ms."""
        seen, chat = model.encode(self._picture.rgb), model.chat([Message("user", self._text, 1)])

        def ask(layer: int, keep: float) -> tuple[bool, int, int, int, float]:
            parts = [p if isinstance(p, TextPart) else ImagePart(seen, self.kept(keep)) for p in chat]
            prompt = model.prefill(parts, layer=layer)
            done = model.generate(scenes.MAX_TOKENS)
            right = scenes.normal(done.text) == scenes.normal(self._want)
            return right, len(prompt.token_ids), prompt.n_past, done.fed, prompt.ms + done.ms

        yield ask
        model.release(seen)


@contextmanager
def _questions(count: int, seed: int, kind: str | None = None) -> Iterator[tuple[Path, list[dict[str, str]]]]:
    with tempfile.TemporaryDirectory() as name:
        rows = [r for r in scenes.make(count, seed, Path(name)) if r["type"] == (kind or r["type"]) != "describe"]
        yield Path(name), rows


def _told(rows: Sequence[Any], what: str) -> Iterator[Any]:
    for number, row in enumerate(rows, 1):
        yield row
        if number % 50 == 0:
            print(f"{what}: {number} of {len(rows)}", file=sys.stderr)


def table(count: int, seed: int, threads: int) -> Table:
    """Every cell on ``count`` questions whose types take turns. The cells of a question are asked in random order, the
    plain run among them, so that what slows the machine slows all alike.
    """
    order = random.Random(seed)
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        model = pipeline.vlm("model")
        assert pipeline.pair.model is not None
        shape, out = LlmShape.of(pipeline.pair.model.model), Table(model.info.n_layer)
        cells = {PLAIN, *((layer, keep) for layer in LAYERS for keep in KEEPS), *map(out.preset, PRESETS)}
        with _questions(count, seed) as (folder, rows):
            for row in _told(rows, "layers"):
                question = _Question(pipeline, row, folder)
                with question.of(model) as ask:
                    for layer, keep in order.sample(sorted(cells), len(cells)):
                        right, whole, pruned, fed, ms = ask(layer, keep)
                        mean = mean_kept(((0, question.n), (layer, len(question.kept(keep)))), out.n_layer)
                        cost = flops(shape, layer, whole, pruned, fed)
                        out.add((layer, keep), right, cost, ms, mean / question.n)
    return out


@dataclass
class Positions:
    """Right or wrong on "where" questions, by share kept (before the first layer): true positions, then compact."""

    right: dict[float, tuple[list[bool], list[bool]]] = field(default_factory=dict)

    def difference(self, keep: float) -> tuple[float, float]:
        """Mean of true - compact in points, and half its paired 95 % interval."""
        true, compact = (np.array(r, float) for r in self.right[keep])
        d = true - compact
        return 100 * float(d.mean()), 196 * float(d.std(ddof=1)) / len(d) ** 0.5

    def __str__(self) -> str:
        lines = [" keep   true compact  difference"]
        for keep, found in self.right.items():
            true, compact = (100 * np.mean(r) for r in found)
            mean, half = self.difference(keep)
            lines.append(f"{keep:5.0%} {true:6.1f} {compact:7.1f}  {mean:+.1f} +- {half:.1f}")
        return "\n".join(lines)


def positions(count: int, seed: int, threads: int) -> Positions:
    """Compact positions against true ones on ``count`` questions of where something is."""
    out = Positions({keep: ([], []) for keep in WHERE_KEEPS})
    kinds = 7  # of questions, which take turns
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        files = pipeline.pair.model
        assert files is not None
        options = LoadOptions(threads=threads, compact_positions=True)
        models = (pipeline.vlm("model"), pipeline.engine.load(files.model, files.mmproj, options))
        with _questions(kinds * count, seed, "where") as (folder, rows):
            for row in _told(rows, "positions"):
                question = _Question(pipeline, row, folder)
                for which, model in enumerate(models):
                    with question.of(model) as ask:
                        for keep in WHERE_KEEPS:
                            out.right[keep][which].append(ask(0, keep)[0])
    return out


def misses(found: Table | None, compared: Positions | None) -> list[str]:
    """What is not as it was promised, in words."""
    out: list[str] = []
    want: Callable[[bool, str], None] = lambda ok, text: None if ok else out.append(text)  # noqa: E731
    if found is not None:
        full = found.percent(PLAIN)
        for name, share in PAPER.items():
            right, wanted = found.percent(found.preset(name)), min(full, share * full) - NOISE
            want(right >= wanted, f"{name}: {right:.1f} % right, wanted {wanted:.1f}")
        for cell in found.flops:
            want(cell == PLAIN or found.flops[cell] < found.flops[PLAIN], f"{cell}: no FLOPs are saved")
    for keep in compared.right if compared is not None else ():
        mean, half = compared.difference(keep)
        want(mean + half >= 0, f"true positions at {keep:.0%}: {mean:+.1f} +- {half:.1f} points against compact ones")
    return out
