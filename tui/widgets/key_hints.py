"""The keys that work now, as the bindings say, in as many lines as they need."""

from __future__ import annotations

from textual.content import Content
from textual.geometry import Size
from textual.screen import Screen
from textual.widget import Widget

__all__ = ["KeyHints"]

GAP = "  "


class KeyHints(Widget):
    """Keys of the focused widget and of the screen; unlike a footer it breaks lines where the screen is narrow."""

    DEFAULT_CSS = """
    KeyHints {
        height: auto;
        padding: 0 1;
        color: $foreground;
    }
    """

    def __init__(self) -> None:
        super().__init__()
        self._hints: list[Content] = []

    def on_mount(self) -> None:
        self.screen.bindings_updated_signal.subscribe(self, self._changed)
        self.call_after_refresh(self._changed, self.screen)

    def _changed(self, screen: Screen[object]) -> None:
        """Keys that do the same are one hint, with the first of them that is told."""
        if not self.is_attached:
            return
        shown: dict[str, list[str]] = {}
        for active in screen.active_bindings.values():
            if active.binding.show and active.enabled:
                keys = shown.setdefault(active.binding.description, [])
                if (key := self.app.get_key_display(active.binding)) not in keys:
                    keys.append(key)
        self._hints = [
            Content.assemble((" ".join(keys), "bold $text-accent"), f" {what}")
            for what, keys in sorted(shown.items(), key=lambda hint: hint[1] == ["esc"])
        ]
        self.refresh(layout=True)

    def _lines(self, width: int) -> Content:
        """The hints, each whole, in lines of at most ``width`` cells."""
        lines: list[list[Content]] = [[]]
        taken = 0
        for hint in self._hints:
            if lines[-1] and taken + len(GAP) + hint.cell_length > width:
                lines.append([])
                taken = 0
            taken += hint.cell_length + len(GAP) * bool(lines[-1])
            lines[-1].append(hint)
        return Content("\n").join(Content(GAP).join(line) for line in lines)

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002
        return self._lines(width).plain.count("\n") + 1

    def render(self) -> Content:
        return self._lines(self.content_size.width)
