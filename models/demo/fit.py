"""Fit a language model and its projector to cached features: batches, the curriculum, the loop, accuracy by type."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import data, text
from .lm import GUIDE, MODEL, Size, Vlm, grown
from .optim import Optimisers
from .questions import TYPES
from .tower import N_PATCHES
from .world import scene_rng

BUDGET = 256  # branch tokens an image
BATCH = 8  # images
SPLIT_LAYERS = 6  # the model starts this deep
EMA = 0.995
SIZES = {"guide": GUIDE, "model": MODEL}


@dataclass
class Batch:
    """A batch of images with their branches."""

    features: Tensor  # (batch, 144, tower width)
    tokens: Tensor  # (batch, BUDGET) int64
    targets: Tensor  # (batch, BUDGET) int64, text.IGNORE where there is no loss
    positions: Tensor  # (batch, rows) int64
    mask: Tensor  # (batch, rows, rows) bool
    branch: np.ndarray  # (batch, BUDGET) index of the branch, -1 for padding
    kinds: list[list[str]]  # type of every branch


def mix_at(step: int) -> dict[str, float]:
    """What is asked at that step: lists and plain look-ups first, the rest when these begin to be known."""
    if step >= 1000:  # colours and shapes are known by now
        return {
            "caption": 0.3, "describe": 0.5, "colour": 0.3, "shape": 0.3, "where": 0.8, "read": 0.8,
            "exist": 1.3, "relation": 2.2, "count": 1.8,
        }  # fmt: skip
    lists = max(0.5, 3.0 * (1 - step / 900))
    mix = {"caption": lists, "describe": 0.3 * lists + 0.2, "colour": 1.0, "shape": 1.0, "where": 1.0, "read": 1.2}
    if step >= 120:
        mix |= {"exist": 1.0, "relation": 1.5}
    if step >= 240:
        mix |= {"count": 1.5}
    return mix


def collate(features: np.ndarray, rows: list[list[tuple[list[int], list[int], str]]]) -> Batch:
    """Lay branches after their images. A branch sees the prefix, the image and itself; positions go on from there."""
    start = len(text.prefix()) + N_PATCHES
    size = (len(rows), BUDGET)
    tokens, targets = np.zeros(size, np.int64), np.full(size, text.IGNORE, np.int64)
    where, branch = np.full(size, start, np.int64), np.full(size, -1, np.int64)
    for i, row in enumerate(rows):
        at = 0
        for b, (inputs, outputs, _) in enumerate(row):
            end = at + len(inputs)
            tokens[i, at:end], targets[i, at:end], branch[i, at:end] = inputs, outputs, b
            where[i, at:end] = start + np.arange(len(inputs))
            at = end
    length = start + BUDGET
    owner = np.full((len(rows), length), -2, np.int64)
    owner[:, start:] = branch
    seen = (owner[:, None, :] == -2) | (owner[:, None, :] == owner[:, :, None])
    mask = seen & np.tril(np.ones((length, length), bool))
    positions = np.concatenate([np.broadcast_to(np.arange(start), (len(rows), start)), where], 1)
    return Batch(
        torch.from_numpy(features.astype(np.float32)), torch.from_numpy(tokens), torch.from_numpy(targets),
        torch.from_numpy(positions.copy()), torch.from_numpy(mask), branch, [[k for *_, k in r] for r in rows],
    )  # fmt: skip


def training_batch(pool: np.ndarray, size: int, step: int, mix: dict[str, float]) -> Batch:
    """The batch of that step, a pure function of its arguments."""
    rng = np.random.default_rng([11, size, step])
    picked = np.sort(rng.choice(len(pool), size, replace=False))
    rows = [text.branches(data.TRAIN.scene(int(i)), rng, mix, BUDGET) for i in picked]
    return collate(pool[picked], rows)


def batches(pool: np.ndarray, size: int, first: int, last: int) -> Iterator[Batch]:
    """Batches of steps first..last-1, made one ahead in a thread."""
    with ThreadPoolExecutor(1) as thread:

        def make(step: int) -> Batch:
            return training_batch(pool, size, step, mix_at(step))

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
def accuracy(vlm: Vlm, work: Path, images: int = 60, blind: bool = False) -> dict[str, float]:
    """Exact match by type on validation scenes, teacher-forced (right when every token of the answer comes first)."""
    pool = data.features(data.VALIDATION, work)
    right, asked = Counter(), Counter()
    for start in range(0, images, 20):
        rows = []
        for i in range(start, start + 20):
            rng, scene, row = scene_rng(data.VALIDATION.stream, 9, i), data.VALIDATION.scene(i), []
            for kind in (*TYPES, *TYPES, "describe"):
                turn = text.ask(scene, rng, kind)
                if turn:
                    row.append((*text.branch([turn]), kind))
            while sum(len(r[0]) for r in row) > BUDGET:
                row.pop(0)
            rows.append(row)
        shown = pool[(np.arange(start, start + 20) + (300 if blind else 0))]
        batch = collate(shown, rows)
        logits, targets = run(vlm, batch)
        hit = np.ones(batch.branch.shape, bool)
        hit[(batch.targets != text.IGNORE).numpy()] = (logits.argmax(-1) == targets).numpy()
        for i, kinds in enumerate(batch.kinds):
            for b, kind in enumerate(kinds):
                asked[kind] += 1
                right[kind] += int(hit[i][batch.branch[i] == b].all())
    out = {k: right[k] / asked[k] for k in asked}
    out["all"] = sum(right[t] for t in TYPES) / sum(asked[t] for t in TYPES)
    return out


def told(scores: dict[str, float]) -> str:
    """Accuracies on one line, in percent."""
    return " ".join(f"{k} {100 * v:.0f}" for k, v in scores.items())


def _checkpoint(path: Path) -> dict:
    return torch.load(path, weights_only=True) if path.exists() else {}


def fit(
    which: str, work: Path, steps: int, cool: int, until: int | None = None, grow: bool = False, size: int = BATCH
) -> None:
    """Train `guide` or `model` to step `until` of `steps`; the learning rate falls over the last `cool` steps."""
    torch.manual_seed(1)
    full, path = SIZES[which], work / f"{which}.pt"
    state = _checkpoint(path)
    until = min(until or steps, steps)
    depth = state.get("layers", SPLIT_LAYERS if which == "model" else full.layers)
    pool = data.features(data.TRAIN, work)
    vocabulary, scale = text.tokenizer().get_vocab_size(), float(np.asarray(pool[:50], np.float32).std())
    if grow and depth < full.layers:
        state |= {k: grown(state[k], full.layers, full) for k in ("model", "ema")} | {"optimisers": None}
        depth = full.layers
    vlm = Vlm(Size(depth, full.width, full.ff), vocabulary, scale)
    optimisers = Optimisers(vlm, 0.015, 3e-3)
    if state:
        vlm.load_state_dict(state["model"])
        if state["optimisers"]:
            optimisers.load_state_dict(state["optimisers"])
    ema = {k: v.clone() for k, v in (state.get("ema") or vlm.state_dict()).items()}
    step, spent, start, clock = state.get("step", 0), state.get("cpu_seconds", 0.0), time.process_time(), time.time()
    warm_from = step
    average = 0.0
    for batch in batches(pool, size, step, until):
        logits, targets = run(vlm, batch)
        loss = functional.cross_entropy(logits, targets)
        loss.backward()
        warm = min(1.0, (step - warm_from + 1) / 30)
        optimisers.step(max(0.01, min(warm, (steps - step) / cool)))
        names = list(ema)
        now = vlm.state_dict()
        torch._foreach_lerp_([ema[n] for n in names], [now[n] for n in names], 1 - min(EMA, (step + 1) / (step + 10)))
        step += 1
        average = loss.item() if step == warm_from + 1 else 0.95 * average + 0.05 * loss.item()
        if step % 25 == 0:
            print(f"{which} {step} loss {average:.4f} {time.time() - clock:.0f}s", flush=True)
        if step % 200 == 0 or step == until:
            live = {k: v.clone() for k, v in now.items()}
            vlm.load_state_dict(ema)
            print(f"{which} {step} [{depth} layers] exact match: {told(accuracy(vlm, work))}", flush=True)
            vlm.load_state_dict(live)
            part = path.with_suffix(".part")
            torch.save({"model": live, "ema": ema, "optimisers": optimisers.state_dict(), "step": step,
                        "layers": depth, "cpu_seconds": spent + time.process_time() - start}, part)  # fmt: skip
            part.replace(path)
