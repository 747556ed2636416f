"""``python -m tests.selection``: what it measures, and what it calls a miss."""

from __future__ import annotations

import pytest

from tests import selection


def test_every_method_is_measured(capsys):
    assert selection.main(["--n", "40", "--width", "8", "--keep", "6", "--rounds", "2"]) in (0, 1)
    told = capsys.readouterr().out.splitlines()[2:]
    assert [line.split()[0] for line in told if not line.startswith("MISSED")] == ["product", *selection.UNTRAINED]


@pytest.mark.parametrize(("scope", "tome", "missed"), [(2.9, 0.9, []), (3.1, 0.9, ["scope"]), (2.9, 1.1, ["tome"])])
def test_medians_are_held_against_the_product(monkeypatch, capsys, scope, tome, missed):
    seconds = {"product": [1.0, 1.0, 9.0], "scope": [scope, 0.1, 9.0], "tome": [tome, tome, 9.0]}
    monkeypatch.setattr(selection, "measured", lambda *_: seconds)
    assert selection.main(["--n", "40", "--width", "8"]) == bool(missed)
    out = capsys.readouterr().out
    assert [line.split()[1] for line in out.splitlines() if line.startswith("MISSED")] == missed
