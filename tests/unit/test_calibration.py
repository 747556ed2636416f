"""Risk curves, the threshold they give, and where it is kept."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from localvlm.calibration import (
    Calibration,
    choose,
    clopper_pearson,
    read_examples,
    risk_curve,
    same_answer,
    store,
    stored,
)
from localvlm.catalog import pair_named
from localvlm.config import directories
from localvlm.errors import StorageError, UsageError
from localvlm.pipeline import Pair, VlmFiles
from tests.unit.cli_help import GUIDE_SAYS, MODEL_SAYS


def binomial(k: int, n: int, p: float) -> float:
    return sum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k + 1))


@pytest.mark.parametrize(("k", "n"), [(0, 1), (0, 30), (1, 10), (7, 50), (49, 50), (30, 30), (12, 400)])
def test_bounds_are_where_the_binomial_tails_are(k, n):
    low, high = clopper_pearson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    if k < n:
        assert binomial(k, n, high) == pytest.approx(0.025, rel=1e-6)
    if k > 0:
        assert 1 - binomial(k - 1, n, low) == pytest.approx(0.025, rel=1e-6)
    assert (low == 0) == (k == 0)
    assert (high == 1) == (k == n)


def test_curve_counts_what_exits_and_what_is_wrong():
    scores = np.array([0.9, 0.8, 0.8, 0.7, 0.6, -np.inf, -np.inf, -np.inf])
    wrong = np.array([0, 0, 1, 0, 1, 1, 1, 0], bool)
    curve = risk_curve(scores, wrong, [0.125, 0.25, 0.5, 0.625, 1.0])
    assert [(p.threshold, p.exited, p.risk) for p in curve] == [
        (0.9, 1, 0.0), (0.8, 3, 1 / 3), (0.7, 4, 1 / 4), (0.6, 5, 2 / 5),
    ]  # fmt: skip
    assert [p.share for p in curve] == [1 / 8, 3 / 8, 4 / 8, 5 / 8]
    assert risk_curve(np.full(4, -np.inf), np.zeros(4, bool)) == []


def test_the_threshold_lets_most_exit_within_the_risk():
    rng = np.random.default_rng(0)
    scores = rng.random(2000)
    wrong = rng.random(2000) < np.where(scores > 0.5, 0.01, 0.3)
    point = choose(risk_curve(scores, wrong), 0.05)
    assert point is not None
    assert 0.4 <= point.share <= 0.55
    assert point.risk < point.high <= 0.05
    assert choose(risk_curve(scores, wrong), 0.001) is None
    assert choose([], 0.5) is None


def test_a_chosen_risk_is_kept_on_new_data():
    """Bounds hold for all points at once: over many draws the chosen point is over the wanted risk in 5 % at most."""
    rng = np.random.default_rng(1)
    over = 0
    for _ in range(200):
        scores = rng.random(300)
        wrong = rng.random(300) < 0.12 * (1 - scores) + 0.02
        point = choose(risk_curve(scores, wrong), 0.1)
        if point is not None:
            t = point.threshold
            over += 0.02 + 0.12 * (1 - t) / 2 > 0.1  # the true mean risk above t
    assert over <= 10


def test_answers_are_the_same_but_for_case_and_punctuation():
    assert same_answer(" Top-left.", "top left")
    assert not same_answer("red", "dark red")


# ---- examples


def test_examples_are_found_beside_their_file(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"image": "a.png", "question": "What?", "answer": "x", "type": "t"}\n\n')
    assert [(e.image, e.question, e.answer) for e in read_examples(file)] == [(str(tmp_path / "a.png"), "What?", "x")]


@pytest.mark.parametrize(
    "text",
    ['{"image": "a"}', "[]", "x", '{"image": 1, "question": "q"}', '{"image": "a", "question": "q", "answer": 3}',
     '{"image": "a", "question": "q", "answer": "x"}\n{"image": "a", "question": "q"}'],
)  # fmt: skip
def test_bad_examples_are_refused(tmp_path, text):
    file = tmp_path / "data.jsonl"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"data\.jsonl"):
        read_examples(file)


# ---- what is kept


@pytest.fixture
def pair(tmp_path: Path) -> Pair:
    files = [tmp_path / f"{name}.gguf" for name in ("guide", "guide-mmproj", "model", "mmproj")]
    for path in files:
        path.write_bytes(path.name.encode() * 20_000)
    return Pair(None, VlmFiles(*files[:2]), VlmFiles(*files[2:]))


FOUND = Calibration(0.75, "sgl+", 0.05, 0.01, 0.04, 0.5, 300, True)


def test_a_threshold_belongs_to_the_weights_of_a_pair(pair, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))
    assert stored(pair, "sgl+") is None
    path = store(pair, FOUND)
    assert stored(pair, "sgl+") == FOUND
    assert stored(pair, "sgl") is None
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert pair.guide is not None
    moved = pair.guide.model.rename(tmp_path / "moved.gguf")
    assert stored(pair, "sgl+") is None
    elsewhere = replace(pair, guide=VlmFiles(moved, pair.guide.mmproj))
    assert stored(elsewhere, "sgl+") == FOUND
    content = bytearray(moved.read_bytes())
    content[-1] ^= 1
    moved.write_bytes(content)
    assert stored(elsewhere, "sgl+") is None


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"threshold": 2}', "null"])
def test_a_damaged_threshold_is_none(pair, text):
    store(pair, FOUND).write_text(text)
    assert stored(pair, "sgl+") is None


def test_a_threshold_that_cannot_be_kept_is_said(pair, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "file"))
    with pytest.raises(StorageError, match="cannot be written"):
        store(pair, FOUND)
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))
    path = store(pair, FOUND)
    path.unlink()
    path.mkdir()  # something else stands in its place
    with pytest.raises(StorageError, match="cannot be written"):
        store(pair, FOUND)
    assert list(path.parent.iterdir()) == [path]


def test_the_demo_pair_comes_calibrated():
    pair = pair_named("demo")
    found = stored(pair, "sgl+")
    assert found is not None, "other weights want another threshold: python -m tests.cascade"
    assert found.risk <= found.high <= found.wanted
    assert (found.share >= 0.4, found.method, found.labelled) == (True, "sgl+", True)
    assert stored(pair, "sgl") is None
    assert stored(replace(pair, guide=pair.model), "sgl+") is None
    store(pair, FOUND)
    assert stored(pair, "sgl+") == FOUND, "the user's own goes first"


# ---- the command line


@pytest.fixture
def data(cli) -> Path:
    """300 labelled examples; the guide is always right."""
    return write(cli, [GUIDE_SAYS] * 300)


def write(cli, answers: list[str | None]) -> Path:
    PIL.Image.new("RGB", (8, 8)).save(cli.folder / "a.png")
    rows = [{"image": "a.png", "question": f"What is {i}?", "answer": a} for i, a in enumerate(answers)]
    file = cli.folder / "data.jsonl"
    file.write_text("".join(json.dumps({k: v for k, v in r.items() if v is not None}) + "\n" for r in rows))
    return file


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))


def test_a_damaged_picture_is_told_before_the_first_question(cli, data):
    (cli.folder / "b.png").write_bytes((cli.folder / "a.png").read_bytes()[:40])
    with data.open("a") as file:
        file.write(json.dumps({"image": "b.png", "question": "What?", "answer": "x"}))
    run = cli("calibrate", data, *cli.pair)
    assert run.code == 6
    assert "b.png' is a truncated" in run.err
    assert cli.engine is None


def test_calibrate_lets_ask_exit(cli, data):
    assert cli.ask().out == MODEL_SAYS + "\n"
    run = cli("calibrate", data, *cli.pair)
    assert (run.code, run.err) == (0, "")
    assert "100% of 300 questions exit" in run.out
    assert [v.info.name for v in cli.engine.loaded] == ["guide"], "labels need no model"
    answer = json.loads(cli.ask("--json").out)
    assert (answer["answer"], answer["answered_by"]) == (GUIDE_SAYS, "guide")
    assert answer["score"]["threshold"] == answer["score"]["combined"]
    assert cli.ask("--exit-at", "off").out == cli.ask("--method", "none").out == MODEL_SAYS + "\n"
    assert cli.ask("--method", "sgl").out == MODEL_SAYS + "\n", "calibrated for sgl+"


def test_a_threshold_holds_for_the_guide_as_it_looked_when_it_was_calibrated(cli, data):
    """A guide that sees fewer tokens is wrong more often at the same score."""
    fewer = ("--guide-image-max-tokens", 16)
    assert cli("calibrate", data, *cli.pair).code == 0
    assert cli.ask("-v").out == GUIDE_SAYS + "\n"
    run = cli.ask(*fewer, "-v")
    assert run.out == MODEL_SAYS + "\n"
    assert "calibrated for another bound of the guide's image tokens" in run.err
    assert cli.ask(*fewer, "--exit-at", 0).out == GUIDE_SAYS + "\n"
    assert cli("calibrate", data, *cli.pair, *fewer).code == 0
    assert cli.ask(*fewer).out == GUIDE_SAYS + "\n"
    assert cli.ask().out == MODEL_SAYS + "\n"


def test_calibrate_finds_no_threshold_where_the_guide_is_wrong(cli):
    run = cli("calibrate", write(cli, ["blue"] * 50), *cli.pair)
    assert run.code == 1
    assert "no threshold kept" in run.err
    assert "100.0%" in run.out
    assert not (directories().state / "calibration").exists()
    assert cli("calibrate", write(cli, [GUIDE_SAYS] * 10), *cli.pair).code == 1, "ten are too few"


def test_without_labels_the_models_own_answer_counts(cli):
    run = cli("calibrate", write(cli, [None] * 100), "--risk", "0.5", "--json", *cli.pair)
    assert run.code == 1
    assert json.loads(run.out)["curve"][-1]["risk"] == 1
    cli.scripts["model"] = replace(cli.scripts["model"], answer=GUIDE_SAYS.upper())
    run = cli("calibrate", *[cli.image] * 100, "--question", "What?", "--risk", "0.1", "--json", *cli.pair)
    found = json.loads(run.out)
    assert run.code == 0
    assert (found["questions"], found["labelled"], found["share"], found["risk"]) == (100, False, 1.0, 0.0)


def test_a_question_beside_a_file_of_questions_is_refused(cli, data):
    run = cli("calibrate", data, "--question", "What?", *cli.pair)
    assert (run.code, "holds its own" in run.err) == (2, True)


def test_answers_cut_off_do_not_count_as_exits(cli, data):
    run = cli("calibrate", data, "--guide-max-tokens", 2, "--json", *cli.pair)
    assert run.code == 1
    assert json.loads(run.out)["curve"] == []


def test_what_calibrate_refuses(cli, data):
    assert "--question" in cli("calibrate", cli.image, *cli.pair).err
    assert "are needed" in cli("calibrate", data, *cli.pair[2:]).err
    assert cli("calibrate", cli.folder / "none.jsonl", *cli.pair).code == 2
    assert cli("calibrate", write(cli, []), *cli.pair).code == 2
    for risk in ("0", "1", "nan", "5"):
        assert f"'{risk}'" in cli("calibrate", data, f"--risk={risk}", *cli.pair).err
