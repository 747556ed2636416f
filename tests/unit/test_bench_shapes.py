"""Random files of real shapes: what is in them, and that llama.cpp runs them."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from localvlm.bench import gguf_files, shapes
from localvlm.bench.gguf_files import KINDS, Tensor
from localvlm.bench.presets import PRESETS, tiny
from localvlm.bench.shapes import write_vlms
from localvlm.engine.api import LoadOptions, Message, SamplingOptions
from localvlm.engine.gguf_header import read_header
from localvlm.errors import StorageError, UsageError
from tests.asking import load, picture, prompt

TOKENS = {"llava15": (64, 64), "next": (320, 320), "internvl3": (52, 52), "smolvlm2": (52, 52), "qwen25vl": (64, 64)}
PARAMS = {  # billions in the LLM and in tower and projector, as published
    "llava-7b": (6.74, 0.324),
    "internvl3-1b": (0.63, 0.308),
    "internvl3-8b": (7.61, 0.332),
    "smolvlm2-256m": (0.163, 0.094),
    "smolvlm2-2.2b": (1.81, 0.434),
    "qwen2.5vl-3b": (3.086, 0.669),
    "qwen2.5vl-7b": (7.62, 0.677),
}


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_spread_as_asked(kind):
    data = np.concatenate(list(Tensor("x", (64, 2048), kind, 0.02).pieces(1)))
    type_ = gguf.GGMLQuantizationType[kind]
    assert gguf.GGML_QUANT_SIZES[type_] == (KINDS[kind].weights, KINDS[kind].size)
    weights = gguf.quants.dequantize(data, type_)
    assert weights.shape == (64, 2048)
    assert weights.std() == pytest.approx(0.02, rel=0.02)
    assert abs(weights.mean()) < 0.0025


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_are_those_of_the_published_models(name):
    vlms = {vlm.name: vlm for preset in PRESETS.values() for vlm in (preset.guide, preset.model)}
    found = (sum(np.prod(t.shape) for t in part) / 1e9 for part in shapes._parts(vlms[name]))
    assert tuple(found) == pytest.approx(PARAMS[name], rel=0.01)


@pytest.mark.parametrize("quant", shapes.QUANTS)
@pytest.mark.parametrize("name", PRESETS)
def test_rows_are_whole_blocks(name, quant):
    preset = PRESETS[name].quantized(quant)
    for vlm in (preset.guide, preset.model):
        for tensor in (t for part in shapes._parts(vlm) for t in part):
            assert tensor.shape[-1] % KINDS[tensor.kind].weights == 0


@pytest.mark.parametrize(
    ("name", "quant", "gigabytes"),
    [("llava15", "Q4_0", 3.83), ("llava15", "Q4_K_M", 4.08), ("llava15", "Q8_0", 7.16), ("qwen25vl", "Q4_K_M", 4.68)],
)
def test_files_are_as_large_as_published_ones(name, quant, gigabytes):
    tensors, _ = shapes._parts(PRESETS[name].quantized(quant).model)
    assert sum(t.n_bytes for t in tensors) / 1e9 == pytest.approx(gigabytes, rel=0.01)


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    preset = tiny(PRESETS["smolvlm2"])
    first = write_vlms(tmp_path / "a", [preset.model])[0]
    assert write_vlms(tmp_path / "b", [preset.model], seed=1)[0][0].read_bytes() != first[0].read_bytes()
    again = write_vlms(tmp_path / "c", [preset.model])[0]
    assert [p.read_bytes() for p in again] == [p.read_bytes() for p in first]
    before = first[0].stat().st_mtime_ns
    assert write_vlms(tmp_path / "a", [preset.model])[0][0].stat().st_mtime_ns == before
    kinds = {t.type for t in read_header(first[0]).tensors.values()}
    assert kinds == {gguf.GGMLQuantizationType[k].value for k in ("F32", "Q5_0", "Q8_0", "Q4_K", "Q6_K")}


def test_a_full_disk_is_told_of_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(gguf_files, "SPARE", 1 << 60)
    with pytest.raises(StorageError, match="left"):
        write_vlms(tmp_path, [tiny(PRESETS["llava15"]).model])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", PRESETS)
def test_llama_cpp_runs_every_preset(name, engine, tmp_path):
    preset = tiny(PRESETS[name])
    rgb = np.random.default_rng(0).integers(0, 256, (*preset.size[::-1], 3), dtype=np.uint8)
    for files, n in zip(write_vlms(tmp_path, [preset.guide, preset.model]), TOKENS[name], strict=True):
        vlm = engine.load(*files, LoadOptions(threads=1))
        seen = vlm.encode(rgb)
        assert seen.layout.n_tokens == n
        assert seen.layout.n_tiles == {"llava15": 1, "next": 5, "qwen25vl": 1}.get(name, 13)
        assert vlm.prefill(prompt(vlm, [seen]), tap=True).n_image == n
        assert np.isfinite(vlm.logits()).all()
        assert vlm.attention().prompt.sum() > 0
        vlm.close()


def test_without_the_tap(engine, files):
    bare = load(engine, files["llava15"], tap=False)
    assert bare.info.repairs == ()
    seen = [bare.encode(picture())]
    assert bare.prefill(prompt(bare, seen)).n_kept == 36
    with pytest.raises(UsageError, match="without it"):
        bare.prefill(prompt(bare, seen, np.array([3], np.int32)))
    with pytest.raises(UsageError, match="without it"):
        bare.prefill(prompt(bare, seen), tap=True)
    bare.close()


def test_answers_go_on_past_their_end(llava):
    for n in range(200):  # a question whose answer ends by itself
        parts = llava.chat([Message("user", f"what is {n}?", 0)])
        llava.prefill(parts)
        done = llava.generate(64)
        if done.finish == "stop":
            break
    llava.prefill(parts)
    longer = llava.generate(64, SamplingOptions(past_end=True))
    assert done.finish == "stop"
    assert (longer.finish, len(longer.ids)) == ("length", 64)
    assert longer.ids[: len(done.ids)].tolist() == done.ids.tolist()
