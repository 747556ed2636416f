"""The sample on llama.cpp itself, with VLMs too small for their times to mean anything."""

from __future__ import annotations

from pathlib import Path

import pytest

from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.planning import sample as sampling
from localvlm.planning.minis import MiniLlm, MiniTower, write
from localvlm.planning.rates import KNOTS
from tests.asking import ONE


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CACHE", 1 << 18)
    monkeypatch.setattr(sampling, "_TOWER", MiniTower("F16", 128, 256, 2, 16))
    monkeypatch.setattr(sampling, "LEAN", MiniLlm("F16", 128, 32, 1))
    monkeypatch.setattr(sampling, "DEEP", 300)
    monkeypatch.setattr(sampling, "REPEATS", 2)
    monkeypatch.setattr(sampling, "SHARE", 0.0)  # tests run beside others


@pytest.mark.parametrize("kind", ["F32", "BF16", "Q8_0", "Q5_1", "Q2_K", "Q3_K", "Q6_K", "IQ4_XS", "MXFP4"])
def test_matrices_of_any_type_load_and_run(engine: Engine, tmp_path: Path, kind: str) -> None:
    files = write(tmp_path, "mini", MiniLlm(kind, 256, 256, 1), MiniTower("F16", 128, 256, 1, 4))
    vlm = engine.load(files.model, files.mmproj, ONE)
    for rows in (sampling.NEAR, *KNOTS[1:]):
        assert vlm.prefill(sampling._text(vlm, rows)).n_run == rows
    assert vlm.prefill(sampling._text(vlm, KNOTS[-1]), reuse="rows").n_run == 1
    assert sampling._batch(vlm, 20, 30) > 0
    vlm.close()


def test_a_sample_of_two_types_and_a_tower(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    told: list[str] = []
    llms = ["Q4_0 256 512 128 2 1", "Q4_K 320 256 64 5 1"]
    found = sampling.sample(engine, LoadOptions(threads=1), llms=llms, towers=["F16"], on_part=told.append)
    assert told == ["attention", *llms, "tower F16"]
    assert set(found.rows) == set(llms)
    for rows in found.rows.values():
        assert list(rows) == sorted(rows)
        assert rows[0] > 0
    assert min(found.patch["F16"], found.pair, found.tile, found.layer, found.step, *found.cell, found.load) > 0
