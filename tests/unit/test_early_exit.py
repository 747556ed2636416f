"""When the guide's answer is final, and what that saves."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.calibration import Calibration
from localvlm.early_exit import Score, confidence, consistency, exits
from localvlm.engine.api import ImagePart, LoadOptions, Message, TextPart
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import ContextOverflow, EngineCrashed, ModelNotFound, UsageError
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from tests import zoo
from tests.unit.cli_help import GUIDE_SAYS, MODEL_SAYS

PAIR = Pair("fake", VlmFiles(Path("guide.gguf"), Path("g.gguf")), VlmFiles(Path("model.gguf"), Path("m.gguf")))
PICTURE = Image(np.zeros((30, 40, 3), np.uint8), "black")
SURE = 1 / (1 + 257 * np.exp(-10))
"""Probability that the fake engine's logits give to each byte of an answer it agrees with."""


def ask(guide: Script = Script("red"), model: Script = Script("dark red"), **options):
    engine = FakeEngine({"guide": guide, "model": model})
    said: list[str] = []
    with Pipeline.open(PAIR, engine=engine) as pipeline:
        answer = pipeline.ask([PICTURE], "What?", AskOptions(**options), said.append)
    assert "".join(said) == answer.text
    return answer, [v.info.name for v in engine.loaded]


# ---- arrays


def test_confidence_is_the_geometric_mean_of_the_tokens():
    p = np.array([0.5, 0.25, 0.9])
    assert confidence(np.log(p).astype(np.float32)) == pytest.approx(p.prod() ** (1 / 3), rel=1e-6)
    assert confidence(np.full(400, -0.7, np.float32)) == pytest.approx(np.exp(-0.7), rel=1e-6)
    assert confidence(np.empty(0, np.float32)) == 0.0


def test_consistency_is_the_geometric_mean_of_a_softmax():
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=(5, 11)) * 3 + 80).astype(np.float32)
    ids = rng.integers(0, 11, 5).astype(np.int32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert consistency(logits, ids) == pytest.approx(p[np.arange(5), ids].prod() ** 0.2, rel=1e-9)
    assert consistency(np.empty((0, 11), np.float32), ids[:0]) == 0.0
    assert consistency(np.array([[1e4, -1e4]], np.float32), np.array([1], np.int32)) == 0.0


def test_who_exits():
    score = Score(0.9, 0.5)
    assert score.combined == pytest.approx(0.7)
    assert exits(score, score.combined, "stop")
    assert exits(score, 0.0, "stop")
    assert not exits(score, 0.71, "stop")
    assert not exits(score, None, "stop")
    assert not exits(score, 0.0, "length")


# ---- the pipeline


def test_an_exit_saves_the_models_load_and_encode():
    answer, loaded = ask(exit_at=0.9)
    assert (answer.text, answer.answered_by, loaded) == ("red", "guide", ["guide"])
    assert (answer.tokens.image, answer.tokens.kept, answer.tokens.generated) == (144, None, 3)
    assert answer.kept_indices == ()
    assert bytes(answer.answer_ids) == b"red"
    assert answer.ms["encode"] == answer.ms["prefill"] == answer.ms["decode"] == 0
    assert answer.score is not None
    assert answer.score.confidence == pytest.approx(np.exp(-0.1), rel=1e-5)
    assert answer.score.consistency == pytest.approx(SURE, rel=1e-5)


def test_a_model_that_is_loaded_stays_and_is_not_run():
    engine = FakeEngine({"guide": Script("red"), "model": Script("dark red", crash_at=4)})
    with Pipeline.open(PAIR, engine=engine) as pipeline:
        assert pipeline.ask([PICTURE], "What?", AskOptions(max_tokens=1, method="none")).text == "d"
        assert pipeline.ask([PICTURE], "What?", AskOptions(exit_at=0.0)).text == "red"
        assert len(engine.loaded) == 2
        with pytest.raises(EngineCrashed):
            pipeline.ask([PICTURE], "What?", AskOptions())


def test_below_the_threshold_the_model_answers_from_the_guides_tokens():
    want, _ = ask()
    answer, loaded = ask(exit_at=0.96)
    assert (answer.text, answer.answered_by, loaded) == ("dark red", "model", ["guide", "model"])
    assert answer.kept_indices == want.kept_indices
    assert answer.score is not None
    assert (answer.threshold, want.threshold, want.score) == (0.96, None, None)  # nothing to compare with, no score


def test_an_answer_that_changes_when_pruned_is_not_consistent():
    answer, _ = ask(Script("red", pruned_answer="tin"), exit_at=0.9)
    assert answer.answered_by == "model"
    assert answer.score is not None
    assert answer.score.confidence == pytest.approx(np.exp(-0.1), rel=1e-5)
    assert answer.score.consistency < 1e-3


def test_an_answer_cut_off_is_never_final():
    for options in ({"guide_max_tokens": 2}, {"max_tokens": 2}):
        answer, _ = ask(exit_at=0.0, **options)
        assert (answer.answered_by, answer.guide_text) == ("model", "re")
        assert answer.score is not None
    assert ask(exit_at=0.0, guide_max_tokens=3)[0].answered_by == "guide"


def test_methods_without_a_guide_exit_only_if_asked_to():
    answer, loaded = ask(method="grid")
    assert (answer.score, loaded) == (None, ["model"])
    answer, loaded = ask(method="grid", exit_at=0.5)
    assert (answer.answered_by, loaded) == ("guide", ["guide"])
    answer, _ = ask(method="grid", exit_at=1.0)
    assert answer.kept_indices == ask(method="grid")[0].kept_indices
    assert ask(keep=None, exit_at=0.5)[0].answered_by == "guide"
    assert ask(keep=None, exit_at=1.0)[0].tokens.kept == 144


def test_without_a_guide_there_is_no_exit():
    with Pipeline.open(replace(PAIR, guide=None), engine=FakeEngine()) as pipeline:
        with pytest.raises(UsageError, match="early exit needs a guide"):
            pipeline.ask([PICTURE], "What?", AskOptions(method="none", exit_at=0.5))
        assert pipeline.ask([], "What?", AskOptions(exit_at=0.5)).answered_by == "model"


def test_a_model_too_small_for_the_question_matters_only_without_an_exit():
    small = Script("dark red", n_ctx=60)
    assert ask(model=small, exit_at=0.9)[0].answered_by == "guide"
    with pytest.raises(ContextOverflow, match="the model's context"):
        ask(model=small, exit_at=1.0)
    with pytest.raises(ContextOverflow, match="the guide's context"):
        ask(Script("red", n_ctx=60), exit_at=0.9)
    missing = Script(load_error=ModelNotFound("gone"))
    assert ask(model=missing, exit_at=0.9)[0].answered_by == "guide"


@pytest.mark.parametrize("name", ["llava15", "qwen25vl", "smolvlm"])
def test_consistency_on_llama_cpp_is_that_of_decoding_token_by_token(tmp_path: Path, name: str) -> None:
    """One batch of the pruned guide against the same tokens fed one by one; and 100 % kept gives the confidence."""
    built = zoo.build(name, tmp_path)
    rng = np.random.default_rng(1)
    shown = Image(rng.integers(0, 256, (12, 20, 3), dtype=np.uint8).repeat(9, 0).repeat(9, 1), "noise")
    with Pipeline.open(Pair(None, VlmFiles(built.model, built.mmproj), None), LoadOptions(threads=1)) as pipeline:
        look = pipeline.look([shown], "What is it?", 5, method="sgl")
        guide, ids = pipeline.vlm("guide"), look.answer.ids
        assert len(ids) > 1
        assert look.score is not None
        saliency = (look.attention.prompt + look.attention.generated).sum(axis=(0, 1))
        boxes = look.layouts[0].boxes
        assert boxes is not None
        saliency[(boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])] = -1
        few = np.sort(np.argsort(-saliency, kind="stable")[: max(1, round(0.05 * len(saliency)))]).astype(np.int32)
        for keep, want in ((few, look.score.consistency), (None, look.score.confidence)):
            encoded = guide.encode(shown.rgb)
            parts = guide.chat([Message("user", "What is it?", 1)])
            guide.prefill([p if isinstance(p, TextPart) else ImagePart(encoded, keep) for p in parts], tap=True)
            rows = []
            for token in ids:
                rows.append(guide.logits())
                guide.feed(np.array([token], np.int32))
            assert consistency(np.stack(rows), ids) == pytest.approx(want, rel=2e-3)
            guide.release(encoded)


# ---- the command line


def score_of(run) -> dict:
    return json.loads(run.out)["score"]


def test_exit_on_the_command_line(cli):
    run = cli.ask("--json", "--exit-at", "0.9")
    answer = json.loads(run.out)
    assert (answer["answer"], answer["answered_by"], answer["tokens"]["kept"]) == (GUIDE_SAYS, "guide", None)
    assert list(answer["score"]) == ["confidence", "consistency", "combined", "threshold"]
    assert answer["score"]["threshold"] == 0.9
    assert [v.info.name for v in cli.engine.loaded] == ["guide"]
    assert "score" not in json.loads(cli.ask("--json", "--exit-at", "off").out)
    assert cli.ask("--exit-at", "always").out == GUIDE_SAYS + "\n"
    assert cli.ask("--exit-at", "off").out == MODEL_SAYS + "\n"
    assert cli.ask("--exit-at", "always", "--guide-max-tokens", 2).out == MODEL_SAYS + "\n"
    run = cli.ask("--exit-at", "always", "-v")
    assert "answered by the guide" in run.err
    assert "exit at 0.0000" in run.err
    assert "model: model" not in run.err
    assert len(cli.engine.loaded) == 1


def test_what_was_calibrated_is_of_a_guide_that_sees_all(cli, monkeypatch):
    found = Calibration(0.0, "sgl+", 0.1, 0.0, 0.1, 1.0, 99, True)
    monkeypatch.setattr("localvlm.calibration.stored", lambda *_: found)
    assert cli.ask().out == GUIDE_SAYS + "\n"
    assert cli.ask("--guide-keep", "0.5").out == MODEL_SAYS + "\n"
    assert cli.ask("--guide-keep", "0.5", "--exit-at", "always").out == GUIDE_SAYS + "\n"


def test_other_methods_imply_no_exit_unless_it_is_asked_for(cli, monkeypatch):
    assert "score" not in json.loads(cli.ask("--json", "--method", "grid").out)
    assert cli.ask("--method", "grid", "--exit-at", "always").out == GUIDE_SAYS + "\n"
    assert cli.ask("--method", "sgl", "--exit-at", "always").out == GUIDE_SAYS + "\n"
    monkeypatch.setenv("LOCALVLM_EXIT_AT", "always")
    assert cli.ask().out == GUIDE_SAYS + "\n"
    assert cli.ask("--method", "grid").out == MODEL_SAYS + "\n"


@pytest.mark.parametrize("value", ["1.1", "-0.1", "nan", "never"])
def test_bad_thresholds_are_refused(cli, value):
    run = cli.ask(f"--exit-at={value}")
    assert (run.code, run.out) == (2, "")
    assert f"'{value}'" in run.err


def test_an_uncalibrated_pair_says_how_to_change_that(cli):
    assert "score" not in json.loads(cli.ask("--json").out)
    assert "localvlm calibrate" in cli.ask("-v").err
    assert "localvlm calibrate" not in cli.ask("-v", "--exit-at", "off").err
    assert "localvlm calibrate" not in cli.ask("-v", "--method", "none").err
