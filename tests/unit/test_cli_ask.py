"""``localvlm ask``: what goes where, from which setting, and with which exit code."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import PIL.Image
import pytest

from localvlm import pruning
from localvlm.answers import STAGES
from localvlm.cli.options import METHODS, PRESETS
from localvlm.config import directories
from localvlm.errors import NotEnoughMemory, NotGguf, ProjectorMismatch
from localvlm.pruning.kinds import FLOORS
from tests.unit.cli_help import GUIDE_SAYS, MODEL_SAYS


def png(size=(8, 8)) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", size).save(buffer, "PNG")
    return buffer.getvalue()


# ---- stdout and stderr


def test_the_answer_alone_goes_to_stdout(cli):
    run = cli.ask()
    assert (run.code, run.out, run.err) == (0, MODEL_SAYS + "\n", "")


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_blank_ends_are_dropped_and_inner_space_kept(cli, flags):
    cli.scripts["model"] = replace(cli.scripts["model"], answer="\n  two\n\nlines \n\n")
    assert cli.ask(*flags).out == "two\n\nlines\n"


def test_json_has_exactly_the_promised_keys(cli):
    run = cli.ask("--json")
    answer = json.loads(run.out)
    assert run.out.count("\n") == 1
    assert list(answer) == [
        "answer", "answer_ids", "kept_indices", "answered_by", "finish", "tokens", "tiles", "ms", "method", "keep",
        "layer", "steps", "pair",
    ]  # fmt: skip
    assert answer["answer"] == MODEL_SAYS
    assert bytes(answer["answer_ids"]).decode() == MODEL_SAYS
    assert list(answer["tokens"]) == [
        "image", "kept", "prompt", "generated", "drafted", "accepted", "mean_kept", "guide",
    ]  # fmt: skip
    assert answer["tokens"]["image"] == 144
    assert answer["tiles"] == {"total": 1, "encoded": 1, "shared": 0}
    assert answer["tokens"]["kept"] == len(answer["kept_indices"]) == round(0.35 * 144)
    assert tuple(answer["ms"]) == STAGES
    assert (answer["answered_by"], answer["method"], answer["keep"], answer["pair"]) == ("model", "sgl+", 0.35, None)
    assert answer["finish"] == "stop"
    assert json.loads(cli.ask("--json", "--max-tokens=1").out)["finish"] == "length"


def test_json_is_plain_ascii_whatever_the_model_says(cli):
    cli.scripts["model"] = replace(cli.scripts["model"], answer="\x1b]0;x\x07 \u202e é \x9b")
    run = cli.ask("--json")
    assert run.out.isascii()
    assert run.out.strip().isprintable()
    assert json.loads(run.out)["answer"] == "\x1b]0;x\x07 \u202e é \x9b"


@pytest.mark.parametrize("flags", [[], ["--no-stream"]])
def test_an_answer_cannot_drive_the_terminal(cli, flags):
    cli.scripts["model"] = replace(cli.scripts["model"], answer="a\x1b]52;c;ZXZpbA==\x07b\x1b[2Jc\x9b31md\re\u202ef")
    assert cli.ask(*flags).out == "abcdef\n"


def test_quiet_and_verbose(cli):
    run = cli.ask("-v")
    assert run.out == MODEL_SAYS + "\n"
    assert f"guide's answer: {GUIDE_SAYS}" in run.err
    assert "tokens: 50 of 144 image" in run.err
    assert all(stage in run.err for stage in STAGES)
    PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(cli.image)
    assert "transparent parts shown on white" in cli.ask().err
    assert cli.ask("-q").err == ""


def test_a_cut_answer_is_said(cli):
    run = cli.ask("--max-tokens", 4)
    assert run.out == MODEL_SAYS[:4] + "\n"
    assert "--max-tokens" in run.err


# ---- arguments


@pytest.mark.parametrize("keep", ["35", "0", "-1", "1.01", "nan", "inf", "x", "35%"])
def test_bad_shares_are_refused(cli, keep):
    run = cli.ask(f"--keep={keep}")
    assert run.code == 2
    assert f"'{keep}'" in run.err
    assert run.err.startswith("localvlm: ")
    assert run.err.count("\n") == 1


def test_shares(cli):
    for keep, kept in (("all", 144), ("1", 144), ("0.5", 72), ("0.001", 1)):
        assert json.loads(cli.ask("--json", f"--keep={keep}").out)["tokens"]["kept"] == kept


def test_the_guide_sees_the_share_that_is_asked_for(cli, monkeypatch):
    assert json.loads(cli.ask("--json").out)["tokens"]["guide"] == 144
    monkeypatch.setenv("LOCALVLM_GUIDE_KEEP", "0.25")
    run = cli.ask("--json", "-v")
    tokens = json.loads(run.out)["tokens"]
    assert (tokens["guide"], tokens["kept"]) == (36, 50)
    assert "tokens: 50 of 144 image (36 of the guide's)" in run.err
    assert "tokens: 36 of 144 image (36 of the guide's)" in cli.ask("-v", "--exit-at", "always").err
    assert json.loads(cli.ask("--json", "--guide-keep", "all").out)["tokens"]["guide"] == 144
    assert json.loads(cli.ask("--json", "--method", "grid").out)["tokens"]["guide"] is None
    refused = cli.ask("--guide-keep", "auto")
    assert (refused.code, "'auto' goes by what the guide looks at" in refused.err) == (2, True)


def test_a_number_of_tokens(cli):
    for n, kept in ((1, 1), (20, 20), (144, 144), (4000, 144)):
        answer = json.loads(cli.ask("--json", f"--keep-tokens={n}").out)
        assert (answer["keep"], answer["tokens"]["kept"]) == (f"{n} tokens", kept)
    assert cli.ask("--keep-tokens=0").code == 2
    assert f"keep {20} tokens" in cli.ask("-v", "--keep-tokens=20").err


def test_presets_are_scaled_to_the_model_s_depth(cli):
    """The fake has 4 layers, the paper's model 48."""
    for name, layer, kept in (("paper-64", 2, 58), ("paper-35", 1, 29), ("paper-9", 1, 7)):
        run = cli.ask("--json", "-v", "--preset", name)
        answer = json.loads(run.out)
        assert (answer["layer"], answer["tokens"]["kept"]) == (layer, kept)
        assert answer["tokens"]["mean_kept"] == (layer * 144 + (4 - layer) * kept) / 4
        assert f"layer: dropped before {layer}, {answer['tokens']['mean_kept']:.1f} of 144 image tokens" in run.err
    assert "layer:" not in cli.ask("-v").err
    assert set(PRESETS) == set(pruning.PRESETS)


@pytest.mark.parametrize("other", ["--keep=0.2", "--keep-tokens=9", "--layer=1"])
def test_a_preset_and_what_it_says_contradict_each_other(other, cli, monkeypatch):
    run = cli.ask("--preset=paper-35", other)
    assert (run.code, run.out) == (2, "")
    assert "both" in run.err
    monkeypatch.setenv("LOCALVLM_PRESET", "paper-64")
    assert json.loads(cli.ask("--json").out)["layer"] == 2
    assert json.loads(cli.ask("--json", other).out)["layer"] == (1 if "layer" in other else 0)
    monkeypatch.setenv("LOCALVLM_KEEP", "0.5")
    assert json.loads(cli.ask("--json", "--preset=paper-35").out)["keep"] == 0.2


def test_positions_reach_the_engine(cli):
    assert cli.ask().code == 0
    assert not any(vlm.options.compact_positions for vlm in cli.engine.loaded)
    assert cli.ask("--positions=compact").code == 0
    assert all(vlm.options.compact_positions for vlm in cli.engine.loaded)
    assert cli.ask("--positions=gaps").code == 2


def test_of_two_budgets_the_nearer_one_counts(cli, monkeypatch):
    run = cli.ask("--keep-tokens=20", "--keep=0.5")
    assert (run.code, run.out) == (2, "")
    assert "both" in run.err
    monkeypatch.setenv("LOCALVLM_KEEP", "0.5")
    assert json.loads(cli.ask("--json", "--keep-tokens=20").out)["tokens"]["kept"] == 20
    monkeypatch.setenv("LOCALVLM_KEEP_TOKENS", "7")
    assert json.loads(cli.ask("--json", "--keep=0.25").out)["tokens"]["kept"] == 36


@pytest.mark.parametrize(
    ("question", "keep", "warned"),
    [
        ("Give the bounding box of the cat.", "0.09", True),
        ("COORDINATES of the cat?", "0.09", True),
        ("Give the bounding box of the cat.", "0.35", False),
        ("Give the bounding box of the cat.", "all", False),
        ("What do coordinators do?", "0.09", False),
    ],
)
def test_coordinates_of_a_heavily_pruned_picture_are_doubted(cli, question, keep, warned):
    run = cli("ask", *cli.pair, "--keep", keep, cli.image, question)
    assert run.out == MODEL_SAYS + "\n"
    assert ("coordinates from 13 of 144" in run.err) is warned


def test_auto_follows_the_guide(cli, monkeypatch):
    monkeypatch.setattr("localvlm.pruning.base.AUTO_SHARE", 0.5)
    kept = {}
    for focus in ((0.4, 0.4, 0.6, 0.6), (0.0, 0.0, 1.0, 1.0)):
        cli.scripts["guide"] = replace(cli.scripts["guide"], focus=focus)
        answer = json.loads(cli.ask("--json", "--keep=auto").out)
        assert answer["keep"] == "auto"
        kept[focus] = answer["tokens"]["kept"]
    narrow, wide = kept.values()
    assert 7 <= narrow < wide <= 92
    run = cli.ask("--keep=auto", "--method=grid")
    assert run.code == 2
    assert "'grid'" in run.err


def test_what_is_measured_of_models_is_kept_in_the_cache_folder(cli):
    cli.ask()
    assert [vlm.options.cache for vlm in cli.engine.loaded] == [str(directories().cache)] * 2


def test_auto_gives_more_to_some_kinds_of_questions(cli, monkeypatch):
    monkeypatch.setattr("localvlm.pruning.base.AUTO_SHARE", 0.0)
    for question, floor in (("How many are there?", FLOORS["counting"]), ("Read it.", FLOORS["reading"])):
        answer = json.loads(cli("ask", *cli.pair, "--json", "--keep=auto", cli.image, question).out)
        assert answer["tokens"]["kept"] == round(floor * answer["tokens"]["image"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--method", "best"], "best"),
        (["--temp", "-1"], "-1"),
        (["--temp", "nan"], "nan"),
        (["--max-tokens", "0"], "0"),
        (["--seed", "-3"], "-3"),
        (["--threads", "many"], "many"),
        (["--no-such-flag"], "--no-such-flag"),
    ],
)
def test_bad_flags_are_quoted(cli, flags, words):
    run = cli.ask(*flags)
    assert (run.code, run.out) == (2, "")
    assert words in run.err


def test_every_method_is_known_to_the_command_line():
    from localvlm import pruning

    assert set(METHODS) == {*pruning.METHODS, *pruning.IN_LLM}


def test_missing_arguments(cli):
    assert "no image was given" in cli("ask", *cli.pair, "What is this?").err
    for forgotten in ([cli.image], [cli.image, cli.image], ["example"], [cli.image, "https://example.org/a.png"]):
        run = cli("ask", *cli.pair, *forgotten)
        assert (run.code, f"no question was given: {forgotten[-1]!r} is an image" in run.err) == (2, True)
    assert cli("ask", *cli.pair, cli.image, "https://example.org is what?").code == 0
    assert "question is empty" in cli("ask", *cli.pair, cli.image, " ").err
    assert cli("ask", *cli.pair, "What is this? " * 100).code == 2
    assert cli("ask").code == 2


def test_more_threads_than_any_machine_runs_are_refused(cli):
    assert cli.ask("--threads=64").code == 0
    run = cli.ask("--threads=9999")
    assert (run.code, "'9999' is not a whole number from 0 to" in run.err) == (2, True)


def test_unquoted_question(cli):
    run = cli("ask", *cli.pair, cli.image, "what", "is", "this")
    assert run.code == 6
    assert "in quotes" in run.err


def test_several_images(cli):
    run = cli("ask", *cli.pair, "--json", "--keep=all", cli.image, cli.image, "Which?")
    assert json.loads(run.out)["tokens"]["image"] == 288


def test_the_example_image_has_a_name(cli, monkeypatch, tmp_path):
    monkeypatch.setattr("localvlm.catalog.example_image", lambda: cli.image)
    monkeypatch.chdir(tmp_path)
    assert cli("ask", *cli.pair, "example", "What?").code == 0
    (tmp_path / "example").write_text("a file of this name goes first")
    assert cli("ask", *cli.pair, "example", "What?").code == 6


# ---- standard input


def test_image_on_standard_input(cli):
    assert cli("ask", *cli.pair, "-", "What?", stdin=png()).out == MODEL_SAYS + "\n"
    assert cli("ask", *cli.pair, "-", "What?", stdin=b"").code == 6
    assert cli("ask", *cli.pair, "-", "What?", stdin=None).code == 6
    assert cli("ask", *cli.pair, "-", "-", "What?", stdin=png()).code == 2


def test_text_on_standard_input_goes_before_the_question(cli):
    plain = json.loads(cli.ask("--json").out)["tokens"]["prompt"]
    with_text = json.loads(cli.ask("--json", stdin="Ünder\n".encode()).out)["tokens"]["prompt"]
    assert with_text == plain + len("Ünder\n\n".encode())
    assert cli.ask("--json", stdin=None).code == 0


# ---- errors


@pytest.mark.parametrize(
    ("error", "code"),
    [(NotGguf("'m.gguf' is no GGUF file"), 3), (ProjectorMismatch("4 and 8"), 3), (NotEnoughMemory("no room"), 5)],
)
def test_engine_errors_have_their_exit_codes(cli, error, code):
    cli.scripts["model"] = replace(cli.scripts["model"], load_error=error)
    run = cli.ask()
    assert (run.code, run.out) == (code, "")
    assert run.err == f"localvlm: {error.message}\n"


def test_a_crash_of_the_engine_is_survived(cli):
    for step in range(4):
        cli.scripts["model"] = replace(cli.scripts["model"], crash_at=step)
        run = cli.ask()
        assert run.code == 4
        assert run.err.startswith("localvlm: the engine was ended by SIGABRT")
    cli.scripts["model"] = replace(cli.scripts["model"], crash_at=3 + 6)
    assert cli.ask().out == MODEL_SAYS[:6] + "\n"


def test_question_too_long_for_the_context(cli):
    run = cli.ask("--ctx-size", 100, stdin=b"word " * 100)
    assert run.code == 9
    assert "100" in run.err


def test_internal_errors_are_one_line_unless_debugging(cli, monkeypatch):
    monkeypatch.setattr("localvlm.pipeline.Pipeline.ask", lambda *a, **k: 1 / 0)
    run = cli.ask()
    assert run.code == 1
    assert "ZeroDivisionError" in run.err
    assert run.err.count("\n") == 1
    monkeypatch.setenv("LOCALVLM_DEBUG", "1")
    from localvlm.cli.main import main

    with pytest.raises(ZeroDivisionError):
        main(["ask", *cli.pair, cli.image, "What?"], None)


def test_errors_with_hostile_text_are_one_safe_line(cli):
    run = cli("ask", *cli.pair, "no\n\x1b]0;x\x07.png", "What?")
    assert run.code == 6
    assert run.err.strip().isprintable()


# ---- which models


def test_guide_free_methods_need_no_guide(cli):
    model = ["--model", cli.pair[3]]
    for method in ("none", "random", "grid"):
        run = cli("ask", *model, "--method", method, cli.image, "What?")
        assert (run.code, run.out) == (0, MODEL_SAYS + "\n")
        assert [v.info.name for v in cli.engine.loaded] == ["model"]
    for method in ("sgl", "sgl+"):
        run = cli("ask", *model, "--method", method, cli.image, "What?")
        assert run.code == 2
        assert "needs a guide" in run.err


def test_mmproj_is_found_beside_the_model(cli):
    (cli.folder / "model-mmproj.gguf").unlink()
    (cli.folder / "guide-mmproj.gguf").unlink()
    run = cli.ask()
    assert run.code == 3
    assert "--guide-mmproj" in run.err
    assert "without its model" in cli("ask", "--mmproj", "x.gguf", cli.image, "What?").err


def test_missing_model_files(cli):
    run = cli("ask", "--model", "/nowhere/m.gguf", cli.image, "What?")
    assert run.code == 3
    assert "/nowhere/m.gguf" in run.err
    run = cli("ask", "--pair", "nonesuch", cli.image, "What?")
    assert run.code == 3
    assert "nonesuch" in run.err


@pytest.mark.parametrize(
    ("flags", "drafted", "accepted"),
    [
        ([], 10, 10),
        (["--method", "sgl"], 10, 10),
        (["--max-tokens", "4"], 4, 4),
        (["--guide-max-tokens", "5"], 5, 5),
        (["--no-draft"], 0, 0),
        (["--temp", "1"], 0, 0),
        (["--method", "grid"], 0, 0),
        (["--method", "grid", "--exit-at", "1"], 0, 0),
        (["--keep", "all"], 0, 0),
    ],
)
def test_the_guides_answer_is_the_models_draft(cli, flags, drafted, accepted):
    for role in ("guide", "model"):
        cli.scripts[role] = replace(cli.scripts[role], answer="a red one")
    tokens = json.loads(cli.ask("--json", *flags).out)["tokens"]
    assert (tokens["drafted"], tokens["accepted"]) == (drafted, accepted)


@pytest.mark.parametrize(("guide", "model", "accepted"), [("red", "blue", 0), ("a red", "a rug", 3), ("a", "a rug", 1)])
def test_a_draft_counts_as_far_as_the_answer_has_it(cli, guide, model, accepted):
    cli.scripts["guide"] = replace(cli.scripts["guide"], answer=guide)
    cli.scripts["model"] = replace(cli.scripts["model"], answer=model)
    answer = json.loads(cli.ask("--json").out)
    assert answer["answer"] == model
    assert answer["tokens"]["drafted"] == len(guide) + 1
    assert answer["tokens"]["accepted"] == accepted
    assert f"{accepted} of {len(guide) + 1} drafted accepted" in cli.ask("-v").err
