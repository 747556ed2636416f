"""Keys that act in the order in which they were pressed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual import events
from textual.widgets import Input

if TYPE_CHECKING:
    from textual.widget import Widget

__all__ = ["Line", "act_in_order"]


async def act_in_order(widget: Widget, event: events.Key) -> bool:
    """Runs what a key is bound to in a widget, if anything, before the next key comes.

    Textual takes a letter at once, but runs a binding when its key has come up to the app: where that is busy, a letter
    typed behind backspace comes first, and is what backspace deletes.
    """
    if event.is_printable:
        return False
    active = widget.screen.active_bindings.get(event.key)
    if active is None or active.node is not widget:
        return False
    event.stop()
    event.prevent_default()
    return await widget.app.run_action(active.binding.action, widget)


class Line(Input):
    """A line that one writes in."""

    async def _on_key(self, event: events.Key) -> None:
        if not await act_in_order(self, event):
            await super()._on_key(event)
