"""Fit what puts fewer rows in the places of the image tokens of the shipped model; tower, projector and LLM stay.

A sequence is one question: prefix, image rows as the question asks for them, question and answer. Every row has the
position that it has unpruned, as in localvlm's engine.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import data, text
from .data import GRID
from .fit import told
from .frozen import AHEAD, Asked, asked, shipped
from .lm import Vlm
from .optim import Optimisers
from .tower import N_PATCHES
from .train import save
from .world import scene_rng

SIDES = (2, 3, 4)  # of a region, in image tokens
KINDS = ("colour", "shape", "where", "read", "exist", "relation", "relation", "count", "count")
SCENES, QUESTIONS = 16, 3  # a step
CHUNK = 24  # sequences of about one length
SIDE = len(AHEAD) + N_PATCHES


@dataclass
class Batch:
    """Questions of about one length."""

    features: Tensor  # (batch, 144, tower width)
    words: Tensor  # (batch, most words) int64, -1 for padding
    tokens: Tensor  # (batch, rows after the image) int64
    prompt: Tensor  # (batch,) rows of the prompt among them
    targets: Tensor  # (batch, rows after the image) int64, text.IGNORE where there is no loss
    kinds: list[str]


class Compressor(nn.Module):
    """What is trained. At `layer`, if there is one, the LLM's rows are given once more."""

    layer: int | None = None

    def pooled(self, rows: Tensor, words: Tensor, used: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """(batch, n, width) rows, (n,) image tokens in whose places they stand, sorted.

        Args:
            rows: (batch, 144, width) of the projector.
            words: (batch, m, width) input embeddings of the question.
            used: (batch, m) bool, false for padding.
            side: of a region.
        """
        raise NotImplementedError

    def again(self, hidden: Tensor, rows: Tensor, prompt: Tensor, used: Tensor) -> Tensor:
        """(batch, n, width) for `hidden` rows of the image that enter `layer`, with those of the prompt."""
        raise NotImplementedError


def regions(rows: Tensor, side: int) -> Tensor:
    """(batch, 144, width) -> (batch, regions, side * side, width), both in raster order."""
    n = GRID // side
    grid = rows.unflatten(1, (n, side, n, side))
    return grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def centres(side: int) -> Tensor:
    """(regions,) the token at each region's centre, the upper left one of four."""
    at = torch.arange(GRID // side) * side + (side - 1) // 2
    return (at[:, None] * GRID + at).flatten()


def padded(rows: list[tuple[int, ...]], fill: int) -> Tensor:
    """(rows, longest) int64."""
    return nn.utils.rnn.pad_sequence([torch.tensor(r) for r in rows], batch_first=True, padding_value=fill)


def chunks(pool: np.ndarray, found: list[tuple[int, Asked]]) -> Iterator[Batch]:
    """Questions about scenes, by length."""
    found = sorted(found, key=lambda pair: len(pair[1].prompt) + len(pair[1].answer))
    for start in range(0, len(found), CHUNK):
        part = found[start : start + CHUNK]
        features = torch.from_numpy(np.stack([pool[n] for n, _ in part]).astype(np.float32))
        asks = [a for _, a in part]
        targets = [(*[text.IGNORE] * (len(a.prompt) - 1), *a.answer) for a in asks]
        yield Batch(
            features,
            padded([a.words for a in asks], -1),
            padded([(*a.prompt, *a.answer[:-1]) for a in asks], 0),
            torch.tensor([len(a.prompt) for a in asks]),
            padded(targets, text.IGNORE),
            [a.kind for a in asks],
        )


def run(vlm: Vlm, compressor: Compressor, batch: Batch, side: int) -> Tensor:
    """(batch, rows after the image, vocabulary) logits."""
    rows = vlm.project(batch.features)
    image, places = compressor.pooled(rows, vlm.embed(batch.words.clamp(0)), batch.words >= 0, side)
    size, after = len(rows), batch.tokens.shape[1]
    x = torch.cat([vlm.embed(torch.tensor(AHEAD)).expand(size, -1, -1), image, vlm.embed(batch.tokens)], 1)
    where = torch.cat([torch.arange(len(AHEAD)), len(AHEAD) + places, SIDE + torch.arange(after)])
    turns = vlm.turns[where].view(1, -1, 1, vlm.turns.shape[-1])
    mask = torch.tril(torch.ones(len(where), len(where), dtype=torch.bool))[None, None]
    first = len(AHEAD) + len(places)
    for i, layer in enumerate(vlm.layers):
        if i == compressor.layer:
            asks = torch.arange(after) < batch.prompt[:, None]
            image = compressor.again(x[:, len(AHEAD) : first], rows, x[:, first:], asks)
            x = torch.cat([x[:, : len(AHEAD)], image, x[:, first:]], 1)
        x = layer(x, turns, mask)
    return vlm.output(vlm.norm(x[:, first:]))


def questions(split: data.Split, step: int) -> list[tuple[int, Asked]]:
    """What is asked at that step."""
    rng = np.random.default_rng([41, step])
    out = []
    for n in np.sort(rng.choice(split.count, SCENES, replace=False)):
        kinds = [str(k) for k in rng.choice(KINDS, QUESTIONS)]
        if rng.random() < 0.05:
            kinds[0] = "describe"
        out += [(int(n), a) for a in asked(split.scene(int(n)), rng, kinds)]
    return out


@torch.no_grad()
def accuracy(vlm: Vlm, compressor: Compressor, work: Path, side: int, scenes: int) -> dict[str, float]:
    """Exact match (teacher-forced) by type on validation scenes."""
    pool, split = data.features(data.VALIDATION, work), data.VALIDATION
    found = [(n, a) for n in range(scenes) for a in asked(split.scene(n), scene_rng(split.stream, 9, n), KINDS)]
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for batch in chunks(pool, found):
        wrong = (run(vlm, compressor, batch, side).argmax(-1) != batch.targets) & (batch.targets != text.IGNORE)
        for kind, hit in zip(batch.kinds, (~wrong.any(1)).tolist(), strict=True):
            total[kind] += 1
            right[kind] += hit
    out = {kind: right[kind] / total[kind] for kind in total}
    return out | {"mean of types": float(np.mean(list(out.values())))}


def fit(compressor: Compressor, work: Path, steps: int, name: str, sides: tuple[int, ...] = SIDES) -> None:
    """Fit a compressor to answers, one of `sides` a step, from its checkpoint on; the rate rises shortly and falls over
    the second half.
    """
    vlm, pool, path = shipped(), data.features(data.TRAIN, work), work / f"{name}.pt"
    optimisers = Optimisers(compressor, 0.01, 2e-3)
    first, spent, mean = 0, -time.process_time(), 0.0
    if path.exists():
        state = torch.load(path, weights_only=True)
        compressor.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        first, spent = state["step"], spent + state["cpu_seconds"]
    for step in range(first, steps):
        side, total = sides[step % len(sides)], 0.0
        found = questions(data.TRAIN, step)
        for batch in chunks(pool, found):
            logits = run(vlm, compressor, batch, side)
            loss = functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
            loss = loss / sum(len(a.answer) for _, a in found)
            loss.backward()
            total += loss.item()
        optimisers.step(max(0.01, min(1.0, (step + 1) / 20, 2 * (1 - step / steps))))
        mean = total if step == first else 0.97 * mean + 0.03 * total
        if (step + 1) % 25 == 0:
            print(f"{name} {step + 1} loss {mean:.4f}, {spent + time.process_time():.0f} s", flush=True)
        if (step + 1) % 200 == 0 or step + 1 == steps:
            save(path, model=compressor.state_dict(), optimisers=optimisers.state_dict(), step=step + 1,
                 cpu_seconds=spent + time.process_time())  # fmt: skip
            for s in sides:
                scores = accuracy(vlm, compressor, work, s, 30)
                print(f"{name} {step + 1} side {s}: {told(scores)}", flush=True)
