"""Prompts that wait between layers: what is shown is what runs, nothing dropped is the plain run, and what fails leaves
nothing that could be decoded.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, TextPart, Vlm
from localvlm.engine.client import Engine
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import ContextOverflow, Interrupted, UsageError
from tests import layers, zoo
from tests.zoo.row import BATCH

FED = np.array([83, 266, 7], np.int32)
NOISE = np.random.RandomState(3).randint(0, 256, (84, 84, 3)).astype(np.uint8)
FAMILIES = ("llava15", "qwen25vl", "qwen3vl", "gemma3")
Parts = list[TextPart | ImagePart]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture
def llava(engine: Engine, folder: Path) -> Iterator[Vlm]:
    found = zoo.build("llava15", folder)
    vlm = engine.load(found.model, found.mmproj, LoadOptions(threads=1, n_ctx=512))
    yield vlm
    vlm.close()


def prompt(vlm: Vlm, keep: list[int] | None = None) -> Parts:
    kept = None if keep is None else np.array(keep, np.int32)
    return [TextPart("USER: "), ImagePart(vlm.encode(NOISE), kept), TextPart("\nwhat is it?")]


def after(vlm: Vlm) -> list[np.ndarray]:
    """Logits after the prompt, after tokens in one batch, and one by one; then an answer."""
    out = [vlm.logits(), vlm.score(FED)]
    for token in FED:
        vlm.feed(np.array([token], np.int32))
        out.append(vlm.logits())
    return [*out, vlm.generate(6).ids]


def same(a: list[np.ndarray], b: list[np.ndarray]) -> bool:
    return all(map(np.array_equal, a, b))


@pytest.mark.parametrize(
    "name", [n if n in FAMILIES else pytest.param(n, marks=pytest.mark.slow) for n in zoo.FAMILIES]
)
def test_pauses_alone_change_nothing(name: str, engine: Engine, folder: Path) -> None:
    """At each layer, prompts of several batches too: the rows come to the same cells each time."""
    found = layers.pauses(engine, zoo.build(name, folder), steps=3)
    assert {d.cuts for d in found} == set(layers.cut_lists(zoo.FAMILIES[name].text.layers))
    assert max(d.rows for d in found) > BATCH
    assert [d for d in found if d.largest != 0.0] == []


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_pause_shows(name: str, engine: Engine, folder: Path) -> None:
    """Attention is that of a tapped prefill, rows are those that go in."""
    found = zoo.build(name, folder)
    vlm = engine.load(found.model, found.mmproj, LoadOptions(threads=1))
    parts = prompt(vlm)
    vlm.prefill(parts, tap=True)
    seen, plain = vlm.attention(), vlm.logits()
    start = vlm.pause(parts, 0, hidden=True)
    width = vlm.info.n_embd
    assert (start.layer, start.attention) == (0, None)
    assert np.array_equal(start.hidden, vlm.features(parts[1].image)[:, :width])  # type: ignore[union-attr]
    assert np.array_equal(start.text[-3:], vlm.embed("what is it?")[-3:, :width])  # type: ignore[index]
    assert start.image.tolist() == list(range(len(start.hidden)))  # type: ignore[arg-type]
    for layer in range(1, vlm.info.n_layer):
        all_rows = vlm.pause(parts, layer, attend=None)
        assert len(all_rows.after) == seen.rows[0]
        assert np.array_equal(all_rows.attention, seen.prompt[layer - 1] / np.float32(seen.rows[0]))
        one = vlm.pause(parts, layer)
        np.testing.assert_allclose(one.attention, seen.last[layer - 1], atol=1e-6)
        two = vlm.pause(parts, layer, attend=(0, -1))
        first = vlm.pause(parts, layer, attend=[0]).attention
        np.testing.assert_allclose(two.attention, (one.attention + first) / 2, atol=1e-6)  # type: ignore[operator]
        none = vlm.pause(parts, layer, attend=(), hidden=True)
        assert none.attention is None
        assert none.text.shape == (len(start.after), width)  # type: ignore[union-attr]
        vlm.finish(None, none.hidden)
        assert np.array_equal(vlm.logits(), plain)
        vlm.pause(parts, layer)
        vlm.finish(None, none.hidden + 1)  # type: ignore[operator]
        assert np.abs(vlm.logits() - plain).max() > 0.01
    vlm.close()


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_given_before_the_first_layer_are_those_of_a_picture(name: str, engine: Engine, folder: Path) -> None:
    found = zoo.build(name, folder)
    vlm = engine.load(found.model, found.mmproj, LoadOptions(threads=1))
    parts, keep = prompt(vlm), np.array([1, 5, 8], np.int32)
    rows = vlm.features(parts[1].image)[keep]  # type: ignore[union-attr]
    width = vlm.info.n_embd
    rows[:, :width] = rows[::-1, :width]
    other = vlm.altered(parts[1].image, keep, rows)  # type: ignore[union-attr]
    vlm.prefill([parts[0], ImagePart(other, keep), parts[2]])
    want = after(vlm)
    vlm.pause(parts, 0)
    assert vlm.finish(keep, rows[:, :width]).n_kept == 3
    assert same(after(vlm), want)
    reused = vlm.prefill([parts[0], ImagePart(parts[1].image, keep), parts[2]], reuse="rows")  # type: ignore[union-attr]
    assert reused.n_run == reused.n_past, "what was replaced is not taken for the picture's own"
    assert not np.array_equal(vlm.logits(), want[0])
    vlm.close()


def test_one_cut_is_a_prefill_at_a_layer(llava: Vlm) -> None:
    """Also where the prompt was pruned before, where it waits on the way, and where all is dropped at once."""
    for keep in ([2, 3, 20], []):
        kept = np.array(keep, np.int32)
        for layer in range(1, llava.info.n_layer):
            done = llava.prefill(prompt(llava, keep), layer=layer)
            want = after(llava)
            start = llava.pause(prompt(llava), layer)
            finished = llava.finish(kept)
            assert (finished.n_image, finished.n_kept, finished.n_past) == (36, len(keep), done.n_past)
            assert np.array_equal(finished.token_ids, start.token_ids)
            assert same(after(llava), want)
            llava.pause(prompt(llava), 0)
            for waits in range(1, layer + 1):
                llava.resume(None, layer=waits, attend=())
            for waits in range(layer + 1, llava.info.n_layer):
                llava.resume(kept, layer=waits)
            llava.finish(kept)
            assert same(after(llava), want)


def test_pruned_twice(llava: Vlm) -> None:
    first = llava.pause(prompt(llava, [0, 2, 3, 20, 30]), 1)
    assert first.image.tolist() == [0, 2, 3, 20, 30]
    second = llava.resume(np.array([2, 20, 30], np.int32), layer=2, hidden=True)
    assert second.image.tolist() == [2, 20, 30]
    assert second.attention.shape == (llava.info.n_head, 3)  # type: ignore[union-attr]
    last = np.array([30], np.int32)
    assert llava.finish(last).n_kept == 1
    want = after(llava)
    for replaced in (False, True):
        llava.pause(prompt(llava), 0)
        llava.resume(first.image, layer=1)
        llava.resume(second.image, layer=2)
        llava.finish(last, second.hidden[:1] if replaced else None)  # type: ignore[index]
        assert same(after(llava), want) is not replaced
    llava.prefill(prompt(llava))
    plain = after(llava)
    llava.prefill(prompt(llava), layer=1)
    assert same(after(llava), plain), "a whole prompt comes after as before"


def test_a_prompt_without_a_picture(llava: Vlm) -> None:
    parts = [TextPart("USER: what is it?")]
    ids = llava.prefill(parts).token_ids
    want = after(llava)
    paused = llava.pause(parts, 0, hidden=True)
    assert np.array_equal(paused.after, ids)
    assert (len(paused.image), paused.hidden.shape) == (0, (0, llava.info.n_embd))  # type: ignore[union-attr]
    later = llava.resume(None, layer=2, attend=None)
    assert later.attention.shape == (llava.info.n_head, 0)  # type: ignore[union-attr]
    llava.finish(np.array([], np.int32))
    assert same(after(llava), want)


def test_what_does_not_fit_is_refused_and_waits_on(llava: Vlm) -> None:
    for call in (lambda: llava.finish(None), lambda: llava.resume(None, layer=1)):
        with pytest.raises(UsageError, match="no prompt is paused"):
            call()
    parts = prompt(llava)
    with pytest.raises(UsageError, match="layer 3 "):
        llava.pause(parts, 3)
    with pytest.raises(UsageError, match="attention of rows"):
        llava.pause(parts, 1, attend=[99])
    waiting = llava.pause(parts, 1)
    width = llava.info.n_embd
    wrong = [
        (lambda: llava.resume(None, layer=1), "cannot go on to layer 1"),
        (lambda: llava.resume(None, layer=3), "layer 3 "),
        (lambda: llava.resume(None, layer=2, attend=[-99]), "attention of rows"),
        (lambda: llava.finish(np.array([5, 4], np.int32)), "sorted"),
        (lambda: llava.finish(np.array([36], np.int32)), "among the 36"),
        (lambda: llava.finish(None, np.zeros((35, width), np.float32)), f"36 rows, {width} wide"),
        (lambda: llava.generate(4), "prefilled"),
        (lambda: llava.feed(FED), "prefilled"),
        (lambda: llava.score(FED), "prefilled"),
        (llava.logits, "prefilled"),
    ]
    for call, says in wrong:
        with pytest.raises(UsageError, match=says):
            call()
    assert llava.resume(None, layer=2).image.tolist() == waiting.image.tolist()
    llava.finish(None)
    found = after(llava)
    with pytest.raises(UsageError, match="no prompt is paused"):
        llava.finish(None)
    llava.prefill(parts)
    assert same(after(llava), found)
    llava.pause(parts, 1)
    llava.prefill(parts)
    with pytest.raises(UsageError, match="no prompt is paused"):
        llava.finish(None)
    with pytest.raises(ContextOverflow, match="512"):
        llava.pause([TextPart("z" * 600), *parts[1:]], 1)


def test_drafts_and_answers_go_through_all_contexts(llava: Vlm) -> None:
    def ask(draft: np.ndarray | None) -> list[int]:
        llava.pause(prompt(llava), 1)
        llava.resume(np.arange(9, dtype=np.int32), layer=2)
        llava.finish(np.array([4], np.int32))
        return llava.generate(12, draft=draft).ids.tolist()

    alone = ask(None)
    for wrong in (12, 7, 1):
        draft = np.array([*alone[:wrong], *[3] * (12 - wrong)], np.int32)
        assert ask(draft) == alone
        assert ask(draft) == alone, "once more, along what was measured"


def test_a_cancel_leaves_nothing_behind(folder: Path) -> None:
    found = zoo.build("llava15", folder)
    vlm = LlamaVlm(found.model, found.mmproj, LoadOptions(threads=1))
    parts, keep = prompt(vlm), np.array([2, 3, 20], np.int32)

    def run(stop_at: int) -> None:
        calls = [
            lambda: vlm.pause(parts, 1),
            lambda: vlm.resume(None, layer=2),
            lambda: vlm.finish(keep),
            lambda: vlm.feed(FED[:1]),
        ]
        for i, call in enumerate(calls):
            if i == stop_at:
                vlm.cancel()
            call()

    run(-1)
    want = vlm.logits()
    for at in range(3):
        with pytest.raises(Interrupted):
            run(at)
        vlm.cancel_reset()
        with pytest.raises(UsageError, match="prefilled"):
            vlm.logits()
        with pytest.raises(UsageError, match="no prompt is paused"):
            vlm.finish(None)
    with pytest.raises(Interrupted):
        run(3)
    vlm.cancel_reset()
    vlm.feed(FED[:1])
    assert np.array_equal(vlm.logits(), want)
    vlm.close()


@pytest.mark.parametrize("compact", [False, True])
def test_contexts_are_opened_once(compact: bool, folder: Path) -> None:
    found = zoo.build("llava15", folder)
    vlm = LlamaVlm(found.model, found.mmproj, LoadOptions(threads=1, compact_positions=compact))
    opened = []
    for _ in range(2):
        vlm.pause(prompt(vlm), 1)
        vlm.resume(np.arange(9, dtype=np.int32), layer=2)
        vlm.finish(np.array([4], np.int32))
        assert vlm._cache.cuts == (1, 2)
        assert vlm._cache.cells == (14, 49, 22)
        opened.append([id(s) for s in vlm._cache.segments])
        vlm.pause(prompt(vlm), 1)
        vlm.resume(None, layer=2)
        vlm.finish(None)
        assert vlm._cache.cuts == (2,), "rows that all stay need no other context"
    assert opened[0] == opened[1]
    vlm.prefill(prompt(vlm))
    assert vlm._cache.cuts == ()
    vlm.close()


def test_contexts_grow_with_the_answer(folder: Path) -> None:
    """All of them, and what they hold moves with them bit for bit."""
    found = zoo.build("llava15", folder)
    vlm = LlamaVlm(found.model, found.mmproj, LoadOptions(threads=1, n_ctx=1024))
    fed = np.random.RandomState(1).randint(3, 200, 500).astype(np.int32)
    sizes, logits = [], []
    for _ in range(2):  # the second time they are as large as they get
        vlm.pause(prompt(vlm), 1)
        vlm.resume(np.arange(9, dtype=np.int32), layer=2)
        vlm.finish(np.array([4], np.int32))
        sizes.append([s.context.size for s in vlm._cache.segments])
        logits.append(np.concatenate([vlm._cache.feed(fed[i : i + 50]) for i in range(0, 500, 50)]))
    assert all(before < after for before, after in zip(*sizes, strict=True))
    assert np.array_equal(*logits)
    vlm.close()
