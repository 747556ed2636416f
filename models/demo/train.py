"""Train the demo pair: `python -m localvlm.models.demo.train --stage STAGE --work DIR`.

The stages are render, tower, cache, guide and model, in that order, then likewise with "tiles-" before their names for
the tiled pair, which goes on from the plain one; each resumes from its checkpoint in DIR. CPU seconds spent are kept
in the checkpoints.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from . import data, fit, tiles, tiles_fit
from .optim import Optimisers
from .tower import N_PATCHES, WIDTH, Tower, losses

TOWER_STEPS, TOWER_BATCH = 700, 64
LM_STEPS = 4000
TILED_TOWER_STEPS = 770
STAGES = ("render", "tower", "cache", "guide", "model",
          "tiles-render", "tiles-tower", "tiles-cache", "tiles-guide", "tiles-model")  # fmt: skip


def schedule(step: int, total: int, warm: int = 50, cool: float = 0.4) -> float:
    """The learning rate factor: a short rise, a plateau, a linear fall over the last `cool` of the steps."""
    return max(0.01, min(1.0, (step + 1) / warm, (total - step) / (cool * total)))


def save(path: Path, **state: object) -> None:
    """Write a checkpoint whole or not at all."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def load_tower(path: Path, tower: Tower) -> Tower:
    """The trained tower."""
    tower.load_state_dict(torch.load(path, weights_only=True)["model"])
    return tower.eval()


def train_tower(work: Path, steps: int = TOWER_STEPS) -> None:
    """Train the tower on patch labels; half of every batch is crowded scenes."""
    torch.manual_seed(0)
    tower = Tower()
    optimisers = Optimisers(tower, 0.02, 2e-3)
    step, spent, path = 0, 0.0, work / "tower.pt"
    if path.exists():
        state = torch.load(path, weights_only=True)
        tower.load_state_dict(state["model"])
        optimisers.load_state_dict(state["optimisers"])
        step, spent = state["step"], state["cpu_seconds"]
    splits = [data.CROWDED, data.TRAIN]
    pixels = [data.pixels(s, work) for s in splits]
    start = time.process_time()
    while step < steps:
        rng = np.random.default_rng([7, step])
        images, rows, present = [], [], []
        for split, pool in zip(splits, pixels, strict=True):
            for i in np.sort(rng.choice(split.count, TOWER_BATCH // 2, replace=False)):
                images.append(pool[i])
                row, seen = data.labels(split.scene(int(i)))
                rows.append(row)
                present.append(seen)
        batch = torch.from_numpy(np.stack(images))
        out = tower.rows(batch)
        loss, stats = losses(tower, out, torch.from_numpy(np.stack(rows)), torch.from_numpy(np.stack(present)))
        loss.backward()
        optimisers.step(schedule(step, steps))
        step += 1
        if step % 20 == 0 or step == steps:
            told = " ".join(f"{k} {v:.3f}" for k, v in stats.items())
            used = spent + time.process_time() - start
            print(f"tower {step} loss {loss.item():.3f} {told} cpu {used:.0f}s", flush=True)
        if step % 100 == 0 or step == steps:
            save(path, model=tower.state_dict(), optimisers=optimisers.state_dict(), step=step,
                 cpu_seconds=spent + time.process_time() - start)  # fmt: skip


@torch.no_grad()
def cache(work: Path, tower: Tower, splits: Sequence[data.Split], scenes: int | None = None) -> None:
    """Write the tower's features of these scenes, as many as given of each, in half precision."""
    for split in splits:
        pool, path = data.pixels(split, work), work / f"{split.name}.features.npy"
        count = min(scenes or split.count, split.count)
        part = path.with_suffix(".part")
        views = split.shape[:-3]
        out = np.lib.format.open_memmap(part, "w+", np.float16, (count, *views, N_PATCHES, WIDTH))
        for i in range(0, count, 50):
            seen = torch.from_numpy(np.ascontiguousarray(pool[i : i + 50])).flatten(0, -4)
            out[i : i + 50] = tower(seen).unflatten(0, (-1, *views)).half().numpy()
        out.flush()
        part.rename(path)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="train", description="Train the demo pair.")
    parser.add_argument("--stage", required=True, choices=STAGES)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="steps in all")
    parser.add_argument("--cool", type=int, default=1000, help="guide, model: the last steps, with a falling rate")
    parser.add_argument("--until", type=int, help="guide, model: stop here, to go on later")
    parser.add_argument("--minutes", type=float, help="guide, model: train this long by the clock, instead of steps")
    parser.add_argument("--grow", action="store_true", help="model: go on with all its layers")
    parser.add_argument("--scenes", type=int, help="cache: this many training scenes alone, to start early")
    parser.add_argument("--batch", type=int, default=fit.BATCH, help="guide, model: images a step")
    parser.add_argument("--hide", type=float, default=0.0, help="guide, model: share of images without much ground")
    parser.add_argument("--rate", type=float, default=1.0, help="guide, model: times the usual learning rates")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage == "render":
        for split in (data.CROWDED, data.VALIDATION, data.TRAIN):
            data.render(split, args.work)
    elif args.stage == "tower":
        train_tower(args.work, args.steps or TOWER_STEPS)
    elif args.stage == "tiles-render":
        for split in (tiles.CROWDED, tiles.VALIDATION, tiles.TRAIN):
            data.render(split, args.work)
    elif args.stage == "tiles-tower":
        steps = args.steps or TILED_TOWER_STEPS
        tiles.train_tower(args.work, steps, lambda step: schedule(step, steps), save)
    elif args.stage == "cache":
        cache(args.work, load_tower(args.work / "tower.pt", Tower()), (data.VALIDATION, data.TRAIN), args.scenes)
    elif args.stage == "tiles-cache":
        tower = load_tower(args.work / "tiles-tower.pt", tiles.TiledTower())
        cache(args.work, tower, (tiles.VALIDATION, tiles.TRAIN), args.scenes)
    else:
        chosen = ("cool", "until", "minutes", "grow", "batch", "hide", "rate")
        fitting = tiles_fit.TiledFitting if args.stage.startswith("tiles-") else fit.Fitting
        options = {name: getattr(args, name) for name in chosen}
        plan = fit.Plan(args.stage.removeprefix("tiles-"), args.steps or LM_STEPS, **options)
        fitting(plan, args.work).go()
    return 0


if __name__ == "__main__":
    sys.exit(main())
