"""Methods within the LLM on llama.cpp: who stays is what the attention of prompts that never paused tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest

from localvlm.catalog import example_image, pair_named
from localvlm.engine.api import ImagePart, LoadOptions, Vlm
from localvlm.engine.client import Engine
from localvlm.images import load
from localvlm.pipeline import AskOptions, Pipeline
from localvlm.pruning import IN_LLM, InLlm, Kept, Seen, mean_kept
from localvlm.pruning.fastv import attended
from localvlm.pruning.in_llm import cuts_for
from localvlm.stepwise import prefill_in_steps
from tests import asking, zoo

FAMILIES = ("llava15", "qwen25vl", "internvl", "gemma3")
SWEEPING = [name for name, method in IN_LLM.items() if method.sweeps]
TWICE = InLlm(
    "twice", "two stages", lambda keep, n, n_layer: cuts_for(keep, n, n_layer, (8, 22), lambda t: (t, t * t)), attended
)


@pytest.fixture(scope="module", params=[*FAMILIES, "demo"])
def model(request, native, tmp_path_factory) -> Iterator[Vlm]:
    if request.param == "demo":
        files = pair_named("demo").model
        assert files is not None
    else:
        files = zoo.build(request.param, tmp_path_factory.mktemp("zoo"))
    with Engine() as engine:
        yield engine.load(files.model, files.mmproj, LoadOptions(threads=1))


@pytest.fixture(scope="module")
def demo(native) -> Iterator[Pipeline]:
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=1)) as opened:
        yield opened


def prompt(vlm: Vlm) -> list:
    return asking.prompt(vlm, [vlm.encode(asking.picture(96, 96))])


def only(parts: list, kept: list[int]) -> list:
    keep = np.array(kept, np.int32)
    return [ImagePart(p.image, keep) if isinstance(p, ImagePart) else p for p in parts]


def best(scores: np.ndarray, among: Sequence[int], k: int) -> list[int]:
    return sorted(sorted(among, key=lambda i: (-scores[i], i))[:k])


def test_fastv_keeps_what_the_last_row_of_a_plain_prompt_attends_to(model: Vlm) -> None:
    parts = prompt(model)
    n = model.prefill(parts, tap=True).n_image
    (cut,) = IN_LLM["fastv"].cuts(0.6, n, model.info.n_layer)
    want = best(model.attention().last[cut.layer - 1].mean(axis=0), range(n), cut.k)
    plain = model.prefill(only(parts, want), layer=cut.layer)
    logits = model.logits()
    done = prefill_in_steps(model, parts, IN_LLM["fastv"], 0.6)
    assert (list(done.kept), done.steps) == (want, ((0, n), cut))
    assert done.prompt.token_ids.tolist() == plain.token_ids.tolist()
    assert (done.prompt.n_kept, done.prompt.n_past) == (plain.n_kept, plain.n_past)
    np.testing.assert_allclose(model.logits(), logits, atol=1e-4)


def test_a_second_stage_looks_at_a_prompt_that_the_first_has_pruned(model: Vlm) -> None:
    parts = prompt(model)
    n = model.prefill(parts, tap=True).n_image
    first, second = TWICE.cuts(0.6, n, model.info.n_layer)
    once = best(model.attention().last[first.layer - 1].mean(axis=0), range(n), first.k)
    model.prefill(only(parts, once), tap=True, layer=first.layer)
    twice = best(model.attention().last[second.layer - 1].mean(axis=0), once, second.k)
    done = prefill_in_steps(model, parts, TWICE, 0.6)
    assert (list(done.kept), done.steps) == (twice, ((0, n), first, second))


def test_sparsevlm_goes_by_the_heads_that_look_at_the_picture(model: Vlm) -> None:
    """Its first stage, with all rows of text for raters: what the tap sums over them."""
    v2, all_rows = IN_LLM["sparsevlm-v2"], lambda _, text: range(len(text))
    method = replace(v2, raters=all_rows, cuts=lambda *asked: v2.cuts(*asked)[:1])
    parts = prompt(model)
    n = model.prefill(parts, tap=True).n_image
    (cut,) = method.cuts(0.6, n, model.info.n_layer)
    seen = model.attention().prompt[cut.layer - 1] / model.attention().rows[0]
    heads = np.argsort(-seen.sum(axis=1), kind="stable")[: round(14 / 32 * len(seen))]
    want = best(seen[heads].mean(axis=0), range(n), cut.k)
    assert list(prefill_in_steps(model, parts, method, 0.6).kept) == want


def test_rows_in_their_own_places_change_nothing(model: Vlm) -> None:
    parts = prompt(model)
    same = replace(TWICE, hidden=True, select=lambda seen, k: replace(attended(seen, k), rows=_rows(seen, k)))
    kept = prefill_in_steps(model, parts, TWICE, 0.6).kept
    logits = model.logits()
    assert prefill_in_steps(model, parts, same, 0.6).kept == kept
    np.testing.assert_allclose(model.logits(), logits, atol=1e-4)


def _rows(seen: Seen, k: int) -> np.ndarray:
    assert seen.rows is not None
    return seen.rows[attended(seen, k).index]


def test_all_image_tokens_may_leave(model: Vlm) -> None:
    """As DyVTE's do."""
    gone = replace(TWICE, select=lambda seen, k: Kept(np.zeros(0, np.int32)))
    done = prefill_in_steps(model, prompt(model), gone, 0.6)
    assert (done.kept, done.steps[-1][1], done.prompt.n_kept) == ((), 0, 0)
    assert np.isfinite(model.logits()).all()
    assert len(model.generate(3).ids)


@pytest.mark.parametrize("name", SWEEPING)
def test_the_demo_pair_answers(demo: Pipeline, name: str) -> None:
    shown, question = load(example_image()), "What color is the circle?"
    before = demo.ask([shown], question, AskOptions("sgl+"))
    with demo.session([shown]) as session:
        for _ in range(2):
            answer = session.ask(question, AskOptions(name, 0.6))
            assert answer.tokens.mean_kept == mean_kept(answer.steps, demo.vlm("model").info.n_layer)
            assert answer.tokens.mean_kept == pytest.approx(0.6 * answer.tokens.image, abs=0.5)
            assert answer.ran[1] == answer.tokens.prompt
    assert demo.ask([shown], question, AskOptions("sgl+")).answer_ids == before.answer_ids
