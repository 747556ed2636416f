"""``localvlm ask`` where --method is left to it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from localvlm import calibration
from localvlm.answers import Pair, VlmFiles
from localvlm.cli.options import ACCURACIES
from localvlm.config import directories
from localvlm.engine.api import LoadOptions
from localvlm.errors import EngineCrashed
from localvlm.planning import choice, plans
from localvlm.planning.memory import RateMemory
from tests.unit.cli_help import GUIDE_SAYS, MODEL_SAYS
from tests.unit.planning_help import GUIDE028, LLAVA7, QWEN3B, QWEN7B, SMOL22B, SMOL256, Real, files_of, rates


def memory() -> RateMemory:
    return RateMemory.of(LoadOptions(cache=str(directories().cache)))


@pytest.fixture
def timed(cli, tmp_path, monkeypatch):
    """A command line on a machine that was timed before; ``timed(model, guide)`` puts their headers in place."""
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr(choice, "_share", lambda: 1.0)
    monkeypatch.setattr("localvlm.cli.fit.room", lambda: 64 << 30)
    memory().add(rates())

    def put(model: Real = LLAVA7, guide: Real = GUIDE028):
        for role, real in (("model", model), ("guide", guide)):
            files_of(cli.folder, replace(real, name=role))
        return cli

    return put


def test_it_is_guided_where_that_pays(timed):
    cli = timed()
    run = cli.ask("--json", "-v")
    answer = json.loads(run.out)
    assert (answer["answer"], answer["method"], answer["keep"]) == (MODEL_SAYS, "sgl+", 0.35)
    plan = answer["plan"]
    assert (plan["name"], list(plan["others_ms"])) == ("guided", ["plain"])
    assert plan["predicted_ms"]["total"] < plan["others_ms"]["plain"]
    assert {"guide_prefill", "prefill", "decode"} < plan["predicted_ms"].keys()
    told = [line for line in run.err.splitlines() if line.startswith("plan: ")]
    assert [line.partition(",")[0] for line in told] == ["plan: plain", "plan: guided"]
    assert [line.endswith("(chosen)") for line in told] == [False, True]
    assert f"{plan['others_ms']['plain'] / 1e3:.1f} s" in told[0]


def test_it_is_plain_where_the_guide_costs_more_than_it_saves(timed):
    cli = timed(GUIDE028, LLAVA7)
    (cli.folder / "model.gguf").write_bytes((cli.folder / "model.gguf").read_bytes() + bytes(300_000_000))
    answer = json.loads(cli.ask("--json").out)
    assert (answer["answer"], answer["method"], answer["plan"]["name"]) == (MODEL_SAYS, "none", "plain")
    assert answer["tokens"]["kept"] == 144
    assert [vlm.info.name for vlm in cli.engine.loaded] == ["model"]


@pytest.mark.parametrize(
    "flags",
    [("--method", "sgl+"), ("--method", "none"), ("--keep", "all"), ("--preset", "paper-35"), ("--layer", "1"),
     ("--exit-at", "always"), ("--exit-at", "0.5"), ("-ngl", "1"), ("--stock-tiling",)],
)  # fmt: skip
def test_what_the_user_says_is_done(timed, flags):
    cli = timed()
    cli.scripts = {role: replace(script, gpus=("a card",)) for role, script in cli.scripts.items()}
    answer = json.loads(cli.ask("--json", *flags).out)
    assert "plan" not in answer
    assert answer["method"] == ("none" if "none" in flags else "sgl+")
    assert answer["answered_by"] == ("guide" if "always" in flags or "0.5" in flags else "model")


def test_a_small_model_is_asked_as_ever(cli, monkeypatch):
    monkeypatch.setattr(choice, "sample", None)
    run = cli.ask("-v")
    assert f"guide's answer: {GUIDE_SAYS}" in run.err
    assert "plan: as asked; a model of 0 MB is too small to plan for" in run.err
    assert "plan" not in json.loads(cli.ask("--json").out)


def test_a_budget_for_the_guide_is_kept_and_else_chosen(timed):
    cli = timed(QWEN7B, QWEN3B)
    answer = json.loads(cli.ask("--json").out)
    assert answer["plan"]["name"] in ("plain", "guided, at most 512 tokens")
    for flags, bound in (([], 512), (["--image-max-tokens=300"], 300), (["--guide-image-max-tokens=99"], 99)):
        assert cli.ask("--method=sgl+", *flags).code == 0
        guide, model = cli.engine.loaded
        assert (guide.options.image_tokens, model.options.image_tokens) == (bound, 300 if "300" in str(flags) else 0)
    fast = json.loads(cli.ask("--json", "--accuracy=fast", "--guide-image-max-tokens=99").out)["plan"]
    names, few = {fast["name"], *fast["others_ms"]}, "guided, at most 99 tokens"
    assert names == {"plain", few, f"{few}, shown 44 %", "fastervlm", "divprune"}


def test_without_a_guide_nothing_is_pruned_unless_asked(timed):
    cli = timed()
    model = ["--model", cli.pair[3]]
    answer = json.loads(cli("ask", *model, "--json", cli.image, "What?").out)
    assert (answer["method"], answer["plan"]["name"], answer["tokens"]["kept"]) == ("none", "plain", 144)
    answer = json.loads(cli("ask", *model, "--json", "--accuracy=fast", cli.image, "What?").out)
    assert (answer["method"], answer["tokens"]["kept"]) == ("fastervlm", 50)
    run = cli("ask", *model, "--keep=0.2", cli.image, "What?")
    assert run.code == 2
    assert "needs a guide" in run.err


@pytest.mark.parametrize(
    "set_", [["exit-at", "0.9"], ["exit-at", "off"], ["keep", "0.5"], ["keep-tokens", "64"], ["layer", "2"]]
)
@pytest.mark.parametrize("place", ["environment", "settings"])
def test_a_budget_that_was_set_for_all_leaves_a_model_without_a_guide_as_it_is(cli, monkeypatch, set_, place):
    key, value = set_
    if place == "settings":
        assert cli("config", "set", key, value).code == 0
    else:
        monkeypatch.setenv(f"LOCALVLM_{key.upper().replace('-', '_')}", value)
    answer = json.loads(cli("ask", "--model", cli.pair[3], "--json", cli.image, "What?").out)
    assert (answer["method"], answer["tokens"]["kept"]) == ("none", 144)


def test_what_says_nothing_of_a_budget_needs_no_guide(cli):
    for flags in (["--exit-at=off"], ["--layer=0"]):
        assert cli("ask", "--model", cli.pair[3], *flags, cli.image, "What?").code == 0
    for flags in (["--exit-at=0.9"], ["--layer=2"], ["--preset=paper-9"]):
        run = cli("ask", "--model", cli.pair[3], *flags, cli.image, "What?")
        assert (run.code, "needs a guide" in run.err) == (2, True)
    run = cli("ask", "--model", cli.pair[3], "--json", "--accuracy=fast", "--keep=0.2", cli.image, "What?")
    answer = json.loads(run.out)  # too small a model to plan for
    assert (answer["method"], answer["tokens"]["kept"]) == ("fastervlm", 29)


@pytest.mark.parametrize("lines", [False, True])
def test_a_guide_sees_what_was_planned(timed, lines):
    cli = timed(SMOL22B, SMOL256)
    PIL.Image.new("RGB", (1600, 1200)).save(cli.folder / "large.png")
    for accuracy, bound in (("high", 512), ("fast", 256)):
        flags = ["--jsonl", str(cli.folder / f"{accuracy}.jsonl")] if lines else ["-v"]
        run = cli("ask", *cli.pair, f"--accuracy={accuracy}", *flags, str(cli.folder / "large.png"), "What?")
        assert run.code == 0
        assert lines or re.search(rf"plan: guided, at most {bound} tokens.*\(chosen\)", run.err)
        assert [vlm.options.image_tokens for vlm in cli.engine.loaded] == [bound, 0]


def test_a_machine_is_timed_once(timed, monkeypatch, tmp_path):
    cli = timed()
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "another"))
    asked = []

    def sampled(engine, options, known, llms, towers):
        asked.append((llms, towers))
        return rates()

    monkeypatch.setattr(choice, "sample", sampled)
    run = cli.ask("-v")
    assert "timing this machine" in run.err
    assert "(chosen)" in run.err
    assert "timing" not in cli.ask("-v").err
    assert asked == [(sorted(real.layer("Q4_0") for real in (LLAVA7, GUIDE028)), ["F16"])]


def test_a_machine_that_cannot_be_timed_is_no_obstacle(timed, monkeypatch, tmp_path):
    cli = timed()
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "another"))
    for error in (EngineCrashed("it died"), OSError("no space"), choice.Disturbed("other work")):

        def fails(*args, found=error):
            raise found

        monkeypatch.setattr(choice, "sample", fails)
        run = cli.ask("-v")
        assert (run.code, run.out) == (0, MODEL_SAYS + "\n")
        assert (
            f"plan: as asked; {'' if 'work' in str(error) else 'this machine could not be timed: '}{error}" in run.err
        )


def test_times_of_a_busy_machine_are_neither_taken_nor_learnt(timed, monkeypatch, tmp_path):
    cli = timed()
    monkeypatch.setattr("os.getloadavg", lambda: (99.0 * 64, 0.0, 0.0))
    monkeypatch.setattr(choice, "_share", lambda: 0.5)
    before = [path.read_bytes() for path in directories().cache.rglob("*.json")]
    assert "plan" in json.loads(cli.ask("--json").out)
    assert [path.read_bytes() for path in directories().cache.rglob("*.json")] == before
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "another"))
    monkeypatch.setattr(choice, "sample", None)
    run = cli.ask("-v")
    assert (run.code, run.out) == (0, MODEL_SAYS + "\n")
    assert "plan: as asked; this machine is too busy to be timed now" in run.err
    monkeypatch.setattr(choice, "_share", lambda: 0.95)  # the others leave what is asked for
    monkeypatch.setattr(choice, "sample", lambda *_: rates())
    assert "(chosen)" in cli.ask("-v").err


def test_answers_are_learnt_from(timed):
    cli = timed()
    before = json.loads(cli.ask("--json").out)["plan"]["predicted_ms"]
    for _ in range(3):
        after = json.loads(cli.ask("--json").out)["plan"]["predicted_ms"]
    assert after["prefill"] < before["prefill"]  # the fake takes no time
    assert memory().rates == rates()


def test_exits_are_expected_as_often_as_when_they_were_calibrated(timed):
    cli = timed()
    found = cli.folder / "guide.gguf"
    pair = Pair(None, *(VlmFiles(Path(p), Path(p).with_name(f"{Path(p).stem}-mmproj.gguf"))
                        for p in (found, cli.folder / "model.gguf")))  # fmt: skip
    before = json.loads(cli.ask("--json").out)["plan"]["predicted_ms"]
    calibration.store(pair, calibration.Calibration(1.0, "sgl+", 0.02, 0.0, 0.01, 0.75, 100, labelled=True))
    run = cli.ask("--json", "-v")
    after = json.loads(run.out)["plan"]["predicted_ms"]
    assert after["prefill"] == pytest.approx(before["prefill"] / 4, rel=0.01)
    assert "75% of answers by the guide" in run.err
    assert json.loads(run.out)["score"]["threshold"] == 1.0


def test_the_classes_are_those_of_the_planner(cli):
    assert ACCURACIES == plans.ACCURACIES
    assert cli.ask("--accuracy=best").code == 2


def test_the_chat_plans_nothing_and_does_not_say_so(cli):
    helps = {name: " ".join(cli(name, "--help").out.split()) for name in ("ask", "chat")}
    assert "sgl+) where there is a guide, else" in helps["chat"]
    assert "--accuracy" not in helps["chat"]
    assert "predicted to be clearly sooner" in helps["ask"]
    assert "--accuracy CLASS" in helps["ask"]
    refused = cli("chat", "--accuracy=fast")
    assert (refused.code, "no such option" in refused.err) == (2, True)
