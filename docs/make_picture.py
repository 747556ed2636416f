"""Draws docs/picture.png: the example picture, where the guide looked, and what the model was shown.

python docs/make_picture.py [--question Q] [--keep R]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from localvlm import images
from localvlm.catalog import example_image, pair_named
from localvlm.pipeline import AskOptions, Pipeline
from localvlm.pruning import method_named

PANEL = 336
MARGIN, CAPTION = 16, 54
INK, PALE, HOT = (28, 28, 36), (246, 246, 244), np.array([255, 92, 0], np.float32)


def heat(picture: Image.Image, boxes: NDArray[np.float32], scores: NDArray[np.float32]) -> Image.Image:
    """The picture in grey under its scores, the highest fully orange."""
    grey = np.asarray(picture.convert("L").convert("RGB"), np.float32) * 0.35 + 150
    weight = np.zeros(grey.shape[:2], np.float32)
    for (x0, y0, x1, y1), share in zip(np.round(boxes).astype(int), scores / scores.max(), strict=True):
        weight[y0:y1, x0:x1] = share
    mixed = grey * (1 - weight[..., None]) + HOT * weight[..., None]
    return Image.fromarray(mixed.clip(0, 255).astype(np.uint8))


def shown(picture: Image.Image, boxes: NDArray[np.float32], kept: NDArray[np.int32]) -> Image.Image:
    """The picture with all but the kept tokens faded out."""
    out = Image.blend(picture, Image.new("RGB", picture.size, PALE), 0.93)
    for x0, y0, x1, y1 in np.round(boxes[kept]).astype(int):
        out.paste(picture.crop((x0, y0, x1, y1)), (x0, y0))
    return out


def main() -> None:
    """Runs the demo pair on the example picture and draws the three panels side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="What is written on the card?")
    parser.add_argument("--keep", type=float, default=0.09)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("picture.png"))
    args = parser.parse_args()
    picture = images.load(example_image())
    method = method_named(AskOptions().method)
    with Pipeline.open(pair_named("demo")) as pipeline:
        answer = pipeline.ask([picture], args.question, AskOptions(keep=args.keep))
        look = pipeline.look([picture], args.question)
        layout = pipeline.vlm("model").layout(*picture.size)
        scores = pipeline.saliency(look, method.aggregation or "sum", [layout])
    assert layout.boxes is not None
    image = Image.fromarray(picture.rgb)
    panels = (
        (image, f"“{args.question}”"),
        (heat(image, layout.boxes, scores), f"where the guide looks: “{look.answer.text.strip()}”"),
        (
            shown(image, layout.boxes, np.array(answer.kept_indices, np.int32)),
            f"what the model sees, {answer.tokens.kept} of {answer.tokens.image} tokens: “{answer.text}”",
        ),
    )
    sheet = Image.new("RGB", (3 * PANEL + 4 * MARGIN, PANEL + MARGIN + CAPTION), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, (panel, caption) in enumerate(panels):
        x = MARGIN + i * (PANEL + MARGIN)
        sheet.paste(panel.resize((PANEL, PANEL), Image.Resampling.LANCZOS), (x, MARGIN))
        pen.rectangle((x, MARGIN, x + PANEL - 1, MARGIN + PANEL - 1), outline=(200, 200, 200))
        pen.text((x + PANEL / 2, MARGIN + PANEL + CAPTION / 2), caption, font=font, fill=INK, anchor="mm")
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
