"""A report as plain columns, and the cells that the page shares with them."""

from __future__ import annotations

from collections.abc import Sequence

from localvlm.evaluation.report import TIMED, Report, Row

__all__ = ["ABSENT", "as_text", "columns"]

ABSENT = "-"
"""What cannot be told."""
_STAGES = {
    "guide_encode": "guide looks",
    "guide_prefill": "guide reads",
    "guide_decode": "guide answers",
    "encode": "model looks",
    "select": "choice",
    "prefill": "model reads",
    "decode": "model answers",
}


def columns(report: Report) -> list[tuple[str, list[list[str]]]]:
    """(caption, rows) of the tables of a report, the first row of each its head: all questions, by type if there are
    several, and yes against no if that was asked; without times where these are left out.
    """
    rows = report.rows
    tables = [("All questions", [["method", *_HEAD], *([_name(r), *_cells(r)] for r in rows)])]
    if report.timings:
        head = ["ms", *(_STAGES[stage] for stage in TIMED), "all"]
        tables.append(("Time of a question by stage, in ms", [head, *([r.cell.name, *_times(r)] for r in rows)]))
    if kinds := list(rows[0].types):
        head = ["accuracy in %", *(f"{kind or 'no type'} ({rows[0].types[kind].n})" for kind in kinds)]
        by_type = ([r.cell.name, *(f"{100 * r.types[k].mean:.1f}" for k in kinds)] for r in rows)
        tables.append(("By type of question", [head, *by_type]))
    if rows[0].yes_no is not None:
        head = ["yes or no", "accuracy", "precision", "recall", "F1", "said yes", "neither"]
        tables.append(("Yes against no", [head, *([r.cell.name, *_detected(r)] for r in rows)]))
    return tables


_HEAD = ["keep", "accuracy", "95 %", "of unpruned", "floor-adj.", "kept", "mean", "GFLOPs", "share"]


def _name(row: Row) -> str:
    return f"{row.cell.method} ({row.how})" if row.how else row.cell.method


def _cells(row: Row) -> list[str]:
    accuracy, cost = row.accuracy, row.cost
    keep = ABSENT if row.cell.keep is None else f"{100 * row.cell.keep:.4g}%"
    return [
        keep if row.reached else f"min {100 * cost.share:.3g}%",
        f"{100 * accuracy.mean:.1f}",
        f"{100 * accuracy.low:.1f}..{100 * accuracy.high:.1f}",
        _percent(row.of_unpruned),
        _percent(row.floor_adjusted),
        f"{cost.kept:.1f}",
        f"{100 * cost.share:.1f}%",
        f"{cost.flops / 1e9:.3g}",
        f"{row.flops_share:.2f}",
    ]


def _times(row: Row) -> list[str]:
    ms = row.cost.ms
    return [*(f"{ms[stage]:.1f}" if ms[stage] else ABSENT for stage in TIMED), f"{sum(ms.values()):.0f}"]


def _detected(row: Row) -> list[str]:
    found = row.yes_no
    if found is None:
        return []
    shares = (found.accuracy, found.precision, found.recall, found.f1, found.yes)
    return [*map(_percent, shares), str(found.neither)]


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def as_text(report: Report) -> str:
    """All tables, the first column to the left and numbers to the right, and the notes."""
    blocks = ["\n".join(f"{name}: {value}" for name, value in report.facts.items())]
    blocks += [f"{caption}\n{_aligned(rows)}" for caption, rows in columns(report)]
    return "\n\n".join([*blocks, "\n".join(report.notes())]) + "\n"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = (cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True))
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
