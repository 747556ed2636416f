"""Times by stage as stacked bars, in SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

__all__ = ["Bar", "bars"]

WIDTH, LEFT, RIGHT, ROW = 860, 270, 120, 24
"""Of the drawing, of the names, of the figures, and the height of a bar with its gap, in pixels."""
TOP, BOTTOM = 56, 34
_COLOURS = ("#9ecae1", "#4292c6", "#084594", "#969696", "#fdae6b", "#e6550d", "#8c2d04", "#54278f", "#006d2c")


@dataclass(frozen=True)
class Bar:
    """``parts``: stage -> its length; ``text``: what is said behind the bar."""

    name: str
    parts: dict[str, float]
    text: str


def bars(title: str, unit: str, found: Sequence[Bar]) -> str:
    """An SVG that stands alone: one bar a row, from 0, all in ``unit``."""
    longest = max((sum(bar.parts.values()) for bar in found), default=0.0) or 1.0
    stages = [s for s in dict.fromkeys(s for bar in found for s in bar.parts) if any(b.parts.get(s) for b in found)]
    colours = dict(zip(stages, _COLOURS, strict=False))
    height = TOP + ROW * len(found) + BOTTOM
    scale = (WIDTH - LEFT - RIGHT) / longest
    body = [
        f'<text x="8" y="20" font-weight="bold">{escape(title)}</text>',
        *_legend(colours),
        *(part for i, bar in enumerate(found) for part in _drawn(bar, TOP + ROW * i, scale, colours, unit)),
        *_axis(longest, scale, TOP + ROW * len(found), unit),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}" '
        f'role="img" font-family="system-ui, sans-serif" font-size="12"><title>{escape(title)}</title>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(body)}</svg>\n'
    )


def _legend(colours: dict[str, str]) -> Iterator[str]:
    x = 8.0
    for stage, colour in colours.items():
        yield f'<rect x="{x:.0f}" y="31" width="11" height="11" fill="{colour}"/>'
        yield f'<text x="{x + 15:.0f}" y="41">{escape(stage)}</text>'
        x += 32 + 6.4 * len(stage)


def _drawn(bar: Bar, y: int, scale: float, colours: dict[str, str], unit: str) -> Iterator[str]:
    yield f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(bar.name)}</text>'
    x = float(LEFT)
    for stage, length in bar.parts.items():
        if length > 0:
            said = escape(f"{stage}: {length:.2f} {unit}")
            yield (
                f'<rect x="{x:.1f}" y="{y + 3}" width="{length * scale:.1f}" height="{ROW - 7}" '
                f'fill="{colours[stage]}"><title>{said}</title></rect>'
            )
            x += length * scale
    yield f'<text x="{x + 6:.1f}" y="{y + 15}">{escape(bar.text)}</text>'


def _axis(longest: float, scale: float, y: int, unit: str) -> Iterator[str]:
    step = next(f * 10.0**e for e in range(-4, 7) for f in (1, 2, 5) if longest / (f * 10.0**e) <= 6)
    for i in range(int(longest / step) + 1):
        x = LEFT + i * step * scale
        yield f'<path d="M{x:.1f} {TOP}V{y}" stroke="#000" stroke-opacity=".12"/>'
        yield f'<text x="{x:.1f}" y="{y + 16}" text-anchor="middle">{i * step:g} {escape(unit)}</text>'
