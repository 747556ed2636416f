"""The conversation without a screen: what is told, in which order, and that nothing of it is ever lost."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from dataclasses import replace

import pytest

from localvlm.answers import AskOptions
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import EngineCrashed, Interrupted, ModelNotFound, StorageError
from localvlm.tui import events
from localvlm.tui.conversation import Conversation
from tests.tui.chatting import DEADLINE, Heard, fake_opener, open_conversation, pair_of, picture

SLOW = 0.2
"""Seconds a token takes of an answer that is to be stopped before its end."""
FINAL = AskOptions(exit_at=0.0)


@contextmanager
def talking(*args, **options):
    conversation, heard, engine = open_conversation(*args, **options)
    try:
        yield conversation, heard, engine
    finally:
        conversation.close()
        conversation._thread.join(DEADLINE)
        assert not conversation._thread.is_alive()


def names(heard):
    return [type(e).__name__ for e in heard.events]


def test_a_question_is_told_stage_by_stage():
    with talking() as (conversation, heard, _):
        exchange = conversation.ask("what?", [picture()])
        answered = heard.wait(events.Answered)
    assert (answered.turn, answered.answer.text) == (exchange.turn, "dark red")
    assert (exchange.status, exchange.text, exchange.guide_text) == ("done", "dark red", "red")
    assert heard.of(events.Opened)[0].pair == "fake"
    assert [e.name for e in heard.of(events.StageBegan) if e.turn] == [
        "load", "guide_encode", "guide_prefill", "guide_decode", "encode", "prefill", "decode",
    ]  # fmt: skip
    told = names(heard)
    assert told.index("Asked") < told.index("Looked") < told.index("Text") < told.index("Answered")
    assert "".join(e.text for e in heard.of(events.Text)) == "dark red"


def test_an_answer_of_the_guide_is_final():
    with talking(options=FINAL) as (conversation, heard, engine):
        conversation.ask("what?", [picture()])
        assert heard.wait(events.Answered).answer.answered_by == "guide"
        assert len(engine.loaded) == 1


def test_options_that_are_set_are_of_the_next_question():
    with talking(options=replace(FINAL, preset="paper-35", keep=0.35)) as (conversation, heard, _):
        conversation.ask("what?", [picture()])
        conversation.set(keep=0.1, exit_at=None)
        conversation.ask("and?")
        later = heard.wait(events.Answered, 2).answer
        assert (later.keep, later.answered_by, later.tokens.kept) == (0.1, "model", 14)
        conversation.set(method="grid")
        conversation.ask("and now?")
        assert heard.wait(events.Answered, 3).answer.method == "grid"


def test_a_method_of_its_own_leaves_early_exit_out():
    with talking(options=FINAL) as (conversation, heard, _):
        conversation.set(method="grid")
        conversation.ask("what?", [picture()])
        answer = heard.wait(events.Answered).answer
        assert (answer.answered_by, answer.threshold) == ("model", None)


def test_a_bad_option_fails_the_question_and_no_more():
    with talking() as (conversation, heard, _):
        conversation.set(method="no-such")
        conversation.ask("what?", [picture()])
        assert "no-such" in heard.wait(events.Failed).error.message
        conversation.set(method="sgl")
        conversation.ask("what?", [picture()])
        assert heard.wait(events.Answered).answer.text == "dark red"


@pytest.mark.parametrize("stage", ["guide_decode", "decode"])
def test_a_question_can_be_stopped_and_the_next_one_asked(stage):
    slow = {
        "guide_decode": {"guide": Script("red " * 999, token_s=SLOW)},
        "decode": {"model": Script("dark " * 999, token_s=SLOW)},
    }
    with talking(**slow[stage]) as (conversation, heard, engine):
        exchange = conversation.ask("what?", [picture()])
        while not any(e.name == stage for e in heard.of(events.StageBegan)):
            heard.wait(events.StageBegan, len(heard.of(events.StageBegan)) + 1)
        if stage == "decode":
            heard.wait(events.Text)
        assert conversation.cancel()
        stopped = heard.wait(events.Interrupted)
        assert exchange.status == "interrupted"
        assert stopped.partial == exchange.text
        assert bool(stopped.partial) == (stage == "decode")
        assert not conversation.cancel()
        for vlm in engine.loaded:
            vlm._script = replace(vlm._script, answer="red", token_s=0.0)
        conversation.ask("what?", [picture()])
        assert heard.wait(events.Answered).answer.text == "red"


def test_a_question_that_waits_can_be_stopped_too():
    with talking(model=Script("dark " * 99, token_s=SLOW)) as (conversation, heard, _):
        conversation.ask("first?", [picture()])
        second = conversation.ask("second?")
        heard.wait(events.Text)
        conversation.cancel()
        assert heard.wait(events.Interrupted, 2).turn == second.turn
        assert len(heard.of(events.Asked)) == 1


def test_a_stop_that_comes_too_late_does_not_stop_the_next_question():
    with talking() as (conversation, heard, engine):
        conversation.ask("what?", [picture()])
        heard.wait(events.Answered)
        engine.cancel()
        conversation.ask("and?")
        assert heard.wait(events.Answered, 2).answer.text == "dark red"


@pytest.mark.parametrize("stops", [True, False])
def test_closing_does_not_wait_for_a_model_that_loads(monkeypatch, stops):
    monkeypatch.setattr("localvlm.tui.conversation.GRACE_S", DEADLINE if stops else 0.1)
    worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    loading = threading.Event()

    class Loading(FakeEngine):
        pid = worker.pid

        def load(self, *_args, **_options):
            loading.set()
            if stops:
                assert self.wait(DEADLINE)
                raise Interrupted
            worker.wait(DEADLINE)
            raise EngineCrashed("the engine was ended by SIGKILL")

    with worker:
        conversation = Conversation(fake_opener(Loading()), Heard())
        conversation.start()
        assert loading.wait(DEADLINE)
        conversation.close()
        assert not conversation._thread.is_alive()
        assert worker.poll() == (None if stops else -signal.SIGKILL)
        worker.kill()


def test_undo_and_edit_leave_no_trace_of_the_turn():
    with talking() as (conversation, heard, _):
        conversation.ask("what?", [picture()])
        heard.wait(events.Answered)
        again = conversation.edit("who?", [picture(2)])
        assert heard.wait(events.Undone).turn == 1
        heard.wait(events.Answered, 2)
        assert [turn.question for turn in conversation._session.turns] == ["who?"]
        assert [image.name for image in conversation._session.images] == ["2.png"]
        assert conversation.undo() is again
        heard.wait(events.Undone, 2)
        assert conversation.exchanges == conversation._session.turns == conversation._session.images == []
        assert conversation.undo() is None


def test_undo_stops_the_question_that_runs():
    with talking(model=Script("dark " * 999, token_s=SLOW)) as (conversation, heard, _):
        conversation.ask("what?", [picture()])
        heard.wait(events.Text)
        conversation.undo()
        heard.wait(events.Undone)
        assert [type(e) for e in heard.events[-2:]] == [events.Interrupted, events.Undone]


def test_regenerate_asks_the_model_where_the_guide_had_answered_and_then_samples():
    with talking(options=FINAL) as (conversation, heard, _):
        assert conversation.regenerate() is None
        conversation.ask("what?", [picture()])
        assert heard.wait(events.Answered).answer.answered_by == "guide"
        conversation.regenerate()
        assert heard.wait(events.Answered, 2).answer.answered_by == "model"
        assert heard.wait(events.Asked, 2).note == "the model is asked this time"
        sampled = conversation.regenerate()
        heard.wait(events.Answered, 3)
        assert (sampled.options.temp, sampled.options.seed) == (0.7, 1)
        assert len(conversation._session.turns) == 1
        assert [e.status for e in conversation.exchanges] == ["done"]


def test_another_pair_goes_on_with_what_was_said():
    opened: list[tuple[str | None, bool]] = []
    heard = Heard()
    engines = [FakeEngine({"guide": Script("red"), "model": Script(f"dark red {i}")}) for i in range(2)]

    def opener(name, private, *, anyway=False):
        return fake_opener(engines[len(opened)], opened=opened)(name, private)

    conversation = Conversation(opener, heard)
    conversation.start()
    conversation.ask("what?", [picture()])
    heard.wait(events.Answered)
    conversation.switch("other")
    assert heard.wait(events.Opened, 2).pair == "other"
    assert not engines[0].alive
    conversation.ask("and?")
    assert heard.wait(events.Answered, 2).answer.text == "dark red 1"
    assert [t.question for t in conversation._session.turns] == ["what?", "and?"]
    conversation.close()
    assert opened == [(None, False), ("other", False)]


def test_a_pair_that_cannot_be_opened_leaves_the_one_before():
    heard, engine = Heard(), FakeEngine()

    def opener(name, private, *, anyway=False):
        if name == "none":
            raise ModelNotFound("there is no pair 'none'")
        return fake_opener(engine)(name, private)

    conversation = Conversation(opener, heard)
    conversation.start()
    heard.wait(events.Opened)
    conversation.switch("none")
    assert "none" in heard.wait(events.Failed).error.message
    heard.wait(events.Opened, 2)
    assert not conversation.exchanges, "it is there without being asked"
    conversation.ask("what?", [picture()])
    assert heard.wait(events.Answered).answer.text == "red"
    conversation.close()


def test_private_begins_anew_and_is_told_to_what_opens():
    opened: list[tuple[str | None, bool]] = []
    heard, kept = Heard(), Kept()
    conversation = Conversation(fake_opener(FakeEngine(), opened=opened), heard, kept)
    conversation.start()
    conversation.ask("what?", [picture()])
    heard.wait(events.Answered)
    conversation.go_private()
    conversation.ask("secret?", [picture()])
    heard.wait(events.Answered, 2)
    conversation.close()
    assert opened == [(None, False), (None, True)]
    assert [e.question for e in kept.added] == ["what?"]


# ---- the engine dies ---------------------------------------------------------------------------------------------


def test_an_engine_that_dies_while_it_waits_is_started_again():
    with talking() as (conversation, heard, engine):
        conversation.ask("what?", [picture()])
        heard.wait(events.Answered)
        engine.kill()
        assert heard.wait(events.Died).turn == 0
        heard.wait(events.Restarted)
        conversation.ask("and?")
        assert heard.wait(events.Answered, 2).answer.text == "dark red"
        assert [turn.question for turn in conversation._session.turns] == ["what?", "and?"]


@pytest.mark.parametrize("role", ["guide", "model"])
@pytest.mark.parametrize("step", range(1, 7))
def test_an_engine_that_dies_at_any_step_loses_nothing(role, step):
    with talking() as (conversation, heard, engine):
        conversation.ask("what?", [picture()])
        heard.wait(events.Answered)
        dying = {vlm.info.name: vlm for vlm in engine.loaded}[role]
        dying._script = replace(dying._script, crash_at=dying._steps + step)
        asked = 1
        while not heard.of(events.Died):
            conversation.ask(f"and {asked}?", [picture(asked + 1)])
            asked += 1
            heard.wait((events.Answered, events.Died), asked)
        died = heard.of(events.Died)[0]
        failed = conversation.exchanges[-1]
        assert (failed.turn, failed.status, failed.text) == (died.turn, "failed", died.partial)
        heard.wait(events.Restarted)
        conversation.regenerate()
        done = heard.wait(events.Answered, asked)
        assert done.answer.text == "dark red"
        assert [t.question for t in conversation._session.turns] == ["what?", *(f"and {i}?" for i in range(1, asked))]
        assert done.answer.tokens.image == 144 * asked


def test_an_engine_that_cannot_start_again_is_told_once_and_tried_with_the_next_question():
    with talking() as (conversation, heard, engine):
        conversation.ask("what?", [picture()])
        heard.wait(events.Answered)
        scripts = dict(engine._scripts)
        engine._scripts["guide"] = replace(scripts["guide"], load_error=ModelNotFound("the file is gone"))
        engine.kill()
        heard.wait(events.Died)
        assert "gone" in heard.wait(events.Failed).error.message
        conversation.ask("and?")
        heard.wait(events.Failed, 2)
        engine._scripts["guide"] = scripts["guide"]
        conversation.regenerate()
        assert heard.wait(events.Answered, 2).answer.text == "dark red"
        assert len(heard.of(events.Died)) == 1


def test_what_nobody_thought_of_is_told_and_the_next_question_asked():
    with talking() as (conversation, heard, _):
        heard.wait(events.Opened)
        conversation.call(lambda: setattr(conversation._session, "_messages", None))
        conversation.ask("what?", [picture()])
        assert "defect" in heard.wait(events.Failed).error.hint
        conversation.call(lambda: delattr(conversation._session, "_messages"))
        conversation.ask("what?", [picture()])
        assert heard.wait(events.Answered).answer.text == "dark red"


# ---- what is kept ------------------------------------------------------------------------------------------------


class Kept:
    """A recorder in memory."""

    def __init__(self, error=None):
        self.added, self.removed, self.places, self.closed, self.error = [], [], [], False, error

    def add(self, exchange, pair):
        if self.error:
            raise self.error
        self.added.append(replace(exchange))
        exchange.kept = len(self.added)
        self.pair = pair

    def remove(self, exchange):
        self.removed.append(exchange.question)

    def go_on(self, stored):
        self.places.append(stored)

    def close(self):
        self.closed = True


def test_turns_that_are_done_or_stopped_or_failed_are_kept():
    kept = Kept()
    with talking(model=Script("dark red" * 50, token_s=SLOW), recorder=kept) as (conversation, heard, engine):
        conversation.ask("stopped?", [picture()])
        heard.wait(events.Text)
        conversation.cancel()
        heard.wait(events.Interrupted)
        for vlm in engine.loaded:
            vlm._script = replace(vlm._script, token_s=0.0)
        conversation.ask("done?", [picture()])
        heard.wait(events.Answered)
        conversation.set(method="no-such")
        conversation.ask("failed?")
        heard.wait(events.Failed)
        conversation.undo()
        heard.wait(events.Undone)
        conversation.restore([], 7)
    assert [(e.question, e.status) for e in kept.added] == [
        ("stopped?", "interrupted"), ("done?", "done"), ("failed?", "failed")
    ]  # fmt: skip
    assert kept.added[0].text.startswith("d")
    assert (kept.removed, kept.places, kept.closed, kept.pair) == (["failed?"], [7], True, "fake")


def test_what_cannot_be_kept_is_told_and_the_answer_is_there():
    with talking(recorder=Kept(StorageError("the disk is full"))) as (conversation, heard, _):
        exchange = conversation.ask("what?", [picture()])
        assert heard.wait(events.NotSaved).error.message == "the disk is full"
        assert (exchange.status, exchange.text) == ("done", "dark red")
        conversation.ask("and?")
        heard.wait(events.Answered, 2)


def test_a_conversation_is_gone_on_with():
    with talking() as (first, heard, _):
        first.ask("what?", [picture()])
        heard.wait(events.Answered)
        said = list(first.exchanges)
    with talking() as (second, heard, _):
        second.ask("forgotten")
        second.restore(said)
        last = second.ask("and?")
        heard.answered(last)
        assert [t.question for t in second._session.turns] == ["what?", "and?"]
        assert [e.turn for e in second.exchanges] == [2, 3]


def test_a_conversation_can_be_gone_on_with_before_anything_is_opened():
    with talking() as (first, heard, _):
        first.ask("what?", [picture()])
        heard.wait(events.Answered)
        said = list(first.exchanges)
    heard, engine = Heard(), FakeEngine()
    second = Conversation(fake_opener(engine), heard)
    second.restore(said)
    second.start()
    second.ask("and?")
    heard.wait(events.Answered)
    assert [t.question for t in second._session.turns] == ["what?", "and?"]
    second.close()
    assert pair_of("a").name == "a"
