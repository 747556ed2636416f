"""The pull screen: a pair's files as they come in from the hub, how fast, and how long it will take."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import Static

from localvlm.errors import Interrupted, LocalvlmError

from ..background import in_thread
from ..text import one_line, shown_size
from .dialog import Dialog, told_error

if TYPE_CHECKING:
    from localvlm.hub import Hub, HubFile, Progress
    from localvlm.references import Reference

__all__ = ["PullProgress", "PullResult", "PullScreen"]

WINDOW_S = 5.0
"""Seconds that the speed is told over."""
EVERY_S = 0.2


@dataclass(frozen=True)
class PullResult:
    """The files of a pair that was fetched, and what is to be known of it."""

    paths: tuple[Path, ...]
    notes: tuple[str, ...]


class PullProgress:
    """Hears a hub, in its thread, and is read by the screen, in another. :meth:`stop` ends the fetch at the next byte.

    ``clock``: seconds, that only go on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._stopped = clock, threading.Event()
        self._seen: deque[tuple[float, int]] = deque()
        self._lock = threading.Lock()
        self.files: tuple[HubFile, ...] = ()
        self.there: dict[HubFile, int] = {}
        self._before: dict[HubFile, int] = {}
        self.news = ""

    def begin(self, files: Sequence[HubFile]) -> None:
        self._go_on()
        with self._lock:
            self.files = tuple(dict.fromkeys(files))

    def at(self, file: HubFile, n_bytes: int) -> None:
        self._go_on()
        with self._lock:
            self._before.setdefault(file, n_bytes)
            self.there[file] = n_bytes
            now = self._clock()
            came = sum(self.there.values()) - sum(self._before.values())
            if not self._seen or now > self._seen[-1][0]:
                self._seen.append((now, came))
            while len(self._seen) > 2 and now - self._seen[0][0] > WINDOW_S:
                self._seen.popleft()

    def note(self, text: str) -> None:
        self._go_on()
        self.news = text

    def stop(self) -> None:
        self._stopped.set()

    def _go_on(self) -> None:
        if self._stopped.is_set():
            raise Interrupted("the fetch was stopped")

    def total(self) -> tuple[int, int]:
        """Bytes of all files that are there, and that there will be."""
        with self._lock:
            return sum(self.there.values()), sum(file.size for file in self.files)

    def speed(self) -> float:
        """Bytes a second over the last seconds; 0.0 until two moments are known."""
        with self._lock:
            if len(self._seen) < 2:
                return 0.0
            (then, had), (_, has) = self._seen[0], self._seen[-1]
            return max(has - had, 0) / max(self._clock() - then, 1e-6)


def _default_hub(progress: Progress) -> Hub:
    from localvlm.hub import Hub

    return Hub(progress=progress)


class PullScreen(Dialog[PullResult]):
    """Fetches at once; dismissed with what was fetched if the pair is to be used now. Esc stops a fetch that runs, what
    came of it is kept; then it closes the screen.

    Args:
        name: of the pair.
        wanted: by PAIR_KEYS, as of :class:`localvlm.catalog.Entry`.
        hub: makes one that tells its progress.
        run: whether this project has run the pair.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "use", "use it now"),
        Binding("r", "again", "go on"),
        Binding("escape", "stop", "stop"),
        Binding("escape", "close", "close"),
    ]
    DEFAULT_CSS = """
    PullScreen #files { height: auto; padding: 0 1; }
    """

    def __init__(
        self,
        name: str,
        wanted: Mapping[str, Reference],
        *,
        hub: Callable[[Progress], Hub] = _default_hub,
        run: bool = True,
    ) -> None:
        super().__init__(classes="-small")
        self.heading = f"Pull {one_line(name, 40)}"
        self._wanted, self._hub, self._by_us = wanted, hub, run
        self._progress = PullProgress()
        self._state = "running"
        self._result: PullResult | None = None
        self._fetching = threading.Lock()
        """Held by the thread of a fetch, which may take a while to end after it was stopped."""

    def body(self) -> ComposeResult:
        yield Static(id="files", markup=False)

    def on_mount(self) -> None:
        self._start()
        self.set_interval(EVERY_S, self.show_progress)

    def on_unmount(self) -> None:
        self._progress.stop()

    def on_resize(self) -> None:
        self.show_progress()

    # ---- the fetch

    def _start(self) -> None:
        self._progress = PullProgress()
        self._set("running")
        self.tell("asking the hub")
        self.run_worker(self._fetched(self._progress), exclusive=True)

    async def _fetched(self, progress: PullProgress) -> None:
        try:
            self._result = await in_thread(partial(self._fetch, progress))
        except LocalvlmError as error:
            if not isinstance(error, Interrupted):
                self._set("failed")
                self.tell(told_error(error), error=True)
            return
        self.show_progress()
        self._set("done")
        self.tell("; ".join(("all is here", *map(one_line, self._result.notes))))

    def _fetch(self, progress: PullProgress) -> PullResult:
        """Runs in a thread."""
        from localvlm.catalog import located
        from localvlm.facts import facts_of, pair_notes

        if not self._fetching.acquire(timeout=EVERY_S):
            progress.note("waiting for the fetch that was stopped to end")
            self._fetching.acquire()
        try:
            hub = self._hub(progress)
            paths = hub.pull([hub.chosen(reference) for reference in dict.fromkeys(self._wanted.values())])
        finally:
            self._fetching.release()
        notes = pair_notes(facts_of(located(self._wanted)))
        return PullResult(tuple(paths), (*notes, *(() if self._by_us else ("not run by us",))))

    def _set(self, state: str) -> None:
        self._state = state
        self.refresh_bindings()

    # ---- what is shown

    def show_progress(self) -> None:
        """Shows how far it is; called every so often."""
        progress = self._progress
        width = max(self.query_one("#dialog").content_size.width - 2, 20)
        lines = [self._line(file, progress.there.get(file, 0), width) for file in progress.files]
        there, total = progress.total()
        if total:
            lines += [Content(""), _bar(there / total, width), Content(self._figures(there, total))]
        self.query_one("#files", Static).update(Content("\n").join(lines))
        if self._state == "running":
            self.tell(one_line(progress.news) if progress.news else "" if total else "asking the hub")

    def _line(self, file: HubFile, there: int, width: int) -> Content:
        share = f"{there / max(file.size, 1):4.0%}"
        figures = f"{shown_size(file.size):>8} {share}"
        name = one_line(PurePosixPath(file.name).name, max(width - len(figures) - 1, 8))
        colour = "$text-success" if there >= file.size else "$foreground"
        return Content.assemble(name.ljust(width - len(figures)), (figures, colour))

    def _figures(self, there: int, total: int) -> str:
        told = f"{shown_size(there)} of {shown_size(total)}"
        speed = self._progress.speed()
        if self._state != "running" or speed <= 0:
            return told
        return f"{told}, {shown_size(round(speed))}/s, {_left((total - there) / speed)}"

    # ---- keys

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002
        states = {"use": ("done",), "again": ("stopped", "failed"), "stop": ("running",)}
        states["close"] = ("done", "stopped", "failed")
        return self._state in states.get(action, (self._state,))

    def action_use(self) -> None:
        self.dismiss(self._result)

    def action_again(self) -> None:
        self._start()

    def action_stop(self) -> None:
        self._progress.stop()
        self.workers.cancel_node(self)
        self._set("stopped")
        there, total = self._progress.total()
        kept = f"; {shown_size(there)} of {shown_size(total)} are kept" if there else ""
        self.tell(f"stopped{kept}")
        self.show_progress()


def _bar(share: float, width: int) -> Content:
    filled = min(round(share * width), width)
    return Content.assemble(("\u2501" * filled, "$primary"), ("\u2501" * (width - filled), "$border-blurred"))


def _left(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s left"
    return f"{seconds / 60:.0f} min left" if seconds < 5400 else f"{seconds / 3600:.1f} h left"
