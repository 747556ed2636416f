"""The sampler against the definitions of its options."""

from __future__ import annotations

import math

import numpy as np
import pytest

from localvlm.engine.api import SamplingOptions
from localvlm.engine.sampling import Sampler

LOGITS = np.array([0.5, 3.0, -1.0, 2.5, 2.9, -20.0, 1.0], np.float32)


def draws(options: SamplingOptions, n: int = 3000, logits: np.ndarray = LOGITS) -> list[int]:
    sampler = Sampler(options)
    return [sampler.pick(logits)[0] for _ in range(n)]


def softmax(logits: np.ndarray, temp: float = 1.0) -> np.ndarray:
    weights = [math.exp(float(x) / temp) for x in logits]
    return np.array(weights) / math.fsum(weights)


def test_temperature_zero_is_greedy() -> None:
    assert set(draws(SamplingOptions(temp=0), 3)) == {1}
    assert set(draws(SamplingOptions(temp=-1), 3)) == {1}


def test_greedy_ties_go_to_the_smaller_id() -> None:
    assert draws(SamplingOptions(), 1, np.array([1, 7, 7, 7], np.float32)) == [1]


@pytest.mark.parametrize("scale", [1.0, 50.0, 1e4])
def test_logprobs_are_those_of_the_model_whatever_the_options(scale: float) -> None:
    logits = LOGITS * np.float32(scale)
    shifted = (logits - logits.max()).astype(np.float64)
    want = shifted - math.log(math.fsum(math.exp(x) for x in shifted))
    for options in (SamplingOptions(), SamplingOptions(temp=2.0, top_k=2), SamplingOptions(temp=0.1, top_p=0.1)):
        token, logprob = Sampler(options).pick(logits)
        assert logprob == pytest.approx(want[token], rel=1e-5, abs=1e-6)


def test_the_same_seed_draws_the_same() -> None:
    options = SamplingOptions(temp=1.3, seed=42, top_p=1.0, top_k=0)
    assert draws(options, 50) == draws(options, 50)
    assert draws(options, 50) != draws(SamplingOptions(temp=1.3, seed=43, top_p=1.0, top_k=0), 50)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_top_k_draws_from_the_k_best(k: int) -> None:
    best = set(np.argsort(-LOGITS)[:k].tolist())
    assert set(draws(SamplingOptions(temp=5.0, top_p=1.0, top_k=k))) == best


@pytest.mark.parametrize("top_p", [0.05, 0.3, 0.5, 0.8, 0.95])
def test_top_p_draws_from_the_smallest_set_that_holds_p(top_p: float) -> None:
    p = softmax(LOGITS, 1.5)
    order = np.argsort(-p)
    nucleus = next(n for n in range(1, len(p) + 1) if p[order[:n]].sum() >= top_p)
    assert set(draws(SamplingOptions(temp=1.5, top_p=top_p, top_k=0))) == set(order[:nucleus].tolist())


def test_frequencies_follow_the_softmax() -> None:
    n = 20_000
    got = np.bincount(draws(SamplingOptions(temp=1.7, top_p=1.0, top_k=0), n), minlength=len(LOGITS)) / n
    np.testing.assert_allclose(got, softmax(LOGITS, 1.7), atol=0.015)


@pytest.mark.parametrize("options", [SamplingOptions(temp=1.0), SamplingOptions(temp=1e-6), SamplingOptions(temp=1e6)])
@pytest.mark.parametrize("top_p", [0.0, 0.95, 1.0, 1.5])
def test_extreme_options_still_give_a_token(options: SamplingOptions, top_p: float) -> None:
    options = SamplingOptions(temp=options.temp, top_p=top_p, top_k=10**6)
    for logits in (LOGITS, LOGITS * 1e30, np.full(7, -np.inf, np.float32) + np.eye(7, dtype=np.float32)[2]):
        logits = np.nan_to_num(logits.astype(np.float32), nan=0.0, posinf=3e38, neginf=-3e38)
        assert all(0 <= t < 7 for t in draws(options, 20, logits))


@pytest.mark.parametrize("temp", [5e-324, 1e-320, 1e-300, 1e-200])
def test_the_coldest_temperatures_draw_among_the_likeliest(temp: float) -> None:
    tied = np.array([1, 3, 3, np.nextafter(np.float32(3), np.float32(0))], np.float32)
    for scale in (1.0, -1.0, 1e38, 1e-38):
        logits = (tied if scale > 0 else tied - 4) * np.float32(abs(scale))
        assert set(draws(SamplingOptions(temp=temp, top_p=1.0, top_k=0), 50, logits)) == {1, 2}


def test_one_token_vocabularies() -> None:
    assert Sampler(SamplingOptions(temp=1.0)).pick(np.zeros(1, np.float32)) == (0, 0.0)


def test_logits_that_are_not_numbers_are_an_error_and_not_an_answer() -> None:
    from localvlm.errors import ModelError

    for options in (SamplingOptions(), SamplingOptions(temp=1.0)):
        with pytest.raises(ModelError, match="not numbers"):
            Sampler(options).pick(np.array([1.0, np.nan], np.float32))
