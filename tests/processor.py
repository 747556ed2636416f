"""Processor time of a piece of work, as a test may bound it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

__all__ = ["thread_seconds"]


def thread_seconds(work: Callable[[], object], tries: int = 3) -> float:
    """Of this thread alone, the best of some tries, without garbage collections: those are of whatever ran before."""
    taken = []
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(tries):
            started = time.thread_time()
            work()
            taken.append(time.thread_time() - started)
    finally:
        if collects:
            gc.enable()
    return min(taken)
