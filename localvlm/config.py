"""Where localvlm keeps its files, and the settings of the user."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localvlm.errors import UsageError

if TYPE_CHECKING:
    from localvlm.references import Reference

__all__ = ["PAIR_KEYS", "Config", "Directories", "closest", "config_file", "directories", "read_config"]

PAIR_KEYS = ("guide", "guide_mmproj", "model", "mmproj")


@dataclass(frozen=True)
class Directories:
    """One folder per kind of file; none is created before something is written to it."""

    config: Path
    """Settings."""
    data: Path
    """What the user would miss: history."""
    cache: Path
    """What can be made again."""
    state: Path
    """Logs, and the thresholds that ``calibrate`` found."""


@dataclass(frozen=True)
class Config:
    """Settings read from a file.

    Attributes:
        path: the file, whether it exists or not.
        settings: by option name, with underscores.
        pairs: pairs the user named; values by PAIR_KEYS: what is on the hub, or a path, resolved against the file's
            folder.
        keys: of the chat, as written; :mod:`localvlm.tui.keymap` knows what they may be.
    """

    path: Path
    settings: Mapping[str, object] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, Path | Reference]] = field(default_factory=dict)
    keys: Mapping[str, object] = field(default_factory=dict)


def directories() -> Directories:
    """The folders of this user: below ``LOCALVLM_HOME`` if that is set, else the platform's usual places."""
    home = os.environ.get("LOCALVLM_HOME")
    if home:
        root = Path(home).expanduser().absolute()
        return Directories(root / "config", root / "data", root / "cache", root / "state")
    from platformdirs import PlatformDirs

    places = PlatformDirs("localvlm", appauthor=False)
    return Directories(places.user_config_path, places.user_data_path, places.user_cache_path, places.user_state_path)


def config_file() -> Path:
    """The settings file, whether it exists or not."""
    return directories().config / "config.toml"


def read_config(known: Collection[str], path: Path | None = None, problems: list[UsageError] | None = None) -> Config:
    """Reads the settings file; a missing one is empty.

    ``known``: names of all settings, with underscores. In the file they may be written with hyphens, as the flags.
    ``problems``: takes what is wrong, which is then left out.

    Raises:
        UsageError: the file cannot be read, is no TOML, or holds a key that is not known.
    """
    import tomllib

    path = path or config_file()

    def refuse(error: UsageError, cause: Exception | None = None) -> None:
        if problems is None:
            raise error from cause
        problems.append(error)

    content: dict[str, Any] = {}
    try:
        with path.open("rb") as file:
            content = tomllib.load(file)
    except FileNotFoundError:
        pass
    except OSError as error:
        refuse(UsageError(f"config file '{path}' cannot be read: {error.strerror}", "check its permissions"), error)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        refuse(UsageError(f"config file '{path}' is not valid TOML: {error}", "correct it"), error)
    pairs, keys = content.pop("pairs", {}), content.pop("keys", {})
    if not isinstance(keys, dict):
        refuse(UsageError(f"'keys' in config file '{path}' must be a table", "write [keys]"))
        keys = {}
    settings: dict[str, Any] = {}
    found: dict[str, dict[str, Path | Reference]] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name in known:
            settings[name] = value
        else:
            refuse(UsageError(f"config file '{path}' has an unknown key {key!r}", closest(name, known)))
    if not isinstance(pairs, dict) or not all(isinstance(pair, dict) for pair in pairs.values()):
        refuse(UsageError(f"'pairs' in config file '{path}' must hold tables", "write [pairs.NAME]"))
        pairs = {}
    for name, table in pairs.items():
        try:
            found[name] = _read_pair(path, name, table)
        except UsageError as error:
            refuse(error)
    return Config(path, settings, found, keys)


def closest(name: str, known: Collection[str]) -> str:
    """A hint at the key that an unknown one is nearest to; all with underscores."""
    import difflib

    close = difflib.get_close_matches(name, [*known, "pairs", "keys"], 1)
    return f"did you mean {close[0].replace('_', '-')!r}?" if close else "`localvlm ask --help` lists the options"


def _read_pair(path: Path, name: str, table: dict[str, Any]) -> dict[str, Path | Reference]:
    from localvlm.references import parse

    files = {key.replace("-", "_"): value for key, value in table.items()}
    for key, value in files.items():
        if key not in PAIR_KEYS or not isinstance(value, str):
            raise UsageError(
                f"pair {name!r} in config file '{path}' has a wrong entry {key!r}",
                "give guide, guide-mmproj, model and mmproj as paths or user/repo:quant in quotes",
            )
    places = {key: path.parent / Path(value).expanduser() for key, value in files.items()}
    return {key: (None if places[key].exists() else parse(value)) or places[key] for key, value in files.items()}
