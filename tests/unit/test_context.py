"""A context has the cells that are needed: what it gives is what one of full size gives, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine import llama
from localvlm.engine.api import ImagePart, LoadOptions, TextPart
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import ContextOverflow, NotEnoughMemory, UsageError
from tests import zoo

Load = Callable[..., LlamaVlm]
STEPS = 270
"""Tokens fed: more than the cells of one step of growth."""


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def loaded(name: str, **options: int | str) -> LlamaVlm:
        found = zoo.build(name, tmp_path)
        return LlamaVlm(found.model, found.mmproj, LoadOptions(threads=1, **options))  # type: ignore[arg-type]

    return loaded


def prompt(vlm: LlamaVlm, text: str = "what is it?") -> list[TextPart | ImagePart]:
    image = np.random.RandomState(3).randint(0, 256, (84, 84, 3)).astype(np.uint8)
    return [TextPart("USER: "), ImagePart(vlm.encode(image), np.array([1, 5, 8], np.int32)), TextPart(text)]


def asked(vlm: LlamaVlm, layer: int) -> list[np.ndarray]:
    """Logits after the prompt, after each of STEPS tokens, and those of a batch after them; what the tap saw."""
    vlm.prefill(prompt(vlm), tap=True, layer=layer)
    out, fed = [vlm.logits()], np.random.RandomState(4).randint(3, vlm.info.n_vocab - 3, STEPS).astype(np.int32)
    for token in fed:
        vlm.feed(np.array([token], np.int32))
        out.append(vlm.logits())
    return [*out, *vlm.score(fed[:9]), vlm.attention().generated]


def test_a_small_context_scores_as_many_tokens_as_any(load: Load) -> None:
    small, usual = load("llava15", n_ctx=10), load("llava15")
    ids = np.random.RandomState(4).randint(3, 200, 80).astype(np.int32)
    got, want = (vlm.score(ids, [TextPart("what is it?")]) for vlm in (small, usual))
    assert np.array_equal(got, want)
    small.prefill([TextPart("what?")])
    with pytest.raises(UsageError, match="fed at once and a batch holds 256"):
        small._cache.feed([5] * 257)
    small.close()
    usual.close()


@pytest.mark.parametrize("name", ["llava15", "qwen25vl"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_context_that_grows_gives_what_a_whole_one_gives(
    name: str, layer: int, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions of three dimensions move too."""
    grown = load(name)
    got = asked(grown, layer)
    size = grown._cache.context.size
    grown.close()
    monkeypatch.setattr(llama, "PADDING", grown.info.n_ctx)
    whole = load(name)
    want = asked(whole, layer)
    assert whole._cache.context.size == whole.info.n_ctx > size > 256
    whole.close()
    assert all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_a_quantized_cache_grows_too(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for room in (256, 2048):
        monkeypatch.setattr(llama, "ROOM", room)
        vlm = load("llava15", kv_type="q8_0")
        found.append(asked(vlm, 0))
        vlm.close()
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_cells_come_with_the_prompt_and_never_over_the_limit(load: Load) -> None:
    vlm = load("llava15", n_ctx=700)
    context = vlm._cache.context
    assert (context.size, context.n_ctx, vlm.info.n_ctx) == (256, 768, 768)
    rows = vlm.prefill(prompt(vlm)).n_past
    assert rows < 256
    assert context.size == 256  # nothing was asked for that is not there
    rows = vlm.prefill(prompt(vlm, "z" * 300)).n_past
    assert 256 < rows < 512
    assert context.size == 768
    vlm.feed(np.full(768 - rows, 83, np.int32))
    with pytest.raises(ContextOverflow, match="768"):
        vlm.feed(np.array([83], np.int32))
    vlm.close()


def test_no_memory_for_more_cells_leaves_those_that_are(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = load("llava15")
    vlm.prefill(prompt(vlm))
    vlm.feed(np.full(100, 83, np.int32))
    logits, context = vlm.logits(), vlm._cache.context
    token = np.array([9], np.int32)
    vlm.feed(token)
    want = vlm.logits()
    vlm._cache.forget(1)
    opened = context._open

    def refuse(size: int) -> None:
        if size > 256:
            raise NotEnoughMemory(f"no {size} cells")
        opened(size)

    monkeypatch.setattr(context, "_open", refuse)
    with pytest.raises(NotEnoughMemory, match="no 768 cells"):
        context.reserve(300)
    assert context.size == 256
    vlm._cache.last = logits
    vlm.feed(token)
    assert np.array_equal(vlm.logits(), want)
    vlm.close()


def test_a_context_that_cannot_be_made_again_is_told_and_made_when_there_is_room(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = load("llava15")
    context = vlm._cache.context
    want = asked(vlm, 0)[:3]
    vlm.prefill(prompt(vlm))
    with monkeypatch.context() as tight:

        def refuse(size: int) -> None:
            raise NotEnoughMemory(f"no {size} cells")

        tight.setattr(context, "_open", refuse)
        with pytest.raises(NotEnoughMemory, match="no "):
            context.reserve(context.size + 1)
        for call in (
            lambda: vlm.feed(np.array([9], np.int32)),
            lambda: vlm._cache.keep(5),
            lambda: vlm._cache.forget(1),
            context.logits,
        ):
            with pytest.raises(NotEnoughMemory, match="is lost"):
                call()
        with pytest.raises(NotEnoughMemory, match="no 256 cells"):
            vlm.prefill(prompt(vlm), reuse="rows")
    assert vlm.prefill(prompt(vlm), reuse="rows").n_run == vlm.prefill(prompt(vlm)).n_run, "nothing is left to reuse"
    assert all(np.array_equal(a, b) for a, b in zip(asked(vlm, 0), want, strict=False))
    vlm.close()


@pytest.mark.parametrize("layer", [0, 1])
def test_a_sliding_window_is_whole_from_the_start(layer: int, load: Load) -> None:
    """Moved, its cells would be taken by new rows as soon as they leave the window."""
    vlm = load("gemma3", n_ctx=1024)
    vlm.prefill(prompt(vlm), layer=layer)
    cache = vlm._cache
    assert [s.context.size for s in cache.segments] == [1024] * (1 + layer)
    vlm.close()


@pytest.mark.parametrize(("options", "kv"), [({"n_ctx": 512}, "512 in f16"), ({"kv_type": "q8_0"}, "q8_0")])
def test_how_it_is_run_is_told(options: dict, kv: str, load: Load) -> None:
    vlm = load("llava15", **options)
    told = vlm.info.runs
    assert told.startswith("threads 1, rows of a batch and micro-batch 512, KV cells up to ")
    assert f"{kv}, flash attention on, weights CPU" in told
    assert told.endswith(" MiB; tower: flash attention on")
    vlm.close()
