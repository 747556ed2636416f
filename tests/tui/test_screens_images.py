"""The image browser: folders by keyboard, names that are hostile, and never a look into a file."""

from __future__ import annotations

import os
import threading

import pytest

from localvlm.tui.screens import images
from localvlm.tui.screens.images import ImageBrowser, Place
from tests.tui.chat_app import pressed_at_once
from tests.tui.chatting import DEADLINE
from tests.tui.stage import idle, played, press, shown

HOSTILE = "bad\x1b[2J\nname\u202e.png"


@pytest.fixture
def folder(tmp_path):
    top = tmp_path / "pictures"
    (top / "holiday").mkdir(parents=True)
    for name in ("a.png", "b photo.jpg", "c.webp", "notes.txt", ".hidden.png", HOSTILE, "[red]x.png"):
        (top / name).write_bytes(b"not a picture")
    (top / "holiday" / "sea.png").write_bytes(b"")
    return top


def browse(place, *keys, look=lambda app: None, size=(80, 24)):
    async def act(pilot):
        await press(pilot, *keys)
        look(pilot.app)

    return played(ImageBrowser(place), act, size)


def seen(place, *keys, **given):
    texts = []
    browse(place, *keys, look=lambda app: texts.append(shown(app)), **given)
    return texts[0]


def test_it_shows_folders_and_pictures_and_hostile_names_escaped(folder):
    text = seen(Place(folder))
    assert "holiday/" in text
    assert "notes.txt" not in text
    assert ".hidden.png" not in text
    assert r"bad\x1b[2J\nname\u202e.png" in text
    assert "[red]x.png" in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_enter_opens_folders_and_takes_a_picture(folder):
    place = Place(folder)
    assert browse(place, "enter", "enter") == [[folder / "holiday" / "sea.png"]]
    assert place.folder == folder / "holiday", "remembered for the next time"
    assert browse(place, "left", "down", "down", "enter") == [[folder / "a.png"]]
    assert browse(place, "escape") == [None]


def test_space_marks_several_across_folders_in_their_order(folder):
    keys = ("+c.w", "space", "backspace", "backspace", "backspace", "+holi", "right", "space")
    assert browse(Place(folder), *keys, "enter") == [[folder / "c.webp", folder / "holiday" / "sea.png"]]
    assert "2 marked" in seen(Place(folder), *keys)
    twice = ("+c.w", "space", "space")
    assert "marked" not in seen(Place(folder), *twice)
    assert browse(Place(folder), "+bad", "enter") == [[folder / HOSTILE]]


def test_typing_filters_and_what_is_not_there_is_told(folder):
    text = seen(Place(folder), "+photo")
    assert "b photo.jpg" in text
    assert "a.png" not in text
    text = seen(Place(folder), "+zebra")
    assert "nothing here is called 'zebra'" in text
    assert browse(Place(folder), "+zebra", "enter", "space") == []
    assert "a.png" in seen(Place(folder), "+zeb", *["backspace"] * 3)


def test_what_is_typed_while_a_folder_is_read_is_of_that_folder(folder, monkeypatch):
    (folder / "holiday" / "b sea.png").touch()
    may, read = threading.Event(), images.listed

    def slow(path, hidden):
        assert path == folder or may.wait(DEADLINE)
        return read(path, hidden=hidden)

    monkeypatch.setattr(images, "listed", slow)

    async def act(pilot):
        pressed_at_once(pilot.app, *"holi", "enter", "b", "enter", "enter")
        await idle(pilot)
        may.set()

    assert played(ImageBrowser(Place(folder)), act) == [[folder / "holiday" / "b sea.png"]]


def test_hidden_files_and_ways_to_other_folders(folder, monkeypatch):
    place = Place(folder)
    assert ".hidden.png" in seen(place, "ctrl+t")
    assert place.hidden
    monkeypatch.setenv("HOME", str(folder.parent))
    assert "pictures/" in seen(Place(folder / "holiday"), "+~")
    text = seen(Place(folder), "+holi/")
    assert "~/pictures/holiday" in text
    assert "sea.png" in text
    up = seen(Place(folder / "holiday"), "left")
    assert "~/pictures" in up
    root = Place(folder)
    browse(root, "+/")
    assert str(root.folder) == folder.anchor


def test_a_folder_that_cannot_be_read_is_told_and_the_one_before_stays(folder, monkeypatch):
    real = os.scandir

    def refusing(path):
        if str(path).endswith("holiday"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("localvlm.tui.paths.os.scandir", refusing)
    place = Place(folder)
    text = seen(place, "enter")
    assert "holiday cannot be read: Permission denied" in text
    assert "a.png" in text
    assert place.folder == folder
    gone = Place(folder / "holiday")
    assert "a.png" in seen(gone), "one that is gone since the last time: the folder above"


def test_it_never_opens_a_file(folder, monkeypatch):
    def refused(*args, **given):
        raise AssertionError(f"a file was opened: {args}")

    monkeypatch.setattr("localvlm.images.load", refused)
    monkeypatch.setattr("PIL.Image.open", refused)
    assert browse(Place(folder), "+a.p", "enter") == [[folder / "a.png"]]


def test_of_a_folder_with_very_many_names_some_are_shown_and_all_are_found(tmp_path):
    for number in range(1100):
        (tmp_path / f"{number}.png").touch()
    assert "100 more: type to find them" in seen(Place(tmp_path))
    assert browse(Place(tmp_path), "+1099", "enter") == [[tmp_path / "1099.png"]]
