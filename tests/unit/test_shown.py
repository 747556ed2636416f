"""The comparison of what a guide may be shown."""

from __future__ import annotations

import numpy as np
import pytest

from tests import shown


def test_tokens_that_were_not_seen_score_as_they_are_filled() -> None:
    scores, seen = np.array([4, 0, 0, 2], np.float32), np.array([0, 3], np.int32)
    features = np.array([[1, 0], [0.6, 0.8], [1, 0], [0, 1]], np.float32)
    boxes = np.array([[x, 0, x + 1, 1] for x in range(4)], np.float32)
    found = {fill: shown.filled(scores, seen, features, boxes, fill).tolist() for fill in shown.FILLS}
    assert found == {"like": pytest.approx([4, 1.6, 4, 2]), "place": [4, 4, 2, 2], "zero": [4, 0, 0, 2]}


def test_a_small_table(capsys: pytest.CaptureFixture[str]) -> None:
    shown.main(["--count", "2", "--shares", "0.5", "--keeps", "0.35", "--fills", "like", "zero"])
    lines = capsys.readouterr().out.splitlines()
    names = [line.split("  ")[0] for line in lines[1:]]
    assert names == ["all", "all, 0.35", "divprune 0.5", "divprune 0.5 like, 0.35", "divprune 0.5 zero, 0.35"]
    assert "+0.0 +- 0.0" in lines[1]
