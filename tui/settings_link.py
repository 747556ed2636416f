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


def settings_of(options: AskOptions, *, calibrated: float | None, theme: str, private: bool) -> ChatSettings:
    """Options as the screen shows them; ``calibrated``: the score that is gone by if nobody says otherwise."""
    exit_at: Any = "off" if options.exit_at is None else options.exit_at
    if options.exit_at == calibrated:
        exit_at = None
    same = {name: getattr(options, name) for name in SAME}
    return ChatSettings(exit_at=exit_at, system=options.system or "", theme=theme, private=private, **same)


def changes_of(change: SettingsChange, calibrated: float | None) -> dict[str, Any]:
    """Fields of AskOptions that were changed."""
    known = {field.name for field in fields(AskOptions)}
    changed = {name: getattr(change.after, name) for name in change.changed if name in known}
    if "exit_at" in changed:
        said = changed["exit_at"]
        changed["exit_at"] = calibrated if said is None else None if said == "off" else said
    if "system" in changed:
        changed["system"] = changed["system"] or None
    return changed


async def show_settings(app: ChatActions) -> None:
    """Shows the settings, and does as they say."""
    from .screens.settings import SettingsScreen

    options, calibrated = app.options or AskOptions(), app.calibrated
    settings = settings_of(options, calibrated=calibrated, theme=app.theme, private=app.conversation.private)

    async def changed(change: SettingsChange | None) -> None:
        if change is None:
            return
        app.theme = change.after.theme
        if options := changes_of(change, calibrated):
            app.set_options(**options)
        if change.after.private and not change.before.private:
            await app.action_go_private()

    screen = SettingsScreen(
        settings,
        [*METHODS, *IN_LLM],
        theme_names(app.available_themes),
        calibrated=calibrated,
        preview=lambda theme: setattr(app, "theme", theme),
    )
    app.push_screen(screen, changed)
