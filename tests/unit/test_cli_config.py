"""``localvlm config``: what it reads, writes and refuses."""

from __future__ import annotations

import tomllib

import pytest

from localvlm.cli.config import changed
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
        assert cli("config", "get", key).out.strip() == value.replace("true", "True")
    assert tomllib.loads(config_file().read_text()) == {
        "keep": "0.5", "max-tokens": 3, "json": True, "guide": 'a "b".gguf',
    }  # fmt: skip
    assert cli("config", "get").out.splitlines()[1] == "max-tokens = 3"
    assert cli.ask("--guide", cli.folder / "guide.gguf").out.startswith('{"answer": ')
    assert cli("config", "set", "keep").code == 0
    assert cli("config", "get", "keep").code == 2


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kep", "0.5", "there is no setting 'kep'"),
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
