"""From a key to the screen: ``python -m tests.latency [--keys 500] [--pair demo]``.

The chat runs on a terminal of its own and answers while somebody types. For each key, the time until the terminal gets
the letter is taken. Twice: while a fake engine streams answer after answer, 2,000 tokens a second, and, with --pair, while
the worker of a real pair answers one question after another. Also the time from the start to the first frame.
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
ANSWER = "A **dark red** star; and a list:\n\n- one\n- two\n\nwith `code` in it.\n\n" * 12


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


def endless() -> None:
    """The app in the terminal: a fake engine that streams without a pause."""
    from localvlm.tui.app import ChatApp
    from localvlm.tui.setup import ChatSetup
    from localvlm.tui.widgets.chips import Chips

    class Busy(ChatApp):
        async def _begin(self) -> None:
            await super()._begin()
            await self.query_one(Chips).add([scene()])
            await self.send("what?")

        async def _answered(self, message: Any, event: Any) -> None:
            await super()._answered(message, event)
            self.run_worker(self._next())

        async def _next(self) -> None:
            await self._show(self.conversation.ask("and?"))

    script = Script(ANSWER, token_s=0.0005, n_ctx=100_000_000)
    app = Busy(ChatSetup(fake_opener(FakeEngine(script), AskOptions(max_tokens=1_000_000, method="none")), "fake"))
    app.run()
    app.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=500)
    parser.add_argument("--pair", default="demo", help="a real pair; 'none': the fake one alone")
    parser.add_argument("--endless", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.endless:
        endless()
        return 0
    late = 0
    with tempfile.TemporaryDirectory() as home:
        env = {"LOCALVLM_HOME": home}
        cases = {"fake": ["-m", "tests.latency", "--endless"]}
        if options.pair != "none":
            cases[options.pair] = ["-m", "localvlm", "chat", "example", "--pair", options.pair, "--exit-at", "off"]
        for name, args in cases.items():
            started = time.perf_counter()
            with Terminal(args, env=env) as terminal:
                terminal.until(b"Ask about")
                print(f"{name}: first frame after {(time.perf_counter() - started) * 1e3:.0f} ms")
                _make_busy(terminal, fake=name == "fake")
                keys = typed(terminal, options.keys)
                terminal.type(b"\x11")
                code = terminal.ended()
            late += percentile(keys.ms, 0.95) > LIMIT_MS or code != 0
            print(f"{name}: {keys.told()}; left with {code}")
    return 1 if late else 0


def _make_busy(terminal: Terminal, *, fake: bool) -> None:
    if fake:
        terminal.until(b"one")
        return
    terminal.until(b"384")
    for question in (b"What colour is the star?", b"What is written on the card?") * 100:
        terminal.type(question + b"\r")
    _drain(terminal, 2.0)


if __name__ == "__main__":
    os.environ.setdefault("PYTHONPATH", os.getcwd())  # noqa: PTH109 - as it is
    sys.exit(main())
