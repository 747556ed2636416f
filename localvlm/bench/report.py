"""What was measured, as a table, as JSON and as bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from localvlm.bench.bars import Bar, bars
from localvlm.bench.cases import PLAIN, STAGES, Case, Run
from localvlm.bench.start import Process

if TYPE_CHECKING:
    from localvlm.answers import Answer
    from localvlm.planning.choice import Choice

__all__ = ["Grown", "Report", "Row", "Started"]

_SHORT = {
    "guide_encode": "g.look",
    "guide_prefill": "g.read",
    "guide_decode": "g.say",
    "select": "choose",
    "encode": "look",
    "prefill": "read",
    "decode": "say",
}
_SPARE = 1.1
"""Ours may hold so many times what plain llama.cpp holds and the guide's files together."""
_FORCED = {
    "exit": "exit: the guide's answer was made final, by a threshold of 0",
    "no exit": "no exit: the guide's answer was never final, by a threshold over 1",
    "draft": "own answer replayed: the draft was the model's own answer to the same prompt",
    "plan": "default plan: what `localvlm ask` does by itself, told before the rounds; but for early exit",
    "tiles": "overview: a tile's price rose until kept tokens were of as few as --tiles says; so many are encoded",
}
_TURNS = "turns: answers stand in the conversation as one text of as many tokens, of which each prefills every row"
_ALWAYS = (
    "answers have one length and go on past their end",
    "choose: all that no other stage holds",
    "plain llama.cpp: the large model without the tap, its worker apart; all prompts are prefilled from nothing",
    "ratios: medians over pairs of one round",
)


@dataclass(frozen=True)
class Row:
    """A case and its runs, with plain's of the same rounds."""

    case: Case
    runs: tuple[Run, ...]
    plain: tuple[Run, ...]

    def median(self, figure: Callable[[Run], float]) -> float:
        return statistics.median(map(figure, self.runs))

    def ratio(self, figure: Callable[[Run], float]) -> float:
        """Median over rounds of plain's figure over this one's: how many times faster."""
        return statistics.median(figure(p) / figure(r) for p, r in zip(self.plain, self.runs, strict=True))

    @property
    def peak(self) -> int | None:
        """The most of all runs."""
        return max((run.peak for run in self.runs if run.peak is not None), default=None)

    def figures(self) -> dict[str, Any]:
        """As JSON holds them."""
        one = self.runs[0]
        return {
            **asdict(self.case),
            "ms": {stage: self.median(lambda r, s=stage: r.ms[s]) for stage in STAGES},  # type: ignore[misc]
            "first_ms": self.median(_first),
            "total_ms": self.median(_total),
            "first_ratio": self.ratio(_first),
            "ratio": self.ratio(_total),
            "tokens": {
                "image": one.image, "kept": one.kept, "prompt": one.prompt, "generated": one.generated,
                "drafted": one.drafted, "accepted": one.accepted,
            },
            "tiles": {"total": one.tiles, "encoded": one.encoded},
            "peak_bytes": self.peak,
            "runs": [asdict(run) for run in self.runs],
        }  # fmt: skip


@dataclass(frozen=True)
class Started:
    """Processes of one case, round by round."""

    name: str
    processes: tuple[Process, ...]


@dataclass(frozen=True)
class Grown:
    """Milliseconds as ``what`` grows to ``n``, plain's and ours by the name of the case; of turns, those of all up to
    the n-th. ``image``: image tokens; ``ratio``: medians over rounds of plain's over ours.
    """

    what: str
    n: int
    image: int
    plain: float
    ours: dict[str, float]
    ratio: dict[str, float]


@dataclass
class Report:
    """``facts``: name -> what it ran on, and with; ``choice``: the default plan; ``planned``: an answer by it;
    ``guide_bytes``: of the guide's files.
    """

    facts: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    started: list[Started] = field(default_factory=list)
    grown: list[Grown] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    choice: Choice | None = None
    planned: Answer | None = None
    guide_bytes: int = 0

    def notes(self) -> list[str]:
        """What was not left to the weights, and what figures mean."""
        forced = {part for row in self.rows for part in row.case.forced.split(", ") if part}
        told = [_TURNS] if any(one.what == "turns" for one in self.grown) else []
        return [text for part, text in _FORCED.items() if part in forced] + [*_ALWAYS, *told, *self.skipped]

    def as_json(self) -> str:
        return (
            json.dumps(
                {
                    "facts": self.facts,
                    "cases": [row.figures() for row in self.rows],
                    "plan": self._planned(),
                    "peaks": {where: self._memory(peaks) for where, peaks in self._peaks().items()},
                    "from_start": [asdict(one) for one in self.started],
                    "growth": [asdict(one) for one in self.grown],
                    "notes": self.notes(),
                },
                indent=1,
            )
            + "\n"
        )

    def _planned(self) -> dict[str, Any]:
        """What was predicted of the default plan, beside what it took; {} where none was measured."""
        row = next((row for row in self.rows if row.case.planned), None)
        if row is None or self.choice is None:
            return {}
        if self.choice.plan is None:
            return {"why": self.choice.why}
        measured = {**{s: row.median(lambda r, s=s: r.ms[s]) for s in STAGES}, "total": row.median(_total)}  # type: ignore[misc]
        knowing = None if self.planned is None else self.choice.knowing(self.planned)
        known = {} if knowing is None else {**knowing.ms, "total": knowing.total}
        return {
            **self.choice.figures(),
            "measured_ms": measured,
            "predicted_of_measured": self.choice.plan.total / measured["total"],
            "knowing_ms": known,
            "knowing_of_measured": known["total"] / measured["total"] if known else None,
            "ratio": row.ratio(_total),
        }

    def _peaks(self) -> dict[str, dict[str, int | None]]:
        """Name of a case -> the most bytes that its worker held, with all models loaded and from process start."""
        ours = {row.case.name: row.peak for row in self.rows if row.case.way in ("plain", "ours")}
        from_start = {
            one.name: max((process.peak for process in one.processes if process.peak is not None), default=None)
            for one in self.started
            if one.name in ours
        }
        return {"loaded": ours, "from_start": from_start}

    def _memory(self, peaks: dict[str, int | None]) -> dict[str, Any]:
        """Plain's peak, the highest of the others, and what it is wanted to be at most; {} if not known."""
        plain = peaks.get(PLAIN.name)
        ours = {name: peak for name, peak in peaks.items() if peak is not None and name != PLAIN.name}
        if plain is None or not ours:
            return {}
        name = max(ours, key=ours.__getitem__)
        return {
            "plain": plain,
            "ours": ours[name],
            "case": name,
            "at_most": round(_SPARE * (plain + self.guide_bytes)),
            "ratio": ours[name] / plain,
        }

    def as_svg(self) -> str:
        title = " - ".join(str(self.facts[name]) for name in ("what", "cpu") if name in self.facts)
        found = []
        for row in self.rows:
            parts = {_SHORT[s]: row.median(lambda r, s=s: r.ms[s]) / 1e3 for s in STAGES}  # type: ignore[misc]
            text = f"{row.median(_total) / 1e3:.2f} s"
            found.append(Bar(row.case.name, parts, text if row.case == PLAIN else f"{text}, {row.ratio(_total):.2f} x"))
        return bars(title, "s", found)

    def as_text(self) -> str:
        blocks = ["\n".join(f"{name}: {_said(value)}" for name, value in self.facts.items())]
        if self.rows:
            blocks.append(_aligned([_HEAD, *map(_cells, self.rows)]))
        if plan := self._planned():
            blocks.append(_plan_text(plan))
        if self.started:
            blocks.append("From process start\n" + _aligned(_start_cells(self.started)))
        told = {where: self._memory(peaks) for where, peaks in self._peaks().items()}
        blocks += [_memory_text(where, found) for where, found in told.items() if found]
        for what in dict.fromkeys(one.what for one in self.grown):
            grown = [one for one in self.grown if one.what == what]
            blocks.append(
                f"As {what} grow, in s{', all turns up to it' * (what == 'turns')}\n" + _aligned(_grown_cells(grown))
            )
        return "\n\n".join([*blocks, "\n".join(self.notes())]) + "\n"


def _first(run: Run) -> float:
    return run.first_ms


def _total(run: Run) -> float:
    return run.total_ms


_HEAD = ["s", *_SHORT.values(), "first", "last", "x first", "x last", "kept", "rows", "accepted", "tiles", "peak"]


def _cells(row: Row) -> list[str]:
    one, peak = row.runs[0], row.peak
    stages = [row.median(lambda r, s=stage: r.ms[s]) for stage in STAGES]  # type: ignore[misc]
    return [
        row.case.name,
        *(_seconds(ms) if ms else "-" for ms in stages),
        _seconds(row.median(_first)),
        _seconds(row.median(_total)),
        f"{row.ratio(_first):.2f}",
        f"{row.ratio(_total):.2f}",
        "-" if one.kept is None else f"{one.kept}/{one.image}",
        str(one.prompt),
        f"{one.accepted}/{one.drafted}" if one.drafted else "-",
        f"{one.encoded}/{one.tiles}",
        _bytes(peak),
    ]


def _memory_text(where: str, found: dict[str, Any]) -> str:
    rows = [
        ["plain llama.cpp", _bytes(found["plain"]), ""],
        [f"ours, {found['case']}", _bytes(found["ours"]), f"{found['ratio']:.2f} x"],
        ["wanted at most", _bytes(found["at_most"]), f"{found['at_most'] / found['plain']:.2f} x"],
    ]
    return f"Peak memory, {'from process start' if where == 'from_start' else 'models loaded'}\n{_aligned(rows)}"


def _plan_text(told: dict[str, Any]) -> str:
    if "why" in told:
        return f"default plan: as asked; {told['why']}"
    rows = [
        [what, *(_seconds(told[key].get(stage, 0.0)) for stage in (*STAGES, "total"))]
        for what, key in (("predicted", "predicted_ms"), ("knowing", "knowing_ms"), ("measured", "measured_ms"))
        if told[key]
    ]
    others = ", ".join(f"{name} {_seconds(ms)}" for name, ms in told["others_ms"].items())
    knowing = f", {told['knowing_of_measured']:.2f} knowing what the guide chose" if told["knowing_ms"] else ""
    return (
        f"default plan: {told['name']}; {told['ratio']:.2f} x plain, predicted {told['predicted_of_measured']:.2f} of "
        f"measured{knowing}; others predicted: {others}\n" + _aligned([["s", *_SHORT.values(), "last"], *rows])
    )


def _start_cells(started: Sequence[Started]) -> list[list[str]]:
    rows = [["s", "first", "end", "x first", "x end", "peak"]]
    for one in started:
        pairs = list(zip(started[0].processes, one.processes, strict=True))
        firsts = [(p.first, o.first) for p, o in pairs if p.first is not None and o.first is not None]
        peak = max((o.peak for _, o in pairs if o.peak is not None), default=None)
        rows.append(
            [
                one.name,
                f"{statistics.median(o for _, o in firsts):.2f}" if firsts else "-",
                f"{statistics.median(o.whole for _, o in pairs):.2f}",
                f"{statistics.median(p / o for p, o in firsts):.2f}" if firsts else "-",
                f"{statistics.median(p.whole / o.whole for p, o in pairs):.2f}",
                _bytes(peak),
            ]
        )
    return rows


def _grown_cells(grown: Sequence[Grown]) -> list[list[str]]:
    names = list(grown[0].ours)
    head = [grown[0].what, "image tokens", "plain", *(text for name in names for text in (name, "x"))]
    body = [
        [str(one.n), str(one.image), _seconds(one.plain)]
        + [text for name in names for text in (_seconds(one.ours[name]), f"{one.ratio[name]:.2f}")]
        for one in grown
    ]
    return [head, *body]


def _seconds(ms: float) -> str:
    return f"{ms / 1e3:.3f}" if ms < 1e4 else f"{ms / 1e3:.2f}"


def _bytes(n: int | None) -> str:
    return "-" if n is None else f"{n / 1e9:.2f} GB"


def _said(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([f"{first:<{widths[0]}}", *cells]).rstrip())
    return "\n".join(lines)
