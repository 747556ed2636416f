"""``localvlm bench``: ratios measured on this machine, in one run."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from localvlm.cli.app import App, load_options
from localvlm.cli.files import target_of, write_text
from localvlm.cli.inputs import choose_pair, load_images
from localvlm.cli.options import ConfiguredCommand, engine_options, output_options, pair_options, setting
from localvlm.cli.output import Reporter
from localvlm.cli.values import LookType, SharesType, WholeType
from localvlm.errors import UsageError
from localvlm.sanitize import sanitize

if TYPE_CHECKING:
    from localvlm.answers import Pair, VlmFiles
    from localvlm.bench.cases import Bench, Case
    from localvlm.bench.report import Report
    from localvlm.images import Image

__all__ = ["bench"]

ROUNDS, TAP_ROUNDS = 3, 9
TAP_LIMIT = 1.03
"""The tap may cost this much of the guide's own LLM time."""
PRESETS = ("llava15", "next", "internvl3", "smolvlm2", "qwen25vl")
"""Names of localvlm.bench.presets.PRESETS, known here without loading numpy."""
QUANTS = ("Q4_0", "Q4_K_M", "Q8_0")
GROWING = ("tokens", "answers", "turns", "images")
TILES = 0.4
"""Share of a picture's tiles that are encoded where the guide sees the overview: 5 of 13."""


class GrowthType(click.ParamType):  # type: ignore[type-arg] # generic since click 8.5 only
    """What grows, and maybe how far: "turns", "tokens=64,1024"."""

    name = "WHAT[=N,N,...]"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, tuple[int, ...] | None]:
        if isinstance(value, tuple):
            return value
        what, given, numbers = str(value).partition("=")
        if what not in (*GROWING, "all"):
            self.fail(f"{what!r} is none of {', '.join(GROWING)} and all.", param, ctx)
        if not given:
            return what, None
        if what == "all" or not all(n.strip().isdigit() and int(n) > 0 for n in numbers.split(",")):
            self.fail(f"{numbers!r} holds other things than whole numbers from 1 up.", param, ctx)
        return what, tuple(sorted({int(n) for n in numbers.split(",")}))


class LooksType(SharesType):
    """What --guide-keep of other commands takes, with commas between; the settings file has one for all of them."""

    name = "R|all,..."

    def convert(  # type: ignore[override] # "all" is None
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float | str | None, ...]:
        if isinstance(value, tuple):
            return value
        return tuple(LookType().convert(part.strip(), param, ctx) for part in str(value).split(","))


@click.command(cls=ConfiguredCommand, epilog="Each option is also LOCALVLM_<OPTION> and a key of config.toml.")
@setting("--only", type=click.Choice(["tap"]), help="Measure nothing but this: what reading the attention costs.")
@setting("--preset", type=click.Choice(PRESETS), metavar="NAME",
         help="A pair of random weights and real shapes: llava15, next, internvl3, smolvlm2 or qwen25vl.")  # fmt: skip
@setting("--quant", type=click.Choice(QUANTS), metavar="TYPE",
         help="Of the preset's large model: Q4_0, Q4_K_M or Q8_0 [default: the preset's own].")  # fmt: skip
@setting("--tiny", is_flag=True, help="The preset in a few layers of a few columns, to try a measurement out.")
@setting("--keep-files", metavar="DIR", help="Where the preset's files stay for the next time [default: nowhere].")
@pair_options(model=True)
@setting("--image", metavar="FILE", help="The picture [default: a drawn one, of the preset's size].")
@setting("--keep", metavar="R,R,...", type=SharesType(), default="0.09,0.35", show_default=True,
         help="Shares of the image tokens to keep.")  # fmt: skip
@setting("--guide-keep", metavar="R|all,...", type=LooksType(), default="all", show_default=True,
         help="Shares of its image tokens that the guide is shown, chosen blind to the question.")  # fmt: skip
@setting("--text", metavar="N", type=WholeType(1), default=32, show_default=True,
         help="Rows of text, the chat template's among them.")  # fmt: skip
@setting("--answer", metavar="N", type=WholeType(2), default=16, show_default=True,
         help="Tokens of every answer.")  # fmt: skip
@setting("--tiles", metavar="N", type=WholeType(1),
         help="Tiles that are encoded where the guide sees the overview [default: 40 % of them].")  # fmt: skip
@setting("--runs", metavar="N", type=WholeType(1),
         help="Rounds; in each, every case runs once [default: 3; 9 of the tap].")  # fmt: skip
@setting("--case", metavar="TEXT", multiple=True,
         help="Only cases whose names hold TEXT, and llama.cpp alone; may be given several times.")  # fmt: skip
@setting("--peer", metavar="PROGRAM", help="A llama-mtmd-cli to run on the same files.")
@setting("--from-start", is_flag=True, help="Time whole processes too.")
@setting("--growth", metavar="WHAT[=N,...]", type=GrowthType(), multiple=True,
         help="How time grows with tokens, answers, turns or images, or all, instead of the cases.")  # fmt: skip
@engine_options
@setting("--json", metavar="FILE.json", help="Write the figures there.")
@setting("--svg", metavar="FILE.svg", help="Draw the stages as bars there.")
@output_options
@click.pass_context
def bench(ctx: click.Context, /, **params: Any) -> None:
    """Measures how much sooner an answer comes than from llama.cpp alone.

    One question about one picture is answered in turn by llama.cpp on the large model (the same library, no tap,
    nothing pruned), from a picture made smaller, and by the pair: with all tokens, as `ask` plans it by itself, guided,
    with the model's own answer as its draft, with the guide's answer as the final one, and on pictures in tiles with a
    guide that sees the overview. Told are medians and ratios of one run, by stage, to the first token and the last,
    tokens, and peak memory; of the plan also what was predicted before; and what was not left to the weights. All
    models are loaded before, and every picture is encoded anew.

    With --preset, weights are random: times are those of the real shapes, and answers mean nothing. With --only tap,
    the LLM time of a guide is measured with the tap on against off; exits 1 if that is over 3 %.
    """
    reporter = Reporter(quiet=params["quiet"], verbose=params["verbose"])
    targets = {kind: target_of(params[kind], kind) for kind in ("json", "svg")}
    if params["only"] == "tap":
        if not _tap(params, targets["json"]):
            ctx.exit(1)
        return
    with _subject(ctx, reporter) as (what, pair, images):
        report = _measured(ctx.ensure_object(App), what, pair, images, params, reporter)
    for kind, target in targets.items():
        if target is not None:
            write_text(target, report.as_json() if kind == "json" else report.as_svg())
    click.echo(sanitize(report.as_text()), nl=False)


def _tap(params: dict[str, Any], target: Path | None) -> bool:
    """Whether the tap costs no more than it may."""
    import json
    import statistics

    from localvlm.bench.tap import measure

    cost = measure(params["runs"] or TAP_ROUNDS, params["threads"])
    if target is not None:
        found = {
            "what": "tap",
            "shape": cost.shape,
            "n_params": cost.n_params,
            "image_tokens": cost.image_tokens,
            "ratio": cost.ratio,
            "off_ms": cost.off,
            "on_ms": cost.on,
        }
        write_text(target, json.dumps(found) + "\n")
    off, on = statistics.median(cost.off), statistics.median(cost.on)
    click.echo(
        f"tap on {cost.shape} ({cost.n_params / 1e9:.2f}B, {cost.image_tokens} image tokens), {len(cost.on)} pairs: "
        f"off {off:.0f} ms, on {on:.0f} ms, ratio {cost.ratio:.3f} (limit {TAP_LIMIT})"
    )
    return cost.ratio <= TAP_LIMIT


@contextlib.contextmanager
def _subject(ctx: click.Context, reporter: Reporter) -> Iterator[tuple[str, Pair, list[Image]]]:
    """What is measured, the pair and the picture; a preset's files are gone afterwards unless they are to stay."""
    import tempfile

    params = ctx.params
    given = load_images([params["image"]], reporter) if params["image"] else None
    if params["preset"] is None:
        if params["quant"] or params["tiny"] or params["keep_files"]:
            raise UsageError("--quant, --tiny and --keep-files go with a preset", "pass --preset")
        from localvlm.bench.cases import drawn

        pair = choose_pair(ctx, reporter)
        if pair.model is None:
            raise UsageError("a model is needed", "pass --model, or --pair")
        if params["growth"] and pair.guide is None:
            raise UsageError(
                "--growth compares the model with one that is guided, and no guide was given", "pass --guide"
            )
        yield pair.name or pair.model.model.stem, pair, given or [drawn(672, 672)]
        return
    if params["pair"] or params["guide"] or params["model"]:
        raise UsageError("a preset and a pair were both given", "pass one of them")
    with contextlib.ExitStack() as stack:
        kept = params["keep_files"]
        folder = Path(kept).expanduser() if kept else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        yield _preset(params, folder, given, reporter)


def _preset(
    params: dict[str, Any], folder: Path, given: list[Image] | None, reporter: Reporter
) -> tuple[str, Pair, list[Image]]:
    from localvlm.answers import Pair, VlmFiles
    from localvlm.bench.cases import drawn
    from localvlm.bench.presets import PRESETS, tiny
    from localvlm.bench.shapes import write_vlms

    preset = PRESETS[params["preset"]]
    if params["quant"]:
        preset = preset.quantized(params["quant"])
    preset = tiny(preset) if params["tiny"] else preset
    reporter.stage("writing random weights")
    guide, model = write_vlms(folder, [preset.guide, preset.model])
    reporter.clear()
    what = f"{'tiny ' if params['tiny'] else ''}{preset.summary}, {preset.model.quant}, random weights"
    return what, Pair(preset.name, VlmFiles(*guide), VlmFiles(*model)), given or [drawn(*preset.size)]


def _measured(
    app: App, what: str, pair: Pair, images: list[Image], params: dict[str, Any], reporter: Reporter
) -> Report:
    from localvlm.bench.cases import Bench, Setting, cases, question_of
    from localvlm.bench.machine import build, machine
    from localvlm.bench.plan import plan_ahead
    from localvlm.bench.report import Report
    from localvlm.bench.rounds import measure

    guide, model = load_options(params, pair)
    tell = reporter.note if reporter.verbose else reporter.stage
    with app.bench(params, lambda engine: Bench(Setting(pair, guide, model, params["answer"]), engine)) as found:
        try:
            tell("loading")
            question = question_of(found.plain, params["text"])
            n_tiles = sum(found.plain.layout(*image.size).n_tiles for image in images)
            tiles = params["tiles"] or max(1, round(TILES * n_tiles))
            all_ = cases(params["keep"], n_tiles, tiles, params["guide_keep"], guided=pair.guide is not None)
            ways = _asked(all_, params["case"])
            facts = {"what": what, **machine(), "build": build(found.bare.engine), "picture": images[0].name}
            report = Report(facts, guide_bytes=_bytes_of(pair.guide))
            if params["growth"]:
                _grow(found, report, images, question, params, tell)
            else:
                if planned := [case for case in ways if case.planned]:
                    tell("planning, on a machine that is timed if it was not yet")
                    report.choice = plan_ahead(found, planned[0], images, question)
                measure(found, report, ways, images, question, params["runs"] or ROUNDS, tell,
                        peer=params["peer"], from_start=params["from_start"])  # fmt: skip
        finally:
            reporter.clear()
    return report


def _bytes_of(files: VlmFiles | None) -> int:
    """What files hold together; what is not there holds nothing."""
    found = [] if files is None else [files.model, files.mmproj]
    return sum(path.stat().st_size for path in found if path.is_file())


def _asked(ways: list[Case], parts: Sequence[str]) -> list[Case]:
    """The first, which the others are held against, and those whose names hold one of ``parts``; all if there are none.

    Raises:
        UsageError: no name does.
    """
    found = [case for case in ways[1:] if not parts or any(part in case.name for part in parts)]
    if not found:
        raise UsageError(f"no case holds {parts[0]!r} in its name", f"there are: {'; '.join(c.name for c in ways)}")
    return [ways[0], *found]


def _grow(
    found: Bench,
    report: Report,
    images: list[Image],
    question: str,
    params: dict[str, Any],
    tell: Callable[[str], None],
) -> None:
    from localvlm.bench.cases import PLAIN, cases
    from localvlm.bench.growth import GROWING, grow

    asked = dict(params["growth"])
    if "all" in asked:
        asked = {**GROWING, **{what: upto for what, upto in asked.items() if what != "all"}}
    ours = [case for case in cases(params["keep"], 1, 1, params["guide_keep"]) if case.forced == "no exit"]
    found.prepare([PLAIN, *ours], images, question)
    for what, upto in asked.items():
        for row in grow(found, what, upto or GROWING[what], ours, images, question, params["runs"] or ROUNDS, tell):
            (report.skipped if isinstance(row, str) else report.grown).append(row)  # type: ignore[arg-type]
