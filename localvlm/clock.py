"""What each stage of an answer takes."""

from __future__ import annotations

import time
from collections.abc import Callable

from localvlm.answers import STAGES

__all__ = ["Clock"]


class Clock:
    """Milliseconds per stage: ``with clock("prefill"): ...``. ``on_stage`` gets the name of each as it begins."""

    def __init__(self, on_stage: Callable[[str], None] | None) -> None:
        self.ms = dict.fromkeys(STAGES, 0.0)
        self._on_stage = on_stage
        self._started = time.perf_counter()
        self._stage, self._entered = "", 0.0

    def elapsed(self) -> float:
        return (time.perf_counter() - self._started) * 1e3

    def __call__(self, stage: str) -> Clock:
        self._stage = stage
        return self

    def __enter__(self) -> None:
        self._entered = time.perf_counter()
        if self._on_stage is not None:
            self._on_stage(self._stage)

    def __exit__(self, *exc: object) -> None:
        self.ms[self._stage] += (time.perf_counter() - self._entered) * 1e3
