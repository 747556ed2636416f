"""Tiles that hold no kept token are never encoded, and those that do are as if all were."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import Encoded, ImageLayout, ImagePart, Message, TextPart, Vlm
from localvlm.engine.client import Engine
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import UsageError
from localvlm.images import Image
from localvlm.pipeline import Answer, AskOptions, Pair, Pipeline, TileCounts, VlmFiles
from localvlm.selection import tiles_in_common
from tests import zoo
from tests.asking import load, picture

PAIR = Pair("fake", VlmFiles(Path("guide.gguf"), Path("g.gguf")), VlmFiles(Path("model.gguf"), Path("m.gguf")))
TILED = ("llavanext", "granitevision", "internvl", "idefics3", "smolvlm", "minicpmv46")
SHOWN = picture(190, 100, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module", params=["fake", *TILED])
def tiled(request, native, engine: Engine, folder: Path) -> Iterator[Vlm]:
    if request.param == "fake":
        yield FakeEngine(Script(grid=(3, 4), tiles=(2, 2))).load(folder, folder)
        return
    vlm = load(engine, zoo.build(request.param, folder))
    yield vlm
    vlm.close()


def parts(vlm: Vlm, *pictures: tuple[Encoded, np.ndarray | None]) -> list:
    chat = vlm.chat([Message("user", "what is this?", len(pictures))])
    return [p if isinstance(p, TextPart) else ImagePart(*pictures[p]) for p in chat]


def tokens_of(vlm: Vlm, *tiles: int) -> np.ndarray:
    """The tokens of some tiles of SHOWN, all of the first and one of each other."""
    layout = vlm.layout(190, 100)
    assert layout.tiles is not None
    found = [np.flatnonzero(layout.tiles == tile) for tile in tiles]
    return np.sort(np.concatenate([found[0], *(f[:1] for f in found[1:])])).astype(np.int32)


def test_every_token_is_of_a_tile(tiled: Vlm) -> None:
    layout = tiled.layout(190, 100)
    assert layout.tiles is not None
    assert layout.tiles.shape == (layout.n_tokens,)
    assert layout.n_tiles == len(np.unique(layout.tiles)) > 2
    encoded = tiled.encode(SHOWN)
    assert encoded.n_tiles == layout.n_tiles


def test_kept_tokens_are_those_of_a_full_encoding(tiled: Vlm) -> None:
    """Rows that show nothing, such as the ends of rows, are there in any case; no other row of a tile left out is."""
    full = tiled.encode(SHOWN)
    numbers = np.unique(full.layout.tiles)
    keep = tokens_of(tiled, *numbers[1:3])
    part = tiled.encode(SHOWN, keep=keep)
    assert part.n_tiles == 2
    want, got = tiled.embeddings(full), tiled.embeddings(part)
    there = np.isfinite(got).all(axis=1)
    np.testing.assert_array_equal(got[there], want[there])
    ids = tiled.prefill(parts(tiled, (full, None))).token_ids
    rows = ids[ids < 0]
    expected = np.ones(len(rows), bool)
    expected[rows == -1] = np.isin(full.layout.tiles, numbers[1:3])
    np.testing.assert_array_equal(there, expected)


def test_answers_from_kept_tokens_are_those_of_a_full_encoding(tiled: Vlm) -> None:
    full = tiled.encode(SHOWN)
    keep = tokens_of(tiled, *np.unique(full.layout.tiles)[[0, 2]])
    part = tiled.encode(SHOWN, keep=keep)
    found = []
    for encoded in (full, part):
        prompt = tiled.prefill(parts(tiled, (encoded, keep)), tap=True)
        found.append((prompt.n_past, prompt.token_ids, tiled.logits(), tiled.attention().prompt))
    for want, got in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_tile_that_was_left_out_is_not_read(tiled: Vlm) -> None:
    numbers = np.unique(tiled.layout(190, 100).tiles)
    part = tiled.encode(SHOWN, keep=tokens_of(tiled, numbers[0]))
    for keep, layer in ((None, 0), (tokens_of(tiled, numbers[1]), 0), (tokens_of(tiled, numbers[0]), 1)):
        with pytest.raises(UsageError, match="was not encoded"):
            tiled.prefill(parts(tiled, (part, keep)), layer=layer)
    assert tiled.prefill(parts(tiled, (part, tokens_of(tiled, numbers[0])))).n_kept


def test_more_tiles_are_added_later(tiled: Vlm) -> None:
    full = tiled.encode(SHOWN)
    numbers = np.unique(full.layout.tiles)
    part = tiled.encode(SHOWN, keep=tokens_of(tiled, numbers[0]))
    more = tiled.encode(SHOWN, keep=tokens_of(tiled, *numbers[:2]), onto=part)
    assert (part.n_tiles, more.n_tiles) == (1, 2)
    assert more.id == part.id
    assert tiled.encode(SHOWN, onto=more).n_tiles == full.n_tiles
    np.testing.assert_array_equal(tiled.embeddings(more), tiled.embeddings(full))
    tiled.release(more)
    with pytest.raises(UsageError, match="not in the engine"):
        tiled.encode(SHOWN, onto=more)
    with pytest.raises(UsageError, match="190x80"):
        tiled.encode(SHOWN[:80], onto=full)


def test_the_tower_s_attention_is_that_of_the_tiles_encoded(tiled: Vlm) -> None:
    full = tiled.encode(SHOWN, tower=True)
    keep = tokens_of(tiled, np.unique(full.layout.tiles)[1])
    part = tiled.encode(SHOWN, tower=True, keep=keep)
    assert full.tower is not None
    assert part.tower is not None
    np.testing.assert_array_equal(part.tower[:, keep], full.tower[:, keep])
    assert np.isfinite(full.tower).all()


@pytest.mark.parametrize("name", TILED)
def test_a_bound_leaves_the_overview_alone(name: str, native, engine: Engine, folder: Path) -> None:
    built = zoo.build(name, folder)
    free = load(engine, built)
    whole = free.layout(190, 100)
    free.close()
    bounded = load(engine, built, image_tokens=int(np.bincount(whole.tiles).max()))
    layout = bounded.layout(190, 100)
    bounded.close()
    assert layout.n_tiles == 1 < whole.n_tiles
    assert layout.boxes is not None
    assert layout.boxes[:, :2].min(axis=0).tolist() == [0, 0]
    assert (layout.boxes[:, 2:].max(axis=0) > (170, 90)).all()


# ---- the pipeline


def ask(guide: Script, model: Script, n_pictures: int = 1, **options: object) -> Answer:
    with Pipeline.open(PAIR, engine=FakeEngine({"guide": guide, "model": model})) as pipeline:
        shown = [Image(np.zeros((30, 40, 3), np.uint8), "black")] * n_pictures
        return pipeline.ask(shown, "What?", AskOptions(**options))  # type: ignore[arg-type]


def test_an_answer_tells_how_many_tiles_were_encoded() -> None:
    corner = Script(focus=(0, 0, 0.5, 0.5), grid=(4, 4), tiles=(2, 2))
    few = ask(corner, corner, keep=0.1)
    assert few.tiles == TileCounts(5, 2), "the overview and the corner's own tile"
    assert {i // 16 for i in few.kept_indices} == {0, 1}
    for all_of_them in (ask(corner, corner, keep=None), ask(corner, corner, keep=0.1, layer=1)):
        assert all_of_them.tiles == TileCounts(5, 5)
    none_asked = ask(corner, corner, keep=0.1, method="grid")
    assert none_asked.tiles == TileCounts(5, 5)
    said_by_guide = ask(corner, replace(corner, tiles=(0, 0)), exit_at=0.0)
    assert (said_by_guide.answered_by, said_by_guide.tiles) == ("guide", TileCounts(5, 5))


CORNER = Script(focus=(0, 0, 0.5, 0.5), grid=(4, 4), tiles=(2, 2))


BEYOND = replace(CORNER, focus=(0, 0, 0.55, 0.5))
"""Looks at a little of the next tile too."""


def test_a_price_leaves_tiles_out() -> None:
    free = ask(BEYOND, BEYOND, keep=0.3, tile_price=0.0)
    told = ask(BEYOND, replace(BEYOND, tile_price=40.0), keep=0.3)
    set_by_hand = ask(BEYOND, BEYOND, keep=0.3, tile_price=40.0)
    assert free.tokens.kept == told.tokens.kept == round(0.3 * 80)
    assert told.kept_indices == set_by_hand.kept_indices
    assert (free.tiles.encoded, told.tiles.encoded) == (3, 2)
    assert ask(BEYOND, replace(BEYOND, tile_price=40.0), keep=0.3, layer=1).kept_indices == free.kept_indices


def test_a_tile_that_the_guides_tower_has_run_has_no_price() -> None:
    dear, one = replace(BEYOND, tile_price=40.0), replace(BEYOND, tile_price=40.0, tower="one")
    free = ask(BEYOND, BEYOND, keep=0.3, tile_price=0.0)
    assert ask(replace(BEYOND, tower="other"), one, keep=0.3).kept_indices == ask(BEYOND, dear, keep=0.3).kept_indices
    assert ask(one, one, keep=0.3).kept_indices == free.kept_indices


def test_tiles_in_common_are_those_in_the_same_places(tiled: Vlm) -> None:
    info, layout = tiled.info, tiled.layout(190, 100)
    alike, other = replace(info, tower="a"), replace(info, tower="b")
    assert tiles_in_common(alike, alike, [layout], [layout]) == set(range(layout.n_tiles))
    assert tiles_in_common(alike, other, [layout], [layout]) == frozenset()
    assert tiles_in_common(replace(info, tower=""), replace(info, tower=""), [layout], [layout]) == frozenset()
    assert layout.boxes is not None
    assert layout.tiles is not None
    last = layout.tiles == layout.tiles.max()
    part = ImageLayout(int(last.sum()), layout.boxes[last], None, 0)
    assert tiles_in_common(alike, alike, [part, layout], [layout, layout]) == {
        layout.n_tiles - 1, *range(layout.n_tiles, 2 * layout.n_tiles)
    }  # fmt: skip


def test_the_guide_may_look_at_the_overview_alone() -> None:
    engine = FakeEngine({"guide": CORNER, "model": CORNER})
    with Pipeline.open(PAIR, engine=engine, guide_image_tokens=16) as pipeline:
        shown = [Image(np.zeros((30, 40, 3), np.uint8), "black")]
        answer = pipeline.ask(shown, "What?", AskOptions(keep=0.25))
        assert [vlm.layout(40, 30).n_tiles for vlm in engine.loaded] == [1, 5]
    assert answer.tokens.kept == 20
    assert answer.saliency is not None
    assert set(answer.kept_indices) == {*(0, 1, 4, 5), *range(16, 32)}, "the corner, in the overview and in its tile"


def test_every_picture_keeps_some_tokens_and_the_text_between() -> None:
    guide = Script(focus=(0, 0, 0.5, 0.5), grid=(4, 4))
    with Pipeline.open(PAIR, engine=FakeEngine({"guide": guide, "model": CORNER})) as pipeline:
        shown = [Image(np.zeros((30, 40, 3), np.uint8), "a"), Image(np.zeros((300, 400, 3), np.uint8), "b")]
        answer = pipeline.ask(shown, "What?", AskOptions(keep=0.25))
    first = sum(i < 80 for i in answer.kept_indices)
    assert (first, answer.tokens.kept) == (20, 40), "the same look at both: the size of a picture does not count"


def test_flags_say_price_and_how_much_the_guide_sees(cli) -> None:
    cli.scripts["guide"] = cli.scripts["model"] = replace(BEYOND, tile_price=40.0)

    def tiles(*flags: str) -> int:
        answer = json.loads(cli.ask("--json", "--keep", "0.3", *flags).out)
        assert (answer["tiles"]["total"], answer["tokens"]["kept"]) == (5, 24)
        return answer["tiles"]["encoded"]

    assert tiles() == tiles("--tile-price", "auto") == tiles("--tile-price", "40") == 2
    assert tiles("--tile-price", "off") == tiles("--tile-price", "0") == 3
    cli.ask("--guide-image-max-tokens", "16")
    assert cli.engine is not None
    assert [vlm.layout(40, 30).n_tiles for vlm in cli.engine.loaded] == [1, 5]
    for wrong in ("much", "-1", "nan"):
        run = cli.ask("--tile-price", wrong)
        assert (run.code, repr(wrong) in run.err) == (2, True)
    assert "tiles: 2 of 5 encoded" in cli.ask("-v", "--keep", "0.3").err


@pytest.mark.parametrize("family", ["llava15", "llavanext", "granitevision", "pixtral", "mistral3", "qwen25vl"])
def test_attention_is_added_to_a_picture_encoded_without(family: str, native, engine: Engine, folder: Path) -> None:
    """Whole or in part; and in families whose rows end in one that no tile gives."""
    vlm = load(engine, zoo.build(family, folder))
    full = vlm.encode(SHOWN, tower=True)
    rows = vlm.embeddings(full)
    assert full.tower is not None
    for keep in (None, np.zeros(1, np.int32)):
        begun = vlm.encode(SHOWN, keep=keep)
        assert begun.tower is None
        later = vlm.encode(SHOWN, tower=True, onto=begun)
        np.testing.assert_array_equal(later.tower, full.tower)
        np.testing.assert_array_equal(vlm.embeddings(later), rows)
        assert (later.id, later.n_tiles, later.shared) == (begun.id, full.n_tiles, 0)
    vlm.close()


def test_attention_of_some_tiles_is_not_taken_for_that_of_all(tiled: Vlm) -> None:
    full = tiled.encode(SHOWN, tower=True)
    begun = tiled.encode(SHOWN, tower=True, keep=np.zeros(1, np.int32))
    more = tiled.encode(SHOWN, onto=begun)
    assert (more.n_tiles, more.tower) == (full.n_tiles, None)
    np.testing.assert_array_equal(tiled.encode(SHOWN, tower=True, onto=more).tower, full.tower)


def test_rows_that_are_there_stay_when_attention_is_added(native, engine: Engine, folder: Path) -> None:
    vlm = load(engine, zoo.build("llavanext", folder))
    begun = vlm.encode(SHOWN)
    rows = vlm.embeddings(begun)[:1] + 1
    other = vlm.altered(begun, np.zeros(1, np.int32), rows)
    vlm.encode(SHOWN, tower=True, onto=other)
    np.testing.assert_array_equal(vlm.embeddings(other)[:1], rows)
    later = vlm.encode(SHOWN, tower=True, onto=begun)
    assert later.tower is not None
    assert np.isfinite(later.tower).all(), "the other's attention is its own"
    vlm.close()
