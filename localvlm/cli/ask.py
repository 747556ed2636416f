"""``localvlm ask``."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App
from localvlm.cli.completers import files
from localvlm.cli.files import check_writable, target_of, write_whole
from localvlm.cli.fit import check_fit
from localvlm.cli.inputs import EXAMPLE, choose_pair, find_images, full_question, load_images
from localvlm.cli.options import (
    ConfiguredCommand,
    answer_options,
    engine_options,
    input_options,
    output_options,
    pair_options,
    setting,
)
from localvlm.cli.output import AnswerPrinter, Reporter, answer_json, data_of
from localvlm.cli.plan import options_asked, plan_answer, say, shown
from localvlm.errors import LocalvlmError, StorageError, UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.images import Image
    from localvlm.pipeline import Answer, Pipeline

__all__ = ["ask"]

_COORDINATES = re.compile(r"\b(bounding[ -]?box(es)?|bbox(es)?|coordinates?)\b", re.IGNORECASE)
_TOO_FEW_TO_MEASURE = 0.2
"""Share of the image tokens below which coordinates are off: SGL on RefCOCO loses 11 of 91 points at 9 % and 2 at 35 %
(arXiv 2412.03324, table 1)."""


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("images", metavar="IMAGE...", nargs=-1, shell_complete=files)
@click.argument("question")
@input_options
@pair_options(model=True)
@answer_options(planned=True)
@engine_options
@setting("--json", is_flag=True, help="One JSON object with the answer, tokens and timings.")
@setting("--schema", metavar="FILE|FIELDS", help='The answer is JSON by a schema, or of fields as in "name, age int".')
@setting("--jsonl", metavar="OUT.jsonl", help="Ask about each IMAGE alone, and add a line of JSON to OUT for each; "
         "those that are there are skipped.")  # fmt: skip
@setting("--copy", is_flag=True, help="Put the answer into the clipboard, too.")
@setting("--no-stream", is_flag=True, help="Print the answer when it is complete.")
@setting("--explain", metavar="OUT.png", help="Draw where the guide looked and what the model saw.")
@output_options
@click.pass_context
def ask(ctx: click.Context, /, images: tuple[str, ...], question: str, **params: Any) -> None:
    """Answers QUESTION about the IMAGEs.

    An IMAGE is a file, a pattern such as "*.jpg", pages of a PDF as in doc.pdf#2-4, `-` for standard input, or
    `example` for the bundled picture. Text on standard input goes before the question. The answer alone goes to stdout.
    """
    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    _check_arguments(images, question, elsewhere=params["clip"] or params["screen"])
    drawing, lines = _drawing(params["explain"], images), target_of(params["jsonl"], "jsonl")
    if lines is not None and (drawing is not None or params["copy"]):
        raise UsageError("--jsonl goes with neither --explain nor --copy", "ask about one picture for these")
    pictures = load_images(images, reporter, params) if lines is None else []
    text = full_question(question, images, reporter)
    pair = choose_pair(ctx, reporter)
    schema = "" if params["schema"] is None else _schema(params["schema"])
    options = options_asked(ctx, pair, reporter, schema)
    if lines is not None:
        from localvlm.cli.batch import ask_each

        ask_each(ctx, lines, find_images(images, params), text, pair, options, reporter)
        return
    planned = plan_answer(ctx, pair, pictures, text, options, reporter)
    params = ctx.params  # the plan may have set the guide's bound
    if reporter.verbose:
        from localvlm.cli.tokens import say_seen

        say(planned, reporter)
        say_seen(pictures, pair, params, reporter)
    printer = AnswerPrinter(reporter)
    stream = not (params["json"] or params["no_stream"])
    app = ctx.ensure_object(App)
    with app.pipeline(pair, params) as pipeline:
        check_fit(pipeline, params, reporter, pictures, text, planned.options)
        try:
            answer = pipeline.ask(pictures, text, planned.options, printer.feed if stream else None, reporter.stage)
        except LocalvlmError:
            printer.abandon()
            raise
        finally:
            reporter.clear()
        _show(answer, printer, stream=stream, json=params["json"], more=data_of(answer, options) | shown(planned))
        if drawing is not None:
            _explain(drawing, pictures, question, answer, reporter)
        if params["copy"]:
            _copy(answer, reporter)
        reporter.summary(answer)
        planned.learn(answer)
        _warn_of_coordinates(question, answer, reporter)
        if reporter.verbose:
            _say_repairs(pipeline, answer, reporter)


def _schema(written: str) -> str:
    from localvlm.schema import schema_of

    return schema_of(written)


def _check_arguments(images: tuple[str, ...], question: str, *, elsewhere: bool) -> None:
    """Says what is missing, the question or the images. ``elsewhere``: there is one that is no argument."""
    alone = not images and (question == "-" or os.path.isfile(question))  # noqa: PTH113 - a long one must not raise
    if alone or _names_image(question):
        raise UsageError(f"no question was given: {question!r} is an image", 'localvlm ask IMAGE... "What is this?"')
    if not images and not elsewhere:
        raise UsageError("no image was given", "localvlm ask IMAGE QUESTION; `localvlm ask --help` tells more")


def _names_image(question: str) -> bool:
    """Whether no one would ask this: a file, an address or a page of a PDF."""
    from localvlm.sources import is_url

    path, page, _ = question.rpartition("#")
    name = path if page else question
    address = is_url(question) and len(question.split()) == 1
    return question == EXAMPLE or address or bool(os.path.splitext(name)[1] and os.path.isfile(name))  # noqa: PTH113, PTH122


def _drawing(explain: str | None, images: tuple[str, ...]) -> Path | None:
    """Where --explain draws, checked before anything is loaded."""
    if explain is None:
        return None
    target = Path(explain).expanduser()
    check_writable(target)
    if target.suffix.lower() != ".png":
        raise UsageError(f"--explain {explain!r} is not the name of a PNG file", "give a name that ends in .png")
    if target.exists() and any(os.path.exists(i) and target.samefile(i) for i in images):  # noqa: PTH110 - any name
        raise UsageError(f"--explain {explain!r} would overwrite the picture that is asked about", "give another name")
    return target


def _explain(target: Path, pictures: list[Image], question: str, answer: Answer, reporter: Reporter) -> None:
    from localvlm.explain import explain

    sheet = explain(pictures, question, answer)
    write_whole(target, lambda file: sheet.save(file, "PNG"))
    reporter.note(f"drawn as {str(target)!r}")


def _copy(answer: Answer, reporter: Reporter) -> None:
    """Puts the answer into the clipboard; where that cannot be, it is said, and the answer is there all the same."""
    from localvlm.clipboard import copy_text

    try:
        reporter.note(copy_text(sanitize(answer.text)))
    except StorageError as error:
        reporter.note(f"{error.message} ({error.hint})")


def _warn_of_coordinates(question: str, answer: Answer, reporter: Reporter) -> None:
    tokens = answer.tokens
    if tokens.kept is not None and tokens.kept < _TOO_FEW_TO_MEASURE * tokens.image and _COORDINATES.search(question):
        seen = f"{tokens.kept} of {tokens.image} image tokens"
        reporter.note(f"coordinates from {seen} may be off; --keep 0.35 or more places things better")


def _show(
    answer: Answer, printer: AnswerPrinter, *, stream: bool, json: bool, more: Mapping[str, object] | None = None
) -> None:
    if json:
        sys.stdout.write(answer_json(answer, more) + "\n")
        sys.stdout.flush()
        return
    if not stream:
        printer.feed(answer.text)
    printer.finish()


def _say_repairs(pipeline: Pipeline, answer: Answer, reporter: Reporter) -> None:
    looked = ["guide"] if answer.guide_text is not None else []
    for role in looked if answer.answered_by == "guide" else [*looked, "model"]:
        info = pipeline.vlm(role).info
        repairs = ", ".join(info.repairs) or "none"
        reporter.note(f"{role}: {info.name}, {info.family}, {info.n_params / 1e6:.0f} M parameters, repairs: {repairs}")
        for note in filter(None, (info.runs, *info.notes)):
            reporter.note(f"{role}: {note}")
