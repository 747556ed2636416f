"""What an answer tells of how it came about: who gave it, from how many tokens, in how many tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from localvlm.answers import Answer, AskOptions, Look, TileCounts, TokenCounts
from localvlm.clock import Clock
from localvlm.engine.api import Completion, Encoded
from localvlm.pruning import Keep, Tokens, mean_kept
from localvlm.stepwise import Stepped

__all__ = ["answer_of_guide", "budget_told", "tile_counts", "token_counts", "without_lead"]


def answer_of_guide(look: Look, options: AskOptions, clock: Clock, pair: str | None) -> Answer:
    """The guide's answer as the final one."""
    text = look.answer.text.strip()
    return Answer(
        text=text,
        answer_ids=tuple(int(t) for t in look.answer.ids),
        kept_indices=(),
        answered_by="guide",
        tokens=TokenCounts(
            look.prompt.n_image, None, look.prompt.n_past, len(look.answer.ids), guide=look.prompt.n_kept
        ),
        ran=(look.prompt.n_run, 0),
        ms={**clock.ms, "first_token": clock.elapsed(), "total": clock.elapsed()},
        method=options.method,
        keep=budget_told(options.keep),
        pair=pair,
        tiles=tile_counts(look.encoded),
        guide_text=text,
        score=look.score,
        threshold=options.exit_at,
        layouts=look.layouts,
    )


def budget_told(keep: Keep) -> float | str:
    """A budget as it is told."""
    return 1.0 if keep is None else str(keep) if isinstance(keep, Tokens) else keep


def token_counts(
    stepped: Stepped, draft: Completion | None, done: Completion, look: Look | None, n_layer: int
) -> TokenCounts:
    """What the model was given and what it said; ``n_layer``: its layers."""
    prompt = stepped.prompt
    return TokenCounts(
        prompt.n_image,
        len(stepped.kept),
        prompt.n_past,
        len(done.ids),
        *_drafted(draft, done),
        mean_kept=mean_kept(stepped.steps, n_layer),
        guide=None if look is None else look.prompt.n_kept,
    )


def _drafted(draft: Completion | None, done: Completion) -> tuple[int, int]:
    """Tokens drafted and accepted, the draft's end counted where the answer had room for it."""
    if draft is None or not done.drafted:
        return 0, 0
    ends = draft.finish == "stop" and done.drafted == len(draft.ids)
    agrees = ends and done.finish == "stop" and len(done.ids) == done.accepted == done.drafted
    return done.drafted + ends, done.accepted + agrees


def tile_counts(encoded: Sequence[Encoded]) -> TileCounts:
    """Tiles of pictures, and how many of them were encoded."""
    return TileCounts(
        sum(e.layout.n_tiles for e in encoded), sum(e.n_tiles for e in encoded), sum(e.shared for e in encoded)
    )


def without_lead(on_text: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Drops white space before the first word of a stream."""
    if on_text is None:
        return None
    begun = False

    def emit(text: str) -> None:
        nonlocal begun
        if not begun:
            text = text.lstrip()
            begun = bool(text)
        if text:
            on_text(text)

    return emit
