"""Keys that one widget gets and another is meant to have."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.events import Key

if TYPE_CHECKING:
    from textual.widget import Widget

__all__ = ["hand_on"]


def hand_on(event: Key, widget: Widget) -> None:
    """Gives a key to ``widget``, and the focus with it at once: the next key goes there by itself."""
    event.stop()
    event.prevent_default()
    widget.screen.set_focus(widget)
    widget._forward_event(Key(event.key, event.character))  # one that is posted would go to the app's bindings, too
