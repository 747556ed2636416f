"""``python -m tests.budgets``: its table and its targets."""

from __future__ import annotations

import pytest

from tests.budgets import AUTO, DEFAULT, Curve, misses, table
from tests.scenes import Tally


def curve(auto: list[bool], fixed: list[bool], kept: int) -> Curve:
    types = ["count" if i % 4 else "read" for i in range(len(auto))]
    tally = Tally({AUTO: auto, DEFAULT: fixed}, types)
    return Curve(tally, {AUTO: [kept * (1 + (t == "count")) for t in types], DEFAULT: [50] * len(auto)})


def test_the_table_goes_from_few_tokens_to_many() -> None:
    lines = table(curve([True] * 8, [False] * 8, 20)).splitlines()
    assert [line.split()[:2] for line in lines[1:]] == [AUTO.split(), DEFAULT.split()]
    assert lines[1].split()[2:4] == ["35.0", "100.0"]
    assert "( 40.0)" in lines[1]
    assert "( 20.0)" in lines[1]


@pytest.mark.parametrize(
    ("right", "kept", "words"),
    [(400, 20, []), (380, 20, ["5.0 points below"]), (400, 29, ["50.8 tokens"]), (397, 20, [])],
)
def test_what_is_missed(right: int, kept: int, words: list[str]) -> None:
    found = misses(curve([i < right for i in range(400)], [True] * 400, kept))
    assert len(found) == len(words)
    assert all(word in line for word, line in zip(words, found, strict=True))
