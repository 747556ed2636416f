"""Who answered, from how much, how soon and why: one line for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.content import Content

from .drafts import Fate

if TYPE_CHECKING:
    from localvlm.answers import Answer

__all__ = ["caption", "seconds_told", "tokens_told"]

_FATES: dict[Fate, str] = {
    "confirmed": "\u2713 confirms the draft",
    "extended": "\u2713 goes on from the draft",
}


def tokens_told(answer: Answer) -> str:
    """How many of the image tokens the model saw, or the guide where it alone answered; "" without pictures."""
    tokens = answer.tokens
    if not tokens.image:
        return ""
    if tokens.kept is None:
        return f"{tokens.image} tokens, none to the model"
    share = f" ({tokens.kept / tokens.image:.0%})" if tokens.kept < tokens.image else ""
    before = f", {answer.earlier} of them from before" if answer.earlier and share else ""
    return f"{tokens.kept} of {tokens.image} tokens{share}{before}"


def seconds_told(ms: float) -> str:
    """Milliseconds as people read them."""
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"


def caption(answer: Answer, fate: Fate | None, note: str = "", *, hidden: int = 0) -> Content:
    """Below an answer: who gave it, why, and what it took."""
    by = answer.answered_by
    why = ""
    if by == "guide":
        why = "final"
        if answer.score is not None and answer.threshold is not None:
            why = f"sure enough: {answer.score.combined:.2f} \u2265 {answer.threshold:.2f}"
    parts = [
        why,
        tokens_told(answer),
        seconds_told(answer.ms.get("total", 0.0)) if answer.ms else "",
        _FATES.get(fate, "") if fate else "",
        "cut at --max-tokens" if answer.finish == "length" else "",
        f"{hidden:,} characters more: shift+tab, then c copies all" if hidden else "",
        note,
    ]
    return Content.assemble((by, f"bold ${by}"), *(f" \u00b7 {part}" for part in parts if part))
