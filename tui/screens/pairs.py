"""The pair switcher: which pairs there are, what each needs, and whether this machine can hold it now."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from localvlm.errors import LocalvlmError
from localvlm.room import told

from ..background import in_thread
from ..text import one_line
from .confirm import ConfirmScreen
from .dialog import MUTED, Dialog, Rows, told_error

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.ranking import Ranked
    from localvlm.references import Reference

__all__ = ["PairChoice", "PairScreen", "pairs_of"]

FITS = {"yes": "fits", "with --low-memory": "fits in turn", "no": "too large", "unknown": "size unknown"}
"""What Ranked.fits() is called here; "in turn": the guide is unloaded before the model is loaded."""
LONGEST_NAME = 20
Pairs = tuple[Sequence["Ranked"], int]
"""Pairs, the best first, and the bytes of memory that are free."""


@dataclass(frozen=True)
class PairChoice:
    """A pair to switch to; ``pull``: it is not here, and is to be fetched before; ``low_memory``: it fits only so;
    ``anyway``: it does not fit, and is wanted all the same.
    """

    entry: Entry
    pull: bool
    low_memory: bool
    anyway: bool = False


def pairs_of(user_pairs: Mapping[str, Mapping[str, Path | Reference]] = {}) -> Pairs:
    """The catalogue's pairs and those of the settings file, by what this machine can hold now; reads files."""
    from localvlm.catalog import entries
    from localvlm.ranking import ranked
    from localvlm.room import room

    free = room()
    return ranked(entries(user_pairs), free), free


class PairScreen(Dialog[PairChoice]):
    """Dismissed with the pair that was chosen. ``look`` is called in a thread; ``current``: the name of the pair in
    use, or None.
    """

    heading = "Pairs"
    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "enter", "use", priority=True)]
    DEFAULT_CSS = """
    PairScreen {
        #about { height: 7; padding: 0 1; border-top: solid $border-blurred; }
        &.-short #about { height: 2; border-top: none; }
    }
    """

    def __init__(self, look: Callable[[], Pairs] = pairs_of, current: str | None = None) -> None:
        super().__init__()
        self._look, self._current = look, current
        self._shown: dict[str, Ranked] = {}
        self._free = 0

    def body(self) -> ComposeResult:
        yield Rows()
        yield Static(id="about", markup=False)

    def on_mount(self) -> None:
        self.query_one(OptionList).loading = True
        self.run_worker(self._list())

    async def _list(self) -> None:
        options = self.query_one(OptionList)
        try:
            found, self._free = await in_thread(self._look)
        except LocalvlmError as error:
            self.tell(told_error(error), error=True)
            return
        finally:
            if options.is_attached:  # else it was closed meanwhile
                options.loading = False
        self._shown = {one.entry.name: one for one in found}
        here = [one for one in found if not one.entry.lacking]
        away = [one for one in found if one.entry.lacking]
        width = min(LONGEST_NAME, max((len(one_line(one.entry.name)) for one in found), default=0))
        for title, group in (("On this machine", here), ("To pull", away)):
            if group:
                heading = Content.assemble((title, "bold $text-primary"))
                options.add_option(Option(heading, disabled=True))
                options.add_options(Option(self._row(one, width), id=one.entry.name) for one in group)
        if found:
            options.highlighted = options.get_option_index(self._start(here))
        self.query_one("#dialog").border_subtitle = Content(f"{told(self._free)} of memory are free")
        options.focus()
        self.refresh_bindings()

    def _start(self, here: Sequence[Ranked]) -> str:
        if self._current in self._shown:
            return self._current or ""
        return here[0].entry.name if here else next(iter(self._shown))

    def _row(self, one: Ranked, width: int) -> Content:
        need = "" if one.need is None else f"{'' if one.exact else '~'}{told(one.need)}"
        fits = one.fits(self._free)
        mark = "\u2022 " if one.entry.name == self._current else "  "
        name = one_line(one.entry.name, LONGEST_NAME).ljust(width)
        return Content.assemble(mark, (name, "bold"), f"  {need:>8}  ", (FITS[fits], "" if fits == "yes" else MUTED))

    @on(OptionList.OptionHighlighted)
    def _highlighted(self, event: OptionList.OptionHighlighted) -> None:
        one = self._shown.get(event.option.id or "")
        if one is not None:
            self.query_one("#about", Static).update(Content("\n").join(self._about(one)))
            self.refresh_bindings()

    def _about(self, one: Ranked) -> list[Content]:
        entry, about = one.entry, one.entry.about
        summary = one_line(entry.summary)
        run = "" if entry.run else "; not run by us"
        lines = [Content(f"{summary}{run}")]
        if good := about.get("good-at"):
            lines.append(Content.assemble(("good at  ", "$foreground-muted"), one_line(str(good))))
        if entry.lacking:
            lines.append(Content.assemble(("lacks    ", "$foreground-muted"), one_line(", ".join(entry.lacking))))
        rest = [key for key in ("tokens", "licence") if key in about]
        return lines + [Content.assemble((f"{key:<9}", "$foreground-muted"), one_line(str(about[key]))) for key in rest]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002
        return action != "enter" or self._chosen() is not None

    @on(OptionList.OptionSelected)
    def _choose(self) -> None:
        """Takes the pair; asks first where it has to be fetched, or cannot fit."""
        one = self._chosen()
        if one is None:
            return
        entry, fits = one.entry, one.fits(self._free)
        if entry.lacking and not entry.references:
            self.tell(f"it lacks the file {one_line(entry.lacking[0])!r}; put it there, or change the settings file")
            return
        choice = PairChoice(entry, bool(entry.lacking), fits == "with --low-memory", fits == "no")
        asked = self._doubt(one, fits)
        if asked is None:
            self.dismiss(choice)
            return
        text, yes = asked

        def answered(agreed: bool | None) -> None:
            if agreed:
                self.dismiss(choice)

        self.app.push_screen(ConfirmScreen(text, yes, "Not now"), answered)

    def _doubt(self, one: Ranked, fits: str) -> tuple[str, str] | None:
        """What is asked before a pair is taken, and its button; None: nothing."""
        name, parts = one_line(one.entry.name), []
        if fits == "no":
            parts.append(f"{name} needs {told(one.need or 0)} of memory, and {told(self._free)} are free.")
        if not one.entry.lacking:
            return (f"{parts[0]} Load it all the same?", "Load it") if parts else None
        size = sum(one.entry.about.get("gb", {}).values()) * 1e9
        parts.append(f"{name} is not here. Pull it{f', {told(round(size))}' if size else ''}?")
        return " ".join(parts), "Pull"

    def _chosen(self) -> Ranked | None:
        option = self.query_one(OptionList).highlighted_option
        return None if option is None else self._shown.get(option.id or "")
