"""``localvlm attention``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App
from localvlm.cli.inputs import choose_pair, full_question, load_images
from localvlm.cli.options import ConfiguredCommand, WholeType, engine_options, output_options, pair_options, setting
from localvlm.cli.output import AnswerPrinter, Reporter
from localvlm.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy import generic
    from numpy.typing import NDArray

__all__ = ["attention"]


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("image")
@click.argument("question")
@setting("--save", metavar="FILE.npz", required=True, help="Where to write the arrays.")
@pair_options(model=False)
@setting(
    "--max-tokens", metavar="N", type=WholeType(1), default=64, show_default=True, help="Longest answer, in tokens."
)
@engine_options
@output_options
@click.pass_context
def attention(ctx: click.Context, /, image: str, question: str, save: str, **params: Any) -> None:
    """Saves what the guide attends to when it answers QUESTION about IMAGE; prints its answer.

    The file holds `prompt` and `generated` (layer, head, image token) summed over rows, `boxes` (image token, x0 y0
    x1 y1) in pixels, `tower` (tower layer, image token), `token_ids`, `generated_ids` and `answer`.
    """
    from dataclasses import replace

    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    target = Path(save).expanduser()
    _check_writable(target)
    pictures = load_images([image], reporter)
    text = full_question(question, [image], reporter)
    pair = replace(choose_pair(ctx, reporter), model=None)
    if pair.guide is None:
        raise UsageError(f"pair {pair.name!r} has no guide", "pass --guide and --guide-mmproj")
    with ctx.ensure_object(App).pipeline(pair, params) as pipeline:
        reporter.stage("guide_encode")
        try:
            arrays = pipeline.attention(pictures, text, params["max_tokens"]).arrays
        finally:
            reporter.clear()
    write_npz(target, arrays)
    printer = AnswerPrinter(reporter)
    printer.feed(str(arrays["answer"]))
    printer.finish()
    reporter.note(f"attention saved as {str(target)!r}")


def _check_writable(target: Path) -> None:
    """Fails before the models are loaded rather than after."""
    folder = target.absolute().parent
    if target.is_dir():
        raise StorageError(f"'{target}' is a directory", "give a file name for --save")
    if not folder.is_dir():
        raise StorageError(f"folder '{folder}' does not exist", "create it, or save elsewhere")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"folder '{folder}' may not be written to by you", "save elsewhere")


def write_npz(target: Path, arrays: Mapping[str, NDArray[generic]]) -> None:
    """Writes the arrays so that ``target`` is either complete or as it was.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    import tempfile

    import numpy as np

    temporary: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(dir=target.absolute().parent, prefix=".localvlm-", delete=False) as file:
            temporary = Path(file.name)
            np.savez_compressed(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(target)
    except OSError as error:
        raise StorageError(f"{str(target)!r} cannot be written: {error.strerror or error}", "save elsewhere") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
