"""What ``localvlm ask`` would do with the pair, the picture and the question, told before it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict

from localvlm.answers import AskOptions
from localvlm.bench.cases import Bench, Case, Prepared
from localvlm.images import Image
from localvlm.planning.choice import Choice, chosen_for
from localvlm.planning.plans import Asked

__all__ = ["plan_ahead"]


def plan_ahead(bench: Bench, case: Case, images: Sequence[Image], question: str) -> Choice:
    """Plans as ``ask --method auto`` does, with the same rates, but for an answer of the length that is measured, by
    models that are loaded; ``bench`` then runs ``case`` so. A machine that was not timed yet is timed now.

    Raises:
        Interrupted: while it was timed.
    """
    setting = bench.setting
    options = AskOptions(max_tokens=setting.answer, guide_max_tokens=setting.answer)
    sizes = [image.size for image in images]
    asked = Asked.of(
        sizes, question, options, image_tokens=setting.model.image_tokens, answer=setting.answer, loaded=True
    )
    choice = chosen_for(setting.pair, asked, options, setting.model, lambda: closing(bench.new_engine()))
    guide_tokens = 0 if choice.plan is None else choice.plan.guide_tokens or 0
    bench.know(case, Prepared(guide_tokens=guide_tokens, asked=asdict(choice.options)))
    return choice
