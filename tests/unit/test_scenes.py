"""The demo pair answers, and its guide's attention is worth more than chance."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from localvlm import images
from localvlm.catalog import example_image, pair_named
from localvlm.engine.api import LoadOptions
from localvlm.pipeline import AskOptions, Pipeline
from tests import scenes


def test_the_question_of_the_readme_is_answered_right() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
    found = re.search(r'localvlm ask example "([^"]+)"', readme)
    assert found is not None
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=1)) as pipeline:
        answer = pipeline.ask([images.load(example_image())], found[1], AskOptions())
    assert scenes.normal(answer.text) == "yellow"
    assert answer.tokens.kept == 50


def test_recall_counts_things() -> None:
    truth = "red circle, blue card 42, green star"
    assert scenes.recall("green star, red circle", truth) == pytest.approx(2 / 3)
    assert scenes.recall("", truth) == 0


def test_differences_are_paired() -> None:
    tally = scenes.Tally({"a": [True] * 6 + [False] * 4, "b": [True] * 4 + [False] * 6}, ["x"] * 10)
    mean, half = tally.difference("a", "b")
    assert mean == pytest.approx(20)
    assert half == pytest.approx(26.13, abs=0.01)


@pytest.mark.slow
def test_a_small_table(tmp_path: Path) -> None:
    rows = [r for r in scenes.make(70, 5, tmp_path) if r["type"] != "describe"]
    tally = scenes.run(rows, tmp_path, threads=1)
    full = tally.percent("unpruned")
    default = AskOptions().method
    assert full >= 70
    assert tally.percent("blind") <= 45
    assert tally.percent(f"{default} 35%") >= full - 10
    assert tally.percent(f"{default} 9%") >= tally.percent("random 9%") + 15
    assert set(tally.types) == {"colour", "count", "exist", "read", "relation", "shape", "where"}
    assert "unpruned" in scenes.table(tally)
