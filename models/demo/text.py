r"""The tokenizer and the token layout of training: a shared prefix with the image, then branches with questions.

The tokenizer is a byte-level BPE cut as llama.cpp's `smollm` pre-tokenizer cuts: every digit apart, then GPT-2's
rule. A prompt is tokenized in segments, apart at the image, as llama.cpp does:

    <s>USER: | image | {question}\nASSISTANT: | {answer}</s>USER: {question}\nASSISTANT: {answer}</s> ...
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from .questions import TYPES, Turn, caption, chain, describe, question_for, step
from .world import COLOURS, KINDS, PLACES, WORDS, Scene, Stream, sample_scene, scene_rng

BOS, EOS = 0, 1
BEFORE = "USER: "
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] | trim + eos_token }}"
    "{% else %}{{ 'USER: ' + message['content'] + '\\nASSISTANT:' }}{% endif %}{% endfor %}"
)
TOKENIZER = Path(__file__).with_name("tokenizer.json")
IGNORE = -100
_LISTS = {"caption": caption, "chain": chain, "describe": describe, "step": step}


def train_tokenizer(path: Path = TOKENIZER, vocabulary: int = 768) -> None:
    """Learn the tokenizer on the text of training scenes and write it."""
    lines = [f" {w}" for w in (*COLOURS, *KINDS, *PLACES, *WORDS)] * 50
    for index in range(3000):
        rng = scene_rng(Stream.TRAIN, 3, index)
        scene = sample_scene(rng)
        turns = [question_for(t, scene, rng, int(rng.integers(1 << 16))) for t in TYPES]
        for turn in [*filter(None, turns), caption(scene, rng), describe(scene, rng)]:
            lines += [f"{turn.question}\nASSISTANT: {turn.answer}", f"USER: {turn.question}"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.save(str(path))


@cache
def tokenizer() -> Tokenizer:
    """The committed tokenizer."""
    return Tokenizer.from_file(str(TOKENIZER))


@cache
def ids(text: str) -> tuple[int, ...]:
    """Token ids of one segment, no special tokens added."""
    return tuple(tokenizer().encode(text, add_special_tokens=False).ids)


@cache
def prefix() -> tuple[int, ...]:
    """What stands before the image."""
    return (BOS, *ids(BEFORE))


def branch(turns: list[Turn]) -> tuple[list[int], list[int]]:
    """Inputs and targets of a branch. Targets are the next token where an answer (or its </s>) is next, else IGNORE."""
    tokens: list[int] = []
    answered: list[bool] = []
    for i, turn in enumerate(turns):
        question = ids(("USER: " if i else "") + turn.question + "\nASSISTANT:")
        answer = (*ids(" " + turn.answer), EOS)
        tokens += [*question, *answer]
        answered += [False] * len(question) + [True] * len(answer)
    targets = [t if a else IGNORE for t, a in zip(tokens[1:], answered[1:], strict=True)]
    return tokens[:-1], targets


def ask(scene: Scene, rng: np.random.Generator, kind: str) -> Turn | None:
    """A question of that type (or of _LISTS) with balanced answers; None if the scene has none."""
    if kind in _LISTS:
        return _LISTS[kind](scene, rng)
    for _ in range(6):
        target = int(rng.integers(1 << 16))
        if kind == "count":  # rare answers are tried more often
            target = target // 4 * 4 + int(rng.choice(4, p=(0.15, 0.15, 0.2, 0.5)))
        turn = question_for(kind, scene, rng, target)
        if turn:
            return turn
    return None


def branches(
    scene: Scene, rng: np.random.Generator, mix: dict[str, float], budget: int
) -> list[tuple[list[int], list[int], str]]:
    """Random branches of at most `budget` tokens in all: (inputs, targets, type of the first turn)."""
    kinds, weights = list(mix), np.array(list(mix.values()))
    weights = weights / weights.sum()
    out: list[tuple[list[int], list[int], str]] = []
    left, misses = budget, 0
    while misses < 3:
        n = 1 if rng.random() < 0.8 else int(rng.integers(2, 4))
        turns = [t for k in rng.choice(kinds, n, p=weights) if (t := ask(scene, rng, str(k)))]
        if not turns:
            continue
        tokens, targets = branch(turns)
        if len(tokens) > left:
            misses += 1
            continue
        left -= len(tokens)
        out.append((tokens, targets, turns[0].type))
    return out
