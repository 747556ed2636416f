"""--method auto: the quickest way to answer that --accuracy allows, plain where no other is clearly sooner."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from localvlm.cli.app import App, load_options
from localvlm.cli.inputs import exit_threshold
from localvlm.cli.interrupt import Interrupts
from localvlm.cli.options import budget_of, on_command_line, preset_of
from localvlm.cli.output import Reporter

if TYPE_CHECKING:
    from localvlm.answers import AskOptions, Pair
    from localvlm.engine.api import Engine
    from localvlm.images import Image
    from localvlm.planning.choice import Choice

__all__ = ["method_asked", "options_asked", "plan_answer", "say", "shown"]


def method_asked(ctx: click.Context, pair: Pair) -> str:
    """The method that --method names, auto as it is where nothing can be planned: a guide leads if there is one.

    Without a guide nothing is pruned, unless the command line says how much: that is left to the guide that is missing,
    or to a method without one where --accuracy allows it.
    """
    method: str = ctx.params["method"]
    if method != "auto":
        return method
    if pair.guide is not None:
        return "sgl+"
    budgets = ("keep", "keep_tokens", "layer", "preset", "exit_at")
    if not any(on_command_line(ctx, name) and ctx.params[name] not in (0, "off") for name in budgets):
        return "none"
    return "fastervlm" if ctx.params.get("accuracy") == "fast" and ctx.params["exit_at"] in (None, "off") else "sgl+"


def options_asked(ctx: click.Context, pair: Pair, reporter: Reporter, schema: str = "") -> AskOptions:
    """What a command's options ask of an answer; ``schema``: a JSON schema, as JSON, that it follows."""
    from localvlm.answers import AskOptions

    params = ctx.params
    names = ("max_tokens", "temp", "seed", "system", "guide_max_tokens", "guide_keep")
    asked = {"method": method_asked(ctx, pair), **{name: params[name] for name in names}}
    asked |= {"preset": preset} if (preset := preset_of(ctx)) else {"keep": budget_of(ctx), "layer": params["layer"]}
    return AskOptions(
        exit_at=exit_threshold(ctx, pair, reporter),
        draft=False if params["no_draft"] else None,
        tile_price=None if params["tile_price"] == "auto" else params["tile_price"],
        schema=schema,
        **asked,
    )


def plan_answer(
    ctx: click.Context, pair: Pair, pictures: list[Image], question: str, options: AskOptions, reporter: Reporter
) -> Choice:
    """``options`` as the quickest plan has them; of the command's own, it sets --guide-image-max-tokens.

    Raises:
        Interrupted: while the machine was timed.
    """
    from localvlm.planning.choice import Choice, chosen_for
    from localvlm.planning.plans import Asked

    if ctx.params["method"] != "auto" or options.keep is None:
        return Choice(options)
    if pair.guide is None and options.method != "none" and ctx.params["accuracy"] == "high":
        return Choice(options)  # a budget without a guide: refused, and not silently left out
    if why := _said(ctx):
        return Choice(options, why=why)
    guide, model = load_options(ctx.params, pair)
    asked = Asked.of(
        [picture.size for picture in pictures],
        question,
        options,
        image_tokens=model.image_tokens,
        guide_tokens=guide.image_tokens if ctx.params["guide_image_max_tokens"] else None,
    )

    @contextmanager
    def timing() -> Iterator[Engine]:
        if reporter.terminal or reporter.verbose:
            reporter.note("timing this machine, a few seconds, once; `localvlm paths` shows the cache that keeps it")
        engine = ctx.ensure_object(App).engine(reporter.verbose > 1)
        try:
            with Interrupts(engine):
                yield engine
        finally:
            engine.close()
            reporter.clear()

    choice = chosen_for(pair, asked, options, model, timing, ctx.params["accuracy"])
    if choice.plan is not None and choice.plan.guide_tokens is not None:
        ctx.params["guide_image_max_tokens"] = choice.plan.guide_tokens
    return choice


def _said(ctx: click.Context) -> str:
    """What the user said that leaves nothing to plan; "" if nothing."""
    given = {name: ctx.params[name] for name in ("preset", "layer", "explain", "private") if ctx.params[name]}
    if ctx.params["exit_at"] not in (None, "off"):
        given["exit-at"] = ctx.params["exit_at"]
    return f"--{next(iter(given))} was given" if given else ""


def say(choice: Choice, reporter: Reporter) -> None:
    """The predictions and the choice."""
    if choice.why:
        reporter.note(f"plan: as asked; {choice.why}")
    for plan in choice.plans:
        stages = ", ".join(f"{name} {ms / 1e3:.1f}" for name, ms in plan.ms.items() if ms >= 50)
        mark = " (chosen)" if plan is choice.plan else ""
        exits = f", {plan.exits:.0%} of answers by the guide" if plan.exits else ""
        reporter.note(f"plan: {plan.name}, {plan.total / 1e3:.1f} s predicted ({stages}){exits}{mark}")


def shown(choice: Choice) -> dict[str, object]:
    """For --json."""
    return {} if choice.plan is None else {"plan": choice.figures()}
