"""Along a draft or not: the answer is the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import Engine, ImagePart, LoadOptions, Message, Part, SamplingOptions, TextPart, Vlm
from localvlm.engine.client import Engine as LlamaEngine
from localvlm.engine.drafts import CELLS, Deviations, Follower, agreed
from localvlm.errors import Interrupted, UsageError
from tests import zoo

N_VOCAB = 7
START = 10
N_TOKENS = 40


class Rows:
    """A language of 7 tokens whose logits hang on the tokens before; cells of batches shift them by ``error``."""

    def __init__(self, error: float, exact: Sequence[int] = (1,), seed: int = 0, spread: float = 1.0) -> None:
        self.error, self.exact, self.seed, self.spread = error, {1, *exact}, seed, spread
        self.cells: list[tuple[int, float]] = []
        self.batches: list[int] = []

    def feed(self, ids: Sequence[int]) -> np.ndarray:
        self.batches.append(len(ids))
        off = 0.0 if len(ids) in self.exact else self.error
        out = []
        for token in ids:
            self.cells.append((token, off))
            state = [self.seed, *(t for t, _ in self.cells)]
            logits = np.random.default_rng(state).normal(scale=self.spread, size=N_VOCAB)
            shift = np.random.default_rng([1, *state]).choice([-1.0, 1.0], N_VOCAB)
            out.append(logits + max(o for _, o in self.cells) * shift)
        return np.array(out, np.float32)

    def forget(self, n: int) -> None:
        del self.cells[len(self.cells) - n :]


def answer(rows: Rows, draft: Sequence[int], deviations: Deviations | None = None) -> list[int]:
    follower = Follower(rows.feed, rows.forget, draft, (START,), 4096, deviations or Deviations())
    ids = [0]
    while len(ids) < N_TOKENS:
        ids.append(int(follower.after(ids[-1]).argmax()))
    follower.finish()
    assert [t for t, _ in rows.cells] == ids[:-1]
    return ids


def test_an_exact_batch_takes_the_place_of_single_rows() -> None:
    want = answer(Rows(0.0), [])
    measured = Deviations()
    assert answer(rows := Rows(0.0), want[:-1], measured) == want
    assert rows.batches == [1] * 16 + [16] + [16] + [1] * 7  # measured, used; 7 are left
    assert answer(rows := Rows(0.0), want[:-1], measured) == want
    assert rows.batches == [16, 16] + [1] * 7 + [1, 8]  # 7 of 8: what the last row would be runs alone, too
    assert answer(rows := Rows(0.0), want[:-1], measured) == want
    assert rows.batches == [16, 16, 8]
    assert measured.tolerance == 0.0


@pytest.mark.parametrize("error", [0.0, 1e-3])
@pytest.mark.parametrize(
    ("left", "batches"),
    [(16, [16]), (15, [16]), (13, [16]), (12, [8, 4]), (11, [8, 3]), (7, [8]), (6, [4, 2]), (5, [4, 1]), (3, [3])],
)
def test_the_last_rows_of_a_draft_are_filled_up_where_that_is_cheaper(
    left: int, batches: list[int], error: float
) -> None:
    """What is filled in is neither counted nor kept, in exact batches or loose ones."""
    clear = {"error": error, "spread": 50.0}
    want = answer(Rows(**clear), [])
    measured = Deviations()
    for _ in range(7):
        rows = Rows(**clear)
        assert answer(rows, want[:left], measured) == want
    assert rows.batches[: len(batches)] == batches


@pytest.mark.parametrize("exact", [(2, 3, 4, 8), (16,)])
def test_a_filled_batch_is_measured_whole(exact: Sequence[int]) -> None:
    """A size that differs in its last row alone, which is filled in, is not taken for an exact one."""

    class Rough(Rows):
        def feed(self, ids: Sequence[int]) -> np.ndarray:
            out = super().feed(ids)
            out[-1] += 0.25 * (len(ids) == 16 and 16 not in self.exact)
            return out

    want = answer(Rows(0.0), [])
    measured = Deviations()
    answer(rows := Rough(0.0, exact), want[:15], measured)
    assert rows.batches[:17] == [1] * 16 + [16]
    assert measured.of((CELLS,), 16) == (0.0 if 16 in exact else 0.25)


def test_an_answer_cancelled_while_its_draft_is_filled_up_leaves_its_own_cells() -> None:
    want, rows = answer(Rows(0.0), []), Rows(0.0)

    def feed(ids: Sequence[int]) -> np.ndarray:
        if len(rows.cells) == 15:  # the last row of 14 was filled in once
            raise Interrupted
        return rows.feed(ids)

    follower = Follower(feed, rows.forget, want[:14], (START,), 4096, Deviations())
    for token in want[:13]:
        follower.after(token)
    with pytest.raises(Interrupted):
        follower.after(want[13])
    follower.finish()
    assert [token for token, _ in rows.cells] == want[:14]


def test_each_answer_measures_one_size() -> None:
    want = answer(Rows(0.0), [])
    measured = Deviations()
    error = 1e-4
    for _ in range(6):
        assert answer(rows := Rows(error, exact=(2, 3)), want, measured) == want
    assert measured.of((CELLS,), 16) == pytest.approx(error, rel=1e-2)
    assert measured.of((CELLS,), 3) == 0.0
    assert set(rows.batches) == {3}


def test_an_answer_that_leaves_its_drafts_early_gains_too() -> None:
    """What it came to is measured, and exact batches stand for single rows where a larger one is measured."""
    want = answer(Rows(0.0), [])
    draft = want[:6] + [(token + 1) % N_VOCAB for token in want[6:]]
    measured, batches = Deviations(), []
    for _ in range(4):
        rows = Rows(0.0)
        assert answer(rows, draft, measured) == want
        batches.append(rows.batches[: len(rows.batches) - N_TOKENS + 7])
    assert batches == [[1] * 6 + [4], [4, 4, 3], [4, 4, 2], [4, 4]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("wrong", [None, 3, 16, 30])
def test_close_decisions_are_made_on_single_rows(seed: int, wrong: int | None) -> None:
    """Errors of batches that would turn many of these decisions turn none."""
    want = answer(Rows(0.3, seed=seed), [])
    draft = list(want)
    if wrong is not None:
        draft[wrong] = (draft[wrong] + 1) % N_VOCAB
    measured = Deviations()
    for _ in range(6):
        assert answer(Rows(0.3, seed=seed), draft, measured) == want


def test_without_a_tolerance_they_would_be_others() -> None:
    class Careless(Deviations):
        tolerance = 0.0

    def same(seed: int) -> bool:
        want = answer(Rows(0.3, seed=seed), [])
        measured = Careless()
        return all(answer(Rows(0.3, seed=seed), want, measured) == want for _ in range(6))

    assert not all(same(seed) for seed in range(8))


def test_a_loose_draft_followed_to_its_end_saves_decodes() -> None:
    clear = {"error": 1e-3, "spread": 50.0}
    want = answer(Rows(**clear), [])
    measured = Deviations()
    for _ in range(6):
        assert answer(rows := Rows(**clear), want, measured) == want
    assert len(rows.batches) < 6
    assert max(off for _, off in rows.cells) > 0


@pytest.mark.parametrize("left", [N_TOKENS, 15, 7])
def test_a_batch_never_crosses_a_border_of_the_cache(left: int) -> None:
    want = answer(Rows(0.0), [])
    largest = 0
    for start in range(CELLS - 24, CELLS):
        rows = Rows(0.0)
        spans: list[tuple[int, int]] = []

        def feed(ids: Sequence[int], rows: Rows = rows, spans: list = spans, start: int = start) -> np.ndarray:
            first = start + len(rows.cells)
            spans.append((first, first + len(ids) - 1))
            return rows.feed(ids)

        follower = Follower(feed, rows.forget, want[:left], (start - 100, start), CELLS + 64, Deviations())
        for token in want:
            follower.after(token)
        assert all(first // CELLS == last // CELLS for first, last in spans)
        largest = max(largest, *(last - first + 1 for first, last in spans))
    assert largest == (8 if left == 7 else 16)


def test_agreed_counts_the_common_start() -> None:
    assert agreed([1, 2, 3], [1, 2, 4]) == 2
    assert agreed([1, 2], [1, 2, 4]) == agreed([1, 2, 4], [1, 2]) == 2
    assert agreed([], [1]) == agreed([1], []) == 0


# on llama.cpp


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with LlamaEngine() as opened:
        yield opened


def prompt(vlm: Vlm, seed: int, words: int) -> list[Part]:
    image = vlm.encode(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))
    parts = vlm.chat([Message("user", "what " * words, 1)])
    return [part if isinstance(part, TextPart) else ImagePart(image) for part in parts]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("family", ["llava15", "qwen25vl", "gemma3"])
def test_answers_are_those_without_a_draft(engine: Engine, folder: Path, family: str, threads: int) -> None:
    """Flat logits, before and after 512 cells, where single rows go through kernels of their own."""
    vlm = engine.load(*zoo_files(family, folder), LoadOptions(threads=threads))
    for words in (1, 60, 250):
        parts = prompt(vlm, words, words)
        n_past = vlm.prefill(parts).n_past
        plain = vlm.generate(24)
        wrong = plain.ids.copy()
        wrong[len(wrong) // 2 :] = 5
        for draft in (plain.ids, wrong, plain.ids, plain.ids[:5], plain.ids, plain.ids, wrong[:0]):
            vlm.prefill(parts)
            done = vlm.generate(24, draft=draft)
            assert done.ids.tolist() == plain.ids.tolist()
            assert (done.finish, done.fed, done.text) == (plain.finish, plain.fed, plain.text)
            assert done.drafted == len(draft)
            assert done.accepted == agreed(plain.ids, draft)
            assert np.allclose(done.logprobs, plain.logprobs, atol=0.05)
    assert n_past > 512
    vlm.close()


@pytest.mark.parametrize("words", [1, 250])
def test_a_draft_after_pruning_at_a_layer(engine: Engine, folder: Path, words: int) -> None:
    """Both contexts take tokens back."""
    vlm = engine.load(*zoo_files("llava15", folder), LoadOptions(threads=2))
    parts = [
        replace(part, keep=np.arange(0, part.image.layout.n_tokens, 3, dtype=np.int32))
        if isinstance(part, ImagePart)
        else part
        for part in prompt(vlm, 1, words)
    ]
    vlm.prefill(parts, layer=1)
    plain = vlm.generate(24)
    wrong = plain.ids.copy()
    wrong[9:] = 5
    for draft in (plain.ids, wrong, plain.ids, wrong, plain.ids):
        vlm.prefill(parts, layer=1)
        done = vlm.generate(24, draft=draft)
        assert done.ids.tolist() == plain.ids.tolist()
        assert done.accepted == agreed(plain.ids, draft) > 0
    vlm.feed(plain.ids[-1:])  # cells and positions are those of the answer
    with_draft = vlm.logits()
    vlm.prefill(parts, layer=1)
    vlm.feed(plain.ids)
    assert np.allclose(with_draft, vlm.logits(), atol=0.2)
    vlm.close()


def zoo_files(family: str, folder: Path) -> tuple[Path, Path]:
    model = zoo.build(family, folder)
    return model.model, model.mmproj


def test_when_a_draft_is_not_used(engine: Engine, folder: Path) -> None:
    vlm = engine.load(*zoo_files("llava15", folder), LoadOptions(threads=1, n_ctx=512))
    parts = prompt(vlm, 0, 1)
    vlm.prefill(parts)
    plain = vlm.generate(8)
    vlm.prefill(parts)
    assert vlm.generate(8, SamplingOptions(temp=1.0), draft=plain.ids).drafted == 0
    vlm.prefill(parts, tap=True)
    assert vlm.generate(8, draft=plain.ids).drafted == 0
    vlm.prefill(parts)
    with pytest.raises(UsageError, match="draft's tokens"):
        vlm.generate(8, draft=np.array([vlm.info.n_vocab], np.int32))
    vlm.close()


def test_a_draft_stops_where_the_context_is_full(engine: Engine, folder: Path) -> None:
    vlm = engine.load(*zoo_files("llava15", folder), LoadOptions(threads=1, n_ctx=256))
    parts = prompt(vlm, 0, 84)
    n_past = vlm.prefill(parts).n_past
    assert 200 < n_past < 250
    plain = vlm.generate(100)
    assert plain.finish == "length"
    assert len(plain.ids) == 256 - n_past + 1
    for _ in range(3):
        vlm.prefill(parts)
        done = vlm.generate(100, draft=np.concatenate([plain.ids, plain.ids]))
        assert done.ids.tolist() == plain.ids.tolist()
        assert done.finish == "length"
    vlm.close()


def test_a_stream_shows_what_was_taken_over_alone(engine: Engine, folder: Path) -> None:
    vlm = engine.load(*zoo_files("llava15", folder), LoadOptions(threads=1))
    parts = prompt(vlm, 0, 1)
    vlm.prefill(parts)
    plain = vlm.generate(12)
    draft = plain.ids.copy()
    draft[6:] = 5
    for _ in range(3):
        pieces: list[str] = []
        vlm.prefill(parts)
        vlm.generate(12, on_text=pieces.append, draft=draft)
        assert "".join(pieces) == plain.text
    vlm.close()
