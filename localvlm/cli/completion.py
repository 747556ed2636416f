"""``localvlm completion``: what a shell needs to complete our commands, options and files."""

from __future__ import annotations

import click

__all__ = ["completion"]


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")), metavar="SHELL")
def completion(shell: str) -> None:
    """Prints what completes commands, options, pairs and files in SHELL: bash, zsh or fish.

    \b
    bash: localvlm completion bash >> ~/.bashrc
    zsh:  localvlm completion zsh >> ~/.zshrc    (after compinit)
    fish: localvlm completion fish > ~/.config/fish/completions/localvlm.fish
    """  # noqa: D301 - click's mark of lines that are not to be wrapped
    from click.shell_completion import get_completion_class

    from localvlm.cli.main import cli

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(cli, {}, "localvlm", "_LOCALVLM_COMPLETE").source())
