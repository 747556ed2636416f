"""Pictures that will come with the next question, each a chip that can be taken away."""

from __future__ import annotations

from collections.abc import Sequence

from textual.app import ComposeResult
from textual.binding import Binding
from textual.containers import HorizontalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Static

from ..attachments import Attached
from ..text import one_line, shown_name, shown_path

__all__ = ["Chip", "Chips"]

LONGEST = 32
"""Characters of a name."""


class Chip(Static, can_focus=True):
    """One picture, or one that is being read (``attached`` None). ``taken``: it is about to go."""

    DEFAULT_CSS = """
    Chip {
        width: auto;
        height: 1;
        margin-right: 1;
        padding: 0 1;
        background: $panel;
        color: $foreground;
        &:focus { background: $block-cursor-background; color: $block-cursor-foreground; text-style: bold; }
        &.-reading { color: $text-muted; text-style: italic; }
    }
    """
    BINDINGS = [
        Binding("delete,backspace,x,enter", "remove", "remove the picture"),
        Binding("left", "app.focus_previous", "left", show=False),
        Binding("right", "app.focus_next", "right", show=False),
        Binding("down,escape", "leave", "back to the text", show=False),
    ]

    class Removed(Message):
        """Somebody took a picture away."""

        def __init__(self, chip: Chip) -> None:
            super().__init__()
            self.chip = chip

    class Left(Message):
        """Somebody wants to go on writing."""

    def __init__(self, name: str, attached: Attached | None) -> None:
        self.named, self.attached = name, attached
        self.taken = False
        self._shown = _tail(name, ())
        super().__init__(self._label, classes="-reading" if attached is None else "", markup=False)
        path = None if attached is None else attached.path
        self.tooltip = Content(one_line(shown_name(name) if path is None else shown_path(path)))

    @property
    def _label(self) -> Content:
        shown = one_line(shown_name(self._shown), LONGEST)
        if self.attached is None:
            return Content(f"\u25a2 {shown} \u2026")
        width, height = self.attached.image.size
        return Content(f"\u25a3 {shown} {width}\u00d7{height} \u00d7")

    def tell_apart(self, names: Sequence[str]) -> None:
        """Shows so much of its path as these do not end with."""
        if (shown := _tail(self.named, names)) != self._shown:
            self._shown = shown
            self.update(self._label)

    def action_remove(self) -> None:
        self.post_message(self.Removed(self))

    def action_leave(self) -> None:
        self.post_message(self.Left())

    def on_click(self) -> None:
        self.action_remove()


class Chips(HorizontalScroll, can_focus=False):
    """A row of chips, not there while it is empty. ``reading``: names of pictures that are about to be read."""

    DEFAULT_CSS = """
    Chips {
        height: 1;
        scrollbar-size-horizontal: 0;
        display: none;
        &.-filled { display: block; }
    }
    """

    class Changed(Message):
        """Pictures came or went."""

    def __init__(self, reading: Sequence[str] = ()) -> None:
        super().__init__(classes="-filled" if reading else "")
        self.first = [Chip(name, None) for name in reading]

    def compose(self) -> ComposeResult:
        yield from self.first

    @property
    def chips(self) -> list[Chip]:
        """Those that are there, in order."""
        return [chip for chip in self.query(Chip) if not chip.taken]

    @property
    def attached(self) -> list[Attached]:
        """The pictures that were read, in order."""
        return [chip.attached for chip in self.chips if chip.attached is not None]

    @property
    def reading(self) -> bool:
        """Whether some are still being read."""
        return any(chip.attached is None for chip in self.chips)

    async def begin(self, name: str) -> Chip:
        """A chip for a picture that is being read; :meth:`replace` it."""
        chip = Chip(name, None)
        await self._mount([chip])
        return chip

    async def replace(self, chip: Chip, attached: Sequence[Attached]) -> None:
        """Puts pictures where a chip is; none if that was taken away meanwhile."""
        if not chip.is_attached or chip.taken:
            return
        await self.mount_all([Chip(each.image.name, each) for each in attached], after=chip)
        await chip.remove()
        self._told()

    async def add(self, attached: Sequence[Attached]) -> None:
        """Adds pictures that were read, but those that are there."""
        there = {id(each) for each in self.attached}
        await self._mount([Chip(each.image.name, each) for each in attached if id(each) not in there])

    def take(self) -> list[Attached]:
        """The pictures that were read, at once; their chips go."""
        attached = self.attached
        self.untake(attached)
        return attached

    def untake(self, attached: Sequence[Attached]) -> None:
        """Takes away the chips of these pictures, as far as there are any."""
        wanted = {id(each) for each in attached}
        self._remove([chip for chip in self.chips if id(chip.attached) in wanted])

    async def clear(self) -> None:
        """Takes all away."""
        await self.remove_children()
        self._told()

    async def drop(self, chip: Chip) -> None:
        """Takes one away; the focus goes to the one beside it, if that is where it was."""
        chips = self.chips
        if chip not in chips:  # a key that was pressed twice
            return
        at, focused = chips.index(chip), chip.has_focus
        chip.taken = True
        await chip.remove()
        left = chips[:at] + chips[at + 1 :]
        if focused and left:
            left[min(at, len(left) - 1)].focus()
        self._told()

    async def _mount(self, chips: Sequence[Chip]) -> None:
        await self.mount_all(chips)
        self._told()

    def _remove(self, chips: Sequence[Chip]) -> None:
        for chip in chips:
            chip.taken = True
            chip.remove()
        self._told()

    def _told(self) -> None:
        names = [chip.named for chip in self.chips]
        for chip in self.chips:
            chip.tell_apart(names)
        self.set_class(bool(self.chips), "-filled")
        # made within a handler of what holds the chips, it would be taken for its own, and go no further
        self.post_message(self.Changed().set_sender(self))


def _tail(name: str, names: Sequence[str]) -> str:
    """The file's name of a path, with the folders before it that tell it from other paths."""
    parts = name.rstrip("/").split("/")
    others = [other.rstrip("/").split("/") for other in names if other != name]
    n = next((n for n in range(1, len(parts)) if all(other[-n:] != parts[-n:] for other in others)), len(parts))
    return "/".join(parts[-n:]) or name
