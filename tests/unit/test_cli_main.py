"""The command line as a whole: what is told of a line that cannot be understood."""

from __future__ import annotations

import pytest


@pytest.mark.parametrize("line", ["ask a.png Q --pair", "eval --json", "bench --svg", "config --nope"])
def test_the_help_that_is_named_is_that_of_the_command(cli, line):
    run = cli(*line.split())
    assert run.code == 2
    assert f"(`localvlm {line.split()[0]} --help` tells more)" in run.err


def test_names_to_choose_from_are_told_in_one_line_of_words(cli):
    run = cli("completion")
    assert run.code == 2
    assert "\t" not in run.err
    assert "bash, zsh, fish" in run.err


def test_questions_that_are_not_there_are_told_as_pictures_are(cli):
    run = cli("eval", "away.jsonl")
    assert (run.code, run.err) == (2, "localvlm: 'away.jsonl' does not exist (check the path)\n")
    assert f"'{cli.folder}' cannot be read: Is a directory" in cli("eval", cli.folder).err


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("aks a.png Q", "no such command 'aks' (did you mean 'ask'?)"),
        ("zzzz", "no such command 'zzzz' (`localvlm --help` tells more)"),
        ("--aks", "no such option '--aks'"),
    ],
)
def test_commands_that_there_are_not(cli, line, hint):
    run = cli(*line.split())
    assert (run.code, hint in run.err) == (2, True), run.err


def test_names_of_pairs_are_pointed_at(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(f'[pairs.home]\nmodel = "{cli.folder}/model.gguf"\n')
    run = cli("ask", "--pair", "dmeo", cli.image, "What?")
    assert (run.code, "shows them: demo, home, " in run.err) == (3, True)
    assert run.err.count("demo,") == 1
    for flag, name in (("--guide", "demo"), ("--model", "home")):
        run = cli("ask", flag, name, cli.image, "What?")
        assert run.code == 3
        assert f"model file '{name}' does not exist (for the pair of that name pass --pair {name})" in run.err
    assert "(check the path)" in cli("ask", "--model", "away", cli.image, "What?").err


def test_what_is_no_model_is_not_asked_for_its_projector(cli, tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    (folder / "notes.txt").write_text("some notes about models")
    (folder / "m.gguf").write_bytes(b"GGUF")
    for name, words in (("notes.txt", "is not a GGUF file"), ("m.gguf", "no mmproj file lies beside")):
        for flag in ("--guide", "--model"):
            run = cli("ask", flag, folder / name, cli.image, "What?")
            assert (run.code, words in run.err) == (3, True), run.err
