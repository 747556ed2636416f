"""Conversations: what each turn prefills, and that nothing said or shown before is mixed up, on the fake engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, TextPart
from localvlm.engine.fake import FakeEngine, FakeVlm, Script
from localvlm.errors import ContextOverflow, EngineCrashed, Interrupted, UsageError
from localvlm.given import Given
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, Session, VlmFiles
from localvlm.pruning import Tokens
from localvlm.session import RESERVE, Turn

PAIR = Pair("fake", *(VlmFiles(Path(f"{role}.gguf"), Path("mmproj.gguf")) for role in ("guide", "model")))
FEW = AskOptions(keep=0.2)
N, FEW_OF = 144, 29


def picture(seed: int) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8), f"{seed}.png")


class Recorded(FakeVlm):
    """Notes the prompts and the pictures that are encoded."""

    def __init__(self, *args):
        super().__init__(*args)
        self.prompts, self.encoded = [], 0

    def encode(self, image, **options):
        self.encoded += 1
        return super().encode(image, **options)

    def prefill(self, parts, **options):
        self.prompts.append(list(parts))
        return super().prefill(parts, **options)


class Recording(FakeEngine):
    def load(self, model, mmproj, options=LoadOptions()):
        super().load(model, mmproj, options)
        self.loaded[-1] = Recorded(self, model.stem, self._scripts[model.stem], options)
        return self.loaded[-1]


def opened(guide=Script("red"), model=Script("dark red"), **options) -> tuple[Recording, Pipeline]:
    engine = Recording({"guide": guide, "model": model})
    return engine, Pipeline.open(PAIR, LoadOptions(**options), engine)


def look_elsewhere(pipeline: Pipeline, focus: tuple[float, float, float, float]) -> None:
    guide = pipeline.vlm("guide")
    guide._script = replace(guide._script, focus=focus)


LEFT, RIGHT = (0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5)


@pytest.mark.parametrize("history", [False, True])
def test_pictures_are_encoded_once_for_each_vlm(history):
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1), picture(1)], history=history) as session:
        for question in ("what?", "where?", "who?"):
            session.ask(question, FEW)
        session.add(picture(2))
        session.ask("and now?", FEW)
        assert [vlm.encoded for vlm in engine.loaded] == [2, 2]
    assert [vlm._images for vlm in engine.loaded] == [{}, {}]


def test_independent_answers_are_those_of_separate_runs():
    _, pipeline = opened()
    questions = ("what?", "where?")
    with pipeline, pipeline.session([picture(1)], history=False) as session:
        runs = [pipeline.ask([picture(1)], question, FEW) for question in questions]
        for apart, question in zip(runs, questions, strict=True):
            got = session.ask(question, FEW)
            assert replace(got, ms={}) == replace(apart, ms={})
        assert got.ran[0] < N < runs[0].ran[0]


def test_a_turn_adds_the_tokens_that_are_not_there_before_its_text():
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        first = session.ask("what?", FEW)
        same = session.ask("where?", FEW)
        assert same.tokens.kept == FEW_OF
        assert (first.earlier, same.earlier) == (0, FEW_OF)
        assert same.ran[1] < 40
        look_elsewhere(pipeline, LEFT)
        other = session.ask("who?", FEW)
        assert other.tokens.kept == len(set(other.kept_indices)) > FEW_OF
        assert other.earlier == FEW_OF
        added = other.tokens.kept - FEW_OF
        assert added < other.ran[1] < added + 40
        parts = engine.loaded[1].prompts[-1]
        places = [i for i, p in enumerate(parts) if isinstance(p, ImagePart)]
        assert [parts[i].again for i in places] == [None, 0]
        assert (parts[places[1] - 1].text, parts[places[1] + 1]) == ("USER: ", TextPart("who?"))
        said = [p.text for p in parts if isinstance(p, TextPart) and not p.special]
        assert said == ["what?", "dark red", "where?", "dark red", "who?"]
        again = session.ask("when?", FEW)
        assert again.tokens.kept == other.tokens.kept
        assert again.ran[1] < 40


def test_the_guide_sees_the_conversation_and_attends_from_the_question():
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        session.ask("where is it?", FEW)
        guide = engine.loaded[0]
        said = [p.text for p in guide.prompts[-1] if isinstance(p, TextPart) and not p.special]
        assert said == ["what?", "dark red", "where is it?"]
        assert guide._rows[0] == len("where is it?\nASSISTANT:")
        assert all(p.keep is None for p in guide.prompts[-1] if isinstance(p, ImagePart))


def test_turns_that_the_guide_answered_are_told_to_the_model_later():
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        first = session.ask("what?", replace(FEW, exit_at=0.0))
        assert (first.answered_by, len(engine.loaded)) == ("guide", 1)
        second = session.ask("where?", FEW)
        assert (second.answered_by, second.tokens.kept) == ("model", FEW_OF)
        parts = engine.loaded[1].prompts[-1]
        assert [p.text for p in parts if isinstance(p, TextPart) and not p.special] == ["what?", "red", "where?"]
        assert isinstance(parts[1], ImagePart)


def test_a_second_picture_never_answers_for_the_first():
    engine, pipeline = opened()
    with pipeline:
        runs = []
        for seed in (1, 2, 1):
            with pipeline.session([picture(seed)], history=False) as session:
                runs.append(session.ask("what?", FEW))
        before = len("^USER: ")
        assert [r.tokens.prompt - r.ran[1] for r in runs] == [0, before, before]
        assert [runs[0].ran[0] - r.ran[0] for r in runs] == [0, before, before]
        one, two = pipeline.session([picture(1)]), pipeline.session([picture(2)])
        for session in (one, two, one):
            session.ask("what?", FEW)
            shown = [p.image.id for p in engine.loaded[1].prompts[-1] if isinstance(p, ImagePart)]
            assert shown == [session._model.encode(session.images)[0].id]
        assert one._model.encode(one.images)[0].id != two._model.encode(two.images)[0].id


def test_a_picture_of_a_later_turn_gets_its_own_tokens():
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        session.add(picture(2))
        answer = session.ask("and here?", FEW)
        assert answer.tokens.image == 2 * N
        assert [len(layout.boxes) for layout in answer.layouts] == [N, N]
        assert any(i >= N for i in answer.kept_indices)
        places = [p for p in engine.loaded[1].prompts[-1] if isinstance(p, ImagePart) and p.again is None]
        assert len({p.image.id for p in places}) == 2
        assert [len(turn.images) for turn in session.turns] == [1, 1]


def test_a_guide_that_sees_less_sees_the_same_in_every_turn():
    engine, pipeline = opened()
    less = replace(FEW, guide_keep=0.5)
    with pipeline, pipeline.session([picture(1)]) as session:
        first = session.ask("what?", less)
        assert (first.tokens.guide, len(first.saliency)) == (N // 2, N)
        unseen = np.setdiff1d(np.arange(N), engine.loaded[0].prompts[-1][1].keep)
        assert np.all(first.saliency[unseen] > 0)
        assert session.ask("where?", less).ran[0] < 60
        session.add(picture(2))
        assert session.ask("and here?", less).tokens.guide == 2 * (N // 2)
        shown = [[p.keep for p in prompt if isinstance(p, ImagePart)] for prompt in engine.loaded[0].prompts]
        assert [len(kept) for kept in shown] == [1, 1, 2]
        assert all(np.array_equal(kept[0], shown[0][0]) for kept in shown)
        session.undo()
        counted = session.ask("who?", replace(less, guide_keep=Tokens(10)))
        assert counted.tokens.guide == 20
        assert [len(p.keep) for p in engine.loaded[0].prompts[-1] if isinstance(p, ImagePart)] == [10, 10]


def test_what_a_guide_that_sees_less_costs_is_less():
    spent = []
    for keep in (None, 0.25):
        _, pipeline = opened()
        with pipeline, pipeline.session([picture(1)]) as session:
            session.ask("what?", replace(FEW, guide_keep=keep))
            spent.append((session._spent, session._last))
            params = pipeline.vlm("guide").info.n_params
    assert spent[0][0] - spent[1][0] == params * (N - N // 4)
    assert spent[0][1] == spent[1][1]


def test_a_guide_that_sees_less_needs_less_room():
    _, pipeline = opened(n_ctx=140)
    with pipeline:
        with pytest.raises(ContextOverflow, match="guide's context"):
            pipeline.ask([picture(1)], "what?", FEW)
        assert pipeline.ask([picture(1)], "what?", replace(FEW, guide_keep=0.5)).answered_by == "model"


def test_undo_takes_a_turn_back_with_its_pictures_and_tokens():
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        before = session._given
        look_elsewhere(pipeline, LEFT)
        session.add(picture(2))
        session.ask("and here?", FEW)
        turn = session.undo()
        assert (turn.question, len(session.turns), len(session.images)) == ("and here?", 1, 2)
        assert session._given is before
        session.ask("and here?", FEW)
        assert [p.text for p in engine.loaded[1].prompts[-1] if isinstance(p, TextPart) and not p.special][-1] == (
            "and here?"
        )
        assert engine.loaded[1].encoded == 2
        session.undo()
        session.undo()
        with pytest.raises(UsageError, match="no turn"):
            session.undo()


def test_a_full_context_loses_nothing():
    _, pipeline = opened(n_ctx=256)
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        with pytest.raises(ContextOverflow, match=r"1 turns.*context has 256") as caught:
            session.ask("x" * 300, FEW)
        assert "new conversation" in caught.value.hint
        assert len(session.turns) == 1
        assert session.ask("where?", FEW).text == "dark red"


def test_nothing_is_no_question_of_a_conversation():
    _, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session, pytest.raises(UsageError, match="empty"):
        session.ask("")
    with pipeline.session([picture(1)], history=False) as session:
        assert session.ask("").text == "dark red"


def test_a_cancelled_question_leaves_no_turn():
    engine, pipeline = opened(model=Script("dark red", token_s=0.001))
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        with pytest.raises(Interrupted):
            session.ask("where?", FEW, on_text=lambda _: engine.cancel())
        assert len(session.turns) == 1
        assert session.ask("where?", FEW).text == "dark red"


def test_a_dead_engine_is_started_anew_and_shown_the_pictures_again():
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        model = engine.loaded[1]
        model._script = replace(model._script, crash_at=model._steps)
        with pytest.raises(EngineCrashed):
            session.ask("where?", FEW)
        assert len(session.turns) == 1
        assert session.ask("where?", FEW).text == "dark red"
        assert len(engine.loaded) == 4
        assert [vlm.encoded for vlm in engine.loaded[2:]] == [1, 1]


# ---- what the guide may cost


def sizes(guide: int, model: int) -> dict[str, Script]:
    return {"guide": Script("red", n_params=guide), "model": Script("dark red", n_params=model)}


FOCI = [LEFT, RIGHT, (0.0, 0.5, 0.5, 1.0), (0.5, 0.5, 1.0, 1.0), (0.25, 0.25, 0.75, 0.75)]


@pytest.mark.parametrize("cost", [0, 2, 5, 10])
def test_image_tokens_and_the_guide_never_cost_more_than_all_image_tokens(cost: int):
    """The guide's rows cost ``cost`` percent of the model's."""
    _, pipeline = opened(**sizes(cost, 100))
    with pipeline, pipeline.session([picture(1)]) as session:
        looks = []
        for turn in range(20):
            if turn:
                look_elsewhere(pipeline, FOCI[turn % len(FOCI)])
            answer = session.ask("where?", FEW)
            assert answer.tokens.kept + session._spent / 100 <= N
            looks.append(answer.ran[0] > 0)
        assert all(looks) == (cost == 0)
        assert looks == sorted(looks, reverse=True)
        if not looks[-1]:
            assert answer.tokens.kept >= int((1 - RESERVE) * N - session._spent / 100)  # the room there was is used
            session.add(picture(2))
            assert session.ask("where?", FEW).ran[0] > 0


def test_what_was_looked_at_most_goes_first():
    a = np.array([0, 5, 1, 3, 0, 2], np.float32)
    given = Given().seen(a, [4, 2]).more(0, [np.array([1], np.int32), np.array([0], np.int32)])
    assert [t.tolist() for t in given.tokens] == [[1], [0]]
    filled = given.more(1, [None, None], 2)
    assert [t.tolist() for t in filled.tokens] == [[1, 3], [0, 1]]
    assert [[g.turn for g in groups] for groups in filled.groups] == [[0, 1], [0, 1]]
    joined = given.more(1, [None, None], 2, in_order=True)
    assert [[g.tokens.tolist() for g in groups] for groups in joined.groups] == [[[1, 3]], [[0, 1]]]
    wider = filled.seen(np.ones(9, np.float32), [4, 2, 3]).more(2, [None, None, np.array([2], np.int32)])
    assert [t.tolist() for t in wider.tokens] == [[0, 1, 2, 3], [0, 1], [2]]


def test_a_picture_that_nothing_was_given_of_is_outside_the_room():
    given = Given().seen(np.ones(4, np.float32), [4]).more(0, [np.array([1], np.int32)])
    both = given.seen(np.arange(7, dtype=np.float32), [4, 3])
    for room, left in ((3, [1, 3]), (2, [1]), (0, [1])):
        later = both.more(1, [np.array([0, 3], np.int32), np.array([0, 2], np.int32)], room)
        assert [t.tolist() for t in later.tokens] == [left, [0, 2]]


@pytest.mark.parametrize(("cost", "turns"), [(5, 12), (50, 2), (200, 1)])
@pytest.mark.parametrize("exit_at", [None, 2.0])
def test_no_picture_is_answered_blind(cost: int, turns: int, exit_at: float | None):
    """Whatever the guide has cost, and however often it is asked again."""
    _, pipeline = opened(**sizes(cost, 100))
    few = replace(FEW, exit_at=exit_at)
    with pipeline, pipeline.session([picture(1)]) as session:
        for turn in range(turns):
            look_elsewhere(pipeline, FOCI[turn % len(FOCI)])
            session.ask("where?", few)
        session.add(picture(2))
        seen = []
        for _ in range(4):
            answer = session.ask("and here?", few)
            seen.append(sum(i >= N for i in answer.kept_indices))
            session.undo()
        assert min(seen) > 0
        assert len(set(seen)) == 1


@pytest.mark.parametrize("last", [AskOptions(preset="paper-9"), AskOptions(keep=1e-9, layer=2)])
def test_tokens_are_dropped_at_a_layer_after_turns_that_dropped_them_before(last: AskOptions):
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        for focus in (LEFT, RIGHT):
            look_elsewhere(pipeline, focus)
            before = session.ask("where?", FEW)
        answer = session.ask("where?", last)
        assert set(before.kept_indices) <= set(answer.kept_indices)
        assert len(answer.kept_indices) < N
        assert answer.layer > 0
        (place,) = [p for p in engine.loaded[1].prompts[-1] if isinstance(p, ImagePart)]
        assert place.again is None  # tokens behind text cannot go into such a prompt
        assert session.ask("where?", FEW).text == "dark red"


def test_what_a_look_costs_is_the_same_in_a_conversation_that_goes_on():
    _, pipeline = opened(**sizes(1, 1000))
    with pipeline, pipeline.session([picture(1)]) as session:
        first = session.ask("what?", FEW)
        session.ask("and where?", FEW)
        fresh = session._last
        session.undo()
        session.undo()
        assert session.ask("what?", FEW).kept_indices == first.kept_indices
        assert session._last >= 0
        assert session._guide.n_tiles == 1
    _, pipeline = opened(**sizes(1, 1000))
    with pipeline, pipeline.session() as session:
        session.restore([Turn("what?", (picture(1),), first)])
        session.ask("and where?", FEW)
        assert fresh <= session._last < fresh + N  # all of the text, and no row of a picture


def test_a_model_without_a_guide_has_conversations_too():
    engine = Recording({"model": Script("dark red")})
    with Pipeline.open(Pair("fake", None, PAIR.model), engine=engine) as pipeline:
        with pipeline.session([picture(1)]) as session:
            for question in ("what?", "where?"):
                answer = session.ask(question, AskOptions("grid", 0.2))
            assert answer.tokens.kept == FEW_OF
            assert session.ask("who?", AskOptions("none", None)).tokens.kept == N
            assert session.ask("why?", AskOptions("none", None)).ran[1] < 40
        assert isinstance(session, Session)


def test_what_the_guide_says_is_told_before_the_model_begins():
    _, pipeline = opened()
    told: list[str] = []
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask(
            "what?", FEW,
            on_text=lambda _: told.append("text"),
            on_stage=told.append,
            on_look=lambda look: told.append(look.answer.text),
        )  # fmt: skip
        assert told.index("guide_decode") < told.index("red") < told.index("encode") < told.index("text")
        told.clear()
        final = session.ask("and?", replace(FEW, exit_at=0.0), on_look=lambda look: told.append(look.answer.text))
        assert (final.answered_by, told) == ("guide", ["red"])


def test_a_conversation_goes_on_in_another_process():
    """The model gets all that was said, its pictures where they came, and what no question came with yet is left."""
    _, first = opened()
    with first, first.session([picture(1)]) as session:
        session.ask("what?", FEW)
        session.add(picture(2))
        session.ask("and here?", FEW)
        turns, images = list(session.turns), [image.name for image in session.images]
    engine, second = opened()
    with second, second.session() as session:
        session.ask("forgotten", FEW)
        session.restore(turns)
        assert [image.name for image in session.images] == images
        answer = session.ask("where?", FEW)
        assert answer.tokens.image == 2 * N
        prompt = [p for p in engine.loaded[-1].prompts[-1] if isinstance(p, ImagePart) or not p.special]
        said = ["what?", "dark red", "and here?", "dark red", "where?"]
        assert [p.text for p in prompt if isinstance(p, TextPart)] == said
        assert [isinstance(p, ImagePart) for p in prompt[:4]] == [True, False, False, True]
        assert session.undo().question == "where?"
        assert session.undo().question == "and here?"
        assert [image.name for image in session.waiting] == ["2.png"]


def test_a_picture_that_waits_may_be_taken_out():
    _, pipeline = opened()
    with pipeline, pipeline.session([picture(1), picture(2)]) as session:
        del session.waiting[0]
        session.ask("what?", FEW)
        assert [image.name for image in session.turns[0].images] == ["2.png"]


@pytest.mark.parametrize("role", ["guide", "model"])
def test_an_engine_that_died_is_started_anew_and_pictures_encoded_again(role):
    engine, pipeline = opened()
    with pipeline, pipeline.session([picture(1)]) as session:
        session.ask("what?", FEW)
        engine.kill()
        with pytest.raises(EngineCrashed):
            pipeline._loaded[role].prefill([])
        assert session.ask("and?", FEW).text == "dark red"
        assert [turn.question for turn in session.turns] == ["what?", "and?"]
        assert [vlm.encoded for vlm in engine.loaded] == [1, 1, 1, 1]
