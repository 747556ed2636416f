"""What ``python -m tests.cascade`` counts and compares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.cascade import FULL, GUIDE, Shown, best, curves, misses
from tests.kept import Kept


def shown(guide: list[int], full: list[int], pruned: list[int], scores: list[float]) -> Shown:
    n = len(guide)
    ones = np.ones(n)
    right = {GUIDE: guide, FULL: full, "35%": pruned, "9%": pruned}
    cost = {GUIDE: ones, FULL: 10 * ones, "35%": 4 * ones, "9%": ones}
    return Shown(np.array(["a", "b"] * (n // 2)), np.array(scores), np.array(scores), ones.astype(bool),
                 {k: np.array(v, bool) for k, v in right.items()}, cost)  # fmt: skip


def test_a_cascade_takes_the_guides_answer_where_it_exits():
    s = shown([1, 0, 1, 0], [1, 1, 1, 1], [0, 1, 0, 1], [0.9, 0.5, 0.8, 0.9])
    right, flops = s.cascade("35%", 0.8)
    assert right.tolist() == [True, True, True, False]
    assert flops.tolist() == [1, 5, 1, 1]
    s.whole[0] = False
    assert s.exited(0.8).tolist() == [False, False, True, True]
    assert s.exited(None).tolist() == [False] * 4
    assert s.cascade("35%", None)[0].tolist() == s.right["35%"].tolist()


def test_targets_are_missed_where_they_are():
    good = shown([1] * 60 + [0] * 40, [1] * 100, [1] * 100, [0.9] * 60 + [0.1] * 40)
    assert misses(good, 0.9) == []
    assert "wanted 40 %" in misses(good, 0.95)[0]
    bad = misses(good, 0.1)
    assert len(bad) == 3
    assert "60% exit" in bad[0]
    assert best(good, "35%").startswith("60% exit at 0.9000 with a loss of +0.00")
    pruned = shown([1] * 60 + [0] * 40, [1] * 100, [1] * 98 + [0] * 2, [0.9] * 60 + [0.1] * 40)
    assert misses(pruned, 0.9) == [], "pruning alone loses two points"
    assert len(misses(shown([0] * 60 + [0] * 40, [1] * 100, [1] * 98 + [0] * 2, [0.9] * 100), 0.9)) == 3
    one_kind = shown([1, 0] * 4 + [1] * 192, [1] * 200, [1] * 200, [0.9] * 200)
    assert [m.split()[0] for m in misses(one_kind, 0.5)] == ["cascade", "cascade"]
    assert curves(good)["both"][0].risk == 0.0
    assert curves(good)["both"][-1].risk == pytest.approx(0.4)


def test_answers_outlive_a_run_that_is_killed(tmp_path: Path) -> None:
    path, about = tmp_path / "a.jsonl", {"seed": 1, "of": (1, 2)}
    Kept(path, about).add({"right": True})
    Kept(path, about).add({"right": False})
    with path.open("a") as file:
        file.write('{"right": tr')
    kept = Kept(path, about)
    assert kept.found == [{"right": True}, {"right": False}]
    kept.add({"right": None})
    assert [e["right"] for e in Kept(path, about).found] == [True, False, None]
    with pytest.raises(SystemExit, match="other weights"):
        Kept(path, {"seed": 2, "of": (1, 2)})
