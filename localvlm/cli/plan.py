"""--method auto: the quickest way to answer that --accuracy allows, plain where no other is clearly sooner."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from localvlm.cli.app import App, load_options
from localvlm.cli.interrupt import Interrupts
from localvlm.cli.options import rank
from localvlm.cli.output import Reporter
from localvlm.errors import EngineCrashed, LocalvlmError, ModelError, NotEnoughMemory

if TYPE_CHECKING:
    from localvlm.answers import Answer, AskOptions, Pair
    from localvlm.engine.api import LoadOptions
    from localvlm.images import Image
    from localvlm.planning.memory import RateMemory
    from localvlm.planning.plans import Asked, Plan, Planner
    from localvlm.planning.shapes import VlmShape

__all__ = ["Planned", "method_asked", "plan_answer"]

SMALL = 400_000_000
"""Bytes of a model below which it answers so soon that a sample of the machine would take longer."""


BUSY = 1.5
"""Processes a core that want to run, over the last minute, from which on times tell nothing. An answer makes it 1."""


@dataclass(frozen=True)
class Planned:
    """What was planned, and between what.

    Attributes:
        options: of the question, as the chosen plan has them.
        plans: those that were compared, plain first; none where nothing was planned.
        why: nothing was planned, for -v.
    """

    options: AskOptions
    chosen: Plan | None = None
    plans: tuple[Plan, ...] = ()
    why: str = ""
    _planner: Planner | None = None
    _asked: Asked | None = None

    def say(self, reporter: Reporter) -> None:
        """The predictions and the choice."""
        if self.why:
            reporter.note(f"plan: as asked; {self.why}")
        for plan in self.plans:
            stages = ", ".join(f"{name} {ms / 1e3:.1f}" for name, ms in plan.ms.items() if ms >= 50)
            mark = " (chosen)" if plan is self.chosen else ""
            exits = f", {plan.exits:.0%} of answers by the guide" if plan.exits else ""
            reporter.note(f"plan: {plan.name}, {plan.total / 1e3:.1f} s predicted ({stages}){exits}{mark}")

    def learn(self, answer: Answer) -> None:
        """Remembers how far the prediction was off, unless other work was in the way."""
        if self.chosen is not None and self._planner is not None and self._asked is not None and not _busy():
            self._planner.learn(self._asked, self.chosen, answer)

    def shown(self) -> dict[str, object]:
        """For --json: the plan's name and what was predicted, of it and of the others."""
        if self.chosen is None:
            return {}
        ms = {stage: round(taken) for stage, taken in self.chosen.ms.items()}
        others = {plan.name: round(plan.total) for plan in self.plans if plan is not self.chosen}
        predicted = {**ms, "total": round(self.chosen.total)}
        return {"plan": {"name": self.chosen.name, "predicted_ms": predicted, "others_ms": others}}


def _busy() -> bool:
    """Whether more runs on this machine than it has cores for."""
    cores = os.cpu_count() or 1
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * cores


def method_asked(ctx: click.Context, pair: Pair) -> str:
    """The method that --method names, auto as it is where nothing can be planned: a guide leads if there is one.

    Without a guide, and without a word on the budget, nothing is pruned.
    """
    method: str = ctx.params["method"]
    if method != "auto":
        return method
    budgets = any(rank(ctx, name) for name in ("keep", "keep_tokens", "layer", "preset", "exit_at"))
    return "sgl+" if pair.guide is not None or budgets else "none"


def plan_answer(
    ctx: click.Context, pair: Pair, pictures: list[Image], question: str, options: AskOptions, reporter: Reporter
) -> Planned:
    """``options`` as the quickest plan has them; of the command's own, it sets --guide-image-max-tokens.

    Raises:
        Interrupted: while the machine was sampled.
    """
    if ctx.params["method"] != "auto" or options.keep is None:
        return Planned(options)
    if pair.guide is None and options.method != "none" and ctx.params["accuracy"] == "high":
        return Planned(options)  # a budget without a guide: refused, and not silently left out
    guide, model = load_options(ctx.params, pair)
    if why := _why_not(ctx, pair, model):
        return Planned(options, why=why)
    from localvlm.planning.memory import RateMemory
    from localvlm.planning.plans import Planner, quickest
    from localvlm.planning.shapes import VlmShape

    assert pair.model is not None
    try:
        shapes = [VlmShape(files) for files in (pair.model, pair.guide) if files is not None]
    except ModelError as error:  # told again, better, when it is loaded
        return Planned(options, why=error.message)
    memory = RateMemory.of(model)
    if why := _sampled(ctx, shapes, memory, model, reporter):
        return Planned(options, why=why)
    planner = Planner(shapes[0], shapes[1] if len(shapes) > 1 else None, memory)
    asked = _asked(ctx, pair, pictures, question, options, guide, model)
    plans = planner.plans(asked, ctx.params["accuracy"])
    if not plans:
        return Planned(options, why="this family's image tokens are not known")
    chosen = quickest(plans)
    if chosen.guide_tokens is not None:
        ctx.params["guide_image_max_tokens"] = chosen.guide_tokens
    return Planned(chosen.applied(options), chosen, tuple(plans), _planner=planner, _asked=asked)


def _why_not(ctx: click.Context, pair: Pair, model: LoadOptions) -> str:
    """Why nothing is planned; "" if something is."""
    params = ctx.params
    given = {name: params[name] for name in ("preset", "layer", "explain") if params[name]}
    if params["exit_at"] not in (None, "off"):
        given["exit-at"] = params["exit_at"]
    if given:
        return f"--{next(iter(given))} was given"
    if model.gpu_layers or model.stock_tiling:
        return "predictions are of a CPU, and of tiles that are cut here"
    try:
        size = 0 if pair.model is None else pair.model.model.stat().st_size
    except OSError:
        return "the model's file cannot be read"
    return f"a model of {size / 1e6:.0f} MB is too small to plan for" if size < SMALL else ""


def _asked(
    ctx: click.Context,
    pair: Pair,
    pictures: list[Image],
    question: str,
    options: AskOptions,
    guide: LoadOptions,
    model: LoadOptions,
) -> Asked:
    from localvlm.planning.plans import Asked

    share = None
    if options.exit_at is not None:
        from localvlm.calibration import stored

        found = stored(pair, options.method)
        share = found.share if found is not None else 0.0
    return Asked(
        sizes=tuple(picture.size for picture in pictures),
        question=question + (options.system or ""),
        keep=options.keep,
        max_tokens=options.max_tokens,
        guide_max_tokens=options.guide_max_tokens,
        exits=share,
        tile_price=options.tile_price,
        image_tokens=model.image_tokens,
        guide_tokens=guide.image_tokens if ctx.params["guide_image_max_tokens"] else None,
    )


def _sampled(
    ctx: click.Context, shapes: list[VlmShape], memory: RateMemory, options: LoadOptions, reporter: Reporter
) -> str:
    """Samples the machine for what is not known of it yet; why that cannot be, or ""."""
    llms, towers = memory.rates.missing((s.llm for s in shapes), (s.tower for s in shapes))
    if not llms and not towers:
        return ""
    if _busy():
        return "this machine is too busy to be timed now"
    from localvlm.planning.sample import sample

    if reporter.terminal or reporter.verbose:
        reporter.note("timing this machine, a few seconds, once; `localvlm paths` shows the cache that keeps it")
    engine = ctx.ensure_object(App).engine(reporter.verbose > 1)
    try:
        with Interrupts(engine):
            memory.add(sample(engine, options, memory.rates, llms, towers))
    except (EngineCrashed, ModelError, NotEnoughMemory, OSError) as error:
        told = error.message if isinstance(error, LocalvlmError) else str(error)
        return f"this machine could not be timed: {told}"
    finally:
        engine.close()
        reporter.clear()
    return ""
