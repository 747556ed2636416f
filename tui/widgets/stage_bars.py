"""A bar of time for each stage of an answer, growing while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import ClassVar

from rich.color import Color
from rich.segment import Segment
from rich.style import Style
from textual.geometry import Size
from textual.strip import Strip
from textual.timer import Timer
from textual.widget import Widget

from localvlm.heatmap import STAGE_BARS

__all__ = ["StageBars", "duration"]

EIGHTHS = " ▏▎▍▌▋▊▉"
LABEL, TIME = 14, 8
"""Columns of a stage's name and of its time."""
EVERY_S = 0.1
"""Between two steps of the bar that grows."""
NOTED_MS = 50
"""Loading that takes less is left out: it was there already."""


class StageBars(Widget):
    """Milliseconds by stage. Bars are as long as their share of the longest."""

    DEFAULT_CSS = """
    StageBars {
        width: 1fr;
        height: auto;
        & > .stage-bars--faint { color: $foreground 60%; }
        & > .stage-bars--running { text-style: bold; }
    }
    """
    COMPONENT_CLASSES: ClassVar[set[str]] = {"stage-bars--faint", "stage-bars--running"}

    def __init__(self, *, clock: Callable[[], float] = time.monotonic, id: str | None = None) -> None:  # noqa: A002
        super().__init__(id=id)
        self._clock = clock
        self._ms: dict[str, float] = {}
        self._stage, self._since = "", 0.0
        self._skipped = ""
        self._timer: Timer | None = None

    def on_mount(self) -> None:
        self._timer = self.set_interval(EVERY_S, self._redraw, pause=True)

    @property
    def ms(self) -> dict[str, float]:
        """Milliseconds so far of each stage that has begun."""
        now = dict(self._ms)
        if self._stage:
            now[self._stage] = now.get(self._stage, 0.0) + (self._clock() - self._since) * 1e3
        return now

    def clear(self) -> None:
        """Nothing has run."""
        self._ms, self._stage, self._skipped = {}, "", ""
        self._changed()

    def stage(self, name: str) -> None:
        """A stage begins, and the one before it is over."""
        self._ms, self._stage, self._since = self.ms, name, self._clock()
        self._ms.setdefault(name, 0.0)
        self._changed()

    def stop(self) -> None:
        """The stage that runs is over, and no other follows."""
        self._ms, self._stage = self.ms, ""
        self._changed()

    def finish(self, ms: Mapping[str, float], skipped: str = "") -> None:
        """What an answer took. ``skipped`` is said of stages that took no time."""
        self._ms, self._stage = {name: ms[name] for name in STAGE_BARS if ms.get(name, 0.0) > 0}, ""
        self._skipped = skipped
        self._changed()

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        return len(self._rows())

    def render_line(self, y: int) -> Strip:
        rows, width, base = self._rows(), self.size.width, self.rich_style
        if y >= len(rows):
            return Strip.blank(width, base)
        name, ms = rows[y], self.ms
        words, (red, green, blue) = STAGE_BARS[name]
        if name not in ms:
            faint = self.get_component_rich_style("stage-bars--faint")
            return Strip([Segment(f"{words:<{LABEL}}{self._skipped}", faint)]).adjust_cell_length(width, base)
        label = self.get_component_rich_style("stage-bars--running") if name == self._stage else base
        bar = _bar(ms[name] / max(1e-9, *ms.values()), max(1, width - LABEL - TIME))
        colour = base + Style(color=Color.from_rgb(red, green, blue))
        line = [Segment(f"{words:<{LABEL}}", label), Segment(bar, colour), Segment(f" {duration(ms[name])}", base)]
        return Strip(line).adjust_cell_length(width, base)

    def _rows(self) -> list[str]:
        """Stages that have a line: all, once one has begun."""
        ms = self.ms
        return [name for name in STAGE_BARS if ms and (name != "load" or ms.get(name, 0.0) >= NOTED_MS)]

    def _redraw(self) -> None:
        """The screen is laid out anew only where there are more lines, or fewer: that takes long."""
        self.refresh(layout=len(self._rows()) != self.size.height)

    def _changed(self) -> None:
        if self._timer is not None:
            (self._timer.resume if self._stage else self._timer.pause)()
        self._redraw()


def duration(ms: float) -> str:
    """Milliseconds in at most seven columns: "812 ms", "12.4 s", "3 min"."""
    if ms < 999.5:
        return f"{ms:.0f} ms"
    return f"{ms / 1e3:.1f} s" if ms < 999_950 else f"{ms / 6e4:.0f} min"


def _bar(share: float, columns: int) -> str:
    eighths = max(1, round(share * columns * 8))
    return "█" * (eighths // 8) + EIGHTHS[eighths % 8].strip()
