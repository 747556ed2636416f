"""A few cases of ``python -m tests.damage``."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from localvlm._native_path import native_library
from localvlm.errors import UnsupportedModel
from tests import damage

try:
    native_library()
except UnsupportedModel as error:
    pytest.skip(f"the native library is not built: {error}", allow_module_level=True)


@pytest.mark.parametrize("count", [8, pytest.param(25, marks=pytest.mark.slow)])
def test_damaged_files_end_in_a_sentence(tmp_path: Path, count: int) -> None:
    cases = list(damage.campaign(count, 7_000, tmp_path))
    assert [(seed, recipe, o.miss) for seed, recipe, o in cases if o.miss] == []
    assert len(cases) == count + 1
    assert sum("EngineCrashed" in o.what for _, _, o in cases) <= 1, "the header check lets too much through"


def test_a_seed_is_a_case(tmp_path: Path) -> None:
    sound = damage.pairs(tmp_path / "zoo")

    def files(seed: int) -> list[bytes]:
        (tmp_path / "case").mkdir(exist_ok=True)
        return [p.read_bytes() for p in damage.damage(seed, sound, tmp_path / "case")[1:]]

    assert files(3) == files(3)
    assert files(3) != files(4)


def test_files_survive_taking_apart(tmp_path: Path) -> None:
    for model, mmproj in damage.pairs(tmp_path).values():
        for path in (model, mmproj):
            assert damage.Gguf.parse(path.read_bytes()).bytes() == path.read_bytes()


@pytest.mark.parametrize("recipe", sorted(set(damage.RECIPES), key=lambda r: r.__name__), ids=lambda r: r.__name__)
def test_recipes_change_the_file(tmp_path: Path, recipe) -> None:
    raw = damage.pairs(tmp_path)["llava15"][1].read_bytes()
    assert sum(recipe(raw, Random(seed)) != raw for seed in range(20)) >= 15
