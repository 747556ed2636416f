"""``localvlm bench``: ratios measured on this machine, in one run."""

from __future__ import annotations

import click

from localvlm.cli.options import ConfiguredCommand, WholeType, setting

__all__ = ["bench"]

TAP_LIMIT = 1.03
"""The tap may cost this much of the guide's own LLM time."""


@click.command(cls=ConfiguredCommand)
@setting("--only", type=click.Choice(["tap"]), default="tap", show_default=True, help="What to measure.")
@setting("--runs", metavar="N", type=WholeType(3), default=9, show_default=True, help="Pairs of runs, on and off.")
@setting("--threads", metavar="N", type=WholeType(0), default=0, help="CPU threads [default: physical cores].")
@setting("--json", is_flag=True, help="As JSON.")
@click.pass_context
def bench(ctx: click.Context, only: str, runs: int, threads: int, json: bool) -> None:
    """Measures what the attention tap costs.

    That is the LLM time of a guide of real size (random weights, written to a temporary folder) with the tap on,
    against off, in alternation. Exits 1 if it is over 3 %.
    """
    import json as json_module
    import statistics

    from localvlm.bench.tap import measure

    cost = measure(runs, threads)
    over = cost.ratio > TAP_LIMIT
    if json:
        shown = {
            "what": only,
            "shape": cost.shape,
            "n_params": cost.n_params,
            "image_tokens": cost.image_tokens,
            "ratio": cost.ratio,
            "off_ms": cost.off,
            "on_ms": cost.on,
        }
        click.echo(json_module.dumps(shown))
    else:
        off, on = statistics.median(cost.off), statistics.median(cost.on)
        click.echo(
            f"tap on {cost.shape} ({cost.n_params / 1e9:.2f}B, {cost.image_tokens} image tokens), {runs} pairs: "
            f"off {off:.0f} ms, on {on:.0f} ms, ratio {cost.ratio:.3f} (limit {TAP_LIMIT})"
        )
    if over:
        ctx.exit(1)
