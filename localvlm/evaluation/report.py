"""What a run comes to: one row a cell, with its accuracy, its cost, and both against no pruning."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from localvlm.answers import STAGES
from localvlm.cost import LlmShape
from localvlm.evaluation.data import Question
from localvlm.evaluation.plan import BLIND, GUIDE, UNPRUNED, Cell
from localvlm.evaluation.runner import Outcome
from localvlm.evaluation.statistics import Accuracy, Detection, detection, floor_adjusted, mean_score, of_unpruned
from localvlm.pruning import mean_kept
from localvlm.scoring import RULES, said_yes

__all__ = ["TIMED", "Cost", "Report", "Row", "rows_of"]

TIMED = (*(s for s in STAGES if s.startswith("guide_")), "encode", "select", "prefill", "decode")
"""Stages whose time is told; loading is apart, as it is once for all questions."""


@dataclass(frozen=True)
class Cost:
    """Means over the questions.

    Attributes:
        image: image tokens before pruning.
        kept: those that enter the last layer.
        mean_kept: those of a layer, mean over the layers.
        model_flops, guide_flops: of the LLMs; the guide's are 0 where it is not needed.
        ms: by TIMED; 0 where the stage is not needed.
    """

    image: float
    kept: float
    mean_kept: float
    model_flops: float
    guide_flops: float
    ms: dict[str, float]

    @property
    def share(self) -> float:
        """Of the image tokens, those kept, as the mean over the layers."""
        return self.mean_kept / self.image if self.image else 0.0

    @property
    def flops(self) -> float:
        return self.model_flops + self.guide_flops


@dataclass(frozen=True)
class Row:
    """One cell of the plan over all questions.

    Attributes:
        of_unpruned: accuracy as a share of the unpruned one; None where that is 0.
        floor_adjusted: (accuracy - blind) / (unpruned - blind); None where the picture gives nothing.
        types: accuracy by type of question; empty where all are of one.
        yes_no: how yes and no were told apart, if any question asks for that.
        flops_share: LLM FLOPs, the guide's among them, as a share of the unpruned model's.
        reached: whether as few tokens were kept as were asked for; else ``cost.share`` is the least there is.
        how: what made the tokens fewer, where the method has several ways; each that a question took.
    """

    cell: Cell
    accuracy: Accuracy
    of_unpruned: float | None
    floor_adjusted: float | None
    types: dict[str, Accuracy]
    yes_no: Detection | None
    cost: Cost
    flops_share: float
    reached: bool
    how: str = ""


@dataclass(frozen=True)
class Report:
    """A whole run, to be told.

    Attributes:
        facts: what it was of, by name, in the order to be shown.
        timings: whether times are told; without them the same run tells the same, bit by bit.
    """

    facts: dict[str, str]
    rows: Sequence[Row]
    timings: bool

    def as_json(self) -> str:
        """One object in ASCII."""
        shown = [_as_dict(row, self.timings) for row in self.rows]
        return json.dumps({"run": self.facts, "rows": shown}, indent=1) + "\n"

    def notes(self) -> list[str]:
        """What a reader of the table has to know."""
        return [text for text, so in _NOTES if so(self)]


def rows_of(
    plan: Sequence[Cell],
    questions: Sequence[Question],
    results: Sequence[Mapping[str, Outcome]],
    model: LlmShape,
    guide: LlmShape | None,
) -> list[Row]:
    """The table, in the order of the plan. ``results`` has, for each question, the outcome of each cell by its name;
    ``guide`` may be None where no cell needs one.
    """
    scores = {cell: _scores(cell, questions, results) for cell in plan}
    costs = {cell: _cost(cell, results, model, guide) for cell in plan}
    full, blind = (mean_score(scores[cell]).mean for cell in (UNPRUNED, BLIND))
    rows = []
    for cell in plan:
        accuracy, cost = mean_score(scores[cell]), costs[cell]
        rows.append(
            Row(
                cell,
                accuracy,
                of_unpruned(accuracy.mean, full),
                floor_adjusted(accuracy.mean, blind, full),
                _by_type(questions, scores[cell]),
                _yes_no(cell, questions, results),
                cost,
                cost.flops / costs[UNPRUNED].flops,
                cell.keep is None or cell.fixed or cost.mean_kept <= cell.keep * cost.image + 0.5 + 1e-9,
                "; ".join(sorted({how for r in results if (how := r[cell.name].how)})),
            )
        )
    return rows


def _scores(cell: Cell, questions: Sequence[Question], results: Sequence[Mapping[str, Outcome]]) -> list[float]:
    return [RULES[q.rule](r[cell.name].text, q.answers) for q, r in zip(questions, results, strict=True)]


def _by_type(questions: Sequence[Question], scores: Sequence[float]) -> dict[str, Accuracy]:
    by_kind: dict[str, list[float]] = {kind: [] for kind in sorted({q.kind for q in questions})}
    for question, score in zip(questions, scores, strict=True):
        by_kind[question.kind].append(score)
    return {kind: mean_score(found) for kind, found in by_kind.items()} if len(by_kind) > 1 else {}


def _yes_no(cell: Cell, questions: Sequence[Question], results: Sequence[Mapping[str, Outcome]]) -> Detection | None:
    asked = [(q, r[cell.name].text) for q, r in zip(questions, results, strict=True) if q.rule == "yes-no"]
    if not asked:
        return None
    return detection([said_yes(text) for _, text in asked], [said_yes(q.answers[0]) is True for q, _ in asked])


def _cost(cell: Cell, results: Sequence[Mapping[str, Outcome]], model: LlmShape, guide: LlmShape | None) -> Cost:
    outcomes = [r[cell.name] for r in results]
    by_guide = cell == GUIDE
    needs_guide = by_guide or cell.aggregation is not None
    looks = [r[GUIDE.name] for r in results] if needs_guide else []
    shape = guide if by_guide and guide is not None else model
    return Cost(
        image=_mean(o.image for o in outcomes),
        kept=_mean(o.steps[-1][1] for o in outcomes),
        mean_kept=_mean(mean_kept(o.steps, shape.n_layer) for o in outcomes),
        model_flops=0.0 if by_guide else _mean(_flops(o, model) for o in outcomes),
        guide_flops=_mean(_flops(o, guide) for o in looks) if guide is not None else 0.0,
        ms={stage: _mean(o.ms.get(stage, 0.0) for o in outcomes) for stage in TIMED},
    )


def _kept(outcome: Outcome, n_layer: int) -> list[int]:
    """Image tokens in each layer."""
    ends = [*(layer for layer, _ in outcome.steps), n_layer]
    return [n for (_, n), (start, end) in zip(outcome.steps, pairwise(ends), strict=True) for _ in range(start, end)]


def _flops(outcome: Outcome, shape: LlmShape) -> int:
    rows = [outcome.rows + kept for kept in _kept(outcome, shape.n_layer)]
    return shape.flops(rows, outcome.fed, outcome.outputs)


def _mean(values: Iterable[float]) -> float:
    """Exactly rounded, and so the same in whatever order; 0 of nothing."""
    listed = list(values)
    return math.fsum(listed) / len(listed) if listed else 0.0


def _as_dict(row: Row, timings: bool) -> dict[str, Any]:
    found = asdict(row)
    found["name"], (found["method"], found["keep"]) = row.cell.name, found.pop("cell").values()
    found["cost"] |= {"share": row.cost.share, "flops": row.cost.flops}
    if not timings:
        del found["cost"]["ms"]
    return found


def _unguided(report: Report) -> bool:
    return all(row.cost.guide_flops == 0 for row in report.rows)


_NOTES: tuple[tuple[str, Callable[[Report], bool]], ...] = (
    ("none: unpruned; blind: no picture; guide: its own answer; accuracy: mean score, 95 % interval", lambda _: True),
    ("floor-adjusted: (accuracy - blind) / (unpruned - blind)", lambda r: r.rows[0].floor_adjusted is not None),
    ("floor-adjusted is not defined here: blind is no worse than unpruned", lambda r: r.rows[0].floor_adjusted is None),
    ("of unpruned is not defined here: unpruned gets nothing right", lambda r: r.rows[0].of_unpruned is None),
    ("kept: image tokens that enter the last layer; mean: share kept, over all layers", lambda _: True),
    (
        "FLOPs: of the LLMs, the guide's counted in, towers left out; share: of unpruned",
        lambda r: not _unguided(r),
    ),
    ("FLOPs: of the LLM, its tower left out; share: of unpruned", _unguided),
    (
        "min: the method cannot keep as few as asked; the row is of its fewest",
        lambda r: not all(x.reached for x in r.rows),
    ),
    ("ms: means; loading left out, drafts and early exit off, pictures encoded whole", lambda r: r.timings),
)
"""Notes, and when each is needed."""
