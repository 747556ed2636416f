"""Accuracy against cost as SVG: plain shapes that a style sheet colours, every text escaped."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Point", "Series", "chart", "swatch"]

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 36, 62, 14, 44
"""Room around the plot for ticks, the axis' name and those of levels."""
LINE = 14
"""Height of a line of text."""
_MARKS: tuple[Callable[[float, float], str], ...] = (
    lambda x, y: f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"/>',
    lambda x, y: f'<rect x="{x - 3.6:.1f}" y="{y - 3.6:.1f}" width="7.2" height="7.2"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 4.8:.1f}l4.6 8.2h-9.2z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y - 5.2:.1f}l5.2 5.2l-5.2 5.2l-5.2 -5.2z"/>',
    lambda x, y: f'<path d="M{x:.1f} {y + 4.8:.1f}l4.6 -8.2h-9.2z"/>',
)
N_COLOURS = 6
"""With the marks, so many times their number of series can be told apart."""


@dataclass(frozen=True)
class Point:
    """``x``; ``y`` in percent with its interval; what is said of it."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Series:
    """Points of one method, joined from left to right; ``number`` counts from 0 and is the name of its class, "m0"."""

    name: str
    number: int
    points: Sequence[Point]


def chart(title: str, x_name: str, series: Sequence[Series], levels: Sequence[tuple[str, float]]) -> str:
    """An SVG of accuracies in percent.

    Args:
        title: for those who cannot see it.
        x_name: below the horizontal axis, which begins at 0 and is in percent.
        series: at least one point in all.
        levels: name and height of lines across the plot.
    """
    points = [p for s in series for p in s.points]
    heights = [*(y for p in points for y in (p.low, p.high)), *(y for _, y in levels)]
    axes = _Axes(max(100.0, *(p.x for p in points)), min(heights), max(heights))
    parts = [*axes.drawn(x_name), *axes.levels(levels)]
    for one in series:
        parts += axes.curve(one)
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"<title>{escape(title)}</title>{''.join(parts)}</svg>"
    )


def swatch(number: int) -> str:
    """The mark of a series, for a legend."""
    return f'<svg class="swatch {_classes(number)}" viewBox="0 0 12 12" aria-hidden="true">{_mark(number)(6, 6)}</svg>'


def _mark(number: int) -> Callable[[float, float], str]:
    return _MARKS[(number // N_COLOURS + number) % len(_MARKS)]


def _classes(number: int) -> str:
    return f"s c{number % N_COLOURS}"


class _Axes:
    """Percent on either axis to places in the drawing."""

    def __init__(self, right: float, low: float, high: float) -> None:
        self._xs = list(_ticks(0.0, right))
        self._ys = list(_ticks(low, high))

    def x(self, value: float) -> float:
        return LEFT + (value - self._xs[0]) / (self._xs[-1] - self._xs[0]) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self._ys[0]) / (self._ys[-1] - self._ys[0]) * (HEIGHT - TOP - BOTTOM)

    def drawn(self, x_name: str) -> Iterator[str]:
        for tick in self._ys:
            y = self.y(tick)
            yield f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>'
        for tick in self._xs:
            yield f'<text x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        middle = (LEFT + WIDTH - RIGHT) // 2
        yield f'<text x="{middle}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_name)}</text>'

    def levels(self, levels: Sequence[tuple[str, float]]) -> Iterator[str]:
        """Broken lines with their names at the right, from the highest down and never one on another."""
        free = 0.0
        for name, value in sorted(levels, key=lambda level: -level[1]):
            y = self.y(value)
            label = max(y + 4, free)
            free = label + LINE
            yield f'<path class="level" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
            yield f'<text x="{WIDTH - RIGHT + 6}" y="{label:.1f}">{escape(name)}</text>'

    def curve(self, series: Series) -> Iterator[str]:
        """The points of a series with their intervals, each telling its figures when pointed at."""
        points = sorted(series.points, key=lambda p: p.x)
        yield f'<g class="{_classes(series.number)} m{series.number}">'
        if len(points) > 1:
            joined = "L".join(f"{self.x(p.x):.1f} {self.y(p.y):.1f}" for p in points)
            yield f'<path class="line" d="M{joined}"/>'
        for p in points:
            x = self.x(p.x)
            bar = f'<path class="bar" d="M{x:.1f} {self.y(p.low):.1f}V{self.y(p.high):.1f}"/>'
            yield f"<g><title>{escape(p.text)}</title>{bar}{_mark(series.number)(x, self.y(p.y))}</g>"
        yield "</g>"


def _ticks(low: float, high: float) -> Iterator[float]:
    """Four to ten round numbers that enclose both ends."""
    span = max(high - low, 1.0)
    unit = 10.0 ** math.floor(math.log10(span))
    step = next(unit * f for f in (0.2, 0.5, 1, 2) if span / (unit * f) <= 6)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    for i in range(first, max(last, first + 1) + 1):
        yield round(i * step, 6)
