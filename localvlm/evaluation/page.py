"""A report as one HTML page without scripts or other files: curves of accuracy against cost, and all tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape

from localvlm.evaluation.chart import Point, Series, chart, swatch
from localvlm.evaluation.plan import BLIND, GUIDE, UNPRUNED
from localvlm.evaluation.report import Report, Row
from localvlm.evaluation.table import ABSENT, columns

__all__ = ["as_page"]

_STYLE = """
:root {
  --ink: #1c1c24; --faint: #5c5c66; --rule: #d8d8de; --paper: #fff;
  --c0: #0072b2; --c1: #d55e00; --c2: #00825f; --c3: #a8437f; --c4: #8a6d00; --c5: #5b4fc4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #ececf0; --faint: #a6a6b0; --rule: #3a3a44; --paper: #15151a;
    --c0: #56b4e9; --c1: #ff8c42; --c2: #2fc79a; --c3: #e58bbf; --c4: #e0c341; --c5: #a99cff;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 76rem; padding: 1rem;
  font: 1rem/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
}
h1 { font-size: 1.4rem; margin: .2rem 0 .6rem; }
h2 { font-size: 1.1rem; margin: 1.6rem 0 .4rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem .8rem; margin: 0; }
dt, .notes { color: var(--faint); }
dd { margin: 0; overflow-wrap: anywhere; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: 1rem; }
figure { margin: 1rem 0 0; }
figure svg { width: 100%; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
.grid { stroke: var(--rule); fill: none; }
.level { stroke: var(--faint); stroke-dasharray: 5 4; fill: none; }
.s { fill: currentColor; stroke: currentColor; }
.line { fill: none; stroke-width: 1.6; }
.bar { fill: none; stroke-width: 1; opacity: .6; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); }
.c3 { color: var(--c3); } .c4 { color: var(--c4); } .c5 { color: var(--c5); }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; list-style: none; margin: 0; padding: 0; }
.legend input { margin: 0 .35em 0 0; vertical-align: -.08em; accent-color: var(--faint); }
.swatch { width: .9em; height: .9em; margin-right: .35em; vertical-align: -.08em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; white-space: nowrap; font-size: .92rem; }
th, td { padding: .2rem .55rem; text-align: right; border-bottom: 1px solid var(--rule); }
th { font-weight: 600; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
"""
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>localvlm eval</title>
<style>{style}</style>
</head>
<body>
"""
_HIDDEN = "body:has(#m{n}:not(:checked)) .m{n} {{ display: none; }}\n"
"""A series is there where its box in the legend is ticked: many in one chart hide each other."""


def as_page(report: Report) -> str:
    """The page; only what it is made of is told, in the same order, so that the same report gives the same bytes."""
    series = [s for s in _series(report.rows, lambda _: 0.0) if s.points]
    body = [
        "<h1>Which image tokens a model needs</h1>",
        _facts(report),
        '<div class="charts">',
        _figure(
            report.rows,
            "Accuracy against image tokens kept",
            "image tokens kept, mean over the layers, % of all",
            lambda row: 100 * row.cost.share,
            guide=False,
        ),
        _figure(
            report.rows,
            "Accuracy against LLM FLOPs",
            "LLM FLOPs, the guide's counted in, % of unpruned",
            lambda row: 100 * row.flops_share,
            guide=True,
        ),
        "</div>",
        '<ul class="legend">',
        *(_entry(s) for s in series),
        "</ul>",
        *(_table(caption, rows) for caption, rows in columns(report)),
        '<ul class="notes">',
        *(f"<li>{escape(note)}</li>" for note in report.notes()),
        "</ul>",
    ]
    style = _STYLE + "".join(_HIDDEN.format(n=s.number) for s in series)
    return _HEAD.format(style=style) + "\n".join(body) + "\n</body>\n</html>\n"


def _entry(series: Series) -> str:
    """Of the legend."""
    box = f'<input type="checkbox" id="m{series.number}" checked>'
    return f"<li><label>{box}{swatch(series.number)}{escape(series.name)}</label></li>"


def _facts(report: Report) -> str:
    pairs = (f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in report.facts.items())
    return f"<dl>{''.join(pairs)}</dl>"


def _figure(rows: Sequence[Row], title: str, x_name: str, x: Callable[[Row], float], *, guide: bool) -> str:
    series = [s for s in _series(rows, x) if guide or s.name != GUIDE.method]
    levels = [(name, 100 * r.accuracy.mean) for r in rows for cell, name in _LEVELS if r.cell == cell]
    return f"<figure><figcaption>{escape(title)}</figcaption>{chart(title, x_name, series, levels)}</figure>"


_LEVELS = ((UNPRUNED, "unpruned"), (BLIND, "blind"))


def _series(rows: Sequence[Row], x: Callable[[Row], float]) -> Iterator[Series]:
    """One for each method; unpruned is a point of none, and blind a line alone."""
    by_method: dict[str, list[Row]] = {}
    for row in rows:
        if row.cell != BLIND:
            by_method.setdefault(row.cell.method, []).append(row)
    for number, (name, found) in enumerate(by_method.items()):
        yield Series(name, number, [_point(row, x(row)) for row in found])


def _point(row: Row, x: float) -> Point:
    a = row.accuracy
    mean, low, high = (100 * value for value in (a.mean, a.low, a.high))
    text = f"{row.cell.name}: {mean:.1f} % right ({low:.1f} to {high:.1f}), {row.flops_share:.2f} of the FLOPs"
    return Point(x, mean, low, high, text)


def _table(caption: str, rows: Sequence[Sequence[str]]) -> str:
    head, *body = rows
    top = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for first, *others in body:
        cells = "".join(f"<td>{'&#8211;' if cell == ABSENT else escape(cell)}</td>" for cell in others)
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<h2>{escape(caption)}</h2>\n<div class="wide" tabindex="0"><table>\n'
        f"<thead><tr>{top}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody></table></div>"
    )
