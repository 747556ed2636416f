"""A vision tower that two VLMs of one worker share runs once for a tile, and no bit of the rows differs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine, RemoteVlm
from localvlm.engine.gguf_header import read_header
from localvlm.engine.shared_tower import Member, Output, Towers
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import Interrupted
from localvlm.pipeline import AskOptions, Pipeline
from tests import shared_tower, zoo
from tests.asking import ONE, picture
from tests.shared_tower import DEMO, halves, with_other_projector

CANNOT = {"granitevision", "qwen3vl"}
"""Families whose projectors read what several blocks gave: they run whole."""


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> zoo.ZooModel:
    return zoo.build("llava15", tmp_path_factory.mktemp("towers"))


@pytest.fixture(scope="module")
def other(row: zoo.ZooModel) -> Path:
    return with_other_projector(row.mmproj, row.mmproj.parent / "mmproj-other.gguf")


# towers


def _member(towers: Towers, mmproj: Path, how: object = None) -> Member:
    return Member(towers, read_header(mmproj), "", how)


def _kept(member: Member, tile: int = 0, n: int = 8) -> Output | None:
    return member.keep(picture(seed=tile), np.full(n, tile, np.float32), None)


def test_towers_are_the_same_by_their_bytes(row: zoo.ZooModel, other: Path, tmp_path: Path) -> None:
    towers, data = Towers(), bytearray(row.mmproj.read_bytes())
    tensors = read_header(row.mmproj).tensors
    last = max((t for t in tensors.values() if t.name.startswith("v.")), key=lambda t: t.offset)
    data[last.offset + last.n_bytes - 1] ^= 1
    changed = tmp_path / "changed.gguf"
    changed.write_bytes(data)
    one, two, three, four = (_member(towers, path) for path in (row.mmproj, other, changed, row.mmproj))
    kept = _kept(one)
    assert kept is not None
    assert two.find(picture(seed=0), False) is kept
    assert four.find(picture(seed=0), False) is kept, "the same file"
    assert three.find(picture(seed=0), False) is None, "one bit of the last tensor differs"
    assert two.find(picture(seed=1), False) is None, "other pixels"
    assert two.find(picture(seed=0).reshape(42, 168, 3), False) is None, "the same bytes in another shape"
    assert two.find(picture(seed=0), True) is None, "no attention was read"
    assert one.find(picture(seed=0), False) is None, "it has the rows already"
    assert _member(towers, other, how="stock").find(picture(seed=0), False) is None


def test_a_fingerprint_tells_towers_apart(row: zoo.ZooModel, other: Path, tmp_path: Path) -> None:
    data = bytearray(row.mmproj.read_bytes())
    data[next(t for t in read_header(row.mmproj).tensors.values() if t.name.startswith("v.blk.0.")).offset] ^= 1
    (changed := tmp_path / "changed.gguf").write_bytes(data)
    one, two, three = (_member(Towers(), path).fingerprint for path in (row.mmproj, other, changed))
    assert one == two != three
    assert one != _member(Towers(), row.mmproj, how="stock").fingerprint
    gone = _member(Towers(), changed)
    changed.unlink()
    assert gone.fingerprint == ""


def test_files_that_have_changed_share_nothing(row: zoo.ZooModel, other: Path, tmp_path: Path) -> None:
    copies = [shutil.copy(path, tmp_path / path.name) for path in (row.mmproj, other)]
    for late in (lambda path: os.utime(path, ns=(1, 1)), os.unlink):
        towers = Towers()
        one, two = (_member(towers, path) for path in copies)
        kept = _kept(one)
        late(copies[0])
        assert two.find(picture(seed=0), False) is None
        assert kept is not None


def test_outputs_are_bounded(row: zoo.ZooModel, other: Path) -> None:
    towers = Towers(limit=3 * 4 * 8)
    one, two = _member(towers, row.mmproj), _member(towers, other)
    held = [_kept(one, tile) for tile in range(3)]
    assert towers.n_bytes == 3 * 4 * 8
    assert _kept(one, 3) is None, "no room: what was kept first stays, as the other begins with it"
    assert two.find(picture(seed=1), False) is held[1]
    held.append(_kept(one, 4))
    assert held[1] is not None
    assert held[1].n_bytes == 0, "what was taken makes room"
    found = [two.find(picture(seed=tile), False) for tile in range(5)]
    assert [f is not None for f in found] == [True, False, True, False, True]
    held.append(_kept(one, 0, n=4))
    assert towers.n_bytes == (8 + 8 + 4) * 4, "in place of the former"
    found.clear()
    held.clear()
    assert towers.n_bytes == 0, "nobody refers to them"


# VLMs


@pytest.fixture
def both(native: None, row: zoo.ZooModel, other: Path) -> Iterator[tuple[LlamaVlm, LlamaVlm, Towers]]:
    towers = Towers()
    first, second = (LlamaVlm(row.model, path, ONE, towers=towers) for path in (row.mmproj, other))
    yield first, second, towers
    for vlm in (first, second):
        vlm.close()


@pytest.mark.parametrize("family", sorted(zoo.FAMILIES))
@pytest.mark.parametrize("tower", [False, True])
def test_rows_and_attention_are_those_of_a_vlm_alone(native: None, tmp_path: Path, family: str, tower: bool) -> None:
    model = zoo.build(family, tmp_path)
    first, second = halves(model, tmp_path)
    found = shared_tower.compare(first, second, model.row.cases[1].images[1].pixels(), tower=tower)
    assert (found.rows, found.attention) == (0.0, 0.0)
    assert found.shared == (0 if family in CANNOT else found.tiles)
    prints = {_member(Towers(), half.mmproj).fingerprint for half in (first, second)}
    assert prints == {""} if family in CANNOT else len(prints) == 1


def _load(engine: Engine, model: zoo.ZooModel, mmproj: Path, **options: bool) -> RemoteVlm:
    return engine.load(model.model, mmproj, LoadOptions(threads=1, **options))  # type: ignore[arg-type]


def test_other_towers_and_stock_ones_share_nothing(engine: Engine, row: zoo.ZooModel, other: Path) -> None:
    reseeded = zoo.write(row.row.reseeded(99), row.mmproj.parent)
    first = _load(engine, row, row.mmproj)
    here = first.encode(picture())
    vlms = [
        _load(engine, reseeded, reseeded.mmproj),
        _load(engine, row, other, stock_tower=True),
        _load(engine, row, other, stock_tiling=True),
    ]
    assert [vlm.encode(picture()).shared for vlm in vlms] == [0, 0, 0]
    stock = _load(engine, row, row.mmproj, stock_tower=True)
    found = stock.encode(picture())
    assert found.shared == 1, "with another stock tower"
    assert np.abs(stock.embeddings(found) - first.embeddings(here)).max() > 0.1
    for vlm in (first, stock, *vlms):
        vlm.close()


def test_one_without_the_tap_shares_nothing(native: None, tmp_path: Path) -> None:
    """In a family whose tower needs no repair, by which the two would else be told apart."""
    halves_ = halves(zoo.build("qwen25vl", tmp_path), tmp_path)
    towers = Towers()
    one, bare = (
        LlamaVlm(half.model, half.mmproj, LoadOptions(threads=1, tap=tap), towers=towers)
        for half, tap in zip(halves_, (True, False), strict=True)
    )
    held = one.encode(picture())
    assert (held.shared, bare.encode(picture()).shared) == (0, 0)
    for vlm in (one, bare):
        vlm.close()


def test_tiles_are_taken_over_one_by_one(both: tuple[LlamaVlm, LlamaVlm, Towers], tmp_path: Path) -> None:
    first, second, towers = both
    pictures = [picture(seed=i) for i in range(3)]
    held = [first.encode(p) for p in pictures[:2]]
    found = [second.encode(p) for p in pictures]
    assert [f.shared for f in found] == [1, 1, 0]
    assert first.encode(pictures[2]).shared == 1, "the other way round"
    attended = second.encode(pictures[0], tower=True)
    assert attended.shared == 0, "no attention was recorded: the tower runs again"
    again = first.encode(pictures[0], tower=True)
    assert again.shared == 1
    assert again.tower is not None
    assert np.isfinite(again.tower).all()
    np.testing.assert_array_equal(again.tower, attended.tower)
    assert towers.n_bytes > 0
    assert len(held) == 2


@pytest.mark.parametrize("end", [LlamaVlm.release, LlamaVlm.close])
def test_nothing_is_kept_of_pictures_that_are_gone(row: zoo.ZooModel, other: Path, native: None, end: Callable) -> None:
    towers = Towers()
    first, second = (LlamaVlm(row.model, path, ONE, towers=towers) for path in (row.mmproj, other))
    pictures = [(vlm, vlm.encode(picture())) for vlm in (first, second)]
    assert pictures[1][1].shared == 1
    for vlm, encoded in pictures:
        assert towers.n_bytes > 0
        end(*((vlm, encoded) if end is LlamaVlm.release else (vlm,)))
    assert towers.n_bytes == 0
    if end is LlamaVlm.release:
        assert second.encode(picture()).shared == 0
        first.close()
        second.close()


def test_cancelled_amid_an_encoding(both: tuple[LlamaVlm, LlamaVlm, Towers]) -> None:
    first, second, towers = both
    right = second.embeddings(whole := second.encode(picture()))
    second.release(whole)
    for vlm in (first, second):
        vlm.cancel()
        with pytest.raises(Interrupted):
            vlm.encode(picture())
        vlm.cancel_reset()
        assert towers.n_bytes == 0
    held = first.encode(picture())
    second.cancel()
    with pytest.raises(Interrupted):
        second.encode(picture())
    second.cancel_reset()
    found = second.encode(picture())
    assert found.shared == 1
    np.testing.assert_array_equal(second.embeddings(found), right)
    assert held.shared == 0


@pytest.mark.parametrize("name", shared_tower.PAIRS)
def test_the_demo_model_goes_on_from_its_guide(native: None, name: str) -> None:
    pair, shown = pair_named(name), [images.load(DEMO)]
    question, options = "What color is the circle?", AskOptions(keep=0.35)
    assert pair.guide is not None
    assert pair.model is not None
    with Pipeline.open(pair, ONE) as pipeline:
        guided = pipeline.ask(shown, question, options)
        found = pipeline.ask(shown, question, AskOptions(method="none", keep=None))
    assert guided.tiles.shared == guided.tiles.encoded > 0
    assert found.tiles.shared == 0, "the guide's picture is gone"
    with Pipeline.open(pair, ONE) as pipeline, Engine() as apart:
        pipeline._loaded["model"] = apart.load(pair.model.model, pair.model.mmproj, ONE)
        alone = pipeline.ask(shown, question, options)
    assert alone.tiles.shared == 0, "in a process of its own"
    assert (alone.text, alone.kept_indices) == (guided.text, guided.kept_indices)
