"""DyVTE's gates for the demo model: `python -m localvlm.models.demo.dyvte --work DIR [--scenes N]`.

DyVTE (arXiv 2411.19628): before each layer a small gate, Linear(2d, 4d) -> GELU -> Linear(4d, 2), looks at the mean of
the hidden rows of the text after the image and at the last of them; where "exit" wins, all image tokens leave the
remaining layers. It learns when they may: where over AGREE of the answer's tokens, fed as they should be, stay the most
likely ones when the layers from there on do not see the image. Answers here have a word or two, and a fifth of them is
guessed right without the image, which no gate can foresee: so "exit" must be SURE, by a constant that is added to the
bias of "stay". Before the first of LAYERS nothing but such guesses may exit. DIR holds the features that
`train --stage cache` made.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from . import data, export
from .frozen import AHEAD, ASKED, Asked, asked, seen_by, shipped, write
from .lm import MODEL, Vlm
from .tower import N_PATCHES
from .world import scene_rng

AGREE, SURE = 0.99, 0.98
HIDDEN = 4 * MODEL.width
LAYERS = range(4, MODEL.layers)
SCENES = 6  # at once
SIDE = len(AHEAD) + N_PATCHES


class Gates(nn.Module):
    """A gate before each of LAYERS."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(2 * MODEL.width, HIDDEN) for _ in LAYERS)
        self.down = nn.ModuleList(nn.Linear(HIDDEN, 2) for _ in LAYERS)

    def forward(self, seen: Tensor) -> Tensor:
        """(n, layers, 2 width) -> (n, layers, 2) logits of stay and exit."""
        out = [d(functional.gelu(u(seen[:, i]))) for i, (u, d) in enumerate(zip(self.up, self.down, strict=True))]
        return torch.stack(out, 1)


@dataclass
class Examples:
    """What the gates see, (n, layers, 2 width) float32; what they should say, (n, layers) int64; types of questions."""

    seen: Tensor
    exits: Tensor
    kinds: list[str]


@dataclass
class Laid:
    """Questions about some scenes, laid after their images: ids, owners and positions of all rows, and which rows of
    which scene hold each question, and predict its answer.
    """

    tokens: Tensor  # (batch, rows after the image)
    owner: Tensor  # (batch, rows)
    positions: Tensor  # (batch, rows)
    spans: list[tuple[int, slice, slice, str]]


def lay(questions: list[list[Asked]]) -> Laid:
    """Rows of a question see the prefix, the image and themselves."""
    longest = max(sum(len(a.prompt) + len(a.answer) - 1 for a in row) for row in questions)
    tokens = torch.zeros(len(questions), longest, dtype=torch.int64)
    owner = torch.zeros(len(questions), SIDE + longest, dtype=torch.int64)
    owner[:, SIDE:] = -1
    positions = torch.arange(SIDE + longest).repeat(len(questions), 1)
    spans = []
    for i, row in enumerate(questions):
        at = 0
        for number, a in enumerate(row, 1):
            ids = torch.tensor([*a.prompt, *a.answer[:-1]])
            end = at + len(ids)
            tokens[i, at:end], owner[i, SIDE + at : SIDE + end] = ids, number
            positions[i, SIDE + at : SIDE + end] = SIDE + torch.arange(len(ids))
            after = at + len(a.prompt)
            spans.append((i, slice(at, after), slice(after - 1, end), a.kind))
            at = end
    return Laid(tokens, owner, positions, spans)


@torch.no_grad()
def examples(vlm: Vlm, features: Tensor, questions: list[list[Asked]]) -> Examples:
    """One example a question."""
    laid = lay(questions)
    x = vlm.rows(torch.tensor(AHEAD), features, laid.tokens)
    text = torch.cat([torch.arange(len(AHEAD)), torch.arange(SIDE, x.shape[1])])
    turns, mask = vlm.turns[laid.positions].unsqueeze(2), seen_by(laid.owner)
    text_turns, text_mask = turns[:, text], seen_by(laid.owner[:, text])
    tails: list[Tensor] = []
    hidden: list[Tensor] = []
    for i, layer in enumerate(vlm.layers):
        if i in LAYERS:
            tails.append(x[:, text])
            hidden.append(x[:, SIDE:])
        if tails:
            n = len(tails)
            tail = layer(torch.cat(tails), text_turns.repeat(n, 1, 1, 1), text_mask.repeat(n, 1, 1, 1))
            tails = list(tail.chunk(n))
        x = layer(x, turns, mask)
    best = [vlm.output(vlm.norm(rows)).argmax(-1) for rows in (x[:, SIDE:], *(t[:, len(AHEAD) :] for t in tails))]
    seen, exits = [], []
    for i, prompt, answer, _ in laid.spans:
        seen.append(torch.stack([torch.cat([h[i, prompt].mean(0), h[i, prompt][-1]]) for h in hidden]))
        agree = torch.stack([(b[i, answer] == best[0][i, answer]).float().mean() for b in best[1:]])
        exits.append((agree > AGREE).long())
    return Examples(torch.stack(seen), torch.stack(exits), [s[-1] for s in laid.spans])


def gather(vlm: Vlm, split: data.Split, work: Path, first: int, count: int) -> Examples:
    """Examples of scenes `first`.. of a split, two questions of each type a scene."""
    pool, parts = data.features(split, work), []
    for start in range(first, first + count, SCENES):
        numbers = range(start, min(start + SCENES, first + count))
        questions = [asked(split.scene(n), scene_rng(split.stream, 31, n), (*ASKED, *ASKED[:-1])) for n in numbers]
        seen = torch.from_numpy(pool[numbers.start : numbers.stop].astype(np.float32))
        parts.append(examples(vlm, seen, questions))
        if (start - first) // SCENES % 20 == 0:
            print(f"{split.name} scene {start}, {time.process_time():.0f} s", flush=True)
    kinds = [kind for part in parts for kind in part.kinds]
    return Examples(torch.cat([p.seen for p in parts]), torch.cat([p.exits for p in parts]), kinds)


def train(found: Examples, epochs: int, batch: int = 256) -> Gates:
    """Gates fitted to examples by cross-entropy, then made SURE."""
    torch.manual_seed(1)
    gates = Gates()
    adam = torch.optim.AdamW(gates.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * (len(found.seen) // batch)
    falling = torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, steps)
    order = torch.Generator().manual_seed(2)
    for epoch in range(epochs):
        losses = []
        for picked in torch.randperm(len(found.seen), generator=order).split(batch)[: steps // epochs]:
            loss = functional.cross_entropy(gates(found.seen[picked]).flatten(0, 1), found.exits[picked].flatten())
            adam.zero_grad()
            loss.backward()
            adam.step()
            falling.step()
            losses.append(loss.item())
        print(f"epoch {epoch + 1} loss {np.mean(losses):.4f}, {time.process_time():.0f} s", flush=True)
    for down in gates.down:
        down.bias.data[0] += math.log(SURE / (1 - SURE))
    return gates


@torch.no_grad()
def told(gates: Gates, found: Examples) -> str:
    """On examples: how often each gate is right, where the image leaves, and how often the answer is then another."""
    exits = gates(found.seen).argmax(-1)
    right = (exits == found.exits).float().mean(0)
    never = torch.ones(len(exits), 1, dtype=torch.int64)
    at = torch.cat([exits, never], 1).argmax(1)
    same = torch.cat([found.exits, never], 1).gather(1, at[:, None])[:, 0].float()
    first = torch.cat([found.exits, never], 1).argmax(1)
    lines = [
        "gate right, %: " + " ".join(f"{100 * r:.1f}" for r in right),
        "may exit, %: " + " ".join(f"{100 * r:.1f}" for r in found.exits.float().mean(0)),
        f"same answer {100 * same.mean():.1f} %, layers with the image {(at.float() + LAYERS[0]).mean():.2f} of "
        f"{MODEL.layers}; fewest possible {(first.float() + LAYERS[0]).mean():.2f}",
    ]
    counts = Counter(found.kinds)
    for kind in counts:
        mine = torch.tensor([k == kind for k in found.kinds])
        lines.append(
            f"{kind}: same {100 * same[mine].mean():.1f} %, layers {(at[mine].float() + LAYERS[0]).mean():.2f}"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="dyvte", description="Train DyVTE's gates for the demo model.")
    parser.add_argument("--work", type=Path, required=True, help="where train.py cached features")
    parser.add_argument("--out", type=Path, default=export.HERE)
    parser.add_argument("--scenes", type=int, default=1200)
    parser.add_argument("--examined", type=int, default=100, help="validation scenes")
    parser.add_argument("--epochs", type=int, default=12)
    args = parser.parse_args(argv)
    vlm = shipped()
    found = gather(vlm, data.TRAIN, args.work, 0, args.scenes)
    torch.save(vars(found), args.work / "dyvte.examples.pt")
    gates = train(found, args.epochs)
    print(told(gates, gather(vlm, data.VALIDATION, args.work, 0, args.examined)), flush=True)
    tensors: dict[str, Tensor] = {}
    for i, (up, down) in enumerate(zip(gates.up, gates.down, strict=True)):
        for name, linear in (("up", up), ("down", down)):
            tensors |= {f"gate.{LAYERS[i]}.{name}.{part}": p for part, p in linear.named_parameters()}
    write(args.out / "model.dyvte.gguf", "dyvte", tensors)
    print(f"{time.process_time() / 60:.1f} CPU minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
