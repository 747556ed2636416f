"""Accuracy of the demo pair on held-out scenes: unpruned, guide alone, blind, and every way of choosing tokens.

    python -m tests.scenes [--count 1000] [--seed 20261121] [--json FILE]

Prints the table and exits non-zero when a target is missed. Each question is encoded once per VLM and looked at once by
the guide; every row of the table is a real prefill of the model with the chosen tokens at their true positions.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import ImageLayout, ImagePart, LoadOptions, Message, TextPart, Vlm
from localvlm.guidance import AGGREGATIONS
from localvlm.models.demo import scenes as scene_maker
from localvlm.pipeline import AskOptions, Look, Pipeline
from localvlm.pruning import METHODS, Inputs, budget
from localvlm.pruning.base import top

KEEPS = (0.35, 0.09)
MAX_TOKENS = 12
DESCRIBED = 200
"""Scenes that are also described; scored apart, without a target."""
EXTRA = {"last prompt row": "last", "maximum": "max"}
"""Aggregations shown beside the methods."""


def normal(text: str) -> str:
    """Lower case, no punctuation, single spaces."""
    return " ".join(re.sub(r"[^\w\s]", " ", text.lower()).split())


@dataclass
class Tally:
    """Right or wrong per question and row of the table."""

    rows: dict[str, list[bool]] = field(default_factory=dict)
    types: list[str] = field(default_factory=list)

    def add(self, row: str, right: bool) -> None:
        self.rows.setdefault(row, []).append(right)

    def percent(self, row: str, kind: str | None = None) -> float:
        hits = [h for h, t in zip(self.rows[row], self.types, strict=True) if kind in (None, t)]
        return 100 * float(np.mean(hits))

    def difference(self, a: str, b: str) -> tuple[float, float]:
        """Mean of a - b in points and half its paired 95 % interval."""
        d = np.array(self.rows[a], float) - np.array(self.rows[b], float)
        return 100 * float(d.mean()), 196 * float(d.std(ddof=1)) / len(d) ** 0.5


def say(vlm: Vlm, question: str, pictures: Sequence[ImagePart]) -> str:
    messages = [Message("user", question, len(pictures))]
    parts = [p if isinstance(p, TextPart) else pictures[p] for p in vlm.chat(messages)]
    vlm.prefill(parts)
    return vlm.generate(MAX_TOKENS).text


def _choices(pipeline: Pipeline, look: Look, inputs: Inputs, layout: ImageLayout) -> dict[str, NDArray[np.int32]]:
    """Kept tokens per row of the table."""
    out: dict[str, NDArray[np.int32]] = {}
    saliency = {name: pipeline.saliency(look, name, [layout]) for name in AGGREGATIONS}
    for keep in KEEPS:
        k = budget(keep, inputs)
        for method in METHODS.values():
            if method.name == "none" or method.needs:  # `localvlm eval` compares those that go by more
                continue
            given = inputs
            if method.aggregation is not None:
                given = replace(inputs, saliency=saliency[method.aggregation])
            out[f"{method.name} {keep:.0%}"] = method.select(given, k)
        for label, aggregation in EXTRA.items():
            out[f"({label}) {keep:.0%}"] = top(saliency[aggregation], inputs.candidates, k)
    return out


def run(rows: Sequence[dict[str, str]], folder: Path, pair: str = "demo", threads: int = 0) -> Tally:
    """Asks every question of ``rows`` (image, question, answer, type) in every setting."""
    tally = Tally()
    with Pipeline.open(pair_named(pair), LoadOptions(threads=threads)) as pipeline:
        model = pipeline.vlm("model")
        for number, row in enumerate(rows):
            picture = images.load(folder / row["image"])
            want = normal(row["answer"])
            tally.types.append(row["type"])
            look = pipeline.look([picture], row["question"], MAX_TOKENS)
            tally.add("guide alone", normal(look.answer.text) == want)
            seen = model.encode(picture.rgb)
            layout = seen.layout
            inputs = Inputs(
                layout.n_tokens,
                np.arange(layout.n_tokens, dtype=np.int32),
                (layout.grid,),
                (layout.n_tokens,),
                seed=number,
            )
            tally.add("unpruned", normal(say(model, row["question"], [ImagePart(seen)])) == want)
            tally.add("blind", normal(say(model, row["question"], [])) == want)
            for name, kept in _choices(pipeline, look, inputs, layout).items():
                answer = say(model, row["question"], [ImagePart(seen, kept)])
                tally.add(name, normal(answer) == want)
            model.release(seen)
            if sys.stderr.isatty() or (number + 1) % 100 == 0:
                print(f"{number + 1} of {len(rows)}", file=sys.stderr)
    return tally


def recall(answer: str, truth: str) -> float:
    """Share of the things in a comma-separated list that the answer names."""
    said = {normal(item) for item in answer.split(",")}
    things = [normal(item) for item in truth.split(",")]
    return sum(thing in said for thing in things) / len(things)


def describe(rows: Sequence[dict[str, str]], folder: Path, threads: int = 0) -> dict[str, float]:
    """Mean object recall in percent of "describe" answers: the guide, the model unpruned, pruned by default at 35 %."""
    default = AskOptions().method
    settings = {
        "guide alone": ("guide", "none", None),
        "unpruned": ("model", "none", None),
        f"{default} 35%": ("model", default, 0.35),
    }
    out: dict[str, float] = {}
    pair = pair_named("demo")
    for label, (role, method, keep) in settings.items():
        asked = pair if role == "model" else replace(pair, guide=None, model=pair.guide)
        with Pipeline.open(asked, LoadOptions(threads=threads)) as pipeline:
            scores = [
                recall(
                    pipeline.ask([images.load(folder / r["image"])], r["question"], AskOptions(method, keep, 96)).text,
                    r["answer"],
                )
                for r in rows
            ]
        out[label] = 100 * float(np.mean(scores))
    return out


def table(tally: Tally) -> str:
    kinds = sorted(set(tally.types))
    lines = [f"{'':24s}{'all':>7s}" + "".join(f"{k:>10s}" for k in kinds)]
    for row in tally.rows:
        cells = "".join(f"{tally.percent(row, k):10.1f}" for k in kinds)
        lines += [f"{row:24s}{tally.percent(row):7.1f}{cells}"]
    return "\n".join(lines)


def misses(tally: Tally) -> list[str]:
    """Targets that are not reached, in words."""
    out: list[str] = []

    def want(ok: bool, text: str) -> None:
        if not ok:
            out.append(text)

    default = AskOptions().method
    full, guide, blind = tally.percent("unpruned"), tally.percent("guide alone"), tally.percent("blind")
    want(full >= 90, f"unpruned {full:.1f} %, wanted 90 %")
    for kind in sorted(set(tally.types)):
        share, unseen = tally.percent("unpruned", kind), tally.percent("blind", kind)
        want(share >= 80, f"unpruned on '{kind}' {share:.1f} %, wanted 80 %")
        want(unseen <= 60, f"blind on '{kind}' {unseen:.1f} %, wanted at most 60 %")
    want(guide >= 60, f"guide alone {guide:.1f} %, wanted 60 %")
    want(guide <= full - 8, f"guide alone {guide:.1f} %, wanted at least 8 points below {full:.1f} %")
    want(blind <= 40, f"blind {blind:.1f} %, wanted at most 40 %")
    pruned = tally.percent(f"{default} 35%")
    want(pruned >= full - 3, f"{default} at 35 % {pruned:.1f} %, wanted within 3 points of {full:.1f} %")
    for keep in ("35%", "9%"):
        for control in ("random", "grid"):
            mean, half = tally.difference(f"{default} {keep}", f"{control} {keep}")
            want(
                mean - half > 0, f"{default} over {control} at {keep}: {mean:+.1f} +- {half:.1f} points, wanted above 0"
            )
    mean, _ = tally.difference(f"{default} 9%", "random 9%")
    want(mean >= 20, f"{default} over random at 9 %: {mean:+.1f} points, wanted 20")
    return out


def make(count: int, seed: int, folder: Path) -> list[dict[str, str]]:
    """Draws the scenes into ``folder``, unless they are there, and returns the rows of its data.jsonl."""
    if not (folder / "data.jsonl").exists():
        scene_maker.main(["--seed", str(seed), "--count", str(count), "--out", str(folder), "--describe"])
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        rows = make(args.count, args.seed, Path(name))
        tally = run([r for r in rows if r["type"] != "describe"], Path(name), threads=args.threads)
        lists = [r for r in rows if r["type"] == "describe"][:DESCRIBED]
        recalls = describe(lists, Path(name), args.threads)
    print(f"{args.count} held-out scenes, seed {args.seed}, exact match in %")
    print(table(tally))
    print(f"describe, object recall over {len(lists)} scenes:", ", ".join(f"{k} {v:.1f}" for k, v in recalls.items()))
    for keep in ("35%", "9%"):
        for control in ("unpruned", f"random {keep}", f"grid {keep}"):
            mean, half = tally.difference(f"{AskOptions().method} {keep}", control)
            print(f"{AskOptions().method} {keep} - {control}: {mean:+.1f} +- {half:.1f} points (paired 95 %)")
    if args.json:
        args.json.write_text(json.dumps({"types": tally.types, "rows": tally.rows}))
    missed = misses(tally)
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
