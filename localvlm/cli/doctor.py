"""``localvlm doctor``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App, load_options
from localvlm.cli.info import as_json, dumps
from localvlm.cli.inputs import choose_pair
from localvlm.cli.options import (
    ConfiguredCommand,
    engine_options,
    output_options,
    pair_options,
    setting,
    settings_problems,
    user_config,
)
from localvlm.cli.output import Reporter
from localvlm.errors import LocalvlmError, UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.doctor import Finding

__all__ = ["doctor"]


class _Doctor(ConfiguredCommand):
    forgiving = True


@click.command(cls=_Doctor)
@pair_options(model=True)
@setting("--speed", is_flag=True, help="Time this machine on the pair's shapes, or on those of the default pair.")
@as_json
@engine_options
@output_options
@click.pass_context
def doctor(ctx: click.Context, /, json: bool, **params: Any) -> None:
    """Looks at this installation part by part, and tells what mends what is wrong.

    With a pair (--pair, --guide, --model), runs its self-tests: the attention that is read is llama.cpp's, and with
    nothing pruned so is the answer, token for token. Leaves with the code of the first problem that stops work.
    """
    from dataclasses import asdict

    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    found: list[Finding] = []
    for finding in _findings(ctx, params, reporter):
        found.append(finding)
        reporter.clear()
        if not json:
            _say(finding)
    if json:
        click.echo(dumps({"ok": not any(f.exit_code for f in found), "findings": [asdict(f) for f in found]}))
    ctx.exit(next((f.exit_code for f in found if f.exit_code), 0))


def _findings(ctx: click.Context, params: dict[str, Any], reporter: Reporter) -> Iterator[Finding]:
    from localvlm.catalog import entries
    from localvlm.doctor import failed, find_installation, find_machine, find_models, find_pair, find_speed

    app = ctx.ensure_object(App)
    yield from _settings(ctx)

    def engine() -> Any:
        return app.engine(params["verbose"] > 1)

    with engine() as running:
        yield from find_installation(running, params["gpu_layers"])
    yield from find_machine()
    yield from find_models(entries(user_config(ctx).pairs))
    named = any(params[name] for name in ("pair", "guide", "model"))
    if not (named or params["speed"]):
        return
    try:
        pair = choose_pair(ctx, reporter)
    except LocalvlmError as error:
        yield failed("pair", error)
        return
    options = load_options(params, pair)[1]
    if named:
        reporter.stage("self-tests")
        yield from find_pair(engine, pair, options)
    if params["speed"]:
        reporter.stage("timing this machine")
        with engine() as running:
            yield from find_speed(running, pair, options)


def _settings(ctx: click.Context) -> Iterator[Finding]:
    """The file, and each thing in it that a command would refuse."""
    from localvlm.doctor import Finding, failed

    problems, config = settings_problems(ctx), user_config(ctx)
    if config.keys:
        from localvlm.tui.keymap import checked_keymap

        try:
            checked_keymap(config.keys, str(config.path))
        except UsageError as error:
            problems.append(error)
    yield from (failed("settings file", error) for error in problems)
    if not problems:
        there = (
            f", {len(config.settings)} settings, {len(config.pairs)} pairs" if config.path.exists() else ", not there"
        )
        yield Finding("settings file", f"'{config.path}'{there}")


def _say(finding: Finding) -> None:
    mark = "ok" if not finding.problem else "FAIL" if finding.exit_code else "note"
    click.echo(sanitize(f"{mark:<5}{finding.name}: {finding.value or finding.problem}"))
    if finding.problem and finding.value:
        click.echo(sanitize(f"     {finding.problem}"))
    if finding.remedy:
        click.echo(sanitize(f"     -> {finding.remedy}"))
    sys.stdout.flush()
