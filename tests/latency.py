"""From a key to the screen: ``python -m tests.latency [--keys 500] [--pair demo]``.

The chat runs on a terminal of its own and answers while somebody types. For each key, the time until the terminal gets
the letter is taken. Twice: while a fake engine streams answer after answer, 2,000 tokens a second, and while the worker
of a real pair answers one question after another. Also the time from the start to the first frame.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from localvlm.answers import AskOptions
from localvlm.engine.fake import FakeEngine, Script
from tests.tui.chatting import fake_opener, scene
from tests.tui.terminal import Terminal

__all__ = ["Keys", "percentile"]

LETTERS = b"abcdefghijklmnopqrstuvwxyz"
LIMIT_MS = 50.0
"""Of the 95th percentile."""
GAP_S = 0.03
"""Between two keys: faster than anybody types."""
MISSED_MS = 5_000.0
ANSWER = "A **dark red** star; and a list:\n\n- one\n- two\n\nwith `code` in it.\n\n" * 240
"""16 kB, 700 blocks: 2,000 tokens a second are long answers."""


@dataclass(frozen=True)
class Keys:
    """Milliseconds from each key to the screen."""

    ms: tuple[float, ...]

    def told(self) -> str:
        return (
            f"{len(self.ms)} keys: median {statistics.median(self.ms):.1f} ms, 95th percentile "
            f"{percentile(self.ms, 0.95):.1f} ms, longest {max(self.ms):.1f} ms"
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The least value that at least ``share`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, -(-len(ordered) * share // 1).__trunc__() - 1)]


def typed(terminal: Terminal, n: int) -> Keys:
    """Types letters into the text, and deletes them before it is a second line."""
    ms = []
    for i in range(n):
        letter = LETTERS[i % len(LETTERS) : i % len(LETTERS) + 1]
        while terminal.read(0):
            pass
        before = len(terminal.said)
        at = time.perf_counter()
        terminal.type(letter)
        while not _shows(terminal.said[before:], letter) and (time.perf_counter() - at) * 1e3 < MISSED_MS:
            terminal.read(0.2)
        ms.append((time.perf_counter() - at) * 1e3)
        if i % len(LETTERS) == len(LETTERS) - 1:
            terminal.type(b"\x15" * 2)  # ctrl+u
        _drain(terminal, GAP_S)
    return Keys(tuple(ms))


def _shows(said: bytes, letter: bytes) -> bool:
    """Whether the line of the text was written with the letter before the cursor, which is reverse."""
    return letter + b"\x1b[0m" in said


def _drain(terminal: Terminal, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while (left := end - time.perf_counter()) > 0:
        terminal.read(left)


def busy(pair: str) -> None:
    """The app in the terminal, which answers one question after another; ``pair``: "fake", or of the catalogue."""
    from localvlm.catalog import example_image, pair_named
    from localvlm.cli.app import NICENESS, worker_engine
    from localvlm.images import load
    from localvlm.pipeline import Pipeline
    from localvlm.tui.app import ChatApp
    from localvlm.tui.attachments import Attached
    from localvlm.tui.setup import ChatSetup
    from localvlm.tui.widgets.chips import Chips

    def real(name: str | None, private: bool) -> tuple[Pipeline, AskOptions]:
        engine = worker_engine(False, NICENESS)  # as `localvlm chat` has it
        return Pipeline.open(pair_named(pair), engine=engine), AskOptions(max_tokens=32)

    class Busy(ChatApp):
        async def _begin(self) -> None:
            await super()._begin()
            shown = scene() if pair == "fake" else Attached(load(example_image()))
            await self.query_one(Chips).add([shown])
            await self.send("What is written on the card?")

        async def _answered(self, message: Any, event: Any) -> None:
            await super()._answered(message, event)
            self.run_worker(self._next())

        async def _next(self) -> None:
            if len(self.conversation.exchanges) < 10:
                await self._show(self.conversation.ask("What colour is the star?"))
            else:  # a context holds no endless conversation
                attached = self.conversation.exchanges[0].attached
                self.conversation.clear()
                await self.log_view.clear()  # and not action_new_chat(), which takes away what is being typed
                await self._show(self.conversation.ask("What is written on the card?", attached))

    engine = FakeEngine(Script(ANSWER, token_s=0.0005, n_ctx=1_000_000))
    fake = fake_opener(engine, AskOptions(max_tokens=100_000, method="none"))
    app = Busy(ChatSetup(fake if pair == "fake" else real, pair))
    app.run()
    app.close()


def first_frame(env: dict[str, str]) -> float:
    """Milliseconds from the start of ``localvlm chat`` to where one can write."""
    started = time.perf_counter()
    with Terminal(["-m", "localvlm", "chat", "--pair", "demo"], env=env) as terminal:
        terminal.until(b"sk about")  # its first letter is under the cursor
        ms = (time.perf_counter() - started) * 1e3
        terminal.type(b"\x11")
        terminal.ended()
    return ms


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=500)
    parser.add_argument("--pair", default="demo", help="a real pair; 'none': the fake one alone")
    parser.add_argument("--busy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.busy:
        busy(options.busy)
        return 0
    late = 0
    with tempfile.TemporaryDirectory() as home:
        env = {"LOCALVLM_HOME": home}
        frames = sorted(first_frame(env) for _ in range(5))
        print(f"first frame after {frames[2]:.0f} ms ({frames[0]:.0f} to {frames[-1]:.0f})", flush=True)
        for name in ["fake"] + [options.pair] * (options.pair != "none"):
            with Terminal(["-m", "tests.latency", "--busy", name], env=env) as terminal:
                terminal.until(b"model")
                keys = typed(terminal, options.keys)
                terminal.type(b"\x11")
                code = terminal.ended()
            late += percentile(keys.ms, 0.95) > LIMIT_MS or code != 0
            print(f"{name}: {keys.told()}; left with {code}", flush=True)
    return 1 if late else 0


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", os.getcwd())  # noqa: PTH109 - as it is
    sys.exit(main())
