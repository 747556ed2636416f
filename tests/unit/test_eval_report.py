"""What outcomes come to: costs layer by layer, and a chart's geometry."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localvlm.cost import LlmShape
from localvlm.errors import UsageError
from localvlm.evaluation.chart import HEIGHT, WIDTH, Point, Series, chart
from localvlm.evaluation.data import Question
from localvlm.evaluation.plan import BLIND, GUIDE, UNPRUNED, Cell, cells
from localvlm.evaluation.report import Report, rows_of
from localvlm.evaluation.runner import Outcome
from localvlm.evaluation.table import as_text

SHAPE = LlmShape(blocks=(100, 100, 100, 100), head=10, width=8)
QUESTIONS = [Question(str(i), ("a.png",), "Q?", (answer,), "", "exact") for i, answer in enumerate(["a", "b"])]
ONE = Outcome("a", "stop", 40, ((0, 40),), 10, 1, 2, {"encode": 2.0, "prefill": 4.0})


def test_tokens_dropped_at_a_layer_are_paid_for_below_it():
    cell = Cell("random", 0.5)
    dropped = replace(ONE, steps=((0, 40), (1, 8)))
    results = [{UNPRUNED.name: ONE, BLIND.name: replace(ONE, steps=((0, 0),)), cell.name: dropped}] * 2
    row = rows_of([UNPRUNED, BLIND, cell], QUESTIONS, results, SHAPE, None)[2]
    assert (row.cost.kept, row.cost.mean_kept, row.cost.share) == (8, (40 + 3 * 8) / 4, 0.4)
    assert row.reached
    assert row.cost.flops == SHAPE.flops([50, 18, 18, 18], 1, 2)
    assert row.flops_share == SHAPE.flops([50, 18, 18, 18], 1, 2) / SHAPE.flops(50, 1, 2)
    late = [{**r, cell.name: replace(dropped, steps=((0, 40), (2, 8)))} for r in results]
    row = rows_of([UNPRUNED, BLIND, cell], QUESTIONS, late, SHAPE, None)[2]
    assert not row.reached
    assert "min 60%" in as_text(Report({}, [row], timings=True))


def test_where_the_picture_gives_nothing_that_is_said():
    results = [{UNPRUNED.name: replace(ONE, text="x"), BLIND.name: ONE}] * 2
    rows = rows_of([UNPRUNED, BLIND], QUESTIONS, results, SHAPE, None)
    assert [r.floor_adjusted for r in rows] == [r.of_unpruned for r in rows] == [None, None]
    text = as_text(Report({}, rows, timings=False))
    assert "floor-adjusted is not defined" in text
    assert "of unpruned is not defined" in text
    assert " ms" not in text


def test_the_plan_begins_with_what_others_are_measured_by():
    assert cells(["random"], [0.5], guide=False) == [UNPRUNED, BLIND, Cell("random", 0.5)]
    assert cells(["blind", "sgl", "none", "sgl"], [0.1, 0.5, 0.1], guide=True) == [
        UNPRUNED, BLIND, GUIDE, Cell("sgl", 0.5), Cell("sgl", 0.1),
    ]  # fmt: skip
    assert cells(["guide"], [0.5], guide=True) == [UNPRUNED, BLIND, GUIDE]
    for methods in (["sgl"], ["guide"], [""], ["random", "best"]):
        with pytest.raises(UsageError):
            cells(methods, [0.5], guide=False)


# ---- charts


@given(
    st.lists(st.tuples(st.floats(0, 150), st.floats(0, 100), st.floats(0, 30)), min_size=1, max_size=6),
    st.floats(0, 100),
    st.floats(0, 100),
)
def test_all_that_is_drawn_lies_within_the_chart(points, full, blind):
    series = [
        Series("a<b", i, [Point(x, y, max(0, y - e), min(100, y + e), "&")]) for i, (x, y, e) in enumerate(points)
    ]
    drawn = chart("T", "X", series, [("unpruned", full), ("blind", blind)])
    for name, value in re.findall(r' (c?[xy])="([-\d.]+)"', drawn):
        assert 0 <= float(value) <= (WIDTH if name.endswith("x") else HEIGHT)
    for x, y in re.findall(r"M([-\d.]+) ([-\d.]+)", drawn):
        assert 0 <= float(x) <= WIDTH
        assert 0 <= float(y) <= HEIGHT
    labels = [float(y) for y in re.findall(r'y="([\d.]+)">(?:unpruned|blind)', drawn)]
    assert abs(labels[0] - labels[1]) > 13.9
    assert "<b" not in drawn.replace("<bar", "")
