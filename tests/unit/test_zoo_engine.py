"""The engine on the zoo: the same values as transformers, and llama.cpp's own answers where nothing is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, TextPart
from localvlm.engine.client import Engine
from localvlm.errors import UnsupportedModel
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


@pytest.mark.parametrize("name", ["llava15", "qwen25vl", "internvl"])
def test_unpruned_answers_are_llama_cpp_s_own(name: str, engine: Engine, folder: Path) -> None:
    found = parity.compare(parity.zoo_subject(name, folder, 10), engine, folder)
    assert found.differences == []
    assert found.equal == 10
    assert len(found.answers) >= 8


def test_attention_over_many_cells_passes_for_the_model_s_own(engine: Engine, folder: Path) -> None:
    """llama.cpp's half-precision sums are off by 0.10 there, twice what the check allows over few."""
    files = zoo.write(zoo.FAMILIES["smolvlm"], folder)
    vlm = engine.load(files.model, files.mmproj, LoadOptions(threads=1, n_ctx=4096))
    picture = vlm.encode(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    parts = [TextPart("ab " * 1500), ImagePart(picture), TextPart("what is it?")]
    assert vlm.prefill(parts, tap=True).n_past > 3000
    vlm.close()


QUICK = ("llava15", "qwen25vl")
BLOCKS = [name for name, row in zoo.FAMILIES.items() if row.text.head_dim % 32 == 0]
VISION = llava15.VisionConfig(hidden=64, layers=5, heads=2, ffn=128, image=84)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in BLOCKS])
def test_a_quantized_cache_gives_nearly_what_transformers_gives(name: str, engine: Engine, folder: Path) -> None:
    measures = fidelity.measure(engine, zoo.build(name, folder), zoo.committed(name), "q8_0")
    assert [m for m in measures if not m.ok] == []
    assert max(m.error for m in measures) > fidelity.BOUNDS["f16"][1], "the cache was not quantized"


def test_a_quantized_cache_that_llama_cpp_rotates_is_read_rightly(engine: Engine, folder: Path) -> None:
    """With head sizes that are multiples of 64, K lies in the cache turned by a Hadamard matrix, and q with it."""
    text = replace(llava15.ROW.text, heads=2, kv_heads=1)
    assert text.head_dim == 64
    model = zoo.write(llava15.make_row("llava15-wide-heads", text, VISION, seed=17), folder)
    found = {}
    for kv_type in ("f16", "q8_0"):
        vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, kv_type=kv_type))
        picture = vlm.encode(model.row.cases[0].images[0].pixels())
        vlm.prefill([TextPart("USER: "), ImagePart(picture), TextPart("\nwhat is it?")], tap=True)
        vlm.feed(np.array([83, 266], np.int32))
        found[kv_type] = vlm.attention()
        vlm.close()
    for name in ("prompt", "generated", "last"):
        measured = fidelity.compare("", name, getattr(found["q8_0"], name), getattr(found["f16"], name))
        assert replace(measured, bounds="q8_0").ok
        assert measured.error > 0


def test_a_cache_whose_blocks_do_not_fit_the_heads_is_refused(engine: Engine, folder: Path) -> None:
    text = replace(llava15.ROW.text, heads=8, kv_heads=4)
    assert text.head_dim == 16
    model = zoo.write(llava15.make_row("llava15-narrow-heads", text, VISION, seed=18), folder)
    with pytest.raises(UnsupportedModel, match="block size 32 does not divide"):
        engine.load(model.model, model.mmproj, LoadOptions(threads=1, kv_type="q8_0"))
    engine.load(model.model, model.mmproj, LoadOptions(threads=1)).close()


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
