"""From a key to the screen: ``python -m tests.latency [--keys 500] [--while fake --while smolvlm2 --while demo]``.

The chat runs on a terminal of its own and answers one question after another while somebody types. For each key, the
time until the terminal gets the letter is taken. The engine is a fake one that streams 2,000 tokens a second, the
worker with a preset of `localvlm bench` (random weights of real shapes, written to a temporary folder), or the worker
with a pair of the catalogue: the demo pair answers six questions a second, each of which changes the whole screen, more
than people ask. Also the time from the start to the first frame. Nothing else should run on the machine.
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
from pathlib import Path

from localvlm.answers import AskOptions, Pair, VlmFiles
from localvlm.engine.fake import FakeEngine, Script
from tests.tui.chatting import fake_opener, scene
from tests.tui.terminal import Terminal

__all__ = ["Keys", "percentile"]

LETTERS = b"abcdefghijklmnopqrstuvwxyz"
ENGINES = ("fake", "smolvlm2", "demo")
FRAMES = 15
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


def pair_for(name: str, folder: Path) -> Pair:
    """A pair of the catalogue; or a preset, whose files are written below ``folder`` unless they are there."""
    from localvlm.bench.presets import PRESETS
    from localvlm.bench.shapes import write_vlms
    from localvlm.catalog import pair_named

    if name not in PRESETS:
        return pair_named(name)
    guide, model = write_vlms(folder, [PRESETS[name].guide, PRESETS[name].model])
    return Pair(name, VlmFiles(*guide), VlmFiles(*model))


def busy(pair: str, folder: Path) -> None:
    """The app in the terminal, which answers one question after another; ``pair``: "fake", or for :func:`pair_for`."""
    from localvlm.catalog import example_image
    from localvlm.cli.app import NICENESS, worker_engine
    from localvlm.images import load
    from localvlm.pipeline import Pipeline
    from localvlm.tui import events
    from localvlm.tui.app import ChatApp
    from localvlm.tui.attachments import Attached
    from localvlm.tui.setup import ChatSetup
    from localvlm.tui.widgets.chips import Chips

    def real(name: str | None, private: bool) -> tuple[Pipeline, AskOptions]:
        engine = worker_engine(False, NICENESS)  # as `localvlm chat` has it
        return Pipeline.open(pair_for(pair, folder), engine=engine), AskOptions(max_tokens=32)

    class Busy(ChatApp):
        async def _begin(self) -> None:
            await super()._begin()
            shown = scene() if pair == "fake" else Attached(load(example_image()))
            await self.query_one(Chips).add([shown])
            await self.send("What is written on the card?")

        def _emit(self, event: events.Event) -> None:
            """The next question is asked by the thread that got the answer: the engine never waits for the screen."""
            super()._emit(event)
            if isinstance(event, events.Answered):
                said, asked = self.conversation.exchanges, "What colour is the star?"
                if len(said) < 10:
                    self.conversation.ask(asked)
                else:  # a context holds no endless conversation
                    self.conversation.clear()
                    self.conversation.ask(asked, said[0].attached)

        async def _show_event(self, event: events.Event) -> None:
            if isinstance(event, events.Asked) and self.log_view.answer(event.turn) is None:
                asked = [e for e in self.conversation.exchanges if e.turn == event.turn]
                if asked and asked[0].attached:
                    await self.log_view.clear()
                for exchange in asked:
                    await self._show(exchange)
            await super()._show_event(event)

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
    parser.add_argument("--while", dest="engines", action="append", help=f"again for more; else {ENGINES}")
    parser.add_argument("--files", type=Path, help="where the files of presets are, or will be")
    parser.add_argument("--busy", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.busy:
        busy(options.busy, options.files)
        return 0
    late = 0
    with tempfile.TemporaryDirectory() as home:
        env = {"LOCALVLM_HOME": home, "PYTHONDONTWRITEBYTECODE": ""}  # as it is installed: compiled
        files = options.files or Path(home, "files")
        first_frame(env)
        frames = sorted(first_frame(env) for _ in range(FRAMES))
        print(f"first frame after {frames[FRAMES // 2]:.0f} ms ({frames[0]:.0f} to {frames[-1]:.0f})", flush=True)
        for name in options.engines or ENGINES:
            if name != "fake":
                pair_for(name, files)
            with Terminal(["-m", "tests.latency", "--busy", name, "--files", str(files)], env=env) as terminal:
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
