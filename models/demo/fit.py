"""Fit a language model and its projector to cached features: batches, the curriculum, the loop, accuracy by type."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import data, text
from .data import GRID
from .lm import GUIDE, MODEL, Size, Vlm, grown
from .optim import Optimisers
from .questions import TYPES
from .tower import N_PATCHES
from .world import PATCH, Scene, scene_rng

BUDGET = 256  # branch tokens an image
BATCH = 8  # images
SPLIT_LAYERS = 6  # the model starts this deep
EMA = 0.995
SIZES = {"guide": GUIDE, "model": MODEL}


@dataclass
class Batch:
    """A batch of images with their branches."""

    features: Tensor  # (batch, image rows, tower width)
    tokens: Tensor  # (batch, BUDGET) int64
    targets: Tensor  # (batch, BUDGET) int64, text.IGNORE where there is no loss
    positions: Tensor  # (batch, rows) int64
    mask: Tensor  # (batch, rows, rows) bool
    branch: np.ndarray  # (batch, BUDGET) index of the branch, -1 for padding
    kinds: list[list[str]]  # type of every branch


def mix_at(step: int) -> dict[str, float]:
    """What is asked at that step: lists and plain look-ups first, the rest when these begin to be known."""
    if step >= 3800:  # counting comes last
        return {
            "caption": 0.2, "describe": 0.3, "colour": 0.2, "shape": 0.2, "where": 0.4, "read": 1.5,
            "exist": 1.2, "relation": 1.2, "step": 0.2, "count": 4.0,
        }  # fmt: skip
    if step >= 2200:
        return {
            "caption": 0.3, "describe": 0.4, "colour": 0.3, "shape": 0.3, "where": 0.8, "read": 1.0,
            "exist": 1.0, "relation": 2.5, "step": 0.6, "count": 2.2,
        }  # fmt: skip
    if step >= 1000:  # colours and shapes are known by now
        return {
            "caption": 0.1, "describe": 0.2, "colour": 0.15, "shape": 0.15, "where": 0.2, "read": 0.4,
            "exist": 0.4, "relation": 2.5, "step": 1.0, "chain": 2.0, "count": 1.5,
        }  # fmt: skip
    lists = max(0.5, 3.0 * (1 - step / 900))
    mix = {"caption": lists, "describe": 0.3 * lists + 0.2, "colour": 1.0, "shape": 1.0, "where": 1.0, "read": 1.2}
    if step >= 120:
        mix |= {"exist": 1.0, "relation": 1.5}
    if step >= 240:
        mix |= {"count": 1.5}
    return mix


def collate(
    features: np.ndarray,
    rows: list[list[tuple[list[int], list[int], str]]],
    places: np.ndarray | None = None,
    length: int = N_PATCHES,
) -> Batch:
    """Lay branches after their images. A branch sees the prefix, the image and itself; positions go on from there.

    Args:
        features: (batch, n, width) of the image rows.
        rows: the branches of each image.
        places: (batch, n) place of each row in an image of `length` rows, -1 where there is none; all of them if None.
        length: rows of a whole image.
    """
    if places is None:
        places = np.broadcast_to(np.arange(length), (len(rows), length))
    before = len(text.prefix())
    start, after = before + places.shape[1], before + length
    size = (len(rows), BUDGET)
    tokens, targets = np.zeros(size, np.int64), np.full(size, text.IGNORE, np.int64)
    where, branch = np.full(size, after, np.int64), np.full(size, -1, np.int64)
    for i, row in enumerate(rows):
        at = 0
        for b, (inputs, outputs, _) in enumerate(row):
            end = at + len(inputs)
            tokens[i, at:end], targets[i, at:end], branch[i, at:end] = inputs, outputs, b
            where[i, at:end] = after + np.arange(len(inputs))
            at = end
    total = start + BUDGET
    owner = np.full((len(rows), total), -2, np.int64)
    owner[:, before:start][places < 0] = -3
    owner[:, start:] = branch
    seen = (owner[:, None, :] == -2) | (owner[:, None, :] == owner[:, :, None])
    mask = seen & np.tril(np.ones((total, total), bool))
    lead = np.broadcast_to(np.arange(before), (len(rows), before))
    positions = np.concatenate([lead, before + np.maximum(places, 0), where], 1)
    return Batch(
        torch.from_numpy(features.astype(np.float32)), torch.from_numpy(tokens), torch.from_numpy(targets),
        torch.from_numpy(positions), torch.from_numpy(mask), branch, [[k for *_, k in r] for r in rows],
    )  # fmt: skip


def hidden_ground(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """A random part of the patches that touch no thing and no tag, (144,) bool."""
    spare = np.ones((GRID, GRID), bool)
    for thing in (*scene.things, *scene.tags):
        row, column = int(thing.y // PATCH), int(thing.x // PATCH)
        spare[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2] = False
    return spare.ravel() & (rng.random(N_PATCHES) < rng.uniform(0.4, 1.0))


def training_batch(pool: np.ndarray, size: int, step: int, mix: dict[str, float], hide: float = 0.0) -> Batch:
    """The batch of that step, a pure function of its arguments; in a share `hide` of its images, ground is unseen."""
    rng = np.random.default_rng([11, size, step])
    picked = np.sort(rng.choice(len(pool), size, replace=False))
    found = [data.TRAIN.scene(int(i)) for i in picked]
    batch = collate(pool[picked], [text.branches(scene, rng, mix, BUDGET) for scene in found])
    start = len(text.prefix())
    for mask, scene in zip(batch.mask, found, strict=True):
        if rng.random() < hide:
            gone = torch.from_numpy(start + np.flatnonzero(hidden_ground(scene, rng)))
            mask[:, gone] = False
            mask[gone, gone] = True  # a row without any key would be NaN
    return batch


def batches(make: Callable[[int], Batch], first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last-1, made one ahead in a thread."""
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(make, first)
        for step in range(first, last):
            batch = ahead.result()
            ahead = thread.submit(make, step + 1)
            yield batch


def run(vlm: Vlm, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits and targets at the answers, (n, vocabulary) and (n,)."""
    x = vlm.rows(torch.tensor(text.prefix()), batch.features, batch.tokens)
    hidden = vlm(x, batch.positions, batch.mask)[:, -BUDGET:]
    answered = batch.targets != text.IGNORE
    return vlm.output(hidden[answered]), batch.targets[answered]


@torch.no_grad()
def tally(vlm: Vlm, batch: Batch, asked: Counter[str], right: Counter[str]) -> None:
    """Count branches by type, and those of which every token of the answer comes first (teacher-forced)."""
    logits, targets = run(vlm, batch)
    hit = np.ones(batch.branch.shape, bool)
    hit[(batch.targets != text.IGNORE).numpy()] = (logits.argmax(-1) == targets).numpy()
    for i, kinds in enumerate(batch.kinds):
        for b, kind in enumerate(kinds):
            asked[kind] += 1
            right[kind] += int(hit[i][batch.branch[i] == b].all())


def examined(scene: Scene, rng: np.random.Generator, kinds: Sequence[str]) -> list[tuple[list[int], list[int], str]]:
    """A branch of each of those types that the scene allows, the last of them if there are too many."""
    row = [(*text.branch([turn]), kind) for kind in kinds if (turn := text.ask(scene, rng, kind))]
    while sum(len(r[0]) for r in row) > BUDGET:
        row.pop(0)
    return row


def accuracy(vlm: Vlm, work: Path, images: int = 60, blind: bool = False) -> dict[str, float]:
    """Exact match by type on validation scenes."""
    pool = data.features(data.VALIDATION, work)
    right: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for start in range(0, images, 20):
        rows = []
        for i in range(start, start + 20):
            rng = scene_rng(data.VALIDATION.stream, 9, i)
            rows.append(examined(data.VALIDATION.scene(i), rng, (*TYPES, *TYPES, "describe")))
        tally(vlm, collate(pool[(np.arange(start, start + 20) + (300 if blind else 0))], rows), asked, right)
    out = {k: right[k] / asked[k] for k in asked}
    out["all"] = sum(right[t] for t in TYPES) / sum(asked[t] for t in TYPES)
    return out


def told(scores: dict[str, float]) -> str:
    """Accuracies on one line, in percent."""
    return " ".join(f"{k} {100 * v:.0f}" for k, v in scores.items())


@dataclass(frozen=True)
class Plan:
    """How to train `which` ('guide' or 'model'): to step `until`, or for `minutes` by the clock."""

    which: str
    steps: int = 4000  # in all; the learning rate falls over the last `cool` of them
    cool: int = 1000
    until: int | None = None  # stop here, to go on later
    minutes: float | None = None  # instead of steps: the rate falls over the second half of this time
    grow: bool = False  # the model: go on with all its layers
    batch: int = BATCH
    hide: float = 0.0  # share of images seen without part of the ground
    rate: float = 1.0  # of the usual learning rates


class Fitting:
    """A model in training: its weights, their running mean, the optimisers, the step."""

    pair = ""  # before the names of checkpoints

    def __init__(self, plan: Plan, work: Path) -> None:
        torch.manual_seed(1)
        self.plan, self.work, self.path = plan, work, work / f"{self.pair}{plan.which}.pt"
        self.pool = self.features()
        state = self.start()
        full = SIZES[plan.which]
        depth = state.get("layers", SPLIT_LAYERS if plan.which == "model" else full.layers)
        if plan.grow and depth < full.layers:
            state |= {k: grown(state[k], full.layers, full) for k in ("model", "ema")} | {"optimisers": None}
            depth = full.layers
        self.vlm = self.fresh(Size(depth, full.width, full.ff))
        self.optimisers = Optimisers(self.vlm, 0.015, 3e-3)
        if state:
            self.vlm.load_state_dict(state["model"])
        if state.get("optimisers"):
            self.optimisers.load_state_dict(state["optimisers"])
        self.ema = {k: v.clone() for k, v in (state.get("ema") or self.vlm.state_dict()).items()}
        self.step, self.spent = state.get("step", 0), state.get("cpu_seconds", 0.0)
        self.first, self.cpu, self.clock = self.step, time.process_time(), time.time()
        self.last = min(plan.until or plan.steps, plan.steps) if plan.minutes is None else 10**9
        self.loss = 0.0

    def features(self) -> np.ndarray:
        """The training scenes' features."""
        return data.features(data.TRAIN, self.work)

    def fresh(self, size: Size) -> Vlm:
        """A model of that size before training."""
        return Vlm(size, text.tokenizer().get_vocab_size(), float(np.asarray(self.pool[:50], np.float32).std()))

    def start(self) -> dict[str, Any]:
        """The state to go on from."""
        return torch.load(self.path, weights_only=True) if self.path.exists() else {}

    def batch(self, step: int) -> Batch:
        """The batch of that step."""
        return training_batch(self.pool, self.plan.batch, step, mix_at(step), self.plan.hide)

    def told(self) -> str:
        """Accuracies of the present weights."""
        return told(accuracy(self.vlm, self.work))

    def rate(self) -> float:
        """The learning rate factor: a short rise after every start, a plateau, a linear fall; 0 when time is over."""
        warm = (self.step - self.first + 1) / 30
        if self.plan.minutes is None:
            left = (self.plan.steps - self.step) / self.plan.cool
        else:
            left = 2 * (1 - (time.time() - self.clock) / 60 / self.plan.minutes)
        return self.plan.rate * max(0.0, min(1.0, warm, left))

    def update(self, batch: Batch, rate: float) -> None:
        """One step."""
        logits, targets = run(self.vlm, batch)
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        self.optimisers.step(max(0.01, rate))
        now, names = self.vlm.state_dict(), list(self.ema)
        pull = 1 - min(EMA, (self.step + 1) / (self.step + 10))
        torch._foreach_lerp_([self.ema[n] for n in names], [now[n] for n in names], pull)
        self.loss = loss.item() if self.step == self.first else 0.95 * self.loss + 0.05 * loss.item()
        self.step += 1

    def save(self) -> None:
        """Tell the accuracy of the mean weights and write the checkpoint."""
        live = {k: v.clone() for k, v in self.vlm.state_dict().items()}
        self.vlm.load_state_dict(self.ema)
        name = f"{self.path.stem} {self.step} [{self.vlm.size.layers} layers]"
        print(f"{name} exact match: {self.told()}", flush=True)
        self.vlm.load_state_dict(live)
        spent = self.spent + time.process_time() - self.cpu
        part = self.path.with_suffix(".part")
        torch.save({"model": live, "ema": self.ema, "optimisers": self.optimisers.state_dict(), "step": self.step,
                    "layers": self.vlm.size.layers, "cpu_seconds": spent}, part)  # fmt: skip
        part.replace(self.path)

    def go(self) -> None:
        """Train as planned, from the checkpoint on."""
        for batch in batches(self.batch, self.step, self.last):
            rate = self.rate()
            if rate <= 0:
                break
            self.update(batch, rate)
            if self.step % 25 == 0:
                print(f"{self.path.stem} {self.step} loss {self.loss:.4f} {time.time() - self.clock:.0f}s", flush=True)
            if self.step % 200 == 0:
                self.save()
        self.save()
