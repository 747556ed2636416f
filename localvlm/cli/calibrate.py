"""``localvlm calibrate``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App, guide_image_tokens
from localvlm.cli.completers import files
from localvlm.cli.fit import check_fit
from localvlm.cli.inputs import check_images, choose_pair
from localvlm.cli.options import ConfiguredCommand, engine_options, output_options, pair_options, setting
from localvlm.cli.output import Reporter
from localvlm.cli.values import ShareType, WholeType
from localvlm.errors import UsageError

if TYPE_CHECKING:
    from localvlm.calibration import Calibration, Example, Point

__all__ = ["calibrate"]


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("data", metavar="DATA.jsonl|IMAGE...", nargs=-1, required=True, shell_complete=files)
@setting("--question", metavar="TEXT", help="What to ask about each IMAGE.")
@setting("--risk", metavar="R", type=ShareType(), default="0.05", show_default=True,
         help="Share of the guide's final answers that may be wrong.")  # fmt: skip
@setting("--method", type=click.Choice(("sgl+", "sgl")), metavar="NAME", default="sgl+", show_default=True,
         help="The method of pruning it is for: sgl+ or sgl.")  # fmt: skip
@setting("--guide-max-tokens", metavar="N", type=WholeType(1), default=64, show_default=True,
         help="Longest answer of the guide, in tokens.")  # fmt: skip
@pair_options(model=True)
@engine_options
@setting("--json", is_flag=True, help="As JSON.")
@output_options
@click.pass_context
def calibrate(ctx: click.Context, /, data: tuple[str, ...], **params: Any) -> None:
    """Finds from which score on the guide's answer is final.

    DATA.jsonl holds `image`, `question` and `answer` a line. Without answers, or with IMAGEs and --question, the
    guide's answers are held against the model's own without pruning. Prints the share of wrong answers (with its 95 %
    interval) among the questions that exit, and keeps the threshold at which most exit with no more than --risk wrong.
    Exits 1 if there is none.
    """
    from localvlm.calibration import Calibration, choose, judge, risk_curve, store

    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    examples = _examples(data, params["question"])
    pair = choose_pair(ctx, reporter)
    if pair.guide is None or pair.model is None:
        raise UsageError("a guide and a model are needed", "pass --guide and --model, or --pair")
    check_images((example.image for example in examples), reporter)
    with ctx.ensure_object(App).pipeline(pair, params) as pipeline:
        check_fit(pipeline, params, reporter)
        try:
            scores, wrong = judge(
                pipeline,
                examples,
                params["method"],
                params["guide_max_tokens"],
                lambda n: reporter.stage(f"{n} of {len(examples)} questions"),
            )
        finally:
            reporter.clear()
    curve = risk_curve(scores, wrong)
    point = choose(curve, params["risk"])
    found = None
    if point is not None:
        found = Calibration(point.threshold, params["method"], params["risk"], point.risk, point.high, point.share,
                            len(examples), examples[0].answer is not None,
                            guide_image_tokens(params, pair))  # fmt: skip
        store(pair, found)
    _show(found, curve, params["json"])
    if found is None:
        reporter.note(
            f"no threshold kept: {len(examples)} questions do not show that fewer than {params['risk']:.1%} of the "
            "guide's final answers would be wrong; give more questions or a larger --risk"
        )
        ctx.exit(1)


def _examples(data: Sequence[str], question: str | None) -> list[Example]:
    from localvlm.calibration import Example, read_examples

    if len(data) == 1 and data[0].endswith((".jsonl", ".ndjson")):
        if question:
            raise UsageError(f"--question was given, and '{data[0]}' holds its own", "leave one of them out")
        found = read_examples(Path(data[0]))
    elif not question:
        raise UsageError("nothing was given to ask about the images", "pass --question, or a file DATA.jsonl")
    else:
        found = [Example(name, question) for name in data]
    if not found:
        raise UsageError(f"'{data[0]}' holds no examples", "give a line for each question")
    return found


def _show(found: Calibration | None, curve: Sequence[Point], json: bool) -> None:
    if json:
        import json as json_module

        shown = {**(dataclasses.asdict(found) if found else {"threshold": None}), "curve": list(map(vars, curve))}
        click.echo(json_module.dumps(shown))
        return
    click.echo("exit at   exited   wrong   95 % interval")
    for p in curve:
        click.echo(f"{p.threshold:7.4f}  {p.share:6.1%}  {p.risk:6.1%}   {p.low:.1%} to {p.high:.1%}")
    if found:
        click.echo(
            f"threshold {found.threshold:.4f}: {found.share:.0%} of {found.questions} questions exit, {found.risk:.1%} "
            f"of them wrong, at most {found.high:.1%}"
        )
