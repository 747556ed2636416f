"""The settings of a conversation: checked as the command line checks its options, with the same words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.css.query import NoMatches
from textual.widgets import Input, Label, Select, TextArea

from ..text import one_line
from ..widgets.in_order import Line
from .dialog import Dialog

if TYPE_CHECKING:
    from localvlm.pruning import Keep, Tokens

__all__ = ["ChatSettings", "SettingsChange", "SettingsScreen"]

PRIVATE = ("no: history is kept", "yes: nothing is written")
EXITS = ("as calibrated", "off", "always", "from score")


@dataclass(frozen=True)
class ChatSettings:
    """What a conversation is answered with.

    Attributes:
        method: of localvlm.pruning, or "auto".
        keep, guide_keep, max_tokens, temp: as in :class:`localvlm.answers.AskOptions`.
        exit_at: score from which the guide's answer is final; None: as the pair is calibrated.
        system: prompt; "": none.
        theme: name of a Textual theme.
        private: nothing is written to disk.
    """

    method: str = "auto"
    keep: Keep = 0.35
    guide_keep: float | Tokens | None = None
    exit_at: float | Literal["off"] | None = None
    max_tokens: int = 256
    temp: float = 0.0
    system: str = ""
    theme: str = "localvlm-dark"
    private: bool = False


@dataclass(frozen=True)
class SettingsChange:
    """Settings as they were, and as they shall be."""

    before: ChatSettings
    after: ChatSettings

    @property
    def changed(self) -> frozenset[str]:
        """Names of the settings that are others now."""
        names = (field.name for field in fields(ChatSettings))
        return frozenset(name for name in names if getattr(self.before, name) != getattr(self.after, name))


class SettingsScreen(Dialog[SettingsChange]):
    """Dismissed with the change, which may be none, once all values are right.

    Args:
        settings: as they are.
        methods, themes: names to choose from.
        calibrated: score that the pair is calibrated for, or None.
        preview: called with the name of a theme that is looked at, and with the one before when the screen is closed.
    """

    heading = "Settings"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("tab", "app.focus_next", "next", priority=True),
        Binding("shift+tab", "app.focus_previous", show=False, priority=True),
        Binding("down", "app.focus_next", show=False),
        Binding("up", "app.focus_previous", show=False),
        Binding("ctrl+s", "save", "use in this chat", priority=True),
    ]
    DEFAULT_CSS = """
    SettingsScreen {
        VerticalScroll { height: 1fr; }
        .row { height: auto; }
        .row Label { width: 15; padding: 0 1; }
        .row Input, .row Select, .row TextArea { width: 1fr; }
        #score { display: none; width: 8; }
        #score.-shown { display: block; }
        Select > SelectCurrent, Select:focus > SelectCurrent {
            padding: 0 1;
            background: $panel;
            border: none;
            border-left: outer $border-blurred;
            #label { text-wrap: nowrap; text-overflow: ellipsis; height: 1; }
            .arrow { color: $foreground-muted; }
        }
        Select:focus > SelectCurrent { border-left: outer $border; }
        SelectOverlay, SelectOverlay:focus { height: auto; background: $panel; border: round $border; }
        TextArea, TextArea:focus {
            height: 3;
            padding: 0 1;
            border: none;
            border-left: outer $border-blurred;
            background: $panel;
        }
        TextArea:focus { border-left: outer $border; }
    }
    """

    def __init__(
        self,
        settings: ChatSettings,
        methods: Sequence[str],
        themes: Sequence[str],
        *,
        calibrated: float | None = None,
        preview: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self._settings, self._methods, self._themes = settings, methods, themes
        self._calibrated, self._preview = calibrated, preview

    def body(self) -> ComposeResult:
        settings = self._settings
        with VerticalScroll(can_focus=False):
            yield from _row("Method", _select(self._methods, settings.method, "method"))
            for name, label in (("keep", "Keep"), ("guide_keep", "Guide keeps")):
                yield from _row(label, Line(_written(getattr(settings, name)), id=name))
            kind, score = _exit_of(settings.exit_at)
            yield from _row("Early exit", self._exits(kind), Line(score, id="score"))
            for name, label in (("max_tokens", "Max tokens"), ("temp", "Temperature")):
                yield from _row(label, Line(_written(getattr(settings, name)), id=name))
            system = TextArea(settings.system, id="system", tab_behavior="focus")
            yield from _row("System prompt", system)
            yield from _row("Theme", _select(self._themes, settings.theme, "theme"))
            ways = PRIVATE[settings.private :]  # of a private chat no history is kept, whatever is said later
            yield from _row("Private", _select(ways, PRIVATE[settings.private], "private"))

    def _exits(self, kind: str) -> Select[str]:
        at = f"{self._calibrated:.3g}" if self._calibrated is not None else "it is not: off"
        choices = [(f"{name} ({at})" if name == EXITS[0] else name, name) for name in EXITS]
        return Select(choices, value=kind, allow_blank=False, id="exit")

    def on_mount(self) -> None:
        self._show_score(self._exit)
        self.query_one("#method").focus()

    # ---- values

    @property
    def _exit(self) -> str:
        return str(self.query_one("#exit", Select).value)

    @on(Select.Changed, "#exit")
    def _exit_changed(self, event: Select.Changed) -> None:
        self._show_score(str(event.value))

    def _show_score(self, kind: str) -> None:
        self.query_one("#score").set_class(kind == EXITS[3], "-shown")
        self._check()

    @on(Select.Changed, "#theme")
    def _theme_changed(self, event: Select.Changed) -> None:
        if self._preview is not None:
            self._preview(str(event.value))

    @on(Input.Changed)
    def _check(self) -> ChatSettings | None:
        """The settings as they stand, or None; the first that is wrong is told."""
        try:
            found = {name: self._value(name) for name in ("keep", "guide_keep", "max_tokens", "temp")}
            found["exit_at"] = self._exit_at()
        except _Wrong as wrong:
            self.tell(str(wrong), error=True)
            return None
        except NoMatches:  # while they are being mounted
            return None
        self.tell("")
        return replace(
            self._settings,
            **found,
            method=str(self.query_one("#method", Select).value),
            theme=str(self.query_one("#theme", Select).value),
            system=self.query_one("#system", TextArea).text.strip(),
            private=self.query_one("#private", Select).value == PRIVATE[True],
        )

    def _value(self, name: str) -> Any:
        """What a field says; a value that was not touched stays as it is."""
        before = getattr(self._settings, name)
        field = self.query_one(f"#{name}", Input)
        return before if field.value == _written(before) else _converted(name, field)

    def _exit_at(self) -> float | Literal["off"] | None:
        kind = self._exit
        if kind == EXITS[0]:
            return None
        if kind == EXITS[3]:
            found = _converted("exit_at", self.query_one("#score", Input))
            return "off" if found == "off" else float(found)
        return "off" if kind == "off" else 0.0

    # ---- keys

    @on(Input.Submitted)
    def action_save(self) -> None:
        if (after := self._check()) is not None:
            self.dismiss(SettingsChange(self._settings, after))

    def action_close(self) -> None:
        if self._preview is not None:
            self._preview(self._settings.theme)
        self.dismiss(None)


class _Wrong(Exception):
    """A value that the command line would refuse, in its words."""


def _converted(name: str, field: Input) -> Any:
    """The value in a field, as the option of that name takes it."""
    import click

    from localvlm.cli.values import AmountType, ExitType, KeepType, LookType, WholeType

    types: dict[str, click.ParamType[Any]] = {
        "keep": KeepType(), "guide_keep": LookType(), "exit_at": ExitType(), "max_tokens": WholeType(1),
        "temp": AmountType(),
    }  # fmt: skip
    try:
        found = types[name].convert(field.value.strip(), None, None)
    except click.BadParameter as error:
        field.add_class("-wrong")
        raise _Wrong(one_line(f"{name.replace('_', '-')}: {error.message}")) from None
    field.remove_class("-wrong")
    return found


def _written(value: object) -> str:
    """A value as it is written on the command line."""
    return "all" if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def _exit_of(exit_at: float | Literal["off"] | None) -> tuple[str, str]:
    if exit_at is None:
        return EXITS[0], ""
    if exit_at == "off":
        return EXITS[1], ""
    return (EXITS[2], "") if exit_at == 0 else (EXITS[3], f"{exit_at:g}")


def _select(names: Sequence[str], value: str, id: str) -> Select[str]:  # noqa: A002
    known = names if value in names else [value, *names]
    return Select([(name, name) for name in known], value=value, allow_blank=False, id=id)


def _row(label: str, *widgets: Any) -> ComposeResult:
    with Horizontal(classes="row"):
        yield Label(label, markup=False)
        yield from widgets
