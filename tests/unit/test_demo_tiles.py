"""The tiled demo pair: scenes with tags, and the rows of its pictures."""

from __future__ import annotations

import hashlib
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

from localvlm.catalog import pair_named
from localvlm.engine.api import ImagePart, LoadOptions
from localvlm.engine.families import describe
from localvlm.engine.gguf_header import read_header
from localvlm.pipeline import Pipeline
from tests.scenes import say

questions = importlib.import_module(f"{demo.__name__}.questions")
scenes = importlib.import_module(f"{demo.__name__}.scenes")
world = importlib.import_module(f"{demo.__name__}.world")

PLAIN = "3fdff55e53f8a6d55af906b1cf2146b287cd589b3fa3d032528f1e52c653ee14"


def tagged(count: int) -> list:
    return [world.sample_tagged(world.scene_rng(world.Stream.VALIDATION, 5, i)) for i in range(count)]


def box(thing) -> tuple[float, float, float, float]:
    """Where a thing's pixels are, as drawn alone."""
    alone = scenes.draw_scene(world.Scene((), 1, (thing,)) if thing.kind == world.TAG else world.Scene((thing,), 1))
    ground = scenes.draw_scene(world.Scene((), 1))
    rows, columns = np.nonzero((np.asarray(alone) != np.asarray(ground)).any(-1))
    return columns.min(), rows.min(), columns.max(), rows.max()


def test_tags_lie_apart_each_in_one_cell_and_one_tile():
    for scene in tagged(30):
        assert 1 <= len(scene.tags) <= 3
        assert len({t.colour for t in scene.tags}) == len(scene.tags)
        boxes = [box(t) for t in (*scene.things, *scene.tags)]
        for i, tag in enumerate(scene.tags):
            left, top, right, bottom = own = boxes[len(scene.things) + i]
            assert bottom - top <= 20
            assert (left // world.TILE, top // world.TILE) == (right // world.TILE, bottom // world.TILE)
            assert (int(tag.y // world.CELL), int(tag.x // world.CELL)) == (tag.row, tag.column)
            assert all(1 < n % 16 < 15 for n in (tag.x, tag.y)), "the centre is well inside a patch"
            for other in boxes:
                apart = left > other[2] or right < other[0] or top > other[3] or bottom < other[1]
                assert other is own or apart


def test_tags_are_no_things():
    """Every question of the plain types has the answer that the same scene without tags has."""
    for scene in tagged(20):
        bare = world.Scene(scene.things, scene.paint)
        for kind in questions.TYPES:
            asked = [questions.question_for(kind, s, np.random.default_rng(3), 6) for s in (scene, bare)]
            assert asked[0] == asked[1]


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("tiled")
    assert scenes.main(["--tiles", "--seed", "3", "--count", "44", "--out", str(folder)]) == 0
    assert len(list(folder.glob("*.png"))) == 44
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def test_a_third_of_a_tiled_set_asks_about_tags(rows):
    asked = Counter(row["type"] for row in rows)
    assert asked == Counter(dict.fromkeys(questions.TYPES, 4) | {"small": 16})
    for index, row in enumerate(rows):
        if row["type"] == "small":
            scene = world.sample_tagged(world.scene_rng(world.Stream.HELD_OUT, 3, index))
            (tag,) = [t for t in scene.tags if t.colour in row["question"] or len(scene.tags) == 1]
            assert tag.text == row["answer"]


def test_no_word_of_a_tag_is_commoner_than_others():
    words = Counter(t.text for scene in tagged(400) for t in scene.tags)
    assert set(words) == set(world.WORDS)
    assert max(words.values()) < 3 * words.total() / len(world.WORDS)


def test_plain_sets_stay_as_they_were(tmp_path):
    """The plain pair's figures are of these scenes: what is added for tags must not redraw them."""
    scenes.write_set(tmp_path, 1, 11)
    text = (tmp_path / "data.jsonl").read_bytes()
    assert hashlib.sha256(text).hexdigest() == PLAIN


def test_rows_come_as_the_engine_lays_them():
    tiles = pytest.importorskip(f"{demo.__name__}.tiles", exc_type=ImportError)
    family = describe(read_header(pair_named("demo-tiles").model.mmproj))
    assert (family.name, family.row_end) == ("llava-next", "v.image_newline")
    (block,) = family.cut(world.SIDE, world.SIDE)
    order = np.where(tiles.LAYOUT == tiles.ROW_END, -1, tiles.LAYOUT)
    np.testing.assert_array_equal(block.order, order)
    picture = scenes.draw_scene(tagged(1)[0])
    for tile, view in zip(block.tiles[1:], tiles.cut(np.asarray(picture)), strict=True):
        np.testing.assert_array_equal(np.asarray(picture.crop(tile.crop)), view)
    boxes = block.boxes(world.SIDE, world.SIDE)
    for tag in tagged(1)[0].tags:
        view, patch = tiles.place_of(tag)
        (row,) = np.flatnonzero(view * 144 + patch == tiles.LAYOUT)
        left, top, right, bottom = boxes[row]
        assert left < tag.x < right
        assert top < tag.y < bottom


def test_the_pair_reads_tags_in_tiles_and_not_in_the_overview():
    right = Counter()
    with Pipeline.open(pair_named("demo-tiles"), LoadOptions(threads=1)) as pipeline:
        vlm = pipeline.vlm("model")
        for scene in tagged(8):
            picture = vlm.encode(np.asarray(scenes.draw_scene(scene)))
            tag = scene.tags[0]
            for name, kept in (("tiles", None), ("overview", np.arange(144, dtype=np.int32))):
                answer = say(vlm, f"What does the small {tag.colour} tag say?", [ImagePart(picture, kept)])
                right[name] += answer.strip() == tag.text
            vlm.release(picture)
    assert right["tiles"] >= 6
    assert right["overview"] <= 2
