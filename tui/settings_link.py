"""Between the options of questions and the screen that shows them."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from localvlm.answers import AskOptions
from localvlm.pruning import IN_LLM, METHODS

from .screens.settings import ChatSettings, SettingsChange
from .themes import theme_names

if TYPE_CHECKING:
    from .actions import ChatActions

__all__ = ["changes_of", "settings_of", "show_settings"]

SAME = ("method", "keep", "guide_keep", "max_tokens", "temp")
"""Settings that are fields of AskOptions by the same name."""


def settings_of(options: AskOptions, *, own_exit: bool, theme: str, private: bool) -> ChatSettings:
    """Options as the screen shows them; ``own_exit``: the score is that of the pair, as nobody said otherwise."""
    exit_at: Any = None if own_exit else "off" if options.exit_at is None else options.exit_at
    same = {name: getattr(options, name) for name in SAME}
    return ChatSettings(exit_at=exit_at, system=options.system or "", theme=theme, private=private, **same)


def changes_of(change: SettingsChange) -> dict[str, Any]:
    """Fields of AskOptions that were changed; but an exit as the pair is calibrated, which sets none."""
    known = {field.name for field in fields(AskOptions)}
    changed = {name: getattr(change.after, name) for name in change.changed if name in known}
    if "exit_at" in changed:
        said = changed.pop("exit_at")
        if said is not None:
            changed["exit_at"] = None if said == "off" else said
    if "system" in changed:
        changed["system"] = changed["system"] or None
    return changed


async def show_settings(app: ChatActions) -> None:
    """Shows the settings, and does as they say."""
    from .screens.settings import SettingsScreen

    settings = settings_of(
        app.options or AskOptions(),
        own_exit="exit_at" not in app.conversation.changes,
        theme=app.theme,
        private=app.conversation.private,
    )

    async def changed(change: SettingsChange | None) -> None:
        if change is None:
            return
        app.theme = change.after.theme
        if "exit_at" in change.changed and change.after.exit_at is None:
            app.unset_options("exit_at")
        if options := changes_of(change):
            app.set_options(**options)
        if change.after.private and not change.before.private:
            await app.action_go_private()

    screen = SettingsScreen(
        settings,
        [*METHODS, *IN_LLM],
        theme_names(app.available_themes),
        calibrated=None if app.own_options is None else app.own_options.exit_at,
        preview=lambda theme: setattr(app, "theme", theme),
    )
    app.push_screen(screen, changed)
