"""``python -m tests.budgets``: its table and its targets."""

from __future__ import annotations

import pytest

from tests.budgets import AUTO, CHOSEN, DEFAULT, FIXED, SHARES, Curve, choose_floors, curve_of, misses, table
from tests.scenes import Tally


def curve(auto: list[bool], fixed: list[bool], kept: int) -> Curve:
    types = ["count" if i % 4 else "read" for i in range(len(auto))]
    tally = Tally({AUTO: auto, DEFAULT: fixed}, types)
    return Curve(tally, {AUTO: [kept * (1 + (t == "count")) for t in types], DEFAULT: [50] * len(auto)})


def test_the_table_goes_from_few_tokens_to_many() -> None:
    lines = table(curve([True] * 8, [False] * 8, 20)).splitlines()
    assert [line[:12].strip() for line in lines[1:]] == [AUTO, DEFAULT]
    assert lines[1][12:].split()[:2] == ["35.0", "100.0"]
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


def entry(kind: str, need: int) -> dict:
    """A question of 100 tokens that is right from ``need`` tokens; a share of the mass lies in 40 times as many."""
    holds = {f"{s:g}": round(40 * s) for s in SHARES}
    counts = {round(100 * f) for f in FIXED} | set(holds.values())
    return {"type": kind, "kind": kind, "n": 100, "holds": holds, "right": {str(k): k >= need for k in counts}}


def test_floors_are_the_fewest_tokens_that_match_a_fixed_share() -> None:
    found = [entry("counting", 33), entry("reading", 7), entry("where", 20), entry("other", 90)]
    share, floors = choose_floors(found, 0.35)
    assert share == min(SHARES)
    assert floors == {"counting": 0.35, "reading": 0.05, "where": 0.05, "other": 0.05}
    curve = curve_of(found, floors, share)
    assert curve.kept[CHOSEN] == [35, 24, 24, 24]
    assert curve.tally.rows[CHOSEN] == curve.tally.rows["keep 0.35"] == [True, True, True, False]
