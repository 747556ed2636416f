"""What `python -m tests.session` compares, on few questions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import LoadOptions
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from tests import session, zoo
from tests.asking import picture


def test_scenes_have_as_many_questions_as_turns() -> None:
    (scene,) = session.held_out(1, 3, 20)
    assert len(scene.asked) == 20
    assert len({question for question, _ in scene.asked}) > 10
    assert scene.image.size == (384, 384)


@pytest.mark.parametrize("layer", [0, 1])
def test_independent_turns_are_runs_of_their_own(tmp_path: Path, layer: int) -> None:
    files = [VlmFiles(m.model, m.mmproj) for m in zoo.pair(tmp_path)]
    shown = [Image(picture(seed=s), "noise") for s in (1, 2)]
    with Pipeline.open(Pair("zoo", *files), LoadOptions(threads=1)) as pipeline:
        options = AskOptions("sgl", 0.3, 4, layer=layer)
        assert session.same(pipeline, shown, ["what?", "where?"], options) == (4, 4)


def test_a_conversation_of_the_zoo_never_has_more_rows_than_plain(tmp_path: Path) -> None:
    """Of its model; plain here is the same model with all image tokens."""
    files = [VlmFiles(m.model, m.mmproj) for m in zoo.pair(tmp_path)]
    scene = session.Scene(Image(picture(), "noise"), tuple((f"where is {i}?", "") for i in range(4)))
    with Pipeline.open(Pair("zoo", *files), LoadOptions(threads=1)) as pipeline:
        made = session.modes(pipeline, 0.3, 4)
        ran = {}
        for name in ("plain", "history", "whatever it costs"):
            make, options = made[name]
            answers = session.converse(lambda make=make: make(scene.image), scene, options, 4)
            ran[name] = np.cumsum([a.ran[1] for a in answers])
    assert (ran["history"] <= ran["plain"]).all()
    assert (ran["whatever it costs"] <= ran["plain"]).all()


def test_what_is_missed_is_told(capsys) -> None:
    good = dict.fromkeys(session.TURNS, 1.02)
    assert session.print_times({"history": good}) == []
    assert session.print_times({"history": good | {20: 1.04}}) == ["history: 1.04 of plain's time at turn 20"]
    rows = {"plain": np.full((20, 3), 10.0), "history": np.full((20, 3), 10.0)}
    assert session.print_rows(rows, 1, 0.2) == []
    rows["history"][3, 1] = 11.0
    assert session.print_rows(rows, 1, 0.2) == ["history: more rows of the model than plain at turn 4"]
    assert "turn 20" in capsys.readouterr().out
