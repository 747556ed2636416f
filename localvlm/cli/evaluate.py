"""``localvlm eval``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App, load_options
from localvlm.cli.completers import files
from localvlm.cli.files import target_of, write_text
from localvlm.cli.fit import check_fit
from localvlm.cli.inputs import check_images, choose_pair
from localvlm.cli.options import ConfiguredCommand, engine_options, output_options, pair_options, setting
from localvlm.cli.output import Reporter
from localvlm.cli.values import LookType, SharesType, WholeType
from localvlm.errors import UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.evaluation.data import Dataset
    from localvlm.evaluation.plan import Cell
    from localvlm.evaluation.report import Report
    from localvlm.evaluation.runner import Outcome, RunOptions
    from localvlm.pipeline import Pair

__all__ = ["evaluate"]

RULES = ("exact", "vqa", "relaxed", "anls", "yes-no")
"""Names of localvlm.scoring.RULES, known here without loading anything."""


@click.command("eval", cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@click.argument("data", metavar="DATA", shell_complete=files)
@setting("--methods", metavar="A,B,...", default="sgl+,sgl,random,grid", show_default=True,
         help="How image tokens are chosen: names that `localvlm methods` lists.")  # fmt: skip
@setting("--keep", metavar="R,R,...", type=SharesType(), default="0.64,0.35,0.09", show_default=True,
         help="Shares of the image tokens to keep, each as the mean over the model's layers.")  # fmt: skip
@setting("--answers", metavar="FILE", help="The right answers, where DATA's format keeps them apart.")
@setting("--images", metavar="DIR", help="Folder of the pictures [default: that of DATA].")
@setting("--limit", metavar="N", type=WholeType(1), help="Only the first N questions.")
@setting("--score", type=click.Choice(RULES), metavar="RULE",
         help="exact, vqa, relaxed, anls or yes-no [default: as DATA's format is scored].")  # fmt: skip
@setting("--suffix", metavar="TEXT", default="", help="Put below every question, such as 'Answer in one word.'")
@setting("-s", "--system", metavar="TEXT", help="System prompt.")
@setting("--max-tokens", metavar="N", type=WholeType(1), default=64, show_default=True,
         help="Longest answer, in tokens.")  # fmt: skip
@setting("--guide-max-tokens", metavar="N", type=WholeType(1), default=64, show_default=True,
         help="Longest answer of the guide, in tokens.")  # fmt: skip
@setting("--guide-keep", metavar="R|all", type=LookType(), default="all", show_default=True,
         help="Share of its image tokens that the guide is shown, chosen blind to the question.")  # fmt: skip
@setting("--seed", metavar="N", type=WholeType(0, 2**31 - 1), default=0, show_default=True, help="Of random's draws.")
@pair_options(model=True)
@engine_options
@setting("--json", metavar="FILE.json", help="Write the figures there.")
@setting("--html", metavar="FILE.html", help="Write a page with curves and tables there.")
@setting("--no-timings", is_flag=True, help="Leave out times: the same run then tells the same, byte for byte.")
@setting("--work", metavar="DIR", help="Where answers are kept as they come [default: a folder for each run].")
@setting("--restart", is_flag=True, help="Ask everything anew.")
@output_options
@click.pass_context
def evaluate(ctx: click.Context, /, data: str, **params: Any) -> None:
    """Asks the questions of DATA with every method at every budget, and tells what each costs and loses.

    DATA is JSONL with `image`, `question` and `answer` (or `answers`) a line, maybe `type`; or a file of VQAv2,
    TextVQA, GQA, POPE, DocVQA, ChartQA or LLaVA as it is published. Answers are kept as they come: a run that was ended
    goes on where it was when it is started again.
    """
    from localvlm.evaluation.data import read_dataset
    from localvlm.evaluation.plan import cells
    from localvlm.evaluation.runner import RunOptions

    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    targets = [target_of(params[kind], kind) for kind in ("json", "html")]
    answers, folder = (Path(params[key]).expanduser() if params[key] else None for key in ("answers", "images"))
    dataset = read_dataset(Path(data).expanduser(), answers, folder, params["score"], params["suffix"])
    dataset = dataset.first(params["limit"])
    pair = choose_pair(ctx, reporter)
    if pair.model is None:
        raise UsageError("a model is needed", "pass --model, or --pair")
    methods = [name.strip() for name in params["methods"].split(",")]
    plan = cells(methods, params["keep"], guide=pair.guide is not None)
    names = ("max_tokens", "guide_max_tokens", "seed", "system", "guide_keep")
    options = RunOptions(**{name: params[name] for name in names})
    results = _run(ctx.ensure_object(App), pair, dataset, plan, options, params, reporter)
    _tell(_report(data, dataset, pair, plan, results, timings=not params["no_timings"]), targets)


def _run(
    app: App, pair: Pair, dataset: Dataset, plan: list[Cell], options: RunOptions, params: dict[str, Any],
    reporter: Reporter,
) -> list[dict[str, Outcome]]:  # fmt: skip
    from localvlm.config import directories
    from localvlm.evaluation.inputs import digest, inputs_of
    from localvlm.evaluation.journal import Journal
    from localvlm.evaluation.runner import ask_all

    reporter.stage("reading the pictures")
    try:
        inputs = inputs_of(dataset.questions, pair, options, *load_options(params, pair))
    finally:
        reporter.clear()
    work = params["work"]
    if params["private"] and not work:
        raise UsageError("--private keeps no answers to go on from", "name a folder for them with --work")
    folder = Path(work).expanduser() if work else directories().state / "eval" / digest(inputs)[:32]
    n, names = len(dataset.questions), [cell.name for cell in plan]
    target = folder / "answers.jsonl"
    if params["restart"] or not target.exists():  # else they were checked when it was begun
        check_images((image for question in dataset.questions for image in question.images), reporter)
    with Journal(target, inputs, restart=params["restart"]) as journal:
        if before := journal.answered(names):
            reporter.note(f"{before} of {n} questions were answered before, in '{journal.path}'; --restart asks anew")
        try:
            with app.pipeline(pair, params) as pipeline:
                check_fit(pipeline, params, reporter)
                return ask_all(
                    pipeline, dataset.questions, plan, options, journal, reporter.progress(before, n, "questions")
                )
        finally:
            reporter.clear()
            if before < (now := journal.answered(names)) < n:
                how = "the same command without --restart" if params["restart"] else "the same command"
                reporter.note(f"{now} of {n} questions are answered; {how} goes on from there")


def _report(
    data: str, dataset: Dataset, pair: Pair, plan: list[Cell], results: list[dict[str, Outcome]], *, timings: bool
) -> Report:
    import localvlm
    from localvlm.cost import LlmShape
    from localvlm.evaluation.report import Report, rows_of

    assert pair.model is not None
    guide = pair.guide if any(cell.aggregation for cell in plan) else None
    facts = {
        "data": f"{Path(data).name} ({dataset.format}), {len(dataset.questions)} questions",
        "scored": ", ".join(sorted({q.rule for q in dataset.questions})),
        "pair": pair.name or "of files",
        "guide": pair.guide.model.name if pair.guide is not None else "none",
        "model": pair.model.model.name,
        "localvlm": localvlm.__version__,
    }
    shapes = LlmShape.of(pair.model.model), None if guide is None else LlmShape.of(guide.model)
    return Report(facts, rows_of(plan, dataset.questions, results, *shapes), timings)


def _tell(report: Report, targets: list[Path | None]) -> None:
    from localvlm.evaluation.page import as_page
    from localvlm.evaluation.table import as_text

    json_file, html_file = targets
    if json_file is not None:
        write_text(json_file, report.as_json())
    if html_file is not None:
        write_text(html_file, as_page(report))
    click.echo(sanitize(as_text(report)), nl=False)
