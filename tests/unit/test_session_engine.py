"""Conversations on llama.cpp: drafts change no answer, M-RoPE gets all tokens once, and a worker may die."""

from __future__ import annotations

from pathlib import Path

import pytest

from localvlm.engine.api import LoadOptions
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from tests import zoo
from tests.asking import picture
from tests.session import Free

QUESTIONS = ("what is the thing in red?", "where?", "what is in the corner?", "who?")
ONE = LoadOptions(threads=1)


def opened(folder: Path, family: str = "llava15", *, twins: bool = False) -> Pipeline:
    guide, model = (VlmFiles(m.model, m.mmproj) for m in zoo.pair(folder, family))
    return Pipeline.open(Pair("zoo", model if twins else guide, model), ONE)


def shown(side: int = 84) -> Image:
    return Image(picture(side, side), "noise")


def test_a_draft_changes_no_turn(tmp_path: Path) -> None:
    found = []
    with opened(tmp_path, twins=True) as pipeline:
        for draft in (False, None):
            with Free(pipeline, [shown()]) as session:
                answers = [session.ask(q, AskOptions("sgl", 0.5, 8, draft=draft)) for q in QUESTIONS]
            found.append([a.answer_ids for a in answers])
    assert sum(a.tokens.accepted for a in answers) > 0
    assert found[0] == found[1]


def test_rows_that_cannot_go_behind_text_are_prefilled_once_for_all(tmp_path: Path) -> None:
    with opened(tmp_path, "qwen25vl") as pipeline, Free(pipeline, [shown(252)]) as session:
        answers = [session.ask(q, AskOptions("sgl", 0.2, 4)) for q in QUESTIONS]
        n = answers[0].tokens.image
        assert answers[0].tokens.kept < n
        at = next(i for i, a in enumerate(answers) if a.tokens.kept == n)
        assert at > 0
        assert answers[at].ran[1] > n
        assert all(a.tokens.kept == n and a.ran[1] < n for a in answers[at + 1 :])


@pytest.mark.parametrize("history", [False, True])
def test_a_worker_that_died_is_replaced(tmp_path: Path, history: bool) -> None:
    with opened(tmp_path) as pipeline, pipeline.session([shown()], history=history) as session:
        options = AskOptions("sgl", 0.3, 4)
        session.ask(QUESTIONS[0], options)
        pipeline.engine.kill()
        again = session.ask(QUESTIONS[1], options)
        assert again.ran == (again.ran[0], again.tokens.prompt)
        assert len(session.turns) == 2
        if not history:
            assert pipeline.ask([shown()], QUESTIONS[1], options).answer_ids == again.answer_ids
