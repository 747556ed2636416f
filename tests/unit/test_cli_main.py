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
