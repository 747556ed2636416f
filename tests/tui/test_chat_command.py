"""`localvlm chat` before it draws anything: what is refused, and with which code."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from localvlm.catalog import pair_named
from localvlm.cli import chat as command
from localvlm.cli.app import App
from localvlm.cli.chat import OWN_THEMES, PICTURES
from localvlm.engine.fake import FakeEngine
from localvlm.errors import NotEnoughMemory
from localvlm.tui.picture import Protocol
from localvlm.tui.themes import THEMES


def chat(*flags: str, terminals: str = "", **environment: str) -> tuple[int, str]:
    """Exit code and standard error, which is a terminal only if ``terminals`` names it ("012": all three)."""
    ours, theirs = pty.openpty()
    streams = {
        name: theirs if str(number) in terminals else subprocess.PIPE
        for number, name in enumerate(("stdin", "stdout", "stderr"))
    }
    command = [sys.executable, "-m", "localvlm", "chat", "--pair", "demo", *flags]
    done = subprocess.Popen(command, env={**os.environ, **environment}, **streams)
    os.close(theirs)
    _, err = done.communicate(timeout=60)
    os.close(ours)
    return done.returncode, (err or b"").decode()


def test_without_a_terminal_it_is_refused():
    """On any of the three streams: Textual reads from the first, and draws on the last."""
    for terminals in ("", "12", "02", "01"):
        if "2" in terminals:
            assert chat(terminals=terminals)[0] == 2
            continue
        code, err = chat(terminals=terminals)
        assert code == 2
        assert err.startswith("localvlm: the chat needs a terminal (")


def test_ways_of_showing_pictures_that_there_are_not_are_refused():
    assert list(PICTURES) == list(Protocol)
    for flags, environment in (
        (["--pictures", "crayon"], {}),
        ([], {"LOCALVLM_PICTURES": "crayon"}),
    ):
        code, err = chat(*flags, **environment)
        assert code == 2
        assert "crayon" in err
        assert "blocks" in err


def test_a_theme_that_there_is_not_is_refused_with_those_that_there_are(tmp_path):
    assert [theme.name for theme in THEMES] == list(OWN_THEMES)
    settings = tmp_path / "config" / "config.toml"
    settings.parent.mkdir()
    settings.write_text('theme = "bogus"\n')
    for flags, environment in (
        (["--theme", "bogus"], {}),
        ([], {"LOCALVLM_THEME": "bogus"}),
        ([], {"LOCALVLM_HOME": str(tmp_path)}),
    ):
        code, err = chat(*flags, terminals="01", **environment)
        assert code == 2, err
        assert "'bogus' is not one of 'localvlm-dark', 'localvlm-light'" in err
        assert "'nord'" in err
    assert "needs a terminal" in chat("--theme", "nord")[1]


def test_more_pictures_than_a_question_takes_are_refused():
    code, err = chat(*["x.png"] * 33)
    assert code == 2
    assert err.startswith("localvlm: a question takes at most 32 pictures, and 33 were given (")


def test_a_pair_that_fits_in_turn_is_opened_so(monkeypatch):
    """The first pair is as the command says; another one was offered as what it is."""
    asked: list[bool] = []

    def refuse(pipeline, params, reporter) -> None:
        asked.append(pipeline.low_memory)
        assert params["low_memory"] == pipeline.low_memory
        if not pipeline.low_memory:
            raise NotEnoughMemory("the pair takes more than there is")

    monkeypatch.setattr(command, "check_fit", refuse)
    with command.chat.make_context("chat", ["--pair", "demo"], obj=App(lambda verbose: FakeEngine())) as ctx:
        opener = command._opener(ctx, pair_named("demo"))
        with pytest.raises(NotEnoughMemory):
            opener(None, False)
        pipeline, _ = opener("demo", False)
        assert pipeline.low_memory
        pipeline.close()
    assert asked == [False, False, True]


def test_a_pair_that_does_not_fit_is_opened_where_that_was_agreed_to():
    arguments = ["--pair", "demo", "--max-memory", "0.001"]
    with command.chat.make_context("chat", arguments, obj=App(lambda verbose: FakeEngine())) as ctx:
        opener = command._opener(ctx, pair_named("demo"))
        with pytest.raises(NotEnoughMemory):
            opener("demo", False)
        pipeline, _ = opener("demo", False, anyway=True)
        assert pipeline.low_memory
        pipeline.close()


def test_a_guide_in_tiles_looks_at_as_few_tokens_as_ask_plans_with(monkeypatch):
    """All where exits were calibrated on all, and what the user says in any case."""
    monkeypatch.setattr("localvlm.cli.app.TINY", 0)
    for pair, flags, bound in (
        ("demo-tiles", [], 512),
        ("demo-tiles", ["--guide-image-max-tokens", "99"], 99),
        ("demo-tiles", ["--image-max-tokens", "600"], 600),
        ("demo-tiles", ["--method", "sgl+"], 0),
        ("demo", [], 0),
        ("demo", ["--exit-at", "off"], 512),
    ):
        arguments = ["--pair", pair, *flags]
        with command.chat.make_context("chat", arguments, obj=App(lambda verbose: FakeEngine())) as ctx:
            pipeline, _ = command._opener(ctx, pair_named(pair))(None, False)
            assert pipeline.options["guide"].image_tokens == bound, (pair, flags)
            pipeline.close()
