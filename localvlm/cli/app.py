"""What the commands share: the engine they run on, handed in so that tests can hand in a fake."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from localvlm.cli.interrupt import Interrupts
from localvlm.config import directories

if TYPE_CHECKING:
    from localvlm.bench.cases import Bench
    from localvlm.engine.api import Engine, LoadOptions
    from localvlm.pipeline import Pair, Pipeline, VlmFiles

__all__ = ["App", "guide_image_tokens", "is_large", "load_options"]


TINY = 20_000_000
"""Bytes of a tower below which it takes less time to run than to be looked into."""
NICENESS = 5
"""Of a worker beside an app in which somebody types."""


def worker_engine(verbose: bool, niceness: int = 0) -> Engine:
    """An engine in a worker process, see :class:`localvlm.engine.client.Engine`."""
    from localvlm.engine.client import Engine as WorkerEngine

    return WorkerEngine(verbose=verbose, niceness=niceness)


class _All:
    """Engines of which one works at a time, as those that cancel see them."""

    def __init__(self, engines: Sequence[Engine]) -> None:
        self._engines = engines

    def cancel(self) -> None:
        for engine in self._engines:
            engine.cancel()

    def close(self) -> None:
        for engine in self._engines:
            getattr(engine, "kill", engine.close)()


@dataclass(frozen=True)
class App:
    """Context object of the commands.

    Attributes:
        engine: makes an engine; the argument says whether it shows its log.
    """

    engine: Callable[[bool], Engine] = worker_engine

    def background_engine(self) -> Engine:
        """An engine that leaves the processor to this process, in which somebody types."""
        return worker_engine(False, NICENESS) if self.engine is worker_engine else self.engine(False)

    @contextmanager
    def pipeline(self, pair: Pair, params: dict[str, Any]) -> Iterator[Pipeline]:
        """A pipeline with the engine options of a command; Ctrl-C cancels it, and the engine ends with it."""
        from localvlm.pipeline import Pipeline

        engine = self.engine(params["verbose"] > 1)
        with Interrupts(engine):
            try:
                guide, model = load_options(params, pair)
                yield Pipeline(pair, engine, guide=guide, model=model, low_memory=params["low_memory"])
            finally:
                engine.close()

    @contextmanager
    def bench(self, params: dict[str, Any], make: Callable[[Callable[[], Engine]], Bench]) -> Iterator[Bench]:
        """What ``make`` makes of something that makes engines; Ctrl-C cancels all of them."""
        engines: list[Engine] = []

        def engine() -> Engine:
            engines.append(self.engine(params["verbose"] > 1))
            return engines[-1]

        with make(engine) as bench, Interrupts(_All(engines)):
            yield bench


def load_options(params: dict[str, Any], pair: Pair) -> tuple[LoadOptions, LoadOptions]:
    """How a command's engine options say that guide and model are loaded.

    A guide whose tower takes pictures of any size looks at the fewest tokens that show it enough, if nothing is said.
    """
    from localvlm.engine.api import LoadOptions

    options = LoadOptions(
        n_ctx=params["ctx_size"],
        threads=params["threads"],
        gpu_layers=params["gpu_layers"],
        stock_tower=params["stock_tower"],
        stock_tiling=params["stock_tiling"],
        image_tokens=params["image_max_tokens"],
        kv_type=params["kv_type"],
        compact_positions=params["positions"] == "compact",
        cache="" if params["private"] else str(directories().cache),
        image_cache=params["image_cache"] << 20,
    )
    return replace(options, image_tokens=guide_image_tokens(params, pair)), options


def guide_image_tokens(params: dict[str, Any], pair: Pair) -> int:
    """Most image tokens of a pair's guide; 0: its family's own bound."""
    said: int = params["guide_image_max_tokens"] or params["image_max_tokens"]
    if params["guide_image_max_tokens"] or not _takes_any_size(pair.guide):
        return said
    from localvlm.planning.plans import GUIDE_TOKENS

    return min(GUIDE_TOKENS[0], said or GUIDE_TOKENS[0])


def is_large(vlm: VlmFiles) -> bool:
    """Whether its tower takes long enough that fewer tokens are sooner seen; no where it cannot be read, which loading
    it tells.
    """
    try:
        return vlm.mmproj.stat().st_size >= TINY
    except OSError:
        return False


def _takes_any_size(guide: VlmFiles | None) -> bool:
    """Whether its tower does; no where it is small, or cannot be read, which loading it tells."""
    from localvlm.errors import ModelError

    try:
        if guide is None or not is_large(guide):
            return False
        from localvlm.engine.plausible import read_projector
        from localvlm.planning.shapes import takes_any_size

        return takes_any_size(read_projector(guide.mmproj))
    except (ModelError, OSError):
        return False
