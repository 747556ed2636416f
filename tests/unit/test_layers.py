"""The table of layers counts rightly and finds what is missed; a staged prompt takes no more memory than allowed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from localvlm.cost import LlmShape
from tests import layer_table, layers
from tests.layer_table import PLAIN, Positions, Table, flops, misses

SHAPE = LlmShape(blocks=(100,) * 12, head=50, width=8)


def test_flops_of_two_halves_are_those_of_the_whole() -> None:
    for layer in range(12):
        assert flops(SHAPE, layer, 100, 100, 5) == SHAPE.flops(100, 5, 6)
    # 3 of 12 layers on 100 rows, 9 on 20: 2 per weight and row, 4 per channel, row and cell before it
    by_hand = 2 * 300 * 100 + 2 * 900 * 20 + 2 * 50 + 2 * 8 * (3 * 100 * 101 + 9 * 20 * 21)
    assert flops(SHAPE, 3, 100, 20, 0) == by_hand


def table(percent: dict[str, int]) -> Table:
    out = Table(n_layer=12)
    for name, right in percent.items():
        cell = PLAIN if name == "plain" else out.preset(name)
        for i in range(100):
            out.add(cell, i < right, 10 if cell == PLAIN else 4, 2.0 if cell == PLAIN else 1.0, cell[1])
    return out


def test_misses_are_the_paper_s_accuracies() -> None:
    good = {"plain": 97, "paper-64": 96, "paper-35": 94, "paper-9": 86}
    assert misses(table(good), None) == []
    assert [m.split(":")[0] for m in misses(table(good | {"paper-35": 93, "paper-9": 84}), None)] == [
        "paper-35",
        "paper-9",
    ]
    shown = str(table(good))
    assert "paper-9" in shown
    assert shown.count("0.40   0.50") == 3
    costly = table(good)
    costly.flops[costly.preset("paper-64")] = costly.flops[PLAIN]
    assert len(misses(costly, None)) == 1


def test_worse_true_positions_are_a_miss() -> None:
    half = [True, False] * 50
    found = Positions({0.2: (half, half), 0.05: ([False] * 100, half)})
    assert found.difference(0.2) == (0.0, 0.0)
    assert [m.split(":")[0] for m in misses(None, found)] == ["true positions at 5%"]
    assert "-50.0" in str(found)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="unused layers' memory goes back to the system on Linux alone")
def test_memory_of_the_paper_s_settings(tmp_path: Path) -> None:
    lines: list[str] = []
    assert layers.memories(tmp_path, lines.append) == 0
    assert len(lines) == 2 + len(layer_table.PAPER)
