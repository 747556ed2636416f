"""Draws docs/picture.png: the example picture, where the guide looked, and what the model was shown.

python docs/make_picture.py [--question Q] [--keep R]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from localvlm import explain, images
from localvlm.catalog import example_image, pair_named
from localvlm.pipeline import AskOptions, Pipeline

PANEL = 336
MARGIN, CAPTION = 16, 54


def main() -> None:
    """Runs the demo pair on the example picture and draws the three panels side by side."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--question", default="What is written on the card?")
    parser.add_argument("--keep", type=float, default=0.09)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("picture.png"))
    args = parser.parse_args()
    picture = images.load(example_image())
    with Pipeline.open(pair_named("demo")) as pipeline:
        answer = pipeline.ask([picture], args.question, AskOptions(keep=args.keep))
    [row] = explain.panels([picture], answer)
    captions = (
        f"“{args.question}”",
        f"where the guide looks: “{answer.guide_text}”",
        f"what the model sees, {answer.tokens.kept} of {answer.tokens.image} tokens: “{answer.text}”",
    )
    sheet = Image.new("RGB", (3 * PANEL + 4 * MARGIN, PANEL + MARGIN + CAPTION), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(15)
    for i, (panel, caption) in enumerate(zip(row, captions, strict=True)):
        x = MARGIN + i * (PANEL + MARGIN)
        sheet.paste(panel.picture.resize((PANEL, PANEL), Image.Resampling.LANCZOS), (x, MARGIN))
        pen.rectangle((x, MARGIN, x + PANEL - 1, MARGIN + PANEL - 1), outline=(200, 200, 200))
        pen.text((x + PANEL / 2, MARGIN + PANEL + CAPTION / 2), caption, font=font, fill=explain.INK, anchor="mm")
    sheet.save(args.out, optimize=True)


if __name__ == "__main__":
    main()
