"""The way that one question of a pair is answered: the quickest that its accuracy class allows, told before it runs."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from localvlm.answers import Answer, AskOptions, Pair
from localvlm.calibration import stored
from localvlm.engine.api import Engine, LoadOptions
from localvlm.engine.gguf_header import parts_of
from localvlm.engine.llama import physical_cores
from localvlm.errors import EngineCrashed, LocalvlmError, ModelError, NotEnoughMemory
from localvlm.planning.memory import RateMemory
from localvlm.planning.plans import Asked, Plan, Planner, quickest
from localvlm.planning.sample import SHARE, Disturbed, sample
from localvlm.planning.shapes import VlmShape

__all__ = ["Choice", "busy", "chosen_for"]

SMALL = 400_000_000
"""Bytes of a model below which it answers so soon that a sample of the machine would take longer."""
BUSY = 1.5
"""Processes a core that want to run, over the last minute, from which on times tell nothing. An answer makes it 1."""
HASHED = 1 << 26
"""Bytes that are hashed to tell which share of the cores is free, in 50 to 200 ms."""

Timing = Callable[[], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Choice:
    """What was planned, and between what.

    Attributes:
        options: of the question, as the chosen plan has them.
        plan: the chosen one; None where nothing was planned.
        plans: those that were compared, plain first.
        why: nothing was planned.
    """

    options: AskOptions
    plan: Plan | None = None
    plans: tuple[Plan, ...] = ()
    why: str = ""
    _planner: Planner | None = None
    _asked: Asked | None = None

    def figures(self) -> dict[str, Any]:
        """The plan's name and what was predicted, of it and of the others, as JSON holds them; {} without one."""
        if self.plan is None:
            return {}
        ms = {stage: round(taken) for stage, taken in self.plan.ms.items()}
        others = {plan.name: round(plan.total) for plan in self.plans if plan is not self.plan}
        return {"name": self.plan.name, "predicted_ms": {**ms, "total": round(self.plan.total)}, "others_ms": others}

    def knowing(self, answer: Answer) -> Plan | None:
        """The prediction with what nobody can know before the guide has looked: tiles, rows, how the answer came."""
        if self.plan is None or self._planner is None or self._asked is None:
            return None
        return self._planner.again(self._asked, self.plan, answer)

    def learn(self, answer: Answer) -> None:
        """Remembers how far the prediction was off, unless other work was in the way."""
        if self.plan is not None and self._planner is not None and self._asked is not None and not busy():
            self._planner.learn(self._asked, self.plan, answer)


def busy() -> bool:
    """Whether more runs on this machine than it has cores for."""
    cores = os.cpu_count() or 1
    return hasattr(os, "getloadavg") and os.getloadavg()[0] > BUSY * cores


def _share() -> float:
    """Share of the cores that this process gets where it wants all: others may wait, or be of low priority."""
    cores, began, used = physical_cores(), time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(hashlib.sha256, [bytes(HASHED)] * cores))
    return (time.process_time() - used) / (time.perf_counter() - began) / cores


def chosen_for(
    pair: Pair,
    asked: Asked,
    options: AskOptions,
    model: LoadOptions,
    timing: Timing,
    accuracy: str = "high",
) -> Choice:
    """``options`` as the quickest plan of a class has them. Of a question that is ``asked``, exits are looked up here.
    ``model`` says how the model is loaded, and where rates are kept; ``timing`` gives an engine to time the machine
    with, if it was not timed yet.

    Raises:
        Interrupted: while the machine was timed.
    """
    if why := _why_not(pair, model):
        return Choice(options, why=why)
    assert pair.model is not None
    try:
        shapes = [VlmShape(files) for files in (pair.model, pair.guide) if files is not None]
    except ModelError as error:  # told again, better, when it is loaded
        return Choice(options, why=error.message)
    memory = RateMemory.of(model)
    if why := _timed(shapes, memory, model, timing):
        return Choice(options, why=why)
    if options.exit_at is not None:
        found = stored(pair, options.method)
        asked = replace(asked, exits=0.0 if found is None else found.share)
    guide = shapes[1] if len(shapes) > 1 else None
    one_tower = guide is not None and guide.shares_tower(shapes[0])
    planner = Planner(shapes[0], guide, memory, one_tower=one_tower)
    plans = planner.plans(asked, accuracy)
    if not plans:
        return Choice(options, why="this family's image tokens are not known")
    plan = quickest(plans)
    learning = None if model.image_cache else planner  # what a kept picture takes tells nothing of its tower
    return Choice(plan.applied(options), plan, tuple(plans), _planner=learning, _asked=asked)


def _why_not(pair: Pair, model: LoadOptions) -> str:
    """Why nothing is planned; "" if something is."""
    if model.gpu_layers or model.stock_tiling:
        return "predictions are of a CPU, and of tiles that are cut here"
    try:
        size = 0 if pair.model is None else sum(path.stat().st_size for path in parts_of(pair.model.model))
    except OSError:
        return "the model's file cannot be read"
    return f"a model of {size / 1e6:.0f} MB is too small to plan for" if size < SMALL else ""


def _timed(shapes: Sequence[VlmShape], memory: RateMemory, options: LoadOptions, timing: Timing) -> str:
    """Times the machine for what is not known of it yet; why that cannot be, or ""."""
    llms, towers = memory.rates.missing((s.llm for s in shapes), (s.tower for s in shapes))
    if not llms and not towers:
        return ""
    if _share() < SHARE:  # a load average does not tell of a quota
        return "this machine is too busy to be timed now"
    try:
        with timing() as engine:
            memory.add(sample(engine, options, memory.rates, llms, towers))
    except Disturbed as error:
        return str(error)
    except (EngineCrashed, ModelError, NotEnoughMemory, OSError) as error:
        told = error.message if isinstance(error, LocalvlmError) else str(error)
        return f"this machine could not be timed: {told}"
    return ""
