"""``localvlm config``: what the settings file says, and what it shall say."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.files import write_text
from localvlm.cli.options import ConfiguredCommand, Setting, known_settings, user_config
from localvlm.cli.values import Written
from localvlm.config import closest, config_file
from localvlm.errors import UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

__all__ = ["changed", "config"]

TABLES = {"pairs": "pairs.NAME", "keys": "keys"}
"""What the file holds besides options, and how it begins."""


def _keys(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    from click.shell_completion import CompletionItem

    known = sorted(known_settings().items())
    named = {name.replace("_", "-"): options[0].help for name, options in known if len(name) > 1}
    return [CompletionItem(name, help=told) for name, told in named.items() if name.startswith(incomplete)]


def _values(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    options = known_settings().get((ctx.params.get("key") or "").replace("-", "_"))
    if options is None or ctx.params.get("action") != "set":
        return []
    from click.shell_completion import CompletionItem

    option = options[0]
    words = ["true", "false"] if option.is_flag else []
    found = [CompletionItem(word) for word in words if word.startswith(incomplete)]
    return found or option.shell_complete(ctx, incomplete)


@click.command(cls=ConfiguredCommand, no_args_is_help=True)
@click.argument("action", metavar="get|set|path", type=click.Choice(("get", "set", "path")))
@click.argument("key", required=False, shell_complete=_keys)
@click.argument("value", required=False, shell_complete=_values)
@click.pass_context
def config(ctx: click.Context, action: str, key: str | None, value: str | None) -> None:
    """Reads and writes the settings file: `get [KEY]`, `set KEY VALUE`, `path`.

    A KEY is an option's name, such as keep or max-tokens; its VALUE is checked as the option's is. Without a VALUE,
    `set KEY` takes the line out. Pairs, under [pairs.NAME], are written by hand.
    """
    if action == "path":
        click.echo(config_file())
    elif action == "get":
        _get(ctx, key)
    elif key is None:
        raise UsageError("no key was given", "localvlm config set KEY VALUE; `localvlm ask --help` lists the keys")
    else:
        _set(ctx, _named(key), value)


def _named(key: str) -> tuple[str, Sequence[Setting]]:
    """The name that the file has for a key, and the options that go by it.

    Raises:
        UsageError: there is no such option.
    """
    name = key.lstrip("-").replace("-", "_")
    table = key.partition(".")[0]
    if table in TABLES:
        raise UsageError(
            f"{key!r} is of a table, which is written by hand", f"write [{TABLES[table]}] into '{config_file()}'"
        )
    known = known_settings()
    if name not in known:
        raise UsageError(f"there is no setting {key!r}", closest(name, known))
    return name, known[name]


def _get(ctx: click.Context, key: str | None) -> None:
    settings = user_config(ctx).settings
    if key is None:
        for name, value in settings.items():
            click.echo(sanitize(f"{name.replace('_', '-')} = {_as_toml(value)}"))
        return
    name, options = _named(key)
    for other in (name, *options[0].names):
        if other in settings:
            found = settings[other]
            click.echo(sanitize(found if isinstance(found, str) else _as_toml(found)))
            return
    raise UsageError(f"{key!r} is not set in '{config_file()}'", f"localvlm config set {key} VALUE")


def _set(ctx: click.Context, named: tuple[str, Sequence[Setting]], value: str | None) -> None:
    name, options = named
    user_config(ctx)  # a file that cannot be read is not written over
    typed = None if value is None else _taken(ctx, options, value)
    text = changed(_text(), (name, *options[0].names), typed)
    target = config_file()
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_text(target, text)


def _taken(ctx: click.Context, options: Sequence[Setting], value: str) -> bool | int | float | str:
    """The value as the file has it, if any of the options takes it; a flag is no name for a file.

    Raises:
        UsageError: as the first of them says it.
    """
    refused = []
    for option in (option for option in options if option.is_flag == options[0].is_flag):
        try:
            return _typed(ctx, option, value)
        except UsageError as error:
            refused.append(error)
    raise refused[0]


def _typed(ctx: click.Context, option: Setting, value: str) -> bool | int | float | str:
    """The value as the file has it, once the option has taken it."""
    if option.is_flag or option.count:
        if value not in ("true", "false"):
            raise UsageError(f"{value!r} is not true or false")
        return value == "true"
    try:
        converted: Any = option.type.convert(value, option, ctx)
    except click.BadParameter as error:
        raise UsageError(error.message.removesuffix("."), f"see --{option.names[0].replace('_', '-')}") from None
    if isinstance(option.type, click.types.IntParamType):
        return int(converted)
    if isinstance(option.type, click.types.FloatParamType):
        return float(converted)
    return _number(option, value, converted) if isinstance(option.type, Written) else value


def _number(option: Setting, text: str, converted: object) -> int | float | str:
    """The number that a text is, if the option takes it for the same; else the text."""
    for kind in (int, float):
        with suppress(ValueError, click.BadParameter):
            if option.type.convert(str(number := kind(text)), option, None) == converted:
                return number
    return text


def _text() -> str:
    """The settings file as it is; "" if there is none.

    Raises:
        UsageError: it cannot be read.
    """
    path = config_file()
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"config file '{path}' cannot be read: {error}", "correct it") from error


def changed(text: str, names: Collection[str], value: bool | int | float | str | None) -> str:
    """A settings file's text with a key set to ``value``, or taken out (None); all else, comments too, stays. ``names``
    are those of the key, with underscores; the first is written where none is there, with hyphens.

    Raises:
        UsageError: the text is written in a way that cannot be changed line by line.
    """
    import tomllib

    lines = text.splitlines(keepends=True)
    end = next((i for i, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines))
    spelled = "|".join(re.escape(name).replace("_", "[-_]") for name in names)
    key = re.compile(rf"""\s*["']?({spelled})["']?\s*=""")
    found = [i for i in range(end) if key.match(lines[i])]
    new = next(iter(names)).replace("_", "-")
    line = [] if value is None else [f"{new} = {_as_toml(value)}\n"]
    if found:
        lines[found[0] : found[0] + 1] = line
    elif line:
        if end and not lines[end - 1].endswith("\n"):
            lines[end - 1] += "\n"
        lines[end:end] = line
    out = "".join(lines)
    content = tomllib.loads(text)
    wanted = {k: v for k, v in content.items() if k.replace("-", "_") not in names}
    if tomllib.loads(out) != (wanted if value is None else wanted | {new: value}):
        raise UsageError(f"'{new}' cannot be changed in config file '{config_file()}'", "change it by hand")
    return out


def _as_toml(value: object) -> str:
    """A number, text or truth value as TOML writes it."""
    import json

    return json.dumps(value, ensure_ascii=False)
