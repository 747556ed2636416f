"""A picture of how an answer came about: where the guide looked, what the model saw, who answered, and the time taken.

Knows pixels and answers: no engine, no files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
from numpy.typing import NDArray
from PIL import ImageDraw, ImageFont

from localvlm.heatmap import STAGE_BARS, heat_colours, heat_shares, owners

if TYPE_CHECKING:
    from localvlm.images import Image
    from localvlm.pipeline import Answer

__all__ = ["INK", "Panel", "draw_heat", "draw_kept", "explain", "panels"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

INK, FAINT, PAPER = (28, 28, 36), (110, 110, 118), (255, 255, 255)
LINE = (0, 0, 0)
SMALLEST, LARGEST = 480, 1280
"""Longest side of a panel in pixels; pictures are scaled to lie between."""
LEAST_BOX = 6
"""Pixels of the shortest side at which kept tokens are outlined one by one; smaller ones are outlined together."""
LONGEST_TEXT = 600
"""Characters of a question or an answer that are shown."""


@dataclass(frozen=True)
class Panel:
    """A drawn picture and what it shows."""

    picture: PIL.Image.Image
    caption: str


def explain(images: Sequence[Image], question: str, answer: Answer) -> PIL.Image.Image:
    """One sheet: the pictures, the saliency as a heat map, kept tokens outlined, who answered, scores, time per stage.

    Args:
        images: those that were asked about, in the same order.
        question: what was asked.
        answer: of :meth:`localvlm.pipeline.Pipeline.ask`.
    """
    rows = list(panels(images, answer))
    side = max((max(p.picture.size) for row in rows for p in row), default=SMALLEST)
    sheet = _Sheet(max(15, side // 36), max((len(row) for row in rows), default=1), side)
    sheet.write(question, FAINT)
    sheet.write(answer.text or "(no answer)", INK, 1.5)
    for fact in _facts(answer):
        sheet.write(fact, INK)
    for row in rows:
        sheet.row(row)
    sheet.bars([(name, answer.ms[stage], colour) for stage, (name, colour) in STAGE_BARS.items()])
    sheet.write(f"first token after {_duration(answer.ms['first_token'])}, all in {_duration(answer.ms['total'])}", INK)
    return sheet.finished()


def panels(images: Sequence[Image], answer: Answer) -> Iterator[list[Panel]]:
    """For each picture: itself, the saliency on it, and the tokens the model saw; of the last two, those there are.

    Pictures are scaled alike, so that the longest side of the largest lies between SMALLEST and LARGEST.
    """
    longest = max((max(image.size) for image in images), default=1)
    scale = min(max(longest, SMALLEST), max(SMALLEST, LARGEST // max(1, len(images)))) / longest
    counts = [layout.n_tokens for layout in answer.layouts]
    kept = np.array(answer.kept_indices, np.int32)
    peak = 0.0 if answer.saliency is None else float(answer.saliency.max(initial=0))
    for i, (image, (start, end)) in enumerate(zip(images, pairwise(np.cumsum([0, *counts]).tolist()), strict=True)):
        width, height = (max(1, round(side * scale)) for side in image.size)
        picture = PIL.Image.fromarray(image.rgb).resize((width, height), PIL.Image.Resampling.LANCZOS)
        name = "the picture" if len(images) == 1 else f"picture {i + 1} of {len(images)}"
        boxes = answer.layouts[i].boxes
        if boxes is None:
            yield [Panel(picture, f"{name}; where its {counts[i]} tokens lie is not known for this family")]
            continue
        row = [Panel(picture, name)]
        boxes = boxes * np.array([width / image.size[0], height / image.size[1]] * 2, np.float32)
        if answer.saliency is not None:
            row.append(
                Panel(
                    draw_heat(picture, boxes, answer.saliency[start:end], peak),
                    "where the guide looks: little (blue) to much (yellow)",
                )
            )
        if answer.answered_by == "model":
            here = kept[(kept >= start) & (kept < end)] - start
            shown = f"what the model sees: {len(here)} of {end - start} tokens"
            row.append(Panel(draw_kept(picture, boxes, here), shown))
        yield row


def draw_heat(picture: PIL.Image.Image, boxes: Float32, scores: Float32, peak: float = 0.0) -> PIL.Image.Image:
    """The picture in grey under its scores, dark blue for 0 to yellow for ``peak`` (the highest score, unless given).

    Brightness goes with the square root of the score, which tells small ones apart.

    Args:
        picture: RGB.
        boxes: (n, 4) x0, y0, x1, y1 in pixels of ``picture``; where boxes overlap, as those of an overview and of tiles
            do, the smallest is drawn, and empty ones are not.
        scores: (n,) non-negative.
        peak: of several pictures that are drawn alike.
    """
    owner = owners(picture.size[::-1], boxes, np.arange(len(boxes), dtype=np.int32))
    colours = heat_colours(heat_shares(scores, peak))
    grey = np.asarray(picture.convert("L"), np.float32)[..., None]
    lit = 0.7 * np.append(colours, [[255, 255, 255]], axis=0)[owner] + 0.3 * grey
    return PIL.Image.fromarray(lit.clip(0, 255).astype(np.uint8))


def draw_kept(picture: PIL.Image.Image, boxes: Float32, kept: Int32) -> PIL.Image.Image:
    """The picture with the kept tokens outlined and all that none of them shows faded out.

    Args:
        picture: RGB.
        boxes: (n, 4) x0, y0, x1, y1 in pixels of ``picture``.
        kept: indices of boxes; of overlapping ones the smallest is outlined.
    """
    owner = owners(picture.size[::-1], boxes, kept)
    faded = 236 + 0.06 * np.asarray(picture.convert("L").convert("RGB"), np.float32)
    pixels = np.where((owner >= 0)[..., None], np.asarray(picture), faded.clip(0, 255).astype(np.uint8))
    sides = boxes[kept, 2:] - boxes[kept, :2]
    seen = sides[(sides > 0).all(axis=1)]
    if len(seen) and seen.min() < LEAST_BOX:
        owner = np.minimum(owner, 0)
    edge = np.zeros(owner.shape, bool)
    edge[:, 1:] |= owner[:, 1:] != owner[:, :-1]
    edge[1:] |= owner[1:] != owner[:-1]
    edge[[0, -1]] |= owner[[0, -1]] >= 0
    edge[:, [0, -1]] |= owner[:, [0, -1]] >= 0
    for _ in range(max(picture.size) // 720):
        edge[1:] |= edge[:-1]
        edge[:, 1:] |= edge[:, :-1]
    pixels[edge] = LINE
    return PIL.Image.fromarray(pixels)


def _facts(answer: Answer) -> Iterator[str]:
    tokens = answer.tokens
    n_seen = tokens.kept if tokens.kept is not None or tokens.guide == tokens.image else tokens.guide
    seen = f"{tokens.image} image tokens" if n_seen is None else f"{n_seen} of {tokens.image} image tokens"
    keep = answer.keep if isinstance(answer.keep, str) else f"{answer.keep:g}"
    yield f"answered by the {answer.answered_by} · {seen} · method {answer.method}, keep {keep}"
    if len(answer.steps) > 1 and tokens.mean_kept is not None:
        left = ", ".join(f"{n} from layer {layer} on" for layer, n in answer.steps[1:])
        told = f"dropped before layer {answer.layer}" if answer.layer else left
        yield f"{told} · {tokens.mean_kept:.1f} tokens a layer on average"
    if answer.guide_text is not None and answer.answered_by != "guide":
        yield f"the guide's answer: {answer.guide_text}"
    if (score := answer.score) is not None:
        bar = "no early exit" if answer.threshold is None else f"exit from {answer.threshold:.3f}"
        parts = f"confidence {score.confidence:.3f} · consistency {score.consistency:.3f}"
        yield f"guide's score {score.combined:.3f}: {parts} · {bar}"
    if answer.saliency is None and answer.layouts:
        yield "no guide led the choice, so there is no heat map"


class _Sheet:
    """White paper that is filled from the top; ``unit`` is the height of its text in pixels."""

    def __init__(self, unit: int, columns: int, side: int) -> None:
        self.unit, self.side = unit, side
        self.width = columns * (side + unit) + unit
        self._blocks: list[tuple[int, int, PIL.Image.Image]] = []
        self._y = unit

    def write(self, text: str, colour: tuple[int, int, int], size: float = 1.0) -> None:
        """A paragraph over the whole width."""
        self._paste(self.unit, self._text(text, self.width - 2 * self.unit, colour, size))

    def row(self, row: Sequence[Panel]) -> None:
        """Panels beside each other with their captions below."""
        top = self._y = self._y + self.unit // 2
        below = []
        for column, panel in enumerate(row):
            x = self.unit + column * (self.side + self.unit)
            self._blocks.append((x, top, panel.picture))
            caption = self._text(panel.caption, self.side, FAINT)
            y = top + panel.picture.height + self.unit // 2
            self._blocks.append((x, y, caption))
            below.append(y + caption.height)
        self._y = max(below) + self.unit // 2

    def bars(self, times: Sequence[tuple[str, float, tuple[int, int, int]]]) -> None:
        """Milliseconds by name, as bars of their length."""
        total = sum(ms for _, ms, _ in times)
        if not total:
            return
        left, room = 9 * self.unit, self.width - 17 * self.unit
        for name, ms, colour in times:
            if ms < 1:
                continue
            line = PIL.Image.new("RGB", (self.width - 2 * self.unit, round(1.4 * self.unit)), PAPER)
            line.paste(self._text(name, left, INK))
            length = max(2, round(ms / total * room))
            line.paste(colour, (left, self.unit // 6, left + length, round(1.2 * self.unit)))
            line.paste(self._text(_duration(ms), 8 * self.unit, INK), (left + length + self.unit // 2, 0))
            self._paste(self.unit, line)

    def finished(self) -> PIL.Image.Image:
        """The sheet, as long as what is on it."""
        sheet = PIL.Image.new("RGB", (self.width, self._y + self.unit), PAPER)
        for x, y, block in self._blocks:
            sheet.paste(block, (x, y))
        return sheet

    def _paste(self, x: int, block: PIL.Image.Image) -> None:
        self._blocks.append((x, self._y, block))
        self._y += block.height

    def _text(self, text: str, width: int, colour: tuple[int, int, int], size: float = 1.0) -> PIL.Image.Image:
        font = ImageFont.load_default(self.unit * size)
        lines = _wrapped(_printable(text), font, width)
        step = round(1.4 * self.unit * size)
        block = PIL.Image.new("RGB", (width, step * len(lines)), PAPER)
        pen = ImageDraw.Draw(block)
        for i, line in enumerate(lines):
            pen.text((0, i * step), line, font=font, fill=colour)
        return block


def _printable(text: str) -> str:
    """On one line, without what cannot be drawn, cut at LONGEST_TEXT. Pillow's own font has no letters with accents."""
    plain = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = " ".join("".join(c if c.isprintable() else " " for c in plain).split())
    return text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " …"


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than ``width``, broken at spaces where a word fits on a line."""
    lines = [""]
    for word in text.split(" "):
        if lines[-1] and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] += f" {word}"
            continue
        if lines[-1]:
            lines.append("")
        for letter in word:
            if lines[-1] and font.getlength(lines[-1] + letter) > width:
                lines.append("")
            lines[-1] += letter
    return lines


def _duration(ms: float) -> str:
    return f"{ms / 1e3:.1f} s" if ms >= 1000 else f"{ms:.0f} ms"
