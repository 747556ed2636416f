"""What shells complete arguments and options with."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]

__all__ = ["any_of", "files", "pairs", "pulled"]


def files(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Leaves completion to the shell, which knows files."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


def pairs(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Names of pairs, and what they are."""
    from click.shell_completion import CompletionItem

    from localvlm.catalog import entries
    from localvlm.cli.options import user_config

    found = entries(user_config(ctx).pairs)
    return [CompletionItem(e.name, help=e.summary) for e in found if e.name.startswith(incomplete)]


def pulled(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:  # noqa: ARG001
    """Models in the cache."""
    from click.shell_completion import CompletionItem

    from localvlm.catalog import Pulled

    named = [str(wanted) for wanted in Pulled().models()]
    return [CompletionItem(name) for name in named if name.startswith(incomplete)]


def any_of(*completers: Completer) -> Completer:
    """What any of them finds; files come first, as bash then takes them where there is nothing else."""
    return lambda ctx, param, incomplete: [item for each in completers for item in each(ctx, param, incomplete)]
