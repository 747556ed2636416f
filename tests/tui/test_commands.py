"""What is typed behind a slash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from localvlm.errors import UsageError
from localvlm.tui.commands import ALIASES, COMMANDS, parsed


@pytest.fixture
def folders(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every path there could be at the root is there, as /private and /System are on macOS."""
    there = os.path.lexists
    monkeypatch.setattr(os.path, "lexists", lambda path: str(path).count("/") == 1 or there(path))


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_a_folder_of_its_name_takes_no_command_away(command):
    argument = "TEXT" if command.takes else ""
    assert parsed(f"/{command.name} {argument}") == (command, argument)


@pytest.mark.usefixtures("folders")
@pytest.mark.parametrize("alias", ALIASES)
def test_nor_one_of_its_other_names(alias):
    assert parsed(f"/{alias}")[0].name == ALIASES[alias]


def test_a_path_is_a_picture_where_something_is_there(photo: Path, monkeypatch):
    command, argument = parsed(str(photo))
    assert (command.name, argument) == ("image", str(photo))
    assert parsed("/no/such/file is this a path?") is None
    with pytest.raises(UsageError, match=r"'/no/such/photo\.png' does not exist"):
        parsed("/no/such/photo.png ")
    assert parsed("/no/such/photo.png what is it?") is None
    with pytest.raises(UsageError, match="there is no command '/photos'"):
        parsed("/photos")
    monkeypatch.setattr(os.path, "lexists", lambda path: path == "/photos")
    assert parsed("/photos")[0].name == "image"
