"""``localvlm attention``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App
from localvlm.cli.completers import files
from localvlm.cli.files import check_writable, write_whole
from localvlm.cli.fit import check_fit
from localvlm.cli.inputs import choose_pair, full_question, load_images
from localvlm.cli.options import ConfiguredCommand, engine_options, output_options, pair_options, setting
from localvlm.cli.output import AnswerPrinter, Reporter
from localvlm.cli.values import WholeType
from localvlm.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy import generic
    from numpy.typing import NDArray

__all__ = ["attention"]


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("image", shell_complete=files)
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
    check_writable(target)
    pictures = load_images([image], reporter)
    text = full_question(question, [image], reporter)
    pair = replace(choose_pair(ctx, reporter), model=None)
    if pair.guide is None:
        raise UsageError(f"pair {pair.name!r} has no guide", "pass --guide and --guide-mmproj")
    with ctx.ensure_object(App).pipeline(pair, params) as pipeline:
        check_fit(pipeline, params, reporter, pictures, text)
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


def write_npz(target: Path, arrays: Mapping[str, NDArray[generic]]) -> None:
    """Writes the arrays so that ``target`` is either complete or as it was.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    import numpy as np

    write_whole(target, lambda file: np.savez_compressed(file, allow_pickle=False, **arrays))
