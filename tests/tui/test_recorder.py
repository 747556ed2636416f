"""What the chat keeps, and what is left of what was taken back."""

from __future__ import annotations

import pytest

from localvlm.history import History
from localvlm.tui.exchange import Exchange
from localvlm.tui.recorder import HistoryRecorder, exchange_of


@pytest.fixture
def path(tmp_path):
    return tmp_path / "history.db"


@pytest.fixture
def window(path):
    """Makes recorders as several chats have them, of one file."""
    made = []

    def make(conversation=None):
        made.append(HistoryRecorder(lambda: History.open(path)))
        made[-1].go_on(conversation)
        return made[-1]

    yield make
    for each in made:
        each.close()


def added(recorder: HistoryRecorder, question: str) -> Exchange:
    exchange = Exchange(1, question, status="failed")
    recorder.add(exchange, "fake")
    return exchange


def kept(path) -> dict[str, list[str]]:
    """Questions by title."""
    with History.open(path) as history:
        return {one.title: [turn.question for turn in history.turns(one.id)] for one in history.conversations()}


def test_of_a_question_that_was_taken_back_no_byte_stays(window, path):
    recorder = window()
    recorder.remove(added(recorder, "my password is hunter2, " + "and more " * 30))
    assert (kept(path), recorder.conversation) == ({}, None)
    assert not any(b"hunter2" in file.read_bytes() for file in path.parent.iterdir())
    added(recorder, "what?")
    assert kept(path) == {"what?": ["what?"]}


def test_a_name_given_by_hand_stays(window, path):
    recorder = window()
    first = added(recorder, "what?")
    recorder.history().rename(recorder.conversation, "My cat")
    recorder.remove(first)
    added(recorder, "who?")
    assert kept(path) == {"My cat": ["who?"]}


def test_each_window_takes_back_its_own_turn(window, path):
    here = window()
    added(here, "first?")
    there = window(here.conversation)
    mine, theirs = added(here, "mine?"), added(there, "theirs?")
    here.remove(mine)
    assert kept(path) == {"first?": ["first?", "theirs?"]}
    (resumed, _) = (exchange_of(turn, ()) for turn in there.history().turns(there.conversation))
    here.remove(resumed)
    assert kept(path) == {"theirs?": ["theirs?"]}
    there.remove(theirs)
    assert kept(path) == {}
    here.remove(mine)
    assert here.conversation is None


def test_a_turn_of_a_conversation_that_was_removed_begins_another(window, path):
    recorder = window()
    before = added(recorder, "what?")
    recorder.history().delete(recorder.conversation)
    after = added(recorder, "and?")
    assert kept(path) == {"and?": ["and?"]}
    recorder.remove(before)
    assert kept(path) == {"and?": ["and?"]}
    recorder.remove(after)
    assert kept(path) == {}
