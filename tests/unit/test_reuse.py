"""Going on with a cache: what is not run again makes no difference, and what would is run again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import Encoded, ImagePart, Message, Part, Reuse, TextPart
from localvlm.engine.client import Engine, RemoteVlm
from localvlm.engine.rows import SOURCE
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import Interrupted, UsageError
from tests import zoo
from tests.asking import ONE, load, picture

QUICK = ("llava15", "qwen25vl", "gemma3")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def llava(engine: Engine, folder: Path) -> RemoteVlm:
    return load(engine, zoo.build("llava15", folder))


def parts(vlm: RemoteVlm, encoded: list[Encoded], *texts: str, keep=None) -> list[Part]:
    """A conversation about the pictures; questions and answers take turns."""
    messages = [
        Message("user" if i % 2 == 0 else "assistant", t, 0 if i else len(encoded)) for i, t in enumerate(texts)
    ]
    return [p if isinstance(p, TextPart) else ImagePart(encoded[p], keep) for p in vlm.chat(messages)]


def fresh(vlm: RemoteVlm, prompt: list[Part], **options) -> np.ndarray:
    vlm.prefill(prompt, **options)
    return vlm.logits()


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.FAMILIES])
@pytest.mark.parametrize("tap", [False, True])
def test_leading_batches_are_reused_bit_for_bit(name: str, tap: bool, engine: Engine, folder: Path) -> None:
    vlm = load(engine, zoo.build(name, folder))
    encoded = [vlm.encode(picture(seed=s)) for s in (1, 2)]
    first, second = (parts(vlm, encoded, text) for text in ("what is the thing in red?", "where?"))
    want = fresh(vlm, second, tap=tap)
    seen = vlm.attention() if tap else None
    vlm.prefill(first, tap=tap)
    vlm.generate(3)
    got = vlm.prefill(second, tap=tap, reuse="batches")
    n_image = sum(e.layout.n_tokens for e in encoded)
    assert got.n_past - got.n_run >= n_image
    assert np.array_equal(vlm.logits(), want)
    if seen is not None:
        again = vlm.attention()
        assert again.rows == seen.rows
        assert np.array_equal(again.prompt, seen.prompt)
        assert np.array_equal(again.last, seen.last)
    vlm.close()


@pytest.mark.parametrize("name", QUICK)
def test_a_conversation_goes_on_from_what_was_generated(name: str, engine: Engine, folder: Path) -> None:
    vlm = load(engine, zoo.build(name, folder))
    encoded = [vlm.encode(picture())]
    begun = vlm.prefill(parts(vlm, encoded, "what?"))
    said = vlm.generate(4)
    assert said.finish == "length"
    prompt = [*parts(vlm, encoded, "what?"), TextPart(said.text), TextPart("\nwhere is it?")]
    got = vlm.prefill(prompt, reuse="rows")
    assert got.n_past - got.n_run >= begun.n_past - 1
    assert got.n_run < begun.n_past
    near = vlm.logits()
    np.testing.assert_allclose(near, fresh(vlm, prompt), atol=0.02 * np.abs(near).max())
    vlm.close()


def test_what_differs_is_run_again(llava: RemoteVlm) -> None:
    one, other = llava.encode(picture(seed=1)), llava.encode(picture(seed=2))
    few, more = np.arange(0, 36, 4, dtype=np.int32), np.arange(0, 36, 3, dtype=np.int32)
    ask = "what is it?"
    base = parts(llava, [one], ask)
    for prompt, options in (
        (parts(llava, [other], ask), {}),
        (parts(llava, [one], ask, keep=few), {}),
        (base, {"tap": True}),
        (base, {"layer": 1}),
    ):
        want = fresh(llava, prompt, **options)
        for reuse in ("batches", "rows"):
            llava.prefill(base)
            llava.prefill(prompt, reuse=reuse, **options)
            assert np.array_equal(llava.logits(), want)
    llava.prefill(parts(llava, [one], ask, keep=few))
    pruned = parts(llava, [one], ask, keep=more)
    assert llava.prefill(pruned, reuse="batches").n_run == llava.prefill(pruned).n_past
    llava.prefill(parts(llava, [one], ask, keep=few), layer=1)
    staged = parts(llava, [one], ask, keep=more)
    got = llava.prefill(staged, layer=1, reuse="rows")
    assert got.n_run == got.n_past
    assert np.array_equal(llava.logits(), fresh(llava, staged, layer=1))


def test_more_tokens_of_a_picture_are_at_their_places(llava: RemoteVlm) -> None:
    """Nothing lies between: added rows are the very rows of a prompt that has them at once."""
    encoded = llava.encode(picture())
    some, rest = np.arange(0, 20, dtype=np.int32), np.arange(20, 36, dtype=np.int32)
    ask = TextPart(" where is it?")
    at_once = [TextPart("what?"), ImagePart(encoded), ask]
    added = [TextPart("what?"), ImagePart(encoded, some), ImagePart(encoded, rest, again=0), ask]
    want = fresh(llava, at_once)
    got = llava.prefill(added)
    assert got.n_kept == got.n_image == 36
    np.testing.assert_allclose(llava.logits(), want, atol=1e-2 * np.abs(want).max())
    llava.prefill(added[:2])
    assert llava.prefill(added, reuse="rows").n_run < 36
    np.testing.assert_allclose(llava.logits(), want, atol=1e-2 * np.abs(want).max())


@pytest.mark.parametrize("again", [1, -1])
def test_a_picture_that_is_not_there_gets_no_tokens(llava: RemoteVlm, again: int) -> None:
    encoded = llava.encode(picture())
    with pytest.raises(UsageError, match="more tokens"):
        llava.prefill([ImagePart(encoded), ImagePart(encoded, np.array([1], np.int32), again=again)])


def test_attention_is_of_the_text_asked_about(llava: RemoteVlm) -> None:
    encoded = [llava.encode(picture())]
    long = parts(llava, encoded, "what is the thing in red?", "red", "where is it?")
    since = next(i for i, p in enumerate(long) if isinstance(p, TextPart) and p.text == "where is it?")
    llava.prefill(long, tap=True)
    all_rows = llava.attention().rows[0]
    llava.prefill(long, tap=True, since=since)
    want = llava.attention()
    assert 3 < want.rows[0] < all_rows
    llava.prefill(parts(llava, encoded, "what is the thing in red?"), tap=True)
    llava.generate(2)
    got = llava.prefill(long, tap=True, since=since, reuse="rows")
    assert got.n_past - got.n_run > 36
    assert llava.attention().rows == want.rows
    np.testing.assert_allclose(llava.attention().prompt, want.prompt, atol=2e-2 * want.prompt.max())


LARGE = replace(ONE, n_ctx=1536, image_tokens=1024)
"""Pictures of more rows than a batch has."""


def test_a_cache_is_not_cut_within_a_picture_whose_rows_share_a_place(folder: Path) -> None:
    """A pruned prompt of Qwen is run in batches of 512 rows, so that one may end within the picture."""
    model = zoo.build("qwen25vl", folder)
    vlm, other = (LlamaVlm(model.model, model.mmproj, LARGE) for _ in range(2))
    rgb = np.random.default_rng(0).integers(0, 255, (840, 840, 3), np.uint8)
    seen, again = vlm.encode(rgb), other.encode(rgb)
    keep = np.flatnonzero(np.random.default_rng(1).random(seen.layout.n_tokens) < 0.62).astype(np.int32)
    for question in ("what is the thing in red?", "is it a cat?", "where is it?", "how many are there?"):
        vlm.prefill([TextPart("Hello there "), ImagePart(seen, keep), TextPart(question)], reuse="batches")
        want = fresh(other, [TextPart("Hello there "), ImagePart(again, keep), TextPart(question)])
        assert np.array_equal(vlm.logits(), want)
    vlm.close()
    other.close()


@pytest.mark.parametrize(("name", "off"), [("qwen25vl", 2e-3), ("gemma3", 0.0)])
def test_fewer_tokens_of_a_picture_leave_none_of_those_before(name: str, off: float, folder: Path) -> None:
    """What the cache holds after the first ones shares their place, or was seen by them."""
    model = zoo.build(name, folder)
    vlm = LlamaVlm(model.model, model.mmproj, ONE)
    seen = vlm.encode(picture())
    few = np.arange(seen.layout.n_tokens // 3, dtype=np.int32)
    prompt = [TextPart("Hello there "), ImagePart(seen, few), TextPart("what?")]
    want = fresh(vlm, prompt)
    fresh(vlm, [TextPart("Hello there "), ImagePart(seen), TextPart("what?")])
    vlm.prefill(prompt, reuse="rows")
    assert float(np.abs(vlm.logits() - want).max()) <= off
    vlm.close()


def test_a_cut_is_no_end_of_a_batch(folder: Path) -> None:
    """Rows that are kept of a larger batch are not those of a smaller one, bit for bit."""
    model = zoo.build("llava15", folder)
    vlm = LlamaVlm(model.model, model.mmproj, ONE)
    seen = vlm.encode(picture())
    few = np.arange(1, 36, dtype=np.int32)
    whole = [TextPart("Hello there, what is it that you see? "), ImagePart(seen), TextPart("what?")]
    want = fresh(vlm, whole)
    vlm.prefill([whole[0], ImagePart(seen, few), whole[2]])  # text and picture in one batch
    vlm._cache.keep(int(np.flatnonzero(vlm._cache.keys[:, SOURCE] >= 0)[0]))
    assert vlm.prefill(whole, reuse="batches").n_run > 36
    assert np.array_equal(vlm.logits(), want)
    vlm.close()


@pytest.mark.parametrize("way", ["feed", "generate", "score"])
def test_an_answer_is_settled_before_anything_is_run_after_it(way: str, folder: Path) -> None:
    model = zoo.build("llava15", folder)
    vlm = LlamaVlm(model.model, model.mmproj, ONE)
    prompt = parts(vlm, [vlm.encode(picture())], "what is the thing in red?")
    ids = np.array([83, 266, 7], np.int32)
    vlm.prefill(prompt)
    vlm.generate(2)
    settled: list[int] = []
    vlm._cache.mend = lambda: settled.append(len(vlm._cache.keys))
    before = len(vlm._cache.keys)
    vlm.generate(2) if way == "generate" else getattr(vlm, way)(ids)
    vlm.prefill(parts(vlm, [vlm.encode(picture())], "what is the thing in red?", "it", "and?"), reuse="rows")
    assert settled == [before]
    vlm.close()


def test_what_was_decoded_along_a_draft_is_mended_before_it_is_gone_on_from(folder: Path) -> None:
    model = zoo.build("llava15", folder)
    vlm = LlamaVlm(model.model, model.mmproj, ONE)
    mended: list[int] = []
    first, other = (parts(vlm, [vlm.encode(picture())], text) for text in ("what is the thing in red?", "where?"))
    said = vlm.prefill([*first, TextPart(" it is red")]).token_ids[vlm.prefill(first).token_ids.size :]

    def answered(prompt: list[Part], reuse: Reuse) -> list[int]:
        vlm.prefill(prompt, reuse=reuse)
        vlm.feed(said)
        return mended

    for begun, reuse, expected in ((first, "rows", [1]), (other, "rows", []), (first, "batches", [])):
        answered(first, "nothing")
        vlm._cache.mend = lambda: mended.append(1)
        assert answered([*begun, TextPart(" it is red where?")], reuse) == expected
        mended.clear()
        assert answered([*begun, TextPart(" it is red where? it is red who?")], reuse) == []
    vlm.close()


def test_scoring_after_another_prompt_leaves_the_cache_alone(llava: RemoteVlm) -> None:
    encoded = llava.encode(picture())
    ids = np.array([83, 266, 7], np.int32)
    pruned = [TextPart("what?"), ImagePart(encoded, np.array([3, 5], np.int32)), TextPart(" where?")]
    llava.prefill(pruned)
    want = llava.score(ids)
    whole = parts(llava, [encoded], "what?")
    before = fresh(llava, whole, tap=True)
    seen = llava.attention()
    assert np.array_equal(llava.score(ids, pruned), want)
    assert np.array_equal(llava.logits(), before)
    assert np.array_equal(llava.attention().prompt, seen.prompt)
    assert llava.prefill(parts(llava, [encoded], "where?"), tap=True, reuse="batches").n_run < 36


@pytest.mark.parametrize("name", ["llava15", "qwen25vl"])
@pytest.mark.parametrize("stop", [0, 1])
def test_a_cancelled_prefill_is_gone_on_from(name: str, stop: int, folder: Path, monkeypatch) -> None:
    model = zoo.build(name, folder)
    vlm = LlamaVlm(model.model, model.mmproj, ONE)
    encoded = [vlm.encode(picture(seed=s)) for s in (1, 2)]
    want = fresh(vlm, parts(vlm, encoded, "where?"))
    vlm.prefill(parts(vlm, encoded, "what is it?"))
    other = [encoded[0], vlm.encode(picture(seed=3))]
    decode, left = vlm._cache.context.decode, [stop]

    def stopped(*batch: np.ndarray) -> None:
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        decode(*batch)

    with monkeypatch.context() as patched:
        patched.setattr(vlm._cache.context, "decode", stopped)
        with pytest.raises(Interrupted):
            vlm.prefill(parts(vlm, other, "what is it?"), reuse="rows")
    with pytest.raises(UsageError, match="nothing has been prefilled"):
        vlm.generate(1)
    got = vlm.prefill(parts(vlm, encoded, "where?"), reuse="batches")
    assert got.n_run < got.n_past - encoded[0].layout.n_tokens
    assert np.array_equal(vlm.logits(), want)
    vlm.close()
