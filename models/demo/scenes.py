"""Draw the demo scenes, and write held-out sets of them with questions. Needs numpy and Pillow alone.

    python -m localvlm.models.demo.scenes [--tiles] --seed 1 --count 1000 --out DIR

writes `DIR/00000.png ...` and `DIR/data.jsonl` with `image`, `question`, `answer` and `type`, one question per
scene, the types in equal parts. The scenes come from the HELD_OUT stream (`world.Stream`); training never uses it.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if not __package__:  # run as a script from a checkout
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import models.demo

    __package__ = models.demo.__name__

from .questions import TILED_TYPES, TYPES, describe, question_for
from .world import CARD, SIDE, Scene, Stream, Thing, sample_scene, sample_tagged, scene_rng

__all__ = ["draw_scene", "write_set"]

SUPER = 2  # drawn this much larger, then averaged
RGB = {
    "red": (214, 36, 34), "green": (40, 158, 62), "blue": (38, 84, 214), "yellow": (245, 214, 34),
    "orange": (245, 134, 22), "purple": (126, 50, 178), "pink": (250, 140, 196), "black": (28, 28, 32),
}  # fmt: skip


def _turned(points: np.ndarray, degrees: float) -> np.ndarray:
    a = np.deg2rad(degrees)
    return points @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])


@lru_cache
def _outline(kind: str) -> np.ndarray:
    """The outline of a shape, (n, 2), inside the square [-1, 1]^2, y downwards."""
    t = np.linspace(0, 2 * np.pi, 49)[:-1]
    ring = np.stack([np.cos(t), np.sin(t)], 1)
    if kind == "circle":
        return ring * 0.92
    if kind == "square":
        return np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]]) * 0.82
    if kind == "triangle":
        return np.array([[0, -0.95], [1, 0.8], [-1, 0.8]])
    if kind == "diamond":
        return np.array([[0, -1.1], [0.8, 0], [0, 1.1], [-0.8, 0]])
    if kind == "cross":
        a, b = 0.34, 0.98
        return np.array(
            [[-a, -b], [a, -b], [a, -a], [b, -a], [b, a], [a, a], [a, b], [-a, b], [-a, a], [-b, a], [-b, -a], [-a, -a]]
        )
    if kind == "star":
        angle = np.arange(10) * np.pi / 5 - np.pi / 2
        radius = np.where(np.arange(10) % 2 == 0, 1.1, 0.45)
        return np.stack([np.cos(angle) * radius, np.sin(angle) * radius + 0.05], 1)
    if kind == "heart":
        y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
        return np.stack([np.sin(t) ** 3, -y / 16 - 0.1], 1)
    outer = ring[8:41] * 1.05  # the moon: the left part of a circle, less a smaller circle to its right
    start, end = np.arctan2(outer[-1, 1], outer[-1, 0] - 0.35), np.arctan2(outer[0, 1], outer[0, 0] - 0.35)
    s = np.linspace(start % (2 * np.pi), end % (2 * np.pi), 24)
    radius = np.hypot(outer[0, 0] - 0.35, outer[0, 1])
    return np.concatenate([outer, np.stack([0.35 + radius * np.cos(s), radius * np.sin(s)], 1)]) + np.array([0.25, 0.0])


def _background(rng: np.random.Generator) -> Image.Image:
    """A light ground with a soft gradient and grain, SIDE x SIDE."""
    ground = rng.uniform(222, 250, 3) + rng.normal(0, 6, (5, 5, 3)) + rng.normal(0, 3, (5, 5, 1))
    soft = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    grain = rng.integers(-4, 5, (SIDE // 2, SIDE // 2, 1)).repeat(2, 0).repeat(2, 1)
    return Image.fromarray(np.clip(np.asarray(soft, np.int16) + grain, 0, 255).astype(np.uint8))


def _shade(rng: np.random.Generator, colour: str) -> tuple[int, int, int]:
    r, g, b = (int(np.clip(c + d, 0, 255)) for c, d in zip(RGB[colour], rng.normal(0, 7, 3), strict=True))
    return r, g, b


@lru_cache
def _font(pixels: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(pixels)


def _card(thing: Thing, shade: tuple[int, int, int]) -> Image.Image:
    """The card, upright, at SUPER times its size: a coloured frame, white inside, dark text."""
    height = round(thing.size * SUPER)
    width = round(thing.size * 1.95 * SUPER)
    card = Image.new("RGBA", (width, height), (0, 0, 0, 0))
    pen = ImageDraw.Draw(card)
    pen.rounded_rectangle((0, 0, width - 1, height - 1), radius=height // 8, fill=shade)
    edge = 5 * SUPER
    pen.rectangle((edge, edge, width - 1 - edge, height - 1 - edge), fill=(252, 252, 250))
    font = _font(round(thing.size * 0.66) * SUPER)
    pen.text((width / 2, height / 2), thing.text.upper(), font=font, fill=(20, 20, 24), anchor="mm", stroke_width=1)
    return card.rotate(-thing.angle, Image.Resampling.BICUBIC, expand=True)


def draw_scene(scene: Scene) -> Image.Image:
    """The picture of a scene, RGB, SIDE x SIDE. A pure function of the scene."""
    rng = np.random.default_rng(scene.paint)
    image = _background(rng)
    for thing in scene.things:
        shade = _shade(rng, thing.colour)
        if thing.kind == CARD:
            layer = _card(thing, shade)
        else:
            half = round(thing.size * 0.75) * SUPER
            layer = Image.new("RGBA", (2 * half, 2 * half), (*shade, 0))
            outline = _turned(_outline(thing.kind), thing.angle) * (thing.size / 2 * SUPER)
            ImageDraw.Draw(layer).polygon([(half + x, half + y) for x, y in outline], fill=(*shade, 255))
        _paste(image, thing, layer.reduce(SUPER))
    for tag in scene.tags:  # as a card of twice the size looks from twice as far
        _paste(image, tag, _card(replace(tag, size=2 * tag.size), _shade(rng, tag.colour)).reduce(2 * SUPER))
    return image


def _paste(image: Image.Image, thing: Thing, layer: Image.Image) -> None:
    image.paste(layer, (round(thing.x - layer.width / 2), round(thing.y - layer.height / 2)), layer)


def write_set(out: Path, seed: int, count: int, with_describe: bool = False, tiles: bool = False) -> int:
    """Write `count` held-out scenes with a question each (and a 'describe' row each if asked), with tags if `tiles`;
    how many rows.
    """
    out.mkdir(parents=True, exist_ok=True)
    types, sample = (TILED_TYPES, sample_tagged) if tiles else (TYPES, sample_scene)
    rows = []
    for index in range(count):
        rng = scene_rng(Stream.HELD_OUT, seed, index)
        kind = types[index % len(types)]
        target = index // len(types)  # answers take turns, so that none is commoner by chance
        turn = None
        while turn is None:
            scene = sample(rng)
            turn = question_for(kind, scene, rng, target)
        name = f"{index:05d}.png"
        draw_scene(scene).save(out / name)
        turns = [turn, describe(scene, rng)] if with_describe else [turn]
        rows += [{"image": name, "question": t.question, "answer": t.answer, "type": t.type} for t in turns]
    (out / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return len(rows)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="scenes", description="Write held-out demo scenes with questions.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiles", action="store_true", help="scenes with tags, too small to read but in tiles")
    parser.add_argument("--describe", action="store_true", help="also ask for a description of every scene")
    args = parser.parse_args(argv)
    rows = write_set(args.out, args.seed, args.count, args.describe, args.tiles)
    print(f"{rows} questions in {args.out / 'data.jsonl'}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
