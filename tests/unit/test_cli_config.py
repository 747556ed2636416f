"""``localvlm config``: what it reads, writes and refuses."""

from __future__ import annotations

import json
import re
import tomllib

import click
import pytest

from localvlm.cli.config import changed
from localvlm.cli.main import cli as cli_group
from localvlm.config import config_file
from localvlm.errors import UsageError


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))


def test_what_is_set_is_got_and_used(cli):
    assert cli("config", "path").out.strip() == str(config_file())
    assert cli("config", "get").out == ""
    for key, value in (("keep", "0.5"), ("max-tokens", "3"), ("json", "true"), ("guide", 'a "b".gguf')):
        assert cli("config", "set", key, value).code == 0
        assert cli("config", "get", key).out.strip() == value
    assert tomllib.loads(config_file().read_text()) == {
        "keep": 0.5, "max-tokens": 3, "json": True, "guide": 'a "b".gguf',
    }  # fmt: skip
    assert cli("config", "get").out.splitlines()[1] == "max-tokens = 3"
    assert cli.ask("--guide", cli.folder / "guide.gguf").out.startswith('{"answer": ')
    assert cli("config", "set", "keep").code == 0
    assert cli("config", "get", "keep").code == 2


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kep", "0.5", "there is no setting 'kep' (did you mean 'keep'?)"),
        ("zzz", "0.5", "`localvlm ask --help` lists the options"),
        ("pairs.own.guide", "a.gguf", "written by hand (write [pairs.NAME] into '"),
        ("keys.help", "f9", "write [keys] into '"),
        ("keep", "5", "is not a share"),
        ("max-tokens", "x", "is not a valid"),
        ("max-tokens", "0", "whole number from 1"),
        ("json", "yes", "'yes' is not true or false"),
        ("method", "best", "'best' is not one of"),
    ],
)
def test_what_no_option_would_take_is_refused(cli, key, value, said):
    done = cli("config", "set", key, value)
    assert (done.code, config_file().exists()) == (2, False)
    assert said in done.err


@pytest.mark.parametrize(("key", "value"), [("method", "fastv"), ("keep", "auto"), ("keep", "0.5,0.2")])
def test_what_one_command_takes_is_taken(cli, key, value):
    assert cli("config", "set", key, value).code == 0
    assert cli("config", "get", key).out == f"{value}\n"


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("keep", "1", "keep = 1"),
        ("exit-at", "0", "exit-at = 0"),
        ("keep", "all", 'keep = "all"'),
        ("guide", "7", 'guide = "7"'),
        ("keep", "0.5,0.2", 'keep = "0.5,0.2"'),
    ],
)
def test_numbers_are_written_as_such_where_they_mean_the_same(cli, key, value, line):
    assert cli("config", "set", key, value).code == 0
    assert config_file().read_text() == f"{line}\n"
    if key != "guide":
        assert cli.ask().code == 0


def test_tables_are_got_by_reading_the_file(cli):
    for key in ("pairs", "pairs.home"):
        run = cli("config", "get", key)
        assert (run.code, f"write [pairs.NAME] into '{config_file()}'" in run.err) == (2, True)


@pytest.fixture
def shaped(cli):
    """An evaluation's questions, and model files that have a shape."""
    from tests.unit.test_cli_eval import SCRIPTS, make

    cli.scripts = dict(SCRIPTS)
    return make(cli.folder, 2)


def test_what_one_command_takes_leaves_the_others_at_their_defaults(cli, shaped):
    for key, value in (("keep", "auto"), ("method", "grid"), ("json", "true")):
        assert cli("config", "set", key, value).code == 0
    assert json.loads(cli.ask("--keep", "0.5").out)["method"] == "grid"  # auto needs a guide
    run = cli("eval", shaped, *cli.pair, "--methods", "grid")
    assert (run.code, run.err) == (0, "")
    for share in ("64%", "35%", "9%"):
        assert re.search(rf"grid +{share} ", run.out)
    run = cli("calibrate", shaped, *cli.pair)
    assert "Usage" not in run.err
    assert "curve" in json.loads(run.out)
    assert cli("eval", shaped, *cli.pair, "--keep", "auto").code == 2  # of a flag it is told


def test_the_environment_too(cli, shaped, monkeypatch):
    monkeypatch.setenv("LOCALVLM_KEEP", "auto")
    run = cli("eval", shaped, *cli.pair, "--methods", "grid")
    assert (run.code, run.err) == (0, "")
    assert json.loads(cli.ask("--json").out)["keep"] == "auto"
    monkeypatch.setenv("LOCALVLM_KEEP", "most")
    for run in (cli.ask(), cli("eval", shaped, *cli.pair)):
        assert run.code == 2
        assert "environment variable LOCALVLM_KEEP" in run.err


@pytest.mark.parametrize("word", ["1", "true", "no"])
def test_a_variable_that_says_yes_for_ask_names_no_file(cli, shaped, monkeypatch, tmp_path, word):
    monkeypatch.setenv("LOCALVLM_JSON", word)
    assert cli.ask().out.startswith("{") == (word != "no")
    run = cli("eval", shaped, *cli.pair, "--methods", "grid", "--keep", "0.5")
    assert (run.code, run.err) == (0, "")
    monkeypatch.setenv("LOCALVLM_JSON", str(tmp_path / "out.json"))
    assert cli("eval", shaped, *cli.pair, "--methods", "grid", "--keep", "0.5").code == 0
    assert (tmp_path / "out.json").exists()
    assert cli("eval", shaped, *cli.pair, "--json", word).code == 2  # of a flag it is told


def test_what_no_command_takes_is_told_by_each(cli, shaped):
    config_file().parent.mkdir(parents=True)
    config_file().write_text("keep = 5\n")
    for run in (cli.ask(), cli("eval", shaped, *cli.pair)):
        assert run.code == 2
        assert "'keep' in config file" in run.err


def test_text_of_an_option_that_may_come_several_times_is_one_of_them(cli):
    config_file().parent.mkdir(parents=True)
    config_file().write_text('case = "plain"\n')
    command = cli_group.get_command(click.Context(cli_group), "bench")
    assert command.make_context("bench", []).params["case"] == ("plain",)


def test_a_settings_file_that_is_a_link_stays_one(cli, tmp_path):
    config_file().parent.mkdir(parents=True)
    for place in (tmp_path / "dotfiles" / "localvlm.toml", tmp_path / "dotfiles" / "new.toml"):
        place.parent.mkdir(exist_ok=True)
        config_file().unlink(missing_ok=True)
        config_file().symlink_to(place)
        assert cli("config", "set", "keep", "0.5").code == 0
        assert config_file().is_symlink()
        assert place.read_text() == "keep = 0.5\n"
    config_file().unlink()
    config_file().symlink_to(config_file())
    assert cli("config", "set", "keep", "0.4").code in (2, 8)


def test_comments_and_pairs_stay():
    before = '# mine\nkeep = 0.5  # half\nngl = 2\n\n[pairs.own]\nmodel = "m.gguf"'
    after = changed(before, ("gpu_layers", "ngl"), 0)
    assert after == before.replace("ngl = 2", "gpu-layers = 0")
    assert changed(before, ("seed",), 1) == before.replace("\n[pairs", "\nseed = 1\n[pairs")
    assert changed("keep = 0.5", ("seed",), 1) == "keep = 0.5\nseed = 1\n"
    assert changed(before, ("keep",), None) == before.replace("keep = 0.5  # half\n", "")
    with pytest.raises(UsageError, match="by hand"):
        changed('system = """\nkeep = 1\n"""\nkeep = 2\n', ("keep",), 3)


def test_keys_of_other_commands_are_known_to_all(cli):
    cli("config", "set", "keep", "0.5")
    assert cli("list").code == cli("paths").code == 0


def test_a_broken_file_is_not_written_over(cli):
    config_file().parent.mkdir(parents=True)
    config_file().write_text("keep = = 1")
    assert cli("config", "set", "keep", "0.5").code == 2
    assert config_file().read_text() == "keep = = 1"
