"""The engine on the zoo: the same values as transformers, and llama.cpp's own answers where nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from tests import fidelity, parity, zoo
from tests.zoo import llava15


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_engine_gives_what_transformers_gives(name: str, engine: Engine, folder: Path) -> None:
    measures = fidelity.measure(engine, zoo.build(name, folder), zoo.committed(name))
    assert [m for m in measures if not m.ok] == []
    assert {"embeddings", "tower", "logits", "prompt", "generated", "pruned logits"} <= {m.what for m in measures}


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_unpruned_answers_are_llama_cpp_s_own(name: str, engine: Engine, folder: Path) -> None:
    found = parity.compare(parity.zoo_subject(name, folder, 10), engine, folder)
    assert found.differences == []
    assert found.equal == 10
    assert len(found.answers) >= 8


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_fifty_unpruned_answers_are_llama_cpp_s_own(name: str, engine: Engine, folder: Path) -> None:
    found = parity.compare(parity.zoo_subject(name, folder, 50), engine, folder)
    assert found.differences == []
    assert found.equal == 50


@pytest.mark.slow
def test_fifty_answers_of_the_demo_pair_are_llama_cpp_s_own(engine: Engine, folder: Path) -> None:
    subjects = parity.demo_subjects(50, folder / "demo")
    if not subjects:
        pytest.skip("the demo pair's files are not there")
    for subject in subjects:
        found = parity.compare(subject, engine, folder)
        assert found.differences == []
        assert found.equal == 50


def test_a_projector_file_without_the_unused_block_is_the_same_tower(engine: Engine, folder: Path) -> None:
    model = zoo.build("llava15", folder)
    short = folder / "mmproj-explicit.gguf"
    model.row.write_mmproj(short, model.row.weights(), blocks="explicit")  # type: ignore[call-arg]
    case = model.row.cases[0]
    rows = []
    for mmproj in (model.mmproj, short):
        vlm = engine.load(model.model, mmproj, LoadOptions(threads=1))
        assert vlm.info.tower_layers == model.row.tower_layers
        rows.append(vlm.embeddings(vlm.encode(case.images[0].pixels())))
        vlm.close()
    assert np.array_equal(rows[0], rows[1])


@pytest.mark.parametrize("family", zoo.LARGE)
def test_pair_shares_a_tokenizer_and_nothing_else(family: str, engine: Engine, folder: Path) -> None:
    guide, model = zoo.pair(folder, family)
    infos = []
    for files in (guide, model):
        vlm = engine.load(files.model, files.mmproj, LoadOptions(threads=1))
        infos.append(vlm.info)
        vlm.close()
    assert infos[0].vocab_hash == infos[1].vocab_hash
    assert infos[0].n_layer < infos[1].n_layer
    assert infos[0].n_embd < infos[1].n_embd
    assert llava15.ROW.tokenizer is llava15.LARGE.tokenizer
