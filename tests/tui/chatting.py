"""Conversations on the fake engine, and pictures for them."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from localvlm.answers import AskOptions, Pair, VlmFiles
from localvlm.engine.fake import FakeEngine, Script
from localvlm.images import Image
from localvlm.pipeline import Pipeline
from localvlm.tui import events
from localvlm.tui.attachments import Attached
from localvlm.tui.conversation import Conversation, Opener, Recorder
from localvlm.tui.exchange import Exchange

__all__ = ["DEADLINE", "HELD", "Heard", "HeldEngine", "fake_opener", "open_conversation", "pair_of", "picture", "scene"]

DEADLINE = 120.0
"""Seconds after which what is waited for will not come, however slow the machine."""
_E = TypeVar("_E")


def picture(seed: int = 1, name: str | None = None) -> Attached:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return Attached(Image(pixels, name or f"{seed}.png"))


def scene(name: str = "scene.png", seed: int = 1) -> Attached:
    """A red star-like blot on a pale ground, and a blue square."""
    pixels = np.full((96, 128, 3), (232, 228, 216), np.uint8)
    y, x = np.mgrid[:96, :128]
    pixels[np.abs(x - 96) + np.abs(y - 26 - seed) < 22] = (170, 30, 40)
    pixels[56:84, 20:48] = (40, 80, 170)
    return Attached(Image(pixels, name))


def pair_of(name: str | None) -> Pair:
    return Pair(name or "fake", *(VlmFiles(Path(f"{role}.gguf"), Path("m.gguf")) for role in ("guide", "model")))


HELD = 1e6
"""Seconds that a step of a HeldEngine takes until it is let go."""


class HeldEngine(FakeEngine):
    """Steps that take HELD seconds wait for :meth:`let_go`, or until they are cancelled."""

    def __init__(self, scripts: Script | Mapping[str, Script] = Script()) -> None:
        super().__init__(scripts)
        self._gone_on = threading.Event()

    def wait(self, seconds: float) -> bool:
        if seconds < HELD:
            return super().wait(seconds)
        while not self._gone_on.wait(0.005):
            if self.take_cancel():
                return True
        return self.take_cancel()

    def let_go(self) -> None:
        """From now on nothing is held."""
        self._gone_on.set()


def fake_opener(
    engine: FakeEngine, options: AskOptions = AskOptions(), opened: list[tuple[str | None, bool]] | None = None
) -> Opener:
    def opener(name: str | None, private: bool, *, anyway: bool = False) -> tuple[Pipeline, AskOptions]:
        if opened is not None:
            opened.append((name, private))
        return Pipeline.open(pair_of(name), engine=engine), options

    return opener


class Heard:
    """Collects events; waits for them."""

    def __init__(self) -> None:
        self.events: list[events.Event] = []
        self._came = threading.Condition()

    def __call__(self, event: events.Event) -> None:
        with self._came:
            self.events.append(event)
            self._came.notify_all()

    def wait(self, kind: type[_E], count: int = 1) -> _E:
        """The ``count``-th event of a kind."""

        def found() -> list[_E]:
            return [e for e in self.events if isinstance(e, kind)]

        with self._came:
            assert self._came.wait_for(lambda: len(found()) >= count, DEADLINE), (kind, self.events)
            return found()[count - 1]

    def answered(self, exchange: Exchange) -> None:
        """Waits for an exchange's answer."""
        with self._came:
            done = self._came.wait_for(lambda: exchange.turn in {e.turn for e in self.of(events.Answered)}, DEADLINE)
            assert done, self.events

    def of(self, kind: type[_E]) -> list[_E]:
        return [e for e in self.events if isinstance(e, kind)]


def open_conversation(
    guide: Script = Script("red"),
    model: Script = Script("dark red"),
    options: AskOptions = AskOptions(),
    recorder: Recorder | None = None,
) -> tuple[Conversation, Heard, FakeEngine]:
    """A conversation that runs; close it at the end."""
    engine, heard = FakeEngine({"guide": guide, "model": model}), Heard()
    conversation = Conversation(fake_opener(engine, options), heard, recorder)
    conversation.start()
    return conversation, heard, engine
