"""What kind of answer a question wants, told by its words: the fewest tokens that an "auto" budget gives it.

The mass of attention does not tell all: to find where something is takes its surroundings, and to know that there is
nothing more to count takes the ground between things. The words are English. A kind that is told wrongly, or another
language, costs some tokens or none: a floor only adds to what the mass asks for.
"""

from __future__ import annotations

import re

__all__ = ["FLOORS", "OTHER", "floor_of", "kind_of"]

OTHER = "other"
FLOORS = {"counting": 0.2, "reading": 0.09, "where": 0.14, OTHER: 0.14}
"""Least share of the image tokens of "auto": with that of the mass, the fewest at which each kind of question is right,
within a point, as often as with 0.35 of the tokens (``python -m tests.budgets``, demo pair)."""
_WORDS = {
    "counting": r"how many|number of|count",
    "reading": r"read|text|say|says|written|wrote|words?|letters?|digits?|(what|which) number",
    "where": r"where|which (side|part)|left|right|above|below|position|location|coordinates?|bounding box(es)?",
}
"""Of a kind, in the order in which they count."""


def kind_of(question: str) -> str:
    """The first kind whose words the question has, else OTHER."""
    found = (kind for kind, words in _WORDS.items() if re.search(rf"\b({words})\b", question, re.IGNORECASE))
    return next(found, OTHER)


def floor_of(question: str) -> float:
    """The least share of the image tokens that an "auto" budget gives a question."""
    return FLOORS[kind_of(question)]
