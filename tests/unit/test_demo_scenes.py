"""The demo scenes and questions: repeatable, balanced, one right answer each, held-out apart from training."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

try:
    demo = importlib.import_module("localvlm.models.demo")
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    demo = importlib.import_module("models.demo")

questions = importlib.import_module(f"{demo.__name__}.questions")
scenes = importlib.import_module(f"{demo.__name__}.scenes")
world = importlib.import_module(f"{demo.__name__}.world")

Stream = world.Stream


def some_scenes(count: int, seed: int = 5) -> list:
    return [world.sample_scene(world.scene_rng(Stream.VALIDATION, seed, i)) for i in range(count)]


def some_turns(count: int) -> list:
    """(scene, turn) pairs of every type."""
    out = []
    for i in range(count):
        rng = world.scene_rng(Stream.VALIDATION, 6, i)
        scene = world.sample_scene(rng)
        for kind in questions.TYPES:
            turn = questions.question_for(kind, scene, rng, int(rng.integers(1 << 16)))
            if turn:
                out.append((scene, turn))
    return out


def matching(scene, words: str) -> list:
    """Every thing that a noun phrase of a question may mean, found without the code that made the phrase."""
    words = words.removeprefix("the ")
    for place in sorted(world.PLACES, key=len, reverse=True):
        if words.endswith((place, f"{place} corner")):
            return [t for t in scene.things if t.place == place]
    parts = words.split()
    colours = [p for p in parts if p in world.COLOURS]
    kinds = [p for p in parts if p in world.KINDS]
    return [t for t in scene.things if all(t.colour == c for c in colours) and all(t.kind == k for k in kinds)]


def test_a_scene_keeps_its_promises():
    for scene in some_scenes(300):
        assert 4 <= len(scene.things) <= 7
        assert 1 <= len(scene.of_kind(world.CARD)) <= 2
        assert len({t.cell for t in scene.things}) == len(scene.things)
        assert len({t.name for t in scene.things}) == len(scene.things)
        assert [t.cell for t in scene.things] == sorted(t.cell for t in scene.things)
        for thing in scene.things:
            assert (int(thing.y // world.CELL), int(thing.x // world.CELL)) == (thing.row, thing.column)
            assert bool(thing.text) == (thing.kind == world.CARD)


def test_the_same_seed_draws_the_same_picture():
    first, again = (some_scenes(3) for _ in range(2))
    assert first == again
    assert scenes.draw_scene(first[0]).tobytes() == scenes.draw_scene(again[0]).tobytes()
    assert scenes.draw_scene(first[0]).tobytes() != scenes.draw_scene(first[1]).tobytes()


def test_streams_never_share_a_seed():
    draws = {
        tuple(world.scene_rng(stream, seed, index).integers(0, 2**63, 2))
        for stream in Stream
        for seed in range(4)
        for index in range(50)
    }
    assert len(draws) == len(Stream) * 4 * 50


def test_most_of_a_picture_is_ground():
    for scene in some_scenes(20):
        pixels = np.asarray(scenes.draw_scene(scene), np.int16)
        assert (pixels.min(-1) > 195).mean() > 0.7


def test_every_noun_phrase_means_one_thing():
    for scene, turn in some_turns(200):
        text = turn.question.rstrip("?.")
        if turn.type == "colour":
            noun = text.split(" the ")[-1] if " thing " not in text else text
            (thing,) = matching(scene, noun)
            assert turn.answer == thing.colour
        elif turn.type == "shape":
            (thing,) = matching(scene, text)
            assert turn.answer == thing.kind
        elif turn.type == "where":
            noun = text.replace("part of the picture", "part")
            (thing,) = matching(scene, noun.split("the ")[-1])
            assert turn.answer == thing.place
        elif turn.type == "read":
            (thing,) = matching(scene, text)
            assert turn.answer == thing.text


def test_counts_and_presence_are_true():
    for scene, turn in some_turns(200):
        words = turn.question.rstrip("?.").replace(" things", "").split()
        if turn.type == "count":
            names = {f"{k}es" if k == "cross" else f"{k}s": k for k in world.KINDS}
            found = [t for t in scene.things if t.colour in words or t.kind in {names.get(w) for w in words}]
            assert turn.answer == questions.COUNTS[len(found)]
        elif turn.type == "exist":
            assert turn.answer == ("yes" if matching(scene, " ".join(words)) else "no")


def test_neighbours_are_the_nearest_in_row_or_column():
    for scene, turn in some_turns(200):
        if turn.type != "relation":
            continue
        text = turn.question.rstrip("?")
        (thing,) = matching(scene, text.split("the ")[-1])
        down = ("below" in text) - ("above" in text)
        right = ("right of" in text) - ("left of" in text)
        ahead = [
            (abs(t.row - thing.row) + abs(t.column - thing.column), t.name, t.place)
            for t in scene.things
            if ((t.row - thing.row) * down > 0 and t.column == thing.column)
            or ((t.column - thing.column) * right > 0 and t.row == thing.row)
        ]
        _, name, place = min(ahead)
        assert turn.answer == f"{place} {name}"


def test_captions_and_descriptions_name_everything():
    for index, scene in enumerate(some_scenes(30)):
        rng = np.random.default_rng(index)
        assert questions.describe(scene, rng).answer.count(",") == len(scene.things) - 1
        caption = questions.caption(scene, rng).answer
        assert all(t.kind in caption and t.colour in caption for t in scene.things)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, request) -> tuple[Path, list[dict]]:
    out = tmp_path_factory.mktemp("scenes")
    drawn = scenes.draw_scene
    scenes.draw_scene = lambda scene: drawn(scene).resize((8, 8))  # the answers matter here, not the pixels
    try:
        assert scenes.main(["--seed", "9", "--count", "140", "--out", str(out)]) == 0
    finally:
        scenes.draw_scene = drawn
    return out, [json.loads(line) for line in (out / "data.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_written_set_has_every_type_in_equal_parts(rows):
    out, table = rows
    assert len(table) == len(list(out.glob("*.png"))) == 140
    assert set(Counter(r["type"] for r in table).values()) == {20}
    assert all((out / r["image"]).is_file() and r["question"] and r["answer"] for r in table)
    assert all(1 <= len(r["answer"].split()) <= 6 for r in table)


def test_no_answer_can_be_guessed_without_the_picture():
    answers: dict[str, Counter] = {kind: Counter() for kind in questions.TYPES}
    for i in range(1400):
        rng = world.scene_rng(Stream.HELD_OUT, 77, i)
        kind, target, turn = questions.TYPES[i % 7], int(rng.integers(1 << 16)), None
        while turn is None:
            turn = questions.question_for(kind, world.sample_scene(rng), rng, target)
        answers[kind][turn.answer] += 1
    most = {kind: max(c.values()) / c.total() for kind, c in answers.items()}
    assert all(share < 0.6 for share in most.values()), most
    assert sum(most.values()) / len(most) < 0.3, most


def test_describe_rows_are_added_on_request(tmp_path, monkeypatch):
    monkeypatch.setattr(scenes, "draw_scene", lambda scene, draw=scenes.draw_scene: draw(scene).resize((8, 8)))
    assert scenes.write_set(tmp_path, 1, 7, with_describe=True) == 14
    table = [json.loads(line) for line in (tmp_path / "data.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(r["type"] for r in table)["describe"] == 7
