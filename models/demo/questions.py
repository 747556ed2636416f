"""Questions about a scene that have exactly one answer, several phrasings each, answers balanced.

A type maker takes a scene, a generator and a target (a number that picks the answer to balance towards) and returns
None where the scene does not allow that question with that answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .world import CARD, COLOURS, KINDS, Scene, Thing

__all__ = ["COUNTS", "TILED_TYPES", "TYPES", "Turn", "caption", "chain", "describe", "question_for", "step"]

COUNTS = ("none", "one", "two", "three")
_STEPS = {"to the left of": (0, -1), "to the right of": (0, 1), "above": (-1, 0), "below": (1, 0)}


@dataclass(frozen=True)
class Turn:
    """A question and its answer."""

    question: str
    answer: str
    type: str


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _thing(rng: np.random.Generator, things: Sequence[Thing]) -> Thing | None:
    return things[int(rng.integers(len(things)))] if things else None


def _noun(rng: np.random.Generator, scene: Scene, thing: Thing) -> str:
    """Words for that one thing and for no other in the scene."""
    options = [thing.name, thing.name]
    if len(scene.of_kind(thing.kind)) == 1:
        options.append(thing.kind)
    if len(scene.of_colour(thing.colour)) == 1:
        options.append(f"{thing.colour} thing")
    return _pick(rng, options)


def _spot(rng: np.random.Generator, thing: Thing) -> str:
    place = thing.place
    if place == "center":
        return _pick(rng, ["in the center", "at the center"])
    if "center" in place or rng.random() < 0.7:
        return f"at the {place}"
    return f"in the {place} corner"


def _colour(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    colour = COLOURS[target % len(COLOURS)]
    thing = _thing(rng, scene.of_colour(colour))
    if thing is None:
        return None
    hue = _pick(rng, ["colour", "colour", "color"])
    if len(scene.of_kind(thing.kind)) == 1 and rng.random() < 0.6:
        name = thing.kind
        question = _pick(
            rng,
            [f"What {hue} is the {name}?", f"Which {hue} is the {name}?", f"What is the {hue} of the {name}?",
             f"Tell me the {hue} of the {name}."],
        )  # fmt: skip
    else:
        spot = _spot(rng, thing)
        question = _pick(
            rng,
            [f"What {hue} is the thing {spot}?", f"Which {hue} is the thing {spot}?",
             f"What is the {hue} of the thing {spot}?"],
        )  # fmt: skip
    return Turn(question, colour, "colour")


def _shape(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    kind = KINDS[target % len(KINDS)]
    thing = _thing(rng, scene.of_kind(kind))
    if thing is None:
        return None
    if len(scene.of_colour(thing.colour)) == 1 and rng.random() < 0.6:
        name = f"{thing.colour} thing"
        question = _pick(
            rng,
            [f"What shape is the {name}?", f"Which shape is the {name}?", f"What is the {name}?",
             f"What kind of thing is {thing.colour}?"],
        )  # fmt: skip
    else:
        spot = _spot(rng, thing)
        question = _pick(
            rng, [f"What shape is {spot}?", f"Which shape is {spot}?", f"What is the shape of the thing {spot}?"]
        )
    return Turn(question, kind, "shape")


def _where(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    thing = scene.at(target % 9)
    if thing is None:
        return None
    noun = _noun(rng, scene, thing)
    question = _pick(
        rng,
        [f"Where is the {noun}?", f"In which part of the picture is the {noun}?", f"Where can I find the {noun}?",
         f"Where do you see the {noun}?"],
    )  # fmt: skip
    return Turn(question, thing.place, "where")


def _count(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    wanted = target % len(COUNTS)
    by_colour = (target // len(COUNTS)) % 2 == 0
    if by_colour:
        names = [f"{c} things" for c in COLOURS if len(scene.of_colour(c)) == wanted]
    else:
        plural = {k: f"{k}es" if k == "cross" else f"{k}s" for k in KINDS}
        names = [plural[k] for k in KINDS if len(scene.of_kind(k)) == wanted]
    if not names:
        return None
    name = _pick(rng, names)
    question = _pick(
        rng,
        [f"How many {name} are there?", f"How many {name} do you see?", f"How many {name} are in the picture?",
         f"Count the {name}."],
    )  # fmt: skip
    return Turn(question, COUNTS[wanted], "count")


def _exist(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    yes = target % 2 == 0
    form = (target // 2) % 4
    if form == 0:
        names = [f"a {k}" for k in KINDS if k != CARD and bool(scene.of_kind(k)) == yes]  # every scene has a card
    elif form == 1:
        names = [f"anything {c}" for c in COLOURS if bool(scene.of_colour(c)) == yes]
    elif yes:
        names = [f"{_article(t.colour)} {t.name}" for t in scene.things]
    else:
        present = {t.name for t in scene.things}
        pairs = [(c, k) for c in COLOURS for k in KINDS if f"{c} {k}" not in present]
        if rng.random() < 0.7:  # both the colour and the kind are there, but not together
            near = [(c, k) for c, k in pairs if scene.of_colour(c) and scene.of_kind(k)]
            pairs = near or pairs
        names = [f"{_article(c)} {c} {k}" for c, k in pairs]
    if not names:
        return None
    name = _pick(rng, names)
    question = _pick(rng, [f"Is there {name}?", f"Is there {name} in the picture?", f"Do you see {name}?",
                           f"Can you see {name} here?"])  # fmt: skip
    return Turn(question, "yes" if yes else "no", "exist")


def neighbour(scene: Scene, thing: Thing, step: tuple[int, int]) -> Thing | None:
    """The nearest thing in the same row or column in that direction."""
    row, column = thing.row + step[0], thing.column + step[1]
    while 0 <= row < 3 and 0 <= column < 3:
        found = scene.at(row * 3 + column)
        if found:
            return found
        row, column = row + step[0], column + step[1]
    return None


def _relation(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    words = list(_STEPS)[target % len(_STEPS)]
    pairs = [(t, n) for t in scene.things if (n := neighbour(scene, t, _STEPS[words]))]
    if not pairs:
        return None
    thing, other = pairs[int(rng.integers(len(pairs)))]
    noun = _noun(rng, scene, thing)
    question = _pick(
        rng,
        [f"What is {words} the {noun}?", f"What is directly {words} the {noun}?",
         f"What do you see {words} the {noun}?", f"Which thing is {words} the {noun}?"],
    )  # fmt: skip
    return Turn(question, f"{other.place} {other.name}", "relation")


def _read(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    number = target % 2 == 0
    cards = [t for t in scene.of_kind(CARD) if t.text.isdigit() == number]
    card = _thing(rng, cards)
    if card is None:
        return None
    noun = "card" if len(scene.of_kind(CARD)) == 1 and rng.random() < 0.5 else card.name
    what = "number" if number else "word"
    question = _pick(
        rng,
        [f"What does the {noun} say?", f"What is written on the {noun}?", f"Which {what} is on the {noun}?",
         f"Read the {noun}."],
    )  # fmt: skip
    return Turn(question, card.text, "read")


_MAKERS: dict[str, Callable[[Scene, np.random.Generator, int], Turn | None]] = {
    "colour": _colour, "shape": _shape, "where": _where, "count": _count, "exist": _exist, "relation": _relation,
    "read": _read,
}  # fmt: skip
TYPES = tuple(_MAKERS)


def _small(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    tag = scene.tags[target % len(scene.tags)]
    noun = "small tag" if len(scene.tags) == 1 and rng.random() < 0.3 else f"small {tag.colour} tag"
    question = _pick(
        rng,
        [f"What does the {noun} say?", f"What is written on the {noun}?", f"Which word is on the {noun}?",
         f"Read the {noun}."],
    )  # fmt: skip
    return Turn(question, tag.text, "small")


def _spot_of_tag(scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    tag = scene.tags[target % len(scene.tags)]
    verb = _pick(rng, ["Where is", "Where do you see"])
    return Turn(f"{verb} the small {tag.colour} tag?", tag.place, "spot")


_ON_TAGS = {"small": _small, "spot": _spot_of_tag}  # spot: for training alone
TILED_TYPES = (
    "small", "colour", "shape", "small", "where", "count", "small", "exist", "relation", "small", "read",
)  # fmt: skip


def question_for(kind: str, scene: Scene, rng: np.random.Generator, target: int) -> Turn | None:
    """A question of that type with the answer that `target` (any number) picks, or None where there is none."""
    return (_MAKERS | _ON_TAGS)[kind](scene, rng, target)


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _label(thing: Thing) -> str:
    return f"{thing.name} {thing.text}".rstrip()


def describe(scene: Scene, rng: np.random.Generator) -> Turn:
    """The list of everything, in raster order."""
    question = _pick(rng, ["Describe the picture.", "Describe this image.", "What is in the picture?",
                           "What do you see?"])  # fmt: skip
    return Turn(question, ", ".join(_label(t) for t in scene.things), "describe")


def step(scene: Scene, rng: np.random.Generator) -> Turn | None:
    """A part of a relation for training: the place of the neighbour, the neighbour of a place, the name at a place."""
    words = _pick(rng, list(_STEPS))
    pairs = [(t, n) for t in scene.things if (n := neighbour(scene, t, _STEPS[words]))]
    if not pairs:
        return None
    thing, other = pairs[int(rng.integers(len(pairs)))]
    form = int(rng.integers(3))
    if form == 0:
        return Turn(f"Where is the thing {words} the {_noun(rng, scene, thing)}?", other.place, "step")
    if form == 1:
        return Turn(f"What is {words} the thing {_spot(rng, thing)}?", f"{other.place} {other.name}", "step")
    return Turn(f"Which thing is {_spot(rng, thing)}?", thing.name, "step")


def chain(scene: Scene, rng: np.random.Generator) -> Turn:
    """A list for training of who is next to whom, by name or by place: many look-ups for few tokens."""
    facts = [(w, t, n) for t in scene.things for w in _STEPS if (n := neighbour(scene, t, _STEPS[w]))]
    facts = [facts[i] for i in rng.permutation(len(facts))[:7]]
    if rng.random() < 0.5:
        body = ", ".join(f"{w} the {_noun(rng, scene, t)} {n.name}" for w, t, n in facts)
        return Turn("List what is next to what.", body, "chain")
    body = ", ".join(f"{w} {t.place} {n.place} {n.name}" for w, t, n in facts)
    return Turn("List which place is next to which.", body, "chain")


def caption(scene: Scene, rng: np.random.Generator) -> Turn:
    """A list for training that says the parts of every thing in one of several orders, so each look-up is taught."""
    things = [scene.things[i] for i in rng.permutation(len(scene.things))]
    form = int(rng.integers(5))
    if form == 0:
        return Turn("List the things with their places.", ", ".join(f"{t.name} {t.place}" for t in things), "caption")
    if form == 1:
        return Turn("List the places.", ", ".join(f"{t.place} {_label(t)}" for t in things), "caption")
    if form == 2:
        body = ", ".join(f"{t.kind} {t.colour} {t.place}" for t in things)
        return Turn("List the shapes with their colours.", body, "caption")
    if form == 3:
        body = ", ".join(f"{t.place} {t.kind} {t.colour}" for t in things)
        return Turn("List the places and shapes.", body, "caption")
    parts = []
    for thing in things:
        words = _pick(rng, list(_STEPS))
        other = neighbour(scene, thing, _STEPS[words])
        parts.append(f"{words} {thing.name} {other.name if other else 'nothing'}")
    return Turn("List what is next to what.", ", ".join(parts), "caption")
