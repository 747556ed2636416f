"""How right an answer is, by the rules of the public sets: each a number from 0 to 1."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

__all__ = ["ANLS_THRESHOLD", "RELAXED_TOLERANCE", "RULES", "VQA_ANNOTATORS", "anls", "exact", "levenshtein", "plain",
           "relaxed", "said_yes", "vqa", "vqa_normal", "yes_no"]  # fmt: skip

ANLS_THRESHOLD = 0.5
"""Least likeness that counts. 0.5 itself does, as in the sets' own evaluation; by the letter of the paper (Biten et
al., arXiv 1907.00490, eq. 1) it would not."""
RELAXED_TOLERANCE = 0.05
"""Relative error that a number may have (ChartQA, arXiv 2203.10244, section 5.1)."""
VQA_ANNOTATORS = 3
"""People who must have said the same for an answer to be wholly right (VQA, arXiv 1505.00468, section 3)."""

_NUMBER = re.compile(r"[-+]?(\d+|\d{1,3}(,\d{3})+)?(\.\d+)?(e[-+]?\d+)?%?", re.IGNORECASE)
_NOISE = re.compile(
    r"(?<=\d),(?=\d{3}(?!\d))"  # of 1,000
    r"|(?P<space>[^\w\s.\-]|_|\.(?!\d)|(?<!\d)\.(?!\d)|-(?!\d)|(?<=\w)-)"
)
_DIGITS = {"none": 0, "zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8,
           "nine": 9, "ten": 10}  # fmt: skip
_ARTICLES = {"a", "an", "the"}
_CONTRACTION = re.compile(
    r"(?P<not>ai|are|ca|could|did|does|do|had|has|have|is|might|must|need|should|was|were|wo|would)nt"
    r"|(?P<have>could|i|might|must|should|they|we|who|would|you)ve"
    r"|(?P<is>he|how|she|that|there|what|when|where|who)s"
    r"|(?P<are>they|you|what)re"
    r"|(?P<will>how|it|that|they|what|who|you)ll"
    r"|(?P<had>it|somebody|there|they|who|you)d"
)
_SUFFIX = {"not": "n't", "have": "'ve", "is": "'s", "are": "'re", "will": "'ll", "had": "'d"}


def plain(text: str) -> str:
    """In one case, without punctuation and double white space; signs and decimal points of numbers stay."""
    return " ".join(_NOISE.sub(lambda m: " " if m["space"] else "", text.casefold()).split())


def exact(said: str, answers: Sequence[str]) -> float:
    """1 if the answer is one of ``answers`` but for case, punctuation and white space."""
    return float(plain(said) in {plain(a) for a in answers})


def vqa_normal(text: str) -> str:
    """As VQAv2 and TextVQA compare answers: lower case, digits for number words, no articles, apostrophes of common
    contractions put in; punctuation goes, and parts words only where it stands between them.
    """
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    commas = re.search(r"\d,\d", text) is not None
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        apart = f"{mark} " in text or f" {mark}" in text or commas
        text = text.replace(mark, "" if apart else " ")
    text = re.sub(r"\.(?!\d)", "", text)
    words = [str(_DIGITS.get(word, word)) for word in text.split() if word not in _ARTICLES]
    return " ".join(map(_with_apostrophe, words))


def _with_apostrophe(word: str) -> str:
    found = _CONTRACTION.fullmatch(word)
    if found is None:
        return word
    kind = found.lastgroup or ""
    return f"{found[kind]}{_SUFFIX[kind]}"


def vqa(said: str, answers: Sequence[str]) -> float:
    """VQA accuracy: of each set of all annotators but one, min(1, those who said the same / 3), averaged.

    With fewer than four annotators nothing can be wholly right.
    """
    same = [vqa_normal(a) == vqa_normal(said) for a in answers]
    agree = sum(same)
    return sum(min(1.0, (agree - s) / VQA_ANNOTATORS) for s in same) / len(same)


def _number(text: str) -> float | None:
    """A number as charts write it ("1,200", "-3.5", "45%", which is 0.45); None for other text."""
    text = text.strip()
    if not _NUMBER.fullmatch(text) or not any(c.isdigit() for c in text):
        return None
    value = float(text.rstrip("%").replace(",", ""))
    return value / 100 if text.endswith("%") else value


def relaxed(said: str, answers: Sequence[str]) -> float:
    """ChartQA's relaxed accuracy: numbers within 5 % of the true one, 0 alone for 0, other answers exact."""
    guess = _number(said.strip().removesuffix("."))
    for answer in answers:
        true = _number(answer)
        if true is None or guess is None:
            if exact(said, [answer]):
                return 1.0
        elif abs(guess - true) <= RELAXED_TOLERANCE * abs(true):
            return 1.0
    return 0.0


def levenshtein(a: str, b: str) -> int:
    """Letters to insert, remove or replace to make ``a`` of ``b``."""
    row = list(range(len(b) + 1))
    for i, letter in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (letter != other))
    return row[-1]


def anls(said: str, answers: Sequence[str]) -> float:
    """DocVQA's score: 1 - Levenshtein distance / longer length to the nearest answer, 0 below a half."""
    best = 0.0
    guess = " ".join(said.lower().split())
    for answer in answers:
        true = " ".join(answer.lower().split())
        longer = max(len(guess), len(true))
        distance = levenshtein(guess, true) / longer if longer else 0.0
        best = max(best, 1 - distance)
    return best if best >= ANLS_THRESHOLD else 0.0


def said_yes(text: str) -> bool | None:
    """What an answer says to a yes/no question: by the first "yes" or "no" in it, else no if it holds "not"; None if
    it says neither.
    """
    words: list[str] = re.findall(r"[\w']+", text.casefold())
    for word in words:
        if word in ("yes", "no"):
            return word == "yes"
    return False if any(word == "not" or word.endswith("n't") for word in words) else None


def yes_no(said: str, answers: Sequence[str]) -> float:
    """1 if the answer says yes where yes is true, or no where no is (POPE, arXiv 2305.10355)."""
    meant = said_yes(said)
    return float(meant is not None and meant == said_yes(answers[0]))


RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "exact": exact,
    "vqa": vqa,
    "relaxed": relaxed,
    "anls": anls,
    "yes-no": yes_no,
}
"""Ways to score by name: (what was said, the right answers) -> 0 to 1."""
