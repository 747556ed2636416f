"""The comparison of answers with and without a draft finds what differs."""

from __future__ import annotations

from pathlib import Path

import pytest

from localvlm.engine.client import Engine as LlamaEngine
from tests import draft


def tally(name: str, **counts: int) -> draft.Tally:
    out = draft.Tally(name)
    for key, value in counts.items():
        setattr(out, key, value)
    return out


def test_what_is_missed_is_told() -> None:
    good = tally("good", questions=2, same=2, long=1, accepted=3, drafted=3)
    assert draft.misses([good, tally("bad", questions=3, same=2)]) == ["bad: 1 of 3 answers differ"]
    assert len(draft.misses([tally("empty")])) == 2
    assert "MISS" in str(tally("bad", questions=3, same=2))
    assert "100.0%" in str(good)


@pytest.mark.parametrize("family", draft.ZOO)
def test_answers_of_the_zoo_are_the_same(tmp_path: Path, family: str) -> None:
    with LlamaEngine() as engine:
        guides, own, wrong = draft.run_zoo(engine, tmp_path, family, 1, 3)
    assert guides.same == own.same == wrong.same == 3
    assert own.accepted == own.drafted > 0
    assert wrong.accepted < wrong.drafted
