"""Predicted against measured seconds of each stage, for one pair on this machine.

    python -m tests.plans --model M.gguf --mmproj P.gguf [--guide G.gguf --guide-mmproj Q.gguf]
                          [--picture FILE | --size WIDTH HEIGHT] [--keep 0.35] [--max-tokens 16] [--threads 0]
                          [--rounds 3] [--only NAME] [--cache FOLDER]

Samples the machine (unless ``--cache`` has its rates), and runs every plan of class "fast" in turns, models loaded and
warm, pictures encoded anew. Of each stage three figures: what was predicted before, what is predicted with the tokens,
tiles and length of the answer that it came to, and the median of what was measured. The difference that counts is of
the second to the third. Exits non-zero if a plan's total is more than 15 % off, or if the plan that is predicted to be
the quickest was slower than plain. Nothing else should run on the machine.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image

from localvlm import images
from localvlm.answers import Answer, AskOptions, Pair, VlmFiles
from localvlm.catalog import example_image
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.pipeline import Pipeline
from localvlm.planning.memory import RateMemory
from localvlm.planning.plans import Asked, Plan, Planner, quickest
from localvlm.planning.sample import sample
from localvlm.planning.shapes import VlmShape

TARGET = 0.15
QUESTION = "What colour is the star, and what stands beside it in the picture?"


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--mmproj"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--guide", "--guide-mmproj", "--picture"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--size", type=int, nargs=2, help="of a picture of noise")
    parser.add_argument("--keep", type=float, default=0.35)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", action="append", help="a plan by name, again for more; plain always runs")
    parser.add_argument("--cache", default="", help="where rates are kept")
    return parser.parse_args()


def rates_of(shapes: list[VlmShape], options: LoadOptions) -> RateMemory:
    """Those of this machine, sampled as far as they are not known."""
    memory = RateMemory.of(options)
    llms, towers = memory.rates.missing((s.llm for s in shapes), (s.tower for s in shapes))
    started = time.perf_counter()
    if llms or towers:
        with Engine() as engine:
            memory.add(sample(engine, options, memory.rates, llms, towers))
        print(f"sampled {', '.join([*llms, *towers])} in {time.perf_counter() - started:.1f} s")
    return memory


def picture_of(args: argparse.Namespace) -> images.Image:
    if args.size is None:
        return images.load(args.picture or example_image())
    width, height = args.size
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    with tempfile.NamedTemporaryFile(suffix=".png") as file:
        PIL.Image.fromarray(noise).save(file, "PNG")
        file.flush()
        return images.load(file.name)


def run(pair: Pair, plan: Plan, picture: images.Image, args: argparse.Namespace) -> Answer:
    """One answer, after another one that warms up."""
    options = LoadOptions(threads=args.threads)
    with Pipeline.open(pair, options, guide_image_tokens=plan.guide_tokens or 0) as pipeline:
        for role in ["model"] + ["guide"] * (plan.guide_tokens is not None):
            pipeline.vlm(role)
        wanted = plan.applied(AskOptions(keep=args.keep, max_tokens=args.max_tokens, draft=False))
        pipeline.ask([picture], "Hm?", replace(wanted, max_tokens=1, system="Nothing of this prompt is used again."))
        return pipeline.ask([picture], QUESTION, wanted)


def table(plan: Plan, answers: list[Answer], again: Plan) -> float:
    """Prints the stages of one plan; the relative difference of the totals."""
    median = {stage: statistics.median(a.ms[stage] for a in answers) / 1e3 for stage in plan.ms}
    median["total"] = statistics.median(a.ms["total"] - a.ms["load"] for a in answers) / 1e3
    print(f"\n{plan.name}: {answers[0].tokens}, {answers[0].tiles}")
    print(f"  {'stage':14}{'before':>9}{'after':>9}{'measured':>10}{'off by':>9}")
    before, after = ({s: ms / 1e3 for s, ms in {**p.ms, "total": p.total}.items()} for p in (plan, again))
    for stage in [s for s in median if s != "load"]:
        off = f"{after[stage] / median[stage] - 1:+.1%}" if median[stage] > 1e-3 else ""
        print(f"  {stage:14}{before[stage]:9.2f}{after[stage]:9.2f}{median[stage]:10.2f}{off:>9}".rstrip())
    return abs(after["total"] / median["total"] - 1)


def main() -> int:
    args = parsed()
    guide = None if args.guide is None else VlmFiles(args.guide, args.guide_mmproj)
    pair = Pair(None, guide, VlmFiles(args.model, args.mmproj))
    shapes = [VlmShape(files) for files in (pair.model, pair.guide) if files is not None]
    memory = rates_of(shapes, LoadOptions(threads=args.threads, cache=args.cache))
    picture = picture_of(args)
    planner = Planner(shapes[0], shapes[1] if guide else None, memory)
    asked = Asked((picture.size,), QUESTION, args.keep, args.max_tokens, loaded=True)
    plans = planner.plans(asked, "fast")
    plans = [p for p in plans if not args.only or p.name in ("plain", *args.only)]
    answers: dict[str, list[Answer]] = {plan.name: [] for plan in plans}
    for _ in range(args.rounds):
        for plan in plans:
            answers[plan.name].append(run(pair, plan, picture, args))
    off = {p.name: table(p, answers[p.name], planner.again(asked, p, answers[p.name][0])) for p in plans}
    took = {name: statistics.median(a.ms["total"] - a.ms["load"] for a in found) for name, found in answers.items()}
    best = quickest(plans)
    print(f"\nchosen: {best.name}, {took['plain'] / took[best.name]:.2f} x as fast as plain")
    far = [f"{name} {share:.0%}" for name, share in off.items() if share > TARGET]
    print(f"totals off by more than {TARGET:.0%}: {', '.join(far) or 'none'}")
    return int(bool(far) or took[best.name] > took["plain"])


if __name__ == "__main__":
    sys.exit(main())
