"""Entry point of the ``localvlm`` command."""

from __future__ import annotations

import click

import localvlm

__all__ = ["cli", "main"]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(localvlm.__version__, prog_name="localvlm")
def cli() -> None:
    """Ask questions about images, offline."""


def main() -> None:
    """Runs the command line."""
    cli()
