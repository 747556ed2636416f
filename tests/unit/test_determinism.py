"""Same seed, same files, same build, same ``--threads``: the same answer. One test a claim, on the demo pair."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from localvlm.answers import Answer, AskOptions
from localvlm.catalog import example_image, pair_named
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.errors import Interrupted
from localvlm.images import Image, load
from localvlm.pipeline import Pipeline
from tests.asking import picture

pytestmark = pytest.mark.usefixtures("native")
ONE = LoadOptions(threads=1)
QUESTIONS = ("What colour is the star?", "Describe the picture.", "How many shapes are there?")
GREEDY = AskOptions(max_tokens=12, exit_at=None)
SAMPLED = replace(GREEDY, temp=20.0, seed=7)


@contextmanager
def opened(load_options: LoadOptions = ONE) -> Iterator[Pipeline]:
    """The demo pair in a worker of its own."""
    with Engine() as engine, Pipeline(pair_named("demo"), engine, guide=load_options, model=load_options) as pipeline:
        yield pipeline


def told(answer: Answer) -> tuple[object, ...]:
    return answer.answer_ids, answer.kept_indices, answer.score, answer.answered_by, answer.text


def asked(pipeline: Pipeline, options: AskOptions = GREEDY) -> list[tuple[object, ...]]:
    shown = load(example_image())
    return [told(pipeline.ask([shown], question, options)) for question in QUESTIONS]


@pytest.fixture(scope="module")
def want(native: None) -> dict[str, list[tuple[object, ...]]]:
    with opened() as pipeline:
        return {"greedy": asked(pipeline), "sampled": asked(pipeline, SAMPLED)}


def test_a1_another_process_answers_alike(want) -> None:
    with opened() as pipeline:
        assert asked(pipeline) == want["greedy"]
        assert asked(pipeline, SAMPLED) == want["sampled"]


def test_a1_seeds_tell_sampled_answers_apart(want) -> None:
    assert want["sampled"] != want["greedy"]
    with opened() as pipeline:
        assert asked(pipeline, replace(SAMPLED, seed=8)) != want["sampled"]


def test_a1_what_was_asked_before_changes_nothing(want) -> None:
    with opened() as pipeline:
        for seed in range(3):
            pipeline.ask([Image(picture(120, 90, seed), "noise")], "What is it?", SAMPLED)
            shown = load(example_image())
            assert told(pipeline.ask([shown], QUESTIONS[seed], GREEDY)) == want["greedy"][seed]


def test_a1_a_cancel_changes_nothing(want) -> None:
    """In every stage of a question, then asked again."""
    shown = load(example_image())
    with opened() as pipeline:
        stages: list[str] = []
        pipeline.ask([shown], QUESTIONS[0], GREEDY, on_stage=stages.append)
        for stage in dict.fromkeys(stages):

            def stop(now: str, stage: str = stage) -> None:
                if now == stage:
                    pipeline.engine.cancel()

            with suppress(Interrupted):
                pipeline.ask([shown], QUESTIONS[1], GREEDY, on_stage=stop)
            assert told(pipeline.ask([shown], QUESTIONS[0], GREEDY)) == want["greedy"][0], stage


def test_a1_caches_change_nothing(want, tmp_path: Path) -> None:
    """Encoded pictures, and what was learned of drafts: first written, then read."""
    kept = replace(ONE, cache=str(tmp_path), image_cache=1 << 24)
    for _ in range(2):
        with opened(kept) as pipeline:
            assert asked(pipeline) == want["greedy"]
    assert any((tmp_path / "images").iterdir())


def test_a1_drafts_change_nothing(want) -> None:
    with opened() as pipeline:
        assert asked(pipeline, replace(GREEDY, draft=False)) == want["greedy"]


def test_a1_the_tap_changes_nothing() -> None:
    """Where nothing of it is needed: all tokens, a model without a guide, the tower as llama.cpp has it."""
    plain, alone = AskOptions(method="none", keep=None, max_tokens=12), replace(pair_named("demo"), guide=None)
    found = []
    for tap in (True, False):
        options = replace(ONE, tap=tap, stock_tower=True)
        with Engine() as engine, Pipeline(alone, engine, guide=options, model=options) as pipeline:
            found.append(asked(pipeline, plain))
    assert found[0] == found[1]


def test_a1_sessions_answer_as_single_questions(want) -> None:
    with opened() as pipeline, pipeline.session([load(example_image())], history=False) as session:
        assert [told(session.ask(question, GREEDY)) for question in QUESTIONS] == want["greedy"]


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2])
def test_a1_the_command_says_the_same_each_time(threads: int) -> None:
    command = [sys.executable, "-m", "localvlm", "ask", "--pair", "demo", "--threads", str(threads), "--json"]
    command += ["--temp", "1.5", "--seed", "11", "--max-tokens", "12", "example", QUESTIONS[1]]
    runs = [json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2)]
    assert runs[0]["answer"] == runs[1]["answer"] != ""
    assert runs[0]["tokens"] == runs[1]["tokens"]
