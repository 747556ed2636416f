"""Pictures that come with a question, driven by keys on the fake engine."""

from __future__ import annotations

import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from textual.widgets import Input, TextArea

from localvlm.errors import ImageError
from localvlm.sources import Source
from localvlm.tui import app as app_module
from localvlm.tui import attachments, picture_actions
from localvlm.tui.attachments import MOST, NO_FILE
from localvlm.tui.widgets.chips import Chip, Chips
from localvlm.tui.widgets.saw_panel import SawPanel
from tests.tui.chat_app import answered, ask, attach, chat_app, ended, last_exchange, notes, played_chat, until
from tests.tui.chatting import DEADLINE, picture
from tests.tui.stage import shown


def test_chips_are_reached_and_removed_by_keys():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture(1), picture(2), picture(3))
        await pilot.press("shift+tab")
        assert app.focused is list(app.query(Chip))[2]
        await pilot.press("left", "delete")
        await until(pilot, lambda: len(app.query(Chip)) == 2)
        assert [chip.attached.image.name for chip in app.query(Chip)] == ["1.png", "3.png"]
        await pilot.press("delete", "delete")
        await until(pilot, lambda: not app.query(Chip))
        assert isinstance(app.focused, TextArea)

    played_chat(chat_app(), act)


def test_chips_show_names_of_files_and_folders_where_these_are_the_same():
    names = ["/p/me/a/cat.png", "/p/me/b/cat.png", "/p/me/b/dog.png", "/p/you/b/cat.png", "owl.png"]

    async def act(pilot):
        app = pilot.app

        def labels():
            return [str(chip.render()).split()[1] for chip in app.query(Chip)]

        await attach(pilot, *(replace(picture(1, name), path=Path(name)) for name in names))
        assert labels() == ["a/cat.png", "me/b/cat.png", "dog.png", "you/b/cat.png", "owl.png"]
        assert [str(chip.tooltip) for chip in app.query(Chip)] == names
        for _ in range(2):
            await app.query_one(Chips).drop(app.query(Chip).first())
        assert labels() == ["dog.png", "cat.png", "owl.png"]

    played_chat(chat_app(), act)


@pytest.mark.parametrize("form", ["{}", "'{}'", "file://{}", "{} {}"])
def test_dropped_files_become_chips(photo, form):
    async def act(pilot):
        app = pilot.app
        escaped = str(photo).replace(" ", "%20" if "file" in form else " " if "'" in form else r"\ ")
        text = form.format(*[escaped] * form.count("{}"))
        app.composer.prompt.post_message(paste(text))
        await until(pilot, lambda: len(app.query_one(Chips).attached) == form.count("{}"))
        assert app.query_one(Chips).attached[0].path == photo
        assert app.composer.text == ""

    played_chat(chat_app(), act)


def paste(text):
    from textual.events import Paste

    return Paste(text)


def test_other_pastes_are_text():
    async def act(pilot):
        pilot.app.composer.prompt.post_message(paste("two\r\nlines /no/such.png"))
        await until(pilot, lambda: pilot.app.composer.text != "")
        assert pilot.app.composer.text == "two\nlines /no/such.png"

    played_chat(chat_app(), act)


@pytest.mark.parametrize("size", [(120, 36), (70, 24)])
def test_a_paste_is_for_the_text_whatever_has_the_focus(photo, size):
    async def act(pilot):
        app = pilot.app
        await answered(pilot, "what?")
        leave = "shift+tab" if size[0] > 100 else "f2"  # to a message; to the panel alone, which hides the text
        await pilot.press(leave)
        await until(pilot, lambda: app.focused is not app.composer.prompt)
        app.post_message(paste("two\r\nlines"))
        await until(pilot, lambda: app.composer.text == "two\nlines" and app.focused is app.composer.prompt)
        await pilot.press("!", leave)
        await until(pilot, lambda: app.focused is not app.composer.prompt)
        app.post_message(paste(str(photo).replace(" ", r"\ ")))
        await until(pilot, lambda: [each.path for each in app.query_one(Chips).attached] == [photo])
        assert app.composer.text == "two\nlines!"

    played_chat(chat_app(), act, size)


def test_a_paste_into_a_dialog_is_not_for_the_text_below_it():
    async def act(pilot):
        await pilot.press("f1")
        await until(pilot, lambda: pilot.app.screen.is_modal)
        pilot.app.post_message(paste("copy"))
        await until(pilot, lambda: pilot.app.screen.query_one(Input).value == "copy")
        pilot.app.screen.set_focus(None)
        pilot.app.post_message(paste("text"))
        await pilot.press("escape")
        await until(pilot, lambda: not pilot.app.screen.is_modal)
        assert pilot.app.composer.text == ""

    played_chat(chat_app(), act)


def test_a_picture_that_cannot_be_read_is_told_and_no_chip_is_left(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"\x89PNG nothing")

    async def act(pilot):
        app = pilot.app
        app.composer.write(f"/image {tmp_path / 'bad.png'}")
        await pilot.press("enter")
        await until(pilot, lambda: "bad.png" in notes(app) and not app.query(Chip))

    played_chat(chat_app(), act)


@pytest.mark.parametrize("name", ["{}", "'{}'", "{}/pipe", "https://example.org/cat.png"])
def test_what_is_no_file_is_told_with_what_can_be_given_in_the_chat(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")

    async def act(pilot):
        app = pilot.app
        app.composer.write(f"/image {name.format(tmp_path)}")
        await pilot.press("enter")
        await until(pilot, lambda: NO_FILE in notes(app) and not app.query(Chip))
        assert "--fetch" not in notes(app)

    played_chat(chat_app(), act)


def test_of_several_pictures_those_that_can_be_read_are_added(photo):
    for name in ("a.png", "b.png", "bad.png"):
        (photo.parent / name).write_bytes(b"no picture" if "bad" in name else photo.read_bytes())

    async def act(pilot):
        app = pilot.app
        await app.attach_name(str(photo.parent / "[ab]*.png"))
        await until(pilot, lambda: "bad.png" in notes(app) and len(app.query_one(Chips).attached) == 2)

    played_chat(chat_app(), act)


def test_a_chip_that_is_taken_away_by_a_key_is_told_to_the_panel():
    async def act(pilot):
        app = pilot.app
        await attach(pilot, picture(1), picture(2))
        await until(pilot, lambda: len(app.query_one(SawPanel)._images) == 2)
        await pilot.press("shift+tab", "delete")
        await until(pilot, lambda: len(app.query_one(SawPanel)._images) == 1)

    played_chat(chat_app(), act)


def test_a_question_waits_for_its_pictures(photo):
    async def act(pilot):
        app = pilot.app
        app.composer.write(f"/image {photo}")
        await pilot.press("enter")
        exchange = await ask(pilot, "what?")
        await ended(pilot, exchange)
        assert exchange.images[0].name == str(photo)

    played_chat(chat_app(), act)


def test_a_question_sent_at_the_first_frame_waits_for_the_pictures_the_chat_was_started_with(photo, monkeypatch):
    sent, import_panel = threading.Event(), app_module._import_panel
    monkeypatch.setattr(app_module, "_import_panel", lambda: sent.wait(DEADLINE) and import_panel())

    async def act(pilot):
        app = pilot.app
        assert [chip.named for chip in app.query(Chip)] == [str(photo)]
        await pilot.press(*"what?", "enter")
        assert (app.conversation.exchanges, app.composer.text) == ([], "what?")
        sent.set()
        await until(pilot, lambda: app.conversation.exchanges)
        exchange = last_exchange(pilot)
        await ended(pilot, exchange)
        assert exchange.images[0].name == str(photo)

    played_chat(chat_app(images=(str(photo),)), act, ready=False)


@pytest.mark.parametrize(("keys", "left"), [(["escape"], "what?"), ([*" ever"], "what? ever")])
def test_a_question_that_waits_is_not_sent_where_somebody_stops_it_or_writes_on(photo, monkeypatch, keys, left):
    read, from_name = threading.Event(), attachments.from_name
    monkeypatch.setattr(
        picture_actions, "from_name", lambda name, unread: read.wait(DEADLINE) and from_name(name, unread)
    )

    async def act(pilot):
        app = pilot.app
        await pilot.press(*"what?", "enter")
        await until(pilot, lambda: "reading the picture" in shown(app))
        await pilot.press(*keys)
        read.set()
        await until(pilot, lambda: app.query_one(Chips).attached)
        assert (app.conversation.exchanges, app.composer.text) == ([], left)
        assert "reading the picture" not in shown(app)
        await pilot.press("enter")
        await until(pilot, lambda: app.conversation.exchanges)
        exchange = last_exchange(pilot)
        await ended(pilot, exchange)
        assert (exchange.question, len(exchange.images)) == (left, 1)

    played_chat(chat_app(images=(str(photo),)), act)


def test_a_question_whose_picture_cannot_be_read_is_said_to_wait(photo, monkeypatch):
    may = threading.Event()

    def refused(name, unread):
        may.wait(DEADLINE)
        raise ImageError(f"image {name!r} is damaged")

    monkeypatch.setattr(picture_actions, "from_name", refused)

    async def act(pilot):
        app = pilot.app
        await pilot.press(*"what?", "enter")
        await until(pilot, lambda: "reading the picture" in shown(app))
        may.set()
        await until(pilot, lambda: "is damaged" in notes(app))
        assert "not asked yet" in shown(app)
        assert (app.conversation.exchanges, app.composer.text) == ([], "what?")

    played_chat(chat_app(images=(str(photo),)), act)


def test_pictures_behind_an_at_come_with_the_question(photo):
    async def act(pilot):
        exchange = await ask(pilot, f"what is on @'{photo}' here?")
        await ended(pilot, exchange)
        assert (exchange.question, exchange.images[0].name) == ("what is on here?", str(photo))

    played_chat(chat_app(), act)


def test_ctrl_v_takes_a_picture_from_the_clipboard_else_text(photo, monkeypatch):
    async def act(pilot):
        app = pilot.app
        await pilot.press("ctrl+v")
        await until(pilot, lambda: len(app.query_one(Chips).attached) == 1)
        monkeypatch.setattr("localvlm.clipboard.picture_of_clipboard", none)
        app._clipboard = "copied here"
        await pilot.press("ctrl+v")
        await until(pilot, lambda: app.composer.text == "copied here")

    def none():
        raise ImageError("the clipboard holds no picture")

    monkeypatch.setattr("localvlm.clipboard.picture_of_clipboard", photo.read_bytes)
    played_chat(chat_app(), act)


def test_a_question_sent_while_the_clipboard_is_read_is_not_asked_without_its_picture(monkeypatch):
    read = threading.Event()

    def closed():
        read.wait(DEADLINE)
        raise ImageError("there is no picture in the clipboard")

    monkeypatch.setattr(picture_actions, "from_clipboard", closed)

    async def act(pilot):
        app = pilot.app
        await pilot.press("ctrl+v")
        await until(pilot, lambda: app.query(Chip))
        await pilot.press(*"what?", "enter")
        await until(pilot, lambda: "reading the picture" in shown(app))
        read.set()
        await until(pilot, lambda: "no picture in the clipboard" in notes(app) and not app.query(Chip))
        assert (app.conversation.exchanges, app.composer.text) == ([], "what?")

    played_chat(chat_app(), act)


def test_very_many_pictures_are_not_all_read(photo, monkeypatch):
    """Each is held at its size: a folder dropped on the terminal would take all memory."""
    for number in range(MOST + 1):
        (photo.parent / f"{number}.jpg").touch()
    read = []
    monkeypatch.setattr(picture_actions, "from_name", lambda name, unread: read.append(name) or [picture(len(read))])

    async def act(pilot):
        app = pilot.app
        await app.attach_names([str(photo)] * (MOST + 3))
        await until(pilot, lambda: len(app.query_one(Chips).attached) == MOST)
        await until(pilot, lambda: f"at most {MOST} pictures, and 3 more were given" in notes(app))
        await app.attach_name(str(photo))
        await until(pilot, lambda: "and 1 more was given" in notes(app))
        assert len(read) == MOST

    played_chat(chat_app(), act)
    with pytest.raises(ImageError, match=rf"stands for {MOST + 1} pictures, and a question takes at most {MOST}"):
        attachments.from_name(str(photo.parent / "*.jpg"))


def test_few_pictures_are_decoded_at_once(monkeypatch):
    may, lock, now, most = threading.Event(), threading.Lock(), [], []

    def slow():
        with lock:
            now.append(1)
            most.append(len(now))
            if len(now) == 2:
                may.set()
        assert may.wait(DEADLINE)
        with lock:
            now.pop()
        return picture().image

    monkeypatch.setattr("localvlm.sources.sources", lambda name, apart: [Source(name, slow)])
    threads = [threading.Thread(target=attachments.from_name, args=["x.png"]) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE)
    assert (len(most), max(most)) == (5, 2)
