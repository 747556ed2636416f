"""Token boxes against what the tower really sees there; see :mod:`tests.maps`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from localvlm.engine.client import Engine
from tests import maps, zoo


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_a_square_changes_tokens_that_show_it(name: str, engine: Engine, tmp_path: Path) -> None:
    scores = maps.check(engine, zoo.build(name, tmp_path), 6, maps.SIZES[2:4])
    few = {"transposed"}  # of 2 x 2 tokens hardly differs: it takes more squares to tell
    assert [s for s in maps.misses(scores) if s.name not in few] == []
    assert {s.name for s in scores} >= {"174x232", "288x162", "rolled", "transposed"}


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_forty_squares_at_each_aspect(name: str, engine: Engine, tmp_path: Path) -> None:
    assert maps.misses(maps.check(engine, zoo.build(name, tmp_path))) == []
