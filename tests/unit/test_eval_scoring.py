"""Scores of answers against hand-worked values and brute force."""

from __future__ import annotations

import itertools
import math
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localvlm.evaluation.statistics import detection, floor_adjusted, mean_score, of_unpruned, wilson
from localvlm.scoring import RULES, anls, exact, levenshtein, plain, relaxed, said_yes, vqa, vqa_normal
from localvlm.scoring import yes_no as yes_no_score

WORDS = st.text("abc é.,-1", max_size=8)


# ---- exact


@pytest.mark.parametrize(
    ("text", "want"),
    [(" Top-left. ", "top left"), ("It's RED!", "it s red"), ("1,000", "1000"), ("-3.5", "-3.5"), ("3.", "3"),
     ("$5", "5"), (".5", ".5"), ("10 - 3", "10 3"), ("2-3", "2 3"), ("1,00", "1 00"), ("snake_case", "snake case"),
     ("e.g. this", "e g this")],
)  # fmt: skip
def test_plain_keeps_numbers_whole(text, want):
    assert plain(text) == want


def test_exact_takes_any_of_the_answers():
    assert exact("The Cat.", ["dog", "the cat"]) == 1
    assert exact("cat", ["the cat"]) == 0
    assert exact("-3", ["3"]) == 0


@given(WORDS)
def test_plain_changes_nothing_twice(text):
    assert plain(plain(text)) == plain(text)


# ---- VQA


@pytest.mark.parametrize(
    ("text", "want"),
    [("The Two dogs", "2 dogs"), ("none", "0"), ("dont know", "don't know"), ("ten-speed", "10 speed"),
     ("left, right", "left right"), ("left,right", "left right"), ("1,000", "1000"), ("3.5", "3.5"), ("end.", "end"),
     ("a\nb", "b"), ("theyre", "they're"), ("hell", "hell"), ("itll", "it'll"), ("were", "were")],
)  # fmt: skip
def test_vqa_normal(text, want):
    assert vqa_normal(text) == want


def test_vqa_of_ten_people():
    """Leaving one out: with k who agree, k of the 10 sets have k - 1 and the others k."""
    for k in range(11):
        by_hand = (k * min(1, (k - 1) / 3) + (10 - k) * min(1, k / 3)) / 10 if k else 0
        assert vqa("Red", ["red"] * k + ["blue"] * (10 - k)) == pytest.approx(by_hand)
    assert vqa("red", ["red"] * 3 + ["blue"] * 7) == pytest.approx(0.9)


@given(st.lists(st.sampled_from(["red", "blue", "2", "two"]), min_size=1, max_size=10), st.sampled_from(["red", "two"]))
def test_vqa_is_the_mean_over_all_that_leave_one_out(answers, said):
    meant = [{"two": "2"}.get(a, a) for a in answers]
    sets = list(itertools.combinations(meant, len(meant) - 1))
    guess = {"two": "2"}.get(said, said)
    assert vqa(said, answers) == pytest.approx(sum(min(1, s.count(guess) / 3) for s in sets) / len(sets))


# ---- relaxed


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("105", "100", 1), ("105.1", "100", 0), ("95", "100", 1), ("94.9", "100", 0), ("-96", "-100", 1), ("0", "0.0", 1),
     ("0.001", "0", 0), ("1,050", "1000", 1), ("52%", "50%", 1), ("0.5", "50%", 1), ("50", "50%", 0),
     ("100.", "100", 1), ("Yes.", "yes", 1), ("10 apples", "10", 0), ("2009", "2010", 1), ("France", "france", 1),
     ("", "0", 0), ("nan", "nan", 1), ("1e2", "100", 1), ("-", "-", 1)],
)  # fmt: skip
def test_relaxed(said, answer, right):
    assert relaxed(said, [answer]) == right


@given(st.integers(-10_000, 10_000), st.floats(-0.2, 0.2))
def test_relaxed_allows_a_twentieth(true, error):
    guess = true * (1 + error)
    if abs(abs(error) - 0.05) > 1e-6:
        assert relaxed(f"{guess:.12f}", [str(true)]) == (abs(error) < 0.05 or true == 0)


# ---- ANLS


@given(WORDS, WORDS)
def test_levenshtein_is_the_shortest_way(a, b):
    @cache
    def way(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(way(i - 1, j) + 1, way(i, j - 1) + 1, way(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    assert levenshtein(a, b) == way(len(a), len(b))


@pytest.mark.parametrize(
    ("said", "answers", "want"),
    [("Hello World", ["hello  world"], 1.0), ("helo", ["hello"], 0.8), ("abcd", ["abxy"], 0.5), ("abcd", ["axyz"], 0.0),
     ("abcd", ["abcx"], 0.75), ("abc", ["xyz", "abd"], 2 / 3), ("", [""], 1.0), ("", ["a"], 0.0)],
)  # fmt: skip
def test_anls(said, answers, want):
    assert anls(said, answers) == pytest.approx(want)


# ---- yes and no


@pytest.mark.parametrize(
    ("text", "want"),
    [("Yes, there is no doubt", True), ("no", False), ("There is not.", False), ("It isn't there", False),
     ("a dog", None), ("", None), ("nobody, yes", True), ("NO!", False)],
)  # fmt: skip
def test_said_yes(text, want):
    assert said_yes(text) is want


def test_yes_no_wants_an_answer():
    assert [yes_no_score(s, ["yes"]) for s in ("Yes.", "no", "a dog")] == [1, 0, 0]
    assert [yes_no_score(s, ["no"]) for s in ("Yes.", "no", "a dog")] == [0, 1, 0]


def test_detection_by_hand():
    said = [True, True, False, False, None, True]
    true = [True, False, True, False, True, True]
    found = detection(said, true)
    assert (found.accuracy, found.precision, found.recall) == (3 / 6, 2 / 3, 2 / 4)
    assert found.f1 == pytest.approx(2 * (2 / 3) * (1 / 2) / (2 / 3 + 1 / 2))
    assert (found.yes, found.neither) == (0.5, 1)


def test_what_cannot_be_counted_is_not():
    nothing = detection([False, None], [False, False])
    assert (nothing.precision, nothing.recall, nothing.f1, nothing.accuracy) == (None, None, None, 0.5)


@given(st.lists(st.tuples(st.sampled_from([True, False, None]), st.booleans()), min_size=1, max_size=20))
def test_detection_is_within_bounds(pairs):
    found = detection(*zip(*pairs, strict=True))
    for share in (found.accuracy, found.precision, found.recall, found.f1, found.yes):
        assert share is None or 0 <= share <= 1
    if found.precision and found.recall:
        assert found.f1 == pytest.approx(2 / (1 / found.precision + 1 / found.recall))


# ---- what scores come to


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 30), (1, 10), (7, 50), (50, 50), (1234, 2000)])
def test_wilson_is_where_the_score_test_turns(k, n):
    z, mean = 1.959963984540054, k / n

    def edge(low: float, high: float) -> float:
        """The p between at which (mean - p)^2 passes z^2 p (1 - p) / n; inside at ``low``."""
        for _ in range(200):
            p = (low + high) / 2
            inside = (mean - p) ** 2 <= z * z * p * (1 - p) / n
            low, high = (p, high) if inside else (low, p)
        return low

    low, high = wilson(mean, n)
    assert low == pytest.approx(edge(mean, 0.0) if k else 0.0, abs=1e-9)
    assert high == pytest.approx(edge(mean, 1.0) if k < n else 1.0, abs=1e-9)
    assert wilson(mean, n) == (low, high)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=50))
def test_intervals_hold_the_mean(scores):
    found = mean_score(scores)
    assert 0 <= found.low <= found.mean + 1e-12
    assert found.mean - 1e-12 <= found.high <= 1
    assert found.n == len(scores)


def test_shares_of_unpruned():
    assert of_unpruned(0.6, 0.8) == pytest.approx(0.75)
    assert of_unpruned(0.6, 0.0) is None
    assert floor_adjusted(0.6, 0.4, 0.8) == pytest.approx(0.5)
    assert floor_adjusted(0.2, 0.4, 0.8) == pytest.approx(-0.5)
    assert floor_adjusted(0.6, 0.8, 0.8) is None
    assert floor_adjusted(0.6, 0.9, 0.8) is None


@pytest.mark.parametrize("name", list(RULES))
def test_every_rule_gives_a_share_for_any_text(name):
    for said, answers in itertools.product(
        ["", "yes", "0", "%", "1,0", "-", ".", "é\x00"], [["yes"], ["0", "x"], [""]]
    ):
        score = RULES[name](said, answers)
        assert 0 <= score <= 1
        assert math.isfinite(score)
