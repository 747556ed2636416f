"""`localvlm history` lists, shows, exports and removes what the chat keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localvlm.history import History, StoredImage, StoredTurn, history_file


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def two(home) -> tuple[int, int]:
    """Conversations: one with escapes in each place, one plain."""
    with History.open() as history:
        odd = history.begin("\x1b]0;x\x07A title\n" + "x" * 90)
        image = StoredImage("\x1b[31mcat.png", None, b"\1" * 32, 1, 1)
        history.add(odd, StoredTurn("What\x1b[2J is\nit?", "A \x1b[31mcat\ud800", "model", images=(image,)))
        history.add(odd, StoredTurn("And?", "", None, "failed"))
        plain = history.begin("Signs")
        history.add(plain, StoredTurn("Which?", "stop", "guide"))
    return odd, plain


def test_nothing_is_begun_by_looking(cli, home):
    done = cli("history")
    assert (done.code, done.out, "no conversations" in done.err) == (0, "", True)
    assert json.loads(cli("history", "list", "--json").out) == []
    assert cli("history", "rm", "1", "-y").code == 2
    assert not home.exists()


def test_list(cli, two):
    odd, plain = two
    done = cli("history")
    assert done.out == cli("history", "list").out
    header, first, second = done.out.splitlines()
    assert header.split() == ["ID", "LAST", "TURNS", "PICTURES", "TITLE"]
    assert (first.split()[0], first.split()[-1]) == (str(plain), "Signs")
    assert second.endswith("  2      1         A title " + "x" * 51 + "…")
    assert "\x1b" not in done.out
    assert cli("history", "list", "STOP").out.splitlines()[1:] == [first]
    assert "no conversation holds 'nowhere'" in cli("history", "list", "nowhere").err
    shown = json.loads(cli("history", "list", "cat", "--json").out)
    assert [(one["id"], one["turns"]) for one in shown] == [(odd, 2)]


def test_list_leaves_none_out(cli, two):
    with History.open() as history:
        history._connection.execute("PRAGMA synchronous = OFF")
        for _ in range(250):
            history.begin("more")
    assert len(cli("history").out.splitlines()) == 1 + 252
    assert len(json.loads(cli("history", "list", "more", "--json").out)) == 250


def test_show(cli, two):
    done = cli("history", "show", two[0])
    assert done.out == "> [cat.png]\n> What is\n> it?\n\nA cat\n\n> And?\n\n(failed)\n\n"
    turns = json.loads(cli("history", "show", two[0], "--json").out)["turns"]
    assert turns[0]["answer"] == "A \x1b[31mcat\ud800"


def test_export(cli, two, tmp_path):
    done = cli("history", "export", two[1], tmp_path / "out")
    assert (done.code, Path(done.out.strip()).name) == (0, "conversation.md")
    assert "> stop" in Path(done.out.strip()).read_text(encoding="utf-8")
    (tmp_path / "file").touch()
    assert cli("history", "export", two[1], tmp_path / "file").code == 8


def test_rm_asks(cli, two):
    refused = cli("history", "rm", two[1])
    assert (refused.code, "pass --yes" in refused.err) == (2, True)
    done = cli("history", "rm", two[1], "--yes")
    assert (done.code, "Signs, 1 turn\n" in done.err) == (0, True)
    assert len(cli("history").out.splitlines()) == 2


@pytest.mark.parametrize(
    ("args", "sign"),
    [
        (("burn",), "no action 'burn'"),
        (("show",), "'' is no ID"),
        (("show", "x"), "'x' is no ID"),
        (("show", "9" * 30), "is no ID"),
        (("show", "\u0663"), "is no ID"),
        (("show", "99"), "no conversation 99"),
        (("list", "two", "words"), "in quotes"),
    ],
)
def test_wrong_use_is_told(cli, two, args, sign):
    done = cli("history", *args)
    assert (done.code, sign in done.err) == (2, True), done.err


def test_a_damaged_history_is_told(cli, two):
    history_file().write_bytes(b"no database")
    for args in ((), ("show", 1), ("rm", 1, "-y")):
        done = cli("history", *args)
        assert (done.code, "damaged" in done.err) == (8, True)


def test_a_time_that_no_calendar_has_is_told(cli, two):
    with History.open() as history:
        history._connection.execute("UPDATE conversation SET updated = 1e18")
    for args in ((), ("rm", two[0], "-y"), ("export", two[0])):
        done = cli("history", *args)
        assert (done.code, "damaged" in done.err) == (8, True), done.err


def test_ids_are_completed(cli, two, monkeypatch, capsys):
    monkeypatch.setenv("_LOCALVLM_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "localvlm history show ")
    monkeypatch.setenv("COMP_CWORD", "3")
    assert cli().out.split() == [f"plain,{number}" for number in reversed(two)]
