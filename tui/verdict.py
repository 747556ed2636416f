"""Who answered and why, in words for people who have not read the paper."""

from __future__ import annotations

from collections.abc import Iterator

from localvlm.answers import Answer, Look
from localvlm.early_exit import Score

__all__ = ["looked_told", "seen_told", "told"]


def told(answer: Answer) -> list[str]:
    """One sentence a line: who answered, how sure the guide was and what that is made of, and what was saved."""
    return [*_who(answer), *_why(answer.score, answer.threshold, answer.answered_by), *_saved(answer)]


def looked_told(look: Look, threshold: float | None = None) -> list[str]:
    """What is known while the guide has looked and no answer is final."""
    return ["The guide has looked.", *_why(look.score, threshold, "")]


def seen_told(kept: int, total: int) -> str:
    """How many image tokens were kept, of all."""
    return f"{kept:,} of {total:,} image tokens" if kept < total else f"all {total:,} image tokens"


def _who(answer: Answer) -> Iterator[str]:
    tokens = answer.tokens
    if answer.answered_by == "guide":
        yield "The guide answered; the model did not run."
    elif not tokens.image:
        yield "The model answered; there was no picture."
    else:
        kept = tokens.image if tokens.kept is None else tokens.kept
        before = f", {answer.earlier:,} of them from before" if answer.earlier and kept < tokens.image else ""
        yield f"The model answered from {seen_told(kept, tokens.image)}{before}."
    if tokens.mean_kept is not None and len(answer.steps) > 1:
        yield f"They leave layer by layer: {tokens.mean_kept:,.1f} a layer on average."


def _why(score: Score | None, threshold: float | None, by: str) -> Iterator[str]:
    if score is None:
        return
    sure = threshold is not None and score.combined >= threshold
    if threshold is None:
        yield f"The guide was sure to {score.combined:.2f}; no early exit was asked for."
    elif sure:
        cut = "" if by != "model" else ", but its answer was cut off"
        yield f"The guide was sure: {_apart(score.combined, threshold, '≥')}{cut}."
    else:
        yield f"The guide was not sure enough: {_apart(score.combined, threshold, '<')}."
    yield f"confidence\u00a0{score.confidence:.2f} · consistency\u00a0{score.consistency:.2f}"


def _apart(value: float, threshold: float, sign: str) -> str:
    """Both numbers, the threshold as it was given, the value with the digits that tell it apart; on one line."""
    digits = next((d for d in (2, 3, 4, 5) if round(value, d) != threshold), 2)
    return f"{value:.{digits}f}\u00a0{sign}\u00a0{threshold:g}"


def _saved(answer: Answer) -> Iterator[str]:
    tokens, tiles = answer.tokens, answer.tiles
    if tiles.total > max(1, len(answer.layouts)):
        shared = f", {tiles.shared} shared with the guide" if tiles.shared else ""
        yield f"Encoded {tiles.encoded} of {tiles.total} tiles{shared}."
    if tokens.drafted:
        yield f"Guide's draft: {tokens.accepted} of {tokens.drafted} tokens taken over."
