"""All layers on a GPU, whichever llama.cpp was built for: ``pytest -m gpu``.

Without the marker the same tests run on the CPU, on less, so that a machine without a GPU finds what is wrong in them.
Where llama.cpp sees no GPU those with the marker are skipped; with LOCALVLM_EXPECT_GPU=1 they fail.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest

from localvlm import catalog
from localvlm.bench.shapes import write_vlm
from localvlm.engine import devices, llama, tower
from localvlm.engine.api import Backend, ImagePart, LoadOptions, TextPart
from localvlm.engine.client import Engine, RemoteVlm
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import Interrupted
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pipeline
from tests import fidelity, layers, parity, zoo
from tests.asking import picture, prompt
from tests.zoo import llava15

EXPECTED = os.environ.get("LOCALVLM_EXPECT_GPU") == "1"
CPU, GPU = pytest.param(0, id="cpu"), pytest.param(-1, id="gpu", marks=pytest.mark.gpu)
QUICK = ("llava15", "qwen25vl")

VISION = llava15.VisionConfig(hidden=128, layers=5, heads=2, ffn=128, image=84)
WIDE = llava15.make_row("llava15-wide", replace(llava15.ROW.text, heads=2, kv_heads=1), VISION, seed=19)
"""Heads of 64, as real models have them: the zoo's, of 32, have no flash attention kernel on CUDA."""
CLOSE = 1e-3
"""Largest difference, as a share of the largest logit, of logits that are equal to the last bit on a CPU. A GPU's
kernels are fused up to where a run looks at a node, or is cut: sums are then rounded elsewhere (1e-6), and keys that
this takes over a border of float16 are off by 5e-4. A row more or less, or one at another position, changes them by
some percent.
"""
MIB = 1 << 20
LEAK = 16 * MIB
"""More than this must not stay behind; drivers hand out memory in pieces of 2 MiB."""
SAME_ANSWERS = 0.9
"""Share of the demo pair's answers that a GPU must give as the CPU does; some choices are closer than rounding."""


def need_gpu(backend: Backend) -> None:
    if not backend.devices:
        told = f"llama.cpp sees no GPU (built for: {', '.join(backend.backends)})"
        pytest.fail(told) if EXPECTED else pytest.skip(told)


@pytest.fixture(scope="module")
def engine(native: None) -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(params=[CPU, GPU])
def ngl(request: pytest.FixtureRequest, engine: Engine) -> int:
    if request.param:
        need_gpu(engine.backend())
    return int(request.param)


def families(on_cpu: Iterable[str], on_gpu: Iterable[str] = zoo.FAMILIES) -> list[object]:
    """(family, layers on a GPU): a few on the CPU, all on a GPU."""
    quick = [pytest.param(name, 0, id=f"{name}-cpu") for name in on_cpu]
    return quick + [pytest.param(name, -1, id=f"{name}-gpu", marks=pytest.mark.gpu) for name in on_gpu]


WITH_WIDE = (*zoo.FAMILIES, WIDE.name)


def built(name: str, folder: Path) -> zoo.ZooModel:
    return zoo.write(WIDE, folder) if name == WIDE.name else zoo.build(name, folder)


def close(got: np.ndarray, want: np.ndarray, ngl: int) -> bool:
    return float(np.abs(got - want).max()) <= (CLOSE * float(np.abs(want).max()) if ngl else 0.0)


@pytest.mark.parametrize("expected", [False, True])
def test_no_gpu_is_a_reason_to_skip_or_to_fail(expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "EXPECTED", expected)
    with pytest.raises(pytest.fail.Exception if expected else pytest.skip.Exception, match="built for: CUDA, CPU"):
        need_gpu(Backend("", "", "", (), ("CUDA", "CPU")))
    need_gpu(Backend("", "", "", ("CUDA0: a card",), ("CUDA", "CPU")))


@pytest.mark.parametrize(("name", "ngl"), families(["smolvlm"]))
def test_what_transformers_gives(name: str, ngl: int, engine: Engine, folder: Path) -> None:
    """Embeddings, the tower's and the model's attention, logits, all of it from kept tokens too."""
    if ngl:
        need_gpu(engine.backend())
    measures = fidelity.measure(engine, zoo.build(name, folder), zoo.committed(name), gpu_layers=ngl)
    assert [m for m in measures if not m.ok] == []
    assert {m.bounds for m in measures} == {"gpu" if ngl else "f16"}


@pytest.mark.parametrize("name", QUICK)
def test_a_quantized_cache_gives_nearly_what_transformers_gives(
    name: str, ngl: int, engine: Engine, folder: Path
) -> None:
    measures = fidelity.measure(engine, zoo.build(name, folder), zoo.committed(name), "q8_0", ngl)
    assert [m for m in measures if not m.ok] == []


class _Here:
    """The engine in this process, without flash attention."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (llama, tower):
            monkeypatch.setattr(module, "flash_attention", lambda _: 0)

    def load(self, model: Path, mmproj: Path, options: LoadOptions) -> LlamaVlm:
        return LlamaVlm(model, mmproj, options)


@pytest.mark.parametrize("name", [*QUICK, "gemma3"])
def test_probabilities_are_read_where_there_is_no_flash_attention(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the CPU, what a GPU without flash attention for a model's heads does."""
    here, model = _Here(monkeypatch), zoo.build(name, folder)
    measures = fidelity.measure(here, model, zoo.committed(name))  # type: ignore[arg-type]
    assert [m for m in measures if not m.ok] == []
    assert max(d.largest for d in layers.pauses(here, model, 2)) == 0.0  # type: ignore[arg-type]


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
@pytest.mark.parametrize("row", [zoo.FAMILIES["qwen25vl"], WIDE], ids=lambda row: row.name)
def test_the_tap_s_own_check(row: zoo.Row, kv_type: str, ngl: int, folder: Path) -> None:
    """Its first run compares softmax(q k) v with every attention node's output: off by the rounding of half floats.
    Where the backend has no flash attention for these heads, the sum of the probabilities that it reads with 1.
    """
    model = zoo.write(row, folder)
    vlm = LlamaVlm(model.model, model.mmproj, LoadOptions(threads=1, gpu_layers=ngl, kv_type=kv_type))
    tap = vlm._cache.tap
    vlm.prefill([TextPart("USER: "), ImagePart(vlm.encode(picture())), TextPart("\nwhat is it?")], tap=True)
    worst = tap._lib.lv_tap_check_worst(tap._tap)
    vlm.close()
    assert 0 <= worst < 0.05
    assert worst > 1e-5 or row is not WIDE, "no flash attention"


@pytest.mark.parametrize("kv_type", ["f16", "q8_0"])
def test_flash_attention_gives_what_the_cpu_gives(kv_type: str, ngl: int, engine: Engine, folder: Path) -> None:
    model, found = zoo.write(WIDE, folder), []
    for there in (0, ngl):
        options = LoadOptions(threads=1, gpu_layers=there, kv_type=kv_type)
        vlm = engine.load(model.model, model.mmproj, options)
        seen = vlm.encode(picture(), tower=True)
        vlm.prefill(prompt(vlm, [seen], np.arange(0, 36, 2, dtype=np.int32)), tap=True)
        vlm.feed(np.array([83, 266, 7], np.int32))
        kept, all_seen = vlm.logits(), vlm.attention()
        attention = np.stack([all_seen.prompt, all_seen.generated, all_seen.last])[..., ::2]
        found.append({"rows": vlm.embeddings(seen), "tower": seen.tower, "logits": kept[None], "attention": attention})
        vlm.close()
    cpu, other = found
    bounds = "f16" if not ngl else "gpu" if kv_type == "f16" else "q8_0"
    measures = [replace(fidelity.compare("wide", what, other[what], cpu[what]), bounds=bounds) for what in cpu]
    assert [m for m in measures if not m.ok] == []


@pytest.mark.parametrize(("name", "ngl"), families(["llava15"], WITH_WIDE))
def test_looking_changes_nothing(name: str, ngl: int, engine: Engine, folder: Path) -> None:
    if ngl:
        need_gpu(engine.backend())
    model = built(name, folder)
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, gpu_layers=ngl))
    parts, fed, found = prompt(vlm, [vlm.encode(picture())]), np.array([83, 266, 7], np.int32), []
    for tap in (False, True, False):
        vlm.prefill(parts, tap=tap)
        found.append([vlm.logits()])
        vlm.feed(fed)
        found[-1].append(vlm.logits())
    vlm.close()
    assert close(np.stack(found[1]), np.stack(found[0]), ngl)
    assert close(np.stack(found[2]), np.stack(found[0]), ngl)


@pytest.mark.parametrize(("name", "ngl"), families(["qwen25vl", WIDE.name], WITH_WIDE))
def test_layers_apart_give_the_plain_logits(name: str, ngl: int, engine: Engine, folder: Path) -> None:
    """Nothing dropped: cut at each layer, and with pauses before several."""
    if ngl:
        need_gpu(engine.backend())
    for measured in (layers.differences, layers.pauses):
        found = measured(engine, built(name, folder), 4, ngl)
        assert len(found) >= 3
        assert [d for d in found if d.largest > (CLOSE * d.scale if ngl else 0.0)] == []


@pytest.mark.parametrize("name", layers.REFERENCES)
def test_rows_dropped_at_a_layer_give_what_transformers_gives(
    name: str, ngl: int, engine: Engine, folder: Path
) -> None:
    """Paused, looked at, and gone on with fewer rows among them."""
    measures = layers.measure(engine, zoo.build(name, folder), layers.committed(name), ngl)
    assert [m for m in measures if not m.ok] == []


@pytest.mark.parametrize("name", QUICK)
def test_a_cancel_is_answered_within_a_second(name: str, ngl: int, engine: Engine, folder: Path) -> None:
    """In the tower, in a prompt, in an answer, between them; what comes after is as if there had been none."""
    model = zoo.build(name, folder)
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, gpu_layers=ngl))
    want, bound = _answer(vlm, 1), 1.0 if ngl else 2.0  # seconds; a CPU may be busy with other things
    for i in range(20 if ngl else 6):
        for _ in range(3):  # a slow one may tell of what else the machine does
            took = _cancelled(vlm, engine, 0.003 * i)
            assert _answer(vlm, 1) == want
            if took < bound:
                break
        else:
            pytest.fail(f"answered {took:.1f} s after a cancel at {3 * i} ms, three times")
    vlm.close()


def _cancelled(vlm: RemoteVlm, engine: Engine, after: float) -> float:
    """Seconds from a cancel to its answer."""
    called: list[float] = []
    timer = threading.Timer(after, lambda: (called.append(time.monotonic()), engine.cancel()))
    timer.start()
    with pytest.raises(Interrupted):
        _answers(vlm, range(2, 2000))
    answered = time.monotonic()
    timer.join()
    return answered - called[0]


def _answers(vlm: RemoteVlm, seeds: Iterable[int]) -> list[list[int]]:
    return [_answer(vlm, seed) for seed in seeds]


def _answer(vlm: RemoteVlm, seed: int) -> list[int]:
    seen = vlm.encode(picture(300, 200, seed))
    vlm.prefill(prompt(vlm, [seen]), tap=bool(seed % 2))
    vlm.release(seen)
    done = vlm.generate(40)
    if done.finish == "cancelled":
        raise Interrupted()
    return done.ids.tolist()


def test_memory_is_given_back(ngl: int, folder: Path) -> None:
    """Weights, caches of two contexts, the tower; 85 MiB of weights show whether they are on the GPU at all."""
    files = write_vlm(folder, layers.SHAPE)
    left = [_taken(ngl)]
    for _ in range(3):
        vlm = LlamaVlm(*files, LoadOptions(threads=1, gpu_layers=ngl))
        few = ImagePart(vlm.encode(picture(336, 336)), np.arange(20, dtype=np.int32))
        vlm.prefill([TextPart("USER: "), few, TextPart(" w1 w2 w3")], layer=1)
        vlm.generate(2)
        assert _taken(ngl) - left[-1] > 4 * LEAK, "the weights are elsewhere"
        vlm.close()
        left.append(_taken(ngl))
    assert left[-1] - left[1] < LEAK  # the first one makes what stays for good


def _taken(ngl: int) -> int:
    """Bytes in use: on all GPUs, as seen by this process, or by it on the CPU."""
    if not ngl:
        gc.collect()
        with contextlib.suppress(AttributeError):  # the C library keeps what was freed between what was not
            ctypes.CDLL(None).malloc_trim(0)
        return int(psutil.Process().memory_info().rss)
    lib, taken = devices._registry(), 0
    lib.ggml_backend_dev_memory.argtypes = [ctypes.c_void_p, *[ctypes.POINTER(ctypes.c_size_t)] * 2]
    for i in range(lib.ggml_backend_dev_count()):
        device, free, total = lib.ggml_backend_dev_get(i), ctypes.c_size_t(), ctypes.c_size_t()
        if devices._is_gpu(lib, device):
            lib.ggml_backend_dev_memory(device, ctypes.byref(free), ctypes.byref(total))
            taken += total.value - free.value
    return taken


def test_the_demo_pair_answers_as_on_the_cpu(ngl: int, tmp_path: Path) -> None:
    subjects = parity.demo_subjects(40 if ngl else 2, tmp_path / "scenes")
    if not subjects:
        pytest.skip("the demo pair's files are not there")
    answers: list[list[str]] = []
    for layers_there in (0, ngl):
        with Pipeline.open(catalog.pair_named("demo"), LoadOptions(threads=1, gpu_layers=layers_there)) as pipeline:
            options = AskOptions(keep=0.2, max_tokens=16)
            asked = ((Image(q.images[0], "scene"), q.text) for q in subjects[0].questions)
            answers.append([pipeline.ask([image], text, options).text for image, text in asked])
    same = [a == b for a, b in zip(*answers, strict=True)]
    assert np.mean(same) >= (SAME_ANSWERS if ngl else 1.0), [p for p in zip(*answers, strict=True) if p[0] != p[1]]
    assert len(set(answers[0])) > 1
