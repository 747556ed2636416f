"""Encoded pictures are kept on disk where that is asked, and are then what the tower gave, bit for bit."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import read_header
from localvlm.engine.image_cache import ImageCache
from localvlm.engine.kept_files import keep_file
from localvlm.engine.vlm import LlamaVlm
from tests import zoo
from tests.asking import ask, picture

ROWS = np.arange(12, dtype=np.float32).reshape(3, 4)
SEEN = np.array([[0.5, np.nan, 0.25], [0.0, 1.0, 2.0]], np.float32)
PIXELS = picture(8, 6)


@pytest.fixture
def cache(tmp_path: Path) -> ImageCache:
    return ImageCache(tmp_path / "images", "a tower", 1 << 20)


def files(folder: Path) -> list[Path]:
    return sorted((folder / "images").iterdir())


def test_what_was_kept_is_found(cache: ImageCache, tmp_path: Path) -> None:
    assert cache.find(PIXELS, 3, 4, 0) is None
    cache.keep(PIXELS, ROWS, SEEN)
    (path,) = files(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    found = cache.find(PIXELS, 3, 4, 2)
    assert found is not None
    np.testing.assert_array_equal(found[0], ROWS)
    np.testing.assert_array_equal(found[1], SEEN)
    plain = cache.find(PIXELS, 3, 4, 0)
    assert plain is not None
    assert plain[1] is None


@pytest.mark.parametrize("pixels", [picture(8, 6, 2), PIXELS.reshape(8, 6, 3)])
def test_other_pixels_are_others(cache: ImageCache, pixels: np.ndarray) -> None:
    cache.keep(PIXELS, ROWS, None)
    assert cache.find(pixels, 3, 4, 0) is None


def test_another_tower_or_shape_is_another(cache: ImageCache, tmp_path: Path) -> None:
    cache.keep(PIXELS, ROWS, None)
    assert ImageCache(tmp_path / "images", "another", 1 << 20).find(PIXELS, 3, 4, 0) is None
    for rows, width, layers in ((4, 3, 0), (3, 5, 0), (3, 4, 1)):
        assert cache.find(PIXELS, rows, width, layers) is None
    cache.keep(PIXELS, ROWS, SEEN)
    assert cache.find(PIXELS, 3, 4, 2) is not None


@pytest.mark.parametrize("at", [0, 31, 32, 36, 40, 44, -1])
def test_a_damaged_file_is_as_none(cache: ImageCache, tmp_path: Path, at: int) -> None:
    cache.keep(PIXELS, ROWS, SEEN)
    (path,) = files(tmp_path)
    whole = bytearray(path.read_bytes())
    whole[at] ^= 0x40
    path.write_bytes(whole)
    assert cache.find(PIXELS, 3, 4, 2) is None
    cache.keep(PIXELS, ROWS, SEEN)
    assert cache.find(PIXELS, 3, 4, 2) is not None


@pytest.mark.parametrize("size", [0, 10, 43, 44, 100, -1, 1])
def test_a_file_of_another_length_is_as_none(cache: ImageCache, tmp_path: Path, size: int) -> None:
    cache.keep(PIXELS, ROWS, SEEN)
    (path,) = files(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size] if size != 1 else whole + b"x")
    assert cache.find(PIXELS, 3, 4, 2) is None


def test_a_file_in_the_place_of_another_is_as_none(cache: ImageCache, tmp_path: Path) -> None:
    cache.keep(PIXELS, ROWS, None)
    (path,) = files(tmp_path)
    cache.keep(picture(8, 6, 2), ROWS + 1, None)
    (other,) = set(files(tmp_path)) - {path}
    other.replace(path)
    assert cache.find(PIXELS, 3, 4, 0) is None


def test_those_asked_for_longest_ago_go_first(tmp_path: Path) -> None:
    pictures = [picture(8, 6, seed) for seed in range(4)]
    size = 44 + ROWS.nbytes
    cache = ImageCache(tmp_path / "images", "a tower", 3 * size)
    for age, pixels in enumerate(pictures[:3]):
        cache.keep(pixels, ROWS, None)
        for path in files(tmp_path):
            os.utime(path, (path.stat().st_mtime - 10 * (3 - age),) * 2)
    assert cache.find(pictures[0], 3, 4, 0) is not None
    cache.keep(pictures[3], ROWS, None)
    assert [cache.find(pixels, 3, 4, 0) is not None for pixels in pictures] == [True, False, True, True]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 3 * size
    ImageCache(tmp_path / "images", "a tower", size - 1).keep(pictures[1], ROWS, None)
    assert len(files(tmp_path)) == 3


def test_a_folder_that_cannot_be_written_to_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "images").write_text("a file")
    cache = ImageCache(tmp_path / "images", "a tower", 1 << 20)
    cache.keep(PIXELS, ROWS, None)
    assert cache.find(PIXELS, 3, 4, 0) is None


def test_what_could_not_be_written_whole_is_not_there(tmp_path: Path) -> None:
    """Another run's folder stands where the file belongs."""
    (tmp_path / "name").mkdir()
    keep_file(tmp_path / "name", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["name"]


_KEEP_MANY = """
import sys
from pathlib import Path
import numpy as np
from localvlm.engine.image_cache import ImageCache
cache = ImageCache(Path(sys.argv[1]), "a tower", 4000)
for i in range(60):
    pixels = np.full((2, 2, 3), i % 20, np.uint8)
    found = cache.find(pixels, 8, 8, 0)
    assert found is None or (found[0] == i % 20).all()
    cache.keep(pixels, np.full((8, 8), i % 20, np.float32), None)
"""


def test_runs_at_a_time_see_whole_files(tmp_path: Path) -> None:
    runs = [subprocess.Popen([sys.executable, "-c", _KEEP_MANY, str(tmp_path / "images")]) for _ in range(3)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    assert all(path.stat().st_size == 300 for path in files(tmp_path))


# on llama.cpp


@pytest.fixture(scope="module", params=["llava15", "llavanext", "qwen25vl", "pixtral"])
def model(request, native: None, tmp_path_factory: pytest.TempPathFactory) -> zoo.ZooModel:
    return zoo.build(request.param, tmp_path_factory.mktemp("zoo"))


def encoded(model: zoo.ZooModel, options: LoadOptions, tower: bool = True) -> tuple[list[np.ndarray], list[int]]:
    """Rows, attention, and an answer of a VLM of its own; how often its tower ran."""
    vlm = LlamaVlm(model.model, model.mmproj, options)
    runs: list[int] = []
    run = vlm.tower._encode_chunk
    vlm.tower._encode_chunk = lambda chunk, n: (runs.append(n), run(chunk, n))[1]  # type: ignore[method-assign]
    seen = vlm.encode(picture(190, 100, 5), tower=tower)
    out = [vlm.embeddings(seen), *([] if seen.tower is None else [seen.tower])]
    out.append(np.array(ask(vlm, seed=7)))  # type: ignore[arg-type]
    vlm.close()
    return out, runs


def test_a_picture_that_was_kept_is_not_encoded_again(model: zoo.ZooModel, tmp_path: Path) -> None:
    plain = LoadOptions(threads=1, cache=str(tmp_path))
    kept = replace(plain, image_cache=1 << 24)
    want, runs = encoded(model, plain)
    assert not (tmp_path / "images").exists()
    first, again = encoded(model, kept), encoded(model, kept)
    assert (len(runs), len(first[1]), again[1]) == (len(first[1]), len(runs), [])
    for got in (first[0], again[0]):
        for a, b in zip(got, want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert encoded(model, kept, tower=False)[1] == []
    assert encoded(model, replace(kept, stock_tower=True))[1] or not model.row.repairs
    assert encoded(model, replace(kept, threads=2))[1]


def test_attention_that_was_not_kept_is_read_later(model: zoo.ZooModel, tmp_path: Path) -> None:
    options = LoadOptions(threads=1, cache=str(tmp_path), image_cache=1 << 24)
    encoded(model, options, tower=False)
    want, runs = encoded(model, options)
    assert runs
    got, none = encoded(model, options)
    assert none == []
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_nothing_is_kept_unless_asked_or_of_a_gpu(model: zoo.ZooModel, tmp_path: Path) -> None:
    header, asked = read_header(model.mmproj), LoadOptions(cache=str(tmp_path), image_cache=1 << 24)
    for options in (replace(asked, image_cache=0), replace(asked, cache=""), replace(asked, gpu_layers=1)):
        ImageCache.of(header, options, ()).keep(PIXELS, ROWS, None)
    assert not (tmp_path / "images").exists()
