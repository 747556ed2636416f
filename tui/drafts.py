"""What becomes of the guide's draft while the model answers."""

from __future__ import annotations

from typing import Literal

__all__ = ["Fate", "fate_of"]

Fate = Literal["waits", "agrees", "confirmed", "extended", "replaced"]


def fate_of(draft: str, answer: str, *, done: bool) -> Fate:
    """``answer``: the model's as far as it came. The draft "waits" for its first word, "agrees" so far, and once
    ``done`` it has been "confirmed" word by word, "extended" by more text, or "replaced" by another answer.
    """
    said, meant = answer.strip(), draft.strip()
    if not said and not done:
        return "waits"
    if said == meant:
        return "confirmed" if done else "agrees"
    if meant.startswith(said) and not done:
        return "agrees"
    if meant and said.startswith(meant):
        return "extended" if done else "agrees"
    return "replaced"
