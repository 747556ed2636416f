"""Options: each is a flag, an environment variable LOCALVLM_<FLAG> and a key of the settings file, in that order."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click
from click.core import ParameterSource

from localvlm.cli.completers import any_of, files, pairs, pulled
from localvlm.cli.values import AmountType, ExitType, KeepType, LookType, PriceType, WholeType, Written
from localvlm.config import Config, config_file, read_config
from localvlm.errors import UsageError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from localvlm.pruning import Keep

__all__ = ["METHODS", "PRESETS", "ConfiguredCommand", "Setting", "answer_options", "budget_of",
           "engine_options", "image_token_options", "input_options", "known_settings", "on_command_line",
           "output_options", "pair_options", "preset_of", "rank", "setting", "settings_problems",
           "user_config"]  # fmt: skip

METHODS = (
    "sgl+", "sgl", "fastervlm", "vtc-cls", "divprune", "cdpruner", "scope", "visionzip", "vispruner", "tome",
    "quecc", "flashsloth", "none", "random", "grid", "fastv", "sparsevlm", "sparsevlm-v2", "pyramiddrop", "dyvte",
)  # fmt: skip
"""Names of localvlm.pruning.METHODS and IN_LLM, known here without loading numpy."""
ACCURACIES = ("high", "fast")
"""Names of localvlm.planning.plans.ACCURACIES, likewise."""
PRESETS = ("paper-64", "paper-35", "paper-9")
"""Names of localvlm.pruning.PRESETS, likewise."""
KV_TYPES = ("f16", "q8_0")
MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))
"""Beyond, threads wait for each other, for minutes at each step."""
POSITIONS = ("true", "compact")
YES_NO = frozenset(("true", "yes", "on", "t", "y", "1", "false", "no", "off", "f", "n", "0"))
"""What click takes for the value of a flag's variable."""
AT_ODDS = (("keep", "keep_tokens"), ("preset", "keep"), ("preset", "keep_tokens"), ("preset", "layer"))
"""Settings that say the same thing twice, see :func:`budget_of` and :func:`preset_of`."""
_F = TypeVar("_F", bound=Callable[..., Any])
_KNOWN: dict[str, list[Setting]] = {}
"""Those of each name: commands may take other values by one name."""


class Setting(click.Option):
    """An option with its environment variable and its key in the settings file."""

    def __init__(self, decls: Sequence[str], **attrs: Any) -> None:
        self.names = [d.lstrip("-").replace("-", "_") for d in decls if len(d.lstrip("-")) > 1]
        super().__init__(decls, envvar=[f"LOCALVLM_{name.upper()}" for name in self.names], **attrs)
        for name in self.names:
            _KNOWN.setdefault(name, []).append(self)

    def get_error_hint(self, ctx: click.Context | None) -> str:
        """Names where the bad value came from."""
        source = ctx.get_parameter_source(self.name) if ctx and self.name else None
        if source is ParameterSource.ENVIRONMENT:
            return f"environment variable {self._variable()}"
        if source is ParameterSource.DEFAULT_MAP:
            return f"'{self.names[-1].replace('_', '-')}' in config file '{config_file()}'"
        return super().get_error_hint(ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Files where the value is one, pairs by name, and what click knows."""
        if self.name == "pair":
            return pairs(ctx, self, incomplete)
        if self.name in ("guide", "model"):
            return any_of(files, pulled)(ctx, self, incomplete)
        if any(word in (self.metavar or "") for word in ("GGUF", "FILE", "OUT", "DIR")):
            return files(ctx, self, incomplete)
        return super().shell_complete(ctx, incomplete)

    def _variable(self) -> str:
        names = [f"LOCALVLM_{name.upper()}" for name in self.names]
        return next((name for name in names if os.environ.get(name)), names[0])

    def get_default(self, ctx: click.Context, call: bool = True) -> Any:  # noqa: ARG002
        """The built-in default: ``--help`` shows it without reading the settings file."""
        return self.default

    def consume_value(self, ctx: click.Context, opts: Mapping[str, Any]) -> tuple[Any, ParameterSource]:
        """A value of the settings file or the environment that another command's option of this name takes, and this
        one does not, is not meant for this one. Where the name is of a flag of `ask`, the file has the flag, and a
        variable that says yes or no is no name.
        """
        value, source = super().consume_value(ctx, opts)
        if source is ParameterSource.ENVIRONMENT and self._says_flag(value):
            return self.get_default(ctx), ParameterSource.DEFAULT
        if source in (ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT) and not self._takes(ctx, value, source):
            if _forgives(ctx) and source is ParameterSource.DEFAULT_MAP:
                return self.get_default(ctx), ParameterSource.DEFAULT
            others = known_settings()[self.name or ""]
            if any(other.is_flag == others[0].is_flag and other._takes(ctx, value, source) for other in others):
                return self.get_default(ctx), ParameterSource.DEFAULT
        return value, source

    def type_cast_value(self, ctx: click.Context, value: Any) -> Any:
        """Refuses TOML values of another type, which click would bend into shape."""
        if ctx.get_parameter_source(self.name or "") is ParameterSource.DEFAULT_MAP:
            return self._of_file(ctx, value)
        return super().type_cast_value(ctx, value)

    def _says_flag(self, value: Any) -> bool:
        """Whether a text is yes or no, and meant for a flag of `ask` by the name of this option."""
        words = isinstance(self.type, click.types.StringParamType) and str(value).lower() in YES_NO
        return words and not self.is_flag and known_settings()[self.name or ""][0].is_flag

    def _takes(self, ctx: click.Context, value: Any, source: ParameterSource) -> bool:
        try:
            if source is ParameterSource.DEFAULT_MAP:
                self._of_file(ctx, value)
            else:
                super().type_cast_value(ctx, value)
        except click.BadParameter:
            return False
        return True

    def _of_file(self, ctx: click.Context, value: Any) -> Any:
        """What a value of the settings file means.

        Raises:
            click.BadParameter: nothing, for this option.
        """
        expected, words = self._toml_types()
        if not isinstance(value, expected) or (isinstance(value, bool) and bool not in expected):
            raise click.BadParameter(f"{value!r} is not {words}.", ctx=ctx, param=self)
        value = (int(value) if self.count else value) if isinstance(value, bool) else str(value)
        return super().type_cast_value(ctx, (value,) if self.multiple else value)

    def _toml_types(self) -> tuple[tuple[type, ...], str]:
        if self.is_flag:
            return (bool,), "true or false"
        if self.count:
            return (bool, int), "true, or a number"
        if isinstance(self.type, Written):
            return (int, float, str), self.type.written
        if isinstance(self.type, click.types.IntParamType):
            return (int,), "a whole number"
        if isinstance(self.type, click.types.FloatParamType):
            return (int, float), "a number"
        return (str,), "text in quotes"


class _LazyConfig(MutableMapping[str, Any]):
    """The settings file as click's default map, read when a value is first asked for: never for ``--help``.

    ``forgiving``: what is wrong in it is left out, as ``problems``; it is told by commands, not while one is typed.
    """

    def __init__(self, *, forgiving: bool) -> None:
        self._config: Config | None = None
        self.forgiving = forgiving
        self.problems: list[UsageError] = []

    @property
    def config(self) -> Config:
        if self._config is None:
            try:
                self._config = _read()
            except UsageError:
                if not self.forgiving:
                    raise
                self._config = read_config(known_settings(), problems=self.problems)
        return self._config

    def __getitem__(self, key: str) -> Any:
        for name in (name for option in _KNOWN.get(key, ()) for name in option.names):
            if name in self.config.settings:
                return self.config.settings[name]
        raise KeyError(key)

    def __setitem__(self, key: str, value: Any) -> None:
        raise TypeError("settings are read-only")

    def __delitem__(self, key: str) -> None:
        raise TypeError("settings are read-only")

    def __iter__(self) -> Iterator[str]:
        return iter(self.config.settings)

    def __len__(self) -> int:
        return len(self.config.settings)

    def __bool__(self) -> bool:
        return True  # without looking


class ConfiguredCommand(click.Command):
    """A command whose options also come from the settings file, and whose errors name its help.

    ``forgiving``: what is wrong in it does not stop the command, which tells it by :func:`settings_problems`.
    """

    forgiving = False

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        forgiving = self.forgiving or bool(extra.get("resilient_parsing"))  # a shell completes a line
        extra.setdefault("default_map", _LazyConfig(forgiving=forgiving))
        return super().make_context(info_name, args, parent, **extra)

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.ctx = error.ctx or ctx  # the parser tells none for an option without its value
            raise


def user_config(ctx: click.Context) -> Config:
    """The settings file of a command's context."""
    lazy = ctx.default_map
    return lazy.config if isinstance(lazy, _LazyConfig) else _read()


def _forgives(ctx: click.Context) -> bool:
    return isinstance(ctx.default_map, _LazyConfig) and ctx.default_map.forgiving


def settings_problems(ctx: click.Context) -> list[UsageError]:
    """What is wrong in the settings file of a command that forgives it: all that any command would refuse."""
    settings = user_config(ctx).settings
    found = list(ctx.default_map.problems) if isinstance(ctx.default_map, _LazyConfig) else []
    known = known_settings() if settings else {}
    for name, value in settings.items():
        options = [option for option in known[name] if option.is_flag == known[name][0].is_flag]
        if any(option._takes(ctx, value, ParameterSource.DEFAULT_MAP) for option in options):
            continue
        try:
            options[0]._of_file(ctx, value)
        except click.BadParameter as error:
            where = f"{name.replace('_', '-')!r} in config file '{config_file()}'"
            found.append(UsageError(f"{where}: {error.message.removesuffix('.')}", "correct it"))
    for both in AT_ODDS:
        if all(name in settings for name in both):
            said = " and ".join(repr(name.replace("_", "-")) for name in both)
            found.append(UsageError(f"config file '{config_file()}' has both {said}", "take one of them out"))
    return found


def known_settings() -> Mapping[str, Sequence[Setting]]:
    """The options of all commands, by their names with underscores; those of `ask` first."""
    from localvlm.cli.main import cli

    context = click.Context(cli)
    commands = {name: cli.get_command(context, name) for name in cli.list_commands(context)}
    asks = commands["ask"].params if commands["ask"] else []
    return {name: sorted(options, key=lambda option: option not in asks) for name, options in _KNOWN.items()}


def _read() -> Config:
    try:
        return read_config(_KNOWN)
    except UsageError:  # the key may be of another command, whose options were not looked at
        return read_config(known_settings())


def rank(ctx: click.Context, name: str) -> int:
    """How near to the user an option's value was set: flag 3, environment 2, settings file 1, default 0."""
    source = ctx.get_parameter_source(name)
    order = [ParameterSource.DEFAULT_MAP, ParameterSource.ENVIRONMENT, ParameterSource.COMMANDLINE]
    return order.index(source) + 1 if source in order else 0


def on_command_line(ctx: click.Context, name: str) -> bool:
    """Whether an option was given with the command itself."""
    return ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE


def budget_of(ctx: click.Context) -> Keep:
    """What --keep and --keep-tokens ask for; of the two, the one set nearer to the user.

    Raises:
        UsageError: both were set in one place.
    """
    share, count = rank(ctx, "keep"), rank(ctx, "keep_tokens")
    if share == count > 0:
        raise UsageError("--keep and --keep-tokens were both given", "pass one of them")
    if share >= count:
        keep: float | Literal["auto"] | None = ctx.params["keep"]
        return keep
    from localvlm.pruning import Tokens

    return Tokens(ctx.params["keep_tokens"])


def preset_of(ctx: click.Context) -> str | None:
    """What --preset names, if none of what it says was set nearer to the user.

    Raises:
        UsageError: some of that was set in the same place.
    """
    name: str | None = ctx.params["preset"]
    for other in ("keep", "keep_tokens", "layer"):
        if name is not None and rank(ctx, other) == rank(ctx, "preset"):
            raise UsageError(f"--preset and --{other.replace('_', '-')} were both given", "pass one of them")
        if rank(ctx, other) > rank(ctx, "preset"):
            name = None
    return name


def setting(*decls: str, **attrs: Any) -> Callable[[_F], _F]:
    """Decorator: one Setting."""
    return click.option(*decls, cls=Setting, **attrs)


def _group(*decorators: Callable[[Any], Any]) -> Callable[[_F], _F]:
    def decorate(function: _F) -> _F:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return decorate


_GGUF = click.types.StringParamType()


def pair_options(*, model: bool) -> Callable[[_F], _F]:
    """Which VLMs to use."""
    roles = [
        setting("--pair", metavar="NAME", help="A pair by name; `localvlm list` shows them."),
        setting("--guide", metavar="GGUF", help="The small VLM that looks first."),
        setting("--guide-mmproj", metavar="GGUF", help="Its projector [default: the mmproj file beside it]."),
    ]
    if model:
        roles += [
            setting("-m", "--model", metavar="GGUF", help="The VLM that answers."),
            setting("--mmproj", metavar="GGUF", help="Its projector [default: the mmproj file beside it]."),
        ]
    return _group(*roles)


_answer_options = _group(
    setting(
        "--keep",
        type=KeepType(),
        metavar="R|auto|all",
        default="0.35",
        show_default=True,
        help="Share of the image tokens to keep; where a method drops them between layers, the mean over the layers. "
        "auto: the fewest that hold most of the guide's attention.",
    ),
    setting("--keep-tokens", metavar="N", type=WholeType(1), help="Image tokens to keep, instead of --keep."),
    setting(
        "--layer",
        metavar="K",
        type=WholeType(0),
        default=0,
        show_default=True,
        help="The model's layer before which the other tokens are dropped; before layer 0 they cost nothing.",
    ),
    setting(
        "--preset",
        type=click.Choice(PRESETS),
        metavar="NAME",
        help="SGL's own settings instead of --keep and --layer: paper-64, paper-35 or paper-9, by the percentage of "
        "image tokens a layer sees on average.",
    ),
    setting(
        "--tile-price",
        metavar="auto|off|X",
        type=PriceType(),
        default="auto",
        show_default=True,
        help="What encoding a tile costs, in image tokens; a tile that adds less is left out. auto: by its shapes.",
    ),
    setting(
        "--max-tokens",
        metavar="N",
        type=WholeType(1),
        default=256,
        show_default=True,
        help="Longest answer, in tokens.",
    ),
    setting(
        "--temp",
        metavar="T",
        type=AmountType(),
        default=0.0,
        show_default=True,
        help="Temperature; 0 takes the likeliest token.",
    ),
    setting(
        "--seed",
        metavar="N",
        type=WholeType(0, 2**32 - 1),
        default=0,
        show_default=True,
        help="Of sampling, and of the random method.",
    ),
    setting("-s", "--system", metavar="TEXT", help="System prompt."),
    setting(
        "--exit-at",
        metavar="T|off|always",
        type=ExitType(),
        help="Score from which the guide's answer is final [default: as calibrated; off if it is not, or if --method "
        "is given and is not of SGL].",
    ),
    setting(
        "--guide-max-tokens",
        metavar="N",
        type=WholeType(1),
        default=64,
        show_default=True,
        help="Longest answer of the guide, in tokens; one cut off is never final.",
    ),
    setting(
        "--guide-keep",
        type=LookType(),
        metavar="R|all",
        default="all",
        show_default=True,
        help="Share of its image tokens that the guide is shown, chosen blind to the question; what was calibrated for "
        "all of them is then not gone by.",
    ),
    setting("--no-draft", is_flag=True, help="Decode token by token, not along the guide's answer."),
)

_ACCURACY = setting(
    "--accuracy",
    type=click.Choice(ACCURACIES),
    metavar="CLASS",
    default="high",
    show_default=True,
    help="What auto may choose: high, a guide's choice or nothing pruned; fast, also a guide that sees less, and "
    "methods without one.",
)


def answer_options(*, planned: bool) -> Callable[[_F], _F]:
    """How it is answered. ``planned``: for each question, how is the quickest way; else alike for all."""
    where = "that is predicted to be clearly sooner than the model alone" if planned else "there is a guide"
    method = setting(
        "--method",
        type=click.Choice(("auto", *METHODS)),
        metavar="NAME",
        default="auto",
        show_default=True,
        help="How image tokens are chosen; `localvlm methods` lists the names. auto: as the guide looks (sgl+) where "
        f"{where}, else not at all.",
    )
    return _group(method, _ACCURACY, _answer_options) if planned else _group(method, _answer_options)


image_token_options = _group(
    setting(
        "--image-max-tokens", metavar="N", type=WholeType(0), default=0,
        help="Most tokens of a picture, for models that take any size [default: 1024].",
    ),
    setting(
        "--guide-image-max-tokens", metavar="N", type=WholeType(0), default=0,
        help="The same for the guide; as many as a tile has leave it the overview [default: 512 where its tower takes "
        "any size, else --image-max-tokens].",
    ),
)  # fmt: skip

engine_options = _group(
    setting(
        "--threads", metavar="N", type=WholeType(0, MOST_THREADS), default=0,
        help="CPU threads [default: physical cores].",
    ),
    setting(
        "-ngl", "--gpu-layers", metavar="N", type=WholeType(-1), default=0, show_default=True,
        help="Layers on the GPU; -1 for all.",
    ),
    setting(
        "--ctx-size", metavar="N", type=WholeType(0), default=0,
        help="Context in tokens [default: the model's own, at most 4096].",
    ),
    setting(
        "--kv-type", type=click.Choice(KV_TYPES), metavar="TYPE", default="f16", show_default=True,
        help="Type of the KV cache: f16, or q8_0 in half the memory.",
    ),
    image_token_options,
    setting(
        "--positions", type=click.Choice(POSITIONS), metavar="WHICH", default="true", show_default=True,
        help="Of the tokens that are kept: true, those they would have had; or compact, numbered without gaps.",
    ),
    setting(
        "--image-cache", metavar="MIB", type=WholeType(0), default=0,
        help="Keep encoded pictures on disk, in at most that many MiB, for later questions [default: none].",
    ),
    setting("--private", is_flag=True, help="Write nothing to disk, and look nothing up that was kept."),
    setting("--low-memory", is_flag=True, help="Unload the guide before the model is loaded."),
    setting(
        "--max-memory", metavar="GB", type=AmountType(),
        help="Memory that may be used; 0: whatever it takes [default: what is free].",
    ),
    setting("--stock-tower", is_flag=True, help="Run llama.cpp's vision tower unrepaired."),
    setting("--stock-tiling", is_flag=True, help="Let llama.cpp cut pictures into tiles; no token can then be placed."),
)  # fmt: skip

input_options = _group(
    setting("--fetch", is_flag=True, help="IMAGEs may be http and https addresses, which are then downloaded."),
    setting("--clip", is_flag=True, help="The picture in the clipboard, too."),
    setting("--screen", is_flag=True, help="A picture of the screen, too."),
)

output_options = _group(
    setting("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
    setting("-v", "--verbose", count=True, help="Tokens and timings on stderr; -vv the engine's log too."),
)
