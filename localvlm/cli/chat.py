"""``localvlm chat``."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App, is_large, load_options
from localvlm.cli.completers import files
from localvlm.cli.fit import check_fit
from localvlm.cli.inputs import choose_pair
from localvlm.cli.options import ConfiguredCommand, answer_options, engine_options, pair_options, setting, user_config
from localvlm.cli.output import Reporter
from localvlm.cli.plan import options_asked
from localvlm.errors import NotEnoughMemory, UsageError
from localvlm.terminal_pictures import VARIABLE, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from localvlm.answers import AskOptions, Pair
    from localvlm.pipeline import Pipeline
    from localvlm.tui.conversation import Opener

__all__ = ["chat"]

PICTURES = tuple(way.value for way in Protocol)
"""Ways of showing pictures."""
OWN_THEMES = ("localvlm-dark", "localvlm-light")
"""Those of :mod:`localvlm.tui.themes`."""
DEMO_NOTE = (
    "This is the demo pair, which knows drawn scenes only: /image example shows one. {key} has pairs for photos."
)


class ThemeType(click.types.StringParamType):
    """The name of a theme. Textual is asked only for those that are not our own: the help page does not load it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        if value in OWN_THEMES:
            return str(value)
        from textual.theme import BUILTIN_THEMES

        from localvlm.tui.themes import theme_names

        if value not in (names := theme_names(BUILTIN_THEMES)):
            self.fail(f"{value!r} is not one of {', '.join(map(repr, names))}.", param, ctx)
        return str(value)


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("images", metavar="IMAGE...", nargs=-1, shell_complete=files)
@pair_options(model=True)
@answer_options(planned=False)
@engine_options
@setting("--theme", metavar="NAME", type=ThemeType(), default=OWN_THEMES[0], show_default=True,
         help="Colours: localvlm-dark, localvlm-light, or one of Textual's.")  # fmt: skip
@setting("--pictures", type=click.Choice(PICTURES),
         help="How pictures are shown [default: as the terminal can].")  # fmt: skip
@click.pass_context
def chat(ctx: click.Context, /, images: tuple[str, ...], **params: Any) -> None:
    """Opens a chat about the IMAGEs in the terminal.

    It shows what was looked at, who answered and why, and keeps a history unless --private is given. F1 there tells
    its keys, which [keys] of the settings file changes.
    """
    from localvlm.tui.attachments import MOST

    if len(images) > MOST:
        raise UsageError(
            f"a question takes at most {MOST} pictures, and {len(images)} were given",
            "`localvlm ask --jsonl` asks about each of many",
        )
    if not all(stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr)):  # Textual draws on the last one
        raise UsageError("the chat needs a terminal", "`localvlm ask` is for pipes and scripts")
    if params["pictures"]:
        os.environ[VARIABLE] = params["pictures"]  # where the panel looks
    gc.disable()  # nothing that is made before the first frame is garbage; the app collects from then on
    pair = choose_pair(ctx, Reporter(quiet=True))
    config = user_config(ctx)
    from localvlm.catalog import DEMOS, entry_named
    from localvlm.tui.app import ChatApp
    from localvlm.tui.hangup import end_with_terminal
    from localvlm.tui.keymap import checked_keymap, key_of
    from localvlm.tui.setup import ChatSetup

    keymap = checked_keymap(config.keys, str(config.path))
    app = ChatApp(
        ChatSetup(
            _opener(ctx, pair),
            pair.name or "files",
            images,
            params["system"],
            params["private"],
            None if params["private"] else _history,
            keymap,
            params["theme"],
            DEMO_NOTE.format(key=key_of("pair", keymap)) if pair.name in DEMOS else "",
            config.pairs,
            check=lambda name: entry_named(name, config.pairs),
        )
    )
    end_with_terminal()
    try:
        code = app.run()
    finally:
        app.close()
    ctx.exit(app.return_code or code or 0)


def _history() -> Any:
    from localvlm.history import History

    return History.open()


def _opener(ctx: click.Context, given: Pair) -> Opener:
    """Makes pipelines as the command's options say."""

    def opener(name: str | None, private: bool, *, anyway: bool = False) -> tuple[Pipeline, AskOptions]:
        from localvlm.catalog import as_pair, entry_named
        from localvlm.pipeline import Pipeline

        params = {**ctx.params, "private": private}
        if anyway:
            params.update(max_memory=0, low_memory=True)  # nothing is looked at, and as little is taken as can be
        pair = given if name is None else as_pair(name, entry_named(name, user_config(ctx).pairs).files)
        reporter = Reporter(quiet=True)
        options = options_asked(ctx, pair, reporter)
        params["guide_image_max_tokens"] = _guide_bound(params, pair, options)

        def fitting(low_memory: bool) -> Pipeline:
            guide, model = load_options(params, pair)
            engine = ctx.ensure_object(App).background_engine()
            pipeline = Pipeline(pair, engine, guide=guide, model=model, low_memory=low_memory)
            try:
                check_fit(pipeline, {**params, "low_memory": low_memory}, reporter)
            except BaseException:
                pipeline.close()
                raise
            return pipeline

        try:
            pipeline = fitting(params["low_memory"])
        except NotEnoughMemory:
            if name is None or params["low_memory"]:
                raise
            pipeline = fitting(low_memory=True)  # the list of pairs said "fits in turn"
        return pipeline, options

    return opener


def _guide_bound(params: Mapping[str, Any], pair: Pair, options: AskOptions) -> int:
    """Most image tokens of the guide: of one that takes pictures in tiles as few as ``ask`` plans with, since looking
    at all can take longer than it saves. All where exits were calibrated, which was on all.
    """
    said: int = params["guide_image_max_tokens"]
    if said or params["image_max_tokens"] or params["method"] != "auto" or options.exit_at is not None:
        return said
    from localvlm.planning.plans import GUIDE_TOKENS

    return GUIDE_TOKENS[0] if pair.guide is not None and is_large(pair.guide) else said
