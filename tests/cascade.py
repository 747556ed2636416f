"""The cascade on held-out demo scenes: risk curves of early exit, accuracy, LLM FLOPs and time against the model alone.

    python -m tests.cascade [--count 2000] [--risk 0.02] [--time 100] [--work FOLDER]

The threshold is found on scenes of one seed (by the guide's answers against the labels, as `localvlm calibrate` does)
and everything is shown on scenes of another. The guide looks once at each question, the model answers it from all
tokens, 35 % and 9 % of them, and a cascade is put together from these answers. The first CHECKED questions are asked
with the threshold as well and must come out the same. The first --time questions are then asked of the model alone and
of each cascade in turns, and timed. Answers are kept in --work, one by one: a run that was ended goes on there, and one
that has them all only measures time. Prints tables and exits non-zero when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.answers import Answer, AskOptions, Look
from localvlm.calibration import Point, choose, risk_curve, same_answer
from localvlm.catalog import pair_named
from localvlm.cost import LlmShape
from localvlm.early_exit import CONSISTENCY_KEEP
from localvlm.engine.api import ImagePart, LoadOptions, Message, TextPart
from localvlm.models.demo import scenes as scene_maker
from localvlm.pipeline import Pipeline
from localvlm.pruning import method_named
from localvlm.selection import select
from tests.kept import Kept, weights

KEEPS = (0.35, 0.09)
MAX_TOKENS = 12
CHECKED = 50
RISK = 0.02
SHARES = tuple(i / 10 for i in range(1, 11))
FULL, GUIDE = "model alone", "guide alone"
Values = NDArray[Any]


@dataclass
class Shown:
    """Arrays over the questions of the seed that is shown, by row of the table: right or wrong, and LLM FLOPs. Those of
    "35%" and "9%" are of the pruned model alone; the guide, which always goes before it, is apart.
    """

    kinds: Values
    confidence: Values
    consistency: Values
    whole: Values
    """Whether the guide's answer was not cut off."""
    right: dict[str, Values]
    flops: dict[str, Values]

    @property
    def scores(self) -> Values:
        """As `calibrate` ranks them: -inf where the guide's answer was cut off."""
        return np.where(self.whole, (self.confidence + self.consistency) / 2, -np.inf)

    def exited(self, threshold: float | None) -> Values:
        if threshold is None:
            return np.zeros(len(self.kinds), bool)
        return np.asarray(self.scores >= threshold)

    def cascade(self, keep: str, threshold: float | None) -> tuple[Values, Values]:
        """Right or wrong, and FLOPs of each question: the guide's, and the pruned model's where it does not exit."""
        out = self.exited(threshold)
        right = np.where(out, self.right[GUIDE], self.right[keep])
        return right, self.flops[GUIDE] + ~out * self.flops[keep]

    def loss(self, right: Values, kind: str | None = None) -> float:
        """Points of accuracy below the model alone."""
        where = np.ones(len(self.kinds), bool) if kind is None else self.kinds == kind
        return 100 * float((self.right[FULL][where].astype(float) - right[where]).mean())


def label(keep: float) -> str:
    return f"{keep:.0%}"


def _guide_flops(shape: LlmShape, look: Look) -> int:
    """The guide's answer, and the pass on its pruned image."""
    n, prompt, said = look.prompt.n_image, look.prompt.n_past, len(look.answer.ids)
    pruned = prompt - n + max(1, round(CONSISTENCY_KEEP * n))
    return shape.flops(prompt, look.answer.fed + 1, said + 1) + shape.flops(pruned, max(0, said - 1), said)


@dataclass(frozen=True)
class Asker:
    """Puts the questions of one set of scenes to the pair, each part of the cascade once."""

    pipeline: Pipeline
    folder: Path
    rows: Sequence[dict[str, str]]
    shapes: dict[str, LlmShape]

    @classmethod
    def of(cls, pipeline: Pipeline, folder: Path) -> Asker:
        guide, model = pipeline.pair.guide, pipeline.pair.model
        assert guide is not None
        assert model is not None
        rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
        return cls(pipeline, folder, rows, {"guide": LlmShape.of(guide.model), "model": LlmShape.of(model.model)})

    def picture(self, number: int) -> images.Image:
        return images.load(self.folder / self.rows[number]["image"])

    def ask(self, number: int, keep: float | None, exit_at: float | None) -> Answer:
        """As a user asks."""
        method = "none" if keep is None else AskOptions().method
        options = AskOptions(method=method, keep=keep, max_tokens=MAX_TOKENS, exit_at=exit_at)
        return self.pipeline.ask([self.picture(number)], self.rows[number]["question"], options)

    def parts(self, number: int, model: bool) -> dict[str, Any]:
        """What the guide says of a question and, if wanted, what the model does from all tokens and from fewer."""
        row, picture = self.rows[number], self.picture(number)
        look = self.pipeline.look([picture], row["question"], MAX_TOKENS, method=AskOptions().method)
        assert look.score is not None
        said = {GUIDE: look.answer.text.strip()}
        flops = {GUIDE: _guide_flops(self.shapes["guide"], look)}
        for name, (text, cost) in self._model(picture, row["question"], look).items() if model else ():
            said[name], flops[name] = text, cost
        return {
            "kind": row["type"],
            "confidence": look.score.confidence,
            "consistency": look.score.consistency,
            "whole": look.answer.finish == "stop",
            "said": said,
            "right": {name: same_answer(text, row["answer"]) for name, text in said.items()},
            "flops": flops,
        }

    def _model(self, picture: images.Image, question: str, look: Look) -> dict[str, tuple[str, int]]:
        """Its answers and their FLOPs, by row of the table; the picture is encoded once."""
        vlm, method = self.pipeline.vlm("model"), method_named(AskOptions().method)
        seen = vlm.encode(picture.rgb)
        saliency = self.pipeline.saliency(look, method.aggregation or "sum", [seen.layout])
        kept = {FULL: None} | {label(k): select(method, k, [seen.layout], saliency)[0] for k in KEEPS}
        out = {}
        for name, keep in kept.items():
            parts = vlm.chat([Message("user", question, 1)])
            prompt = vlm.prefill([p if isinstance(p, TextPart) else ImagePart(seen, keep) for p in parts])
            answer = vlm.generate(MAX_TOKENS)
            n = len(answer.ids)
            out[name] = answer.text.strip(), self.shapes["model"].flops(prompt.n_past, n, n + 1)
        vlm.release(seen)
        return out


def ask_all(asker: Asker, path: Path, seed: int, model: bool) -> list[dict[str, Any]]:
    """Every question's parts, those in ``path`` not asked again."""
    about = {"seed": seed, "model": model, "method": AskOptions().method, "weights": weights(asker.pipeline.pair)}
    kept = Kept(path, about)
    for number in range(len(kept.found), len(asker.rows)):
        kept.add(asker.parts(number, model))
        if (number + 1) % 100 == 0:
            print(f"seed {seed}: {number + 1} of {len(asker.rows)}", file=sys.stderr, flush=True)
    return kept.found[: len(asker.rows)]


def differences(asker: Asker, found: Sequence[dict[str, Any]], threshold: float | None) -> list[str]:
    """Questions that come out otherwise when they are really asked."""
    out = []
    for number, entry in enumerate(found[:CHECKED]):
        real = asker.ask(number, KEEPS[0], threshold)
        exit_ = threshold is not None and entry["whole"] and entry["confidence"] + entry["consistency"] >= 2 * threshold
        want = ("guide", entry["said"][GUIDE]) if exit_ else ("model", entry["said"][label(KEEPS[0])])
        if (real.answered_by, real.text) != want:
            out.append(f"question {number} came out as {real.text!r} by the {real.answered_by}, wanted {want}")
    return out


def times(asker: Asker, count: int, threshold: float | None) -> dict[str, float]:
    """Total ms of the first ``count`` questions, loading apart, each asked in every way and in turns."""
    ways = {FULL: (None, None)} | {f"cascade, {label(k)}": (k, threshold) for k in KEEPS}
    for keep, exit_at in ways.values():  # loads, and measures what drafts need
        asker.ask(0, keep, exit_at)
    out = dict.fromkeys(ways, 0.0)
    for number in range(min(count, len(asker.rows))):
        turn = number % len(ways)
        for name in [*ways][turn:] + [*ways][:turn]:
            answer = asker.ask(number, *ways[name])
            out[name] += answer.ms["total"] - answer.ms["load"]
    return out


def _stacked(found: Sequence[dict[str, Any]]) -> Shown:
    def column(name: str) -> Values:
        return np.array([entry[name] for entry in found])

    def columns(name: str) -> dict[str, Values]:
        return {row: np.array([entry[name][row] for entry in found]) for row in found[0][name]}

    return Shown(column("kind"), column("confidence"), column("consistency"), column("whole"),
                 columns("right"), columns("flops"))  # fmt: skip


def curves(shown: Shown) -> dict[str, list[Point]]:
    signs = {
        "confidence": shown.confidence,
        "consistency": shown.consistency,
        "both": shown.scores,
    }
    wrong = ~shown.right[GUIDE]
    return {name: risk_curve(np.where(shown.whole, s, -np.inf), wrong, SHARES) for name, s in signs.items()}


def curve_table(shown: Shown) -> str:
    """Risk in percent, with its interval, at each share exited; below, the mean over the shares."""
    found = curves(shown)
    lines = ["exited " + "".join(f"{name:>26s}" for name in found)]
    for points in zip(*found.values(), strict=False):
        cells = [f"{p.risk:7.1%} ({p.low:6.1%} to {p.high:6.1%})" for p in points]
        lines.append(f"{points[-1].share:6.0%} " + "".join(f"{c:>26s}" for c in cells))
    means = [f"{np.mean([p.risk for p in points]):.2%}" if points else "-" for points in found.values()]
    return "\n".join([*lines, "mean   " + "".join(f"{m:>26s}" for m in means)])


def table(shown: Shown, threshold: float | None) -> str:
    """Accuracy in all and by type, share exited, FLOPs as a share of the model's alone."""
    rows = {FULL: (shown.right[FULL], shown.flops[FULL], 0.0)}
    rows[GUIDE] = (shown.right[GUIDE], shown.flops[GUIDE], 1.0)
    for keep in map(label, KEEPS):
        rows[f"no exit, {keep}"] = (*shown.cascade(keep, None), 0.0)
        rows[f"cascade, {keep}"] = (*shown.cascade(keep, threshold), float(shown.exited(threshold).mean()))
    kinds = sorted(set(shown.kinds))
    lines = [f"{'':14s}{'all':>7s}{'exit':>7s}{'FLOPs':>7s}" + "".join(f"{k:>10s}" for k in kinds)]
    for name, (right, flops, share) in rows.items():
        cells = "".join(f"{100 * right[shown.kinds == k].mean():10.1f}" for k in kinds)
        ratio = f"{flops.sum() / shown.flops[FULL].sum():7.2f}"
        lines.append(f"{name:14s}{100 * right.mean():7.1f}{share:7.0%}{ratio}{cells}")
    return "\n".join(lines)


def best(shown: Shown, keep: str) -> str:
    """The point of the curve where most questions exit and at most one point is lost, or the least is."""
    tried = np.unique(shown.scores[shown.whole])
    points = [(float(shown.exited(t).mean()), shown.loss(shown.cascade(keep, t)[0]), float(t)) for t in tried]
    good = [p for p in points if p[1] <= 1]
    if not points:
        return "no answer of the guide may exit"
    share, loss, at = max(good) if good else min(points, key=lambda p: (p[1], -p[0]))
    unexited = shown.loss(shown.right[keep])
    return f"{share:.0%} exit at {at:.4f} with a loss of {loss:+.2f} points; pruning alone loses {unexited:+.2f}"


def misses(shown: Shown, threshold: float | None) -> list[str]:
    """Targets that are not reached, in words. Where pruning alone loses more than a point, exits must not add to it."""
    out: list[str] = []

    def want(ok: bool, text: str) -> None:
        if not ok:
            out.append(text)

    share = float(shown.exited(threshold).mean())
    want(share >= 0.4, f"{share:.0%} of the questions exit, wanted 40 %")
    for keep in map(label, KEEPS):
        loss, unexited = shown.loss(shown.cascade(keep, threshold)[0]), shown.loss(shown.right[keep])
        reason = f"best point: {best(shown, keep)}"
        want(loss <= max(1, unexited), f"cascade at {keep} loses {loss:.2f} points, wanted 1 ({reason})")
    right = shown.cascade(label(KEEPS[0]), threshold)[0]
    losses = {kind: shown.loss(right, kind) for kind in sorted(set(shown.kinds))}
    worst = max(losses, key=lambda k: losses[k])
    want(losses[worst] <= 5, f"'{worst}' loses {losses[worst]:.1f} points at the defaults, wanted 5 at most")
    return out


def run(
    count: int, seeds: Sequence[int], risk: float, timed: int, threads: int, work: Path
) -> tuple[Shown, float | None, list[str]]:
    """Calibrates on ``count`` scenes of seeds[0], asks ``count`` of seeds[1] and prints what came of both."""
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        askers = []
        for seed in seeds:
            folder = work / f"{seed}-{count}"
            if not (folder / "data.jsonl").exists():
                scene_maker.write_set(folder, seed, count)
            askers.append(Asker.of(pipeline, folder))
        first, second = (
            ask_all(asker, work / f"{seed}{'-model' * model}.jsonl", seed, model)
            for asker, seed, model in zip(askers, seeds, (False, True), strict=True)
        )
        calibrated, shown = _stacked(first), _stacked(second)
        point = choose(risk_curve(calibrated.scores, ~calibrated.right[GUIDE]), risk)
        threshold = None if point is None else point.threshold
        print(f"seed {seeds[0]}, {count} questions: " + _calibration(point, risk))
        print(f"\nseed {seeds[1]}, {count} questions: share of wrong answers among those that exit")
        print(curve_table(shown))
        print("\nexact match in %; LLM FLOPs (guide and model) as a share of the model's alone")
        print(table(shown, threshold))
        missed = differences(askers[1], second, threshold)
        if timed:
            ms = times(askers[1], timed, threshold)
            print(f"\ntime of {timed} questions (towers too, loading apart) as a share of the model's alone:")
            print(", ".join(f"{name} {total / ms[FULL]:.2f}" for name, total in ms.items()))
    return shown, threshold, missed


def _calibration(point: Point | None, risk: float) -> str:
    if point is None:
        return f"no threshold with a risk of {risk:.1%} at most"
    return (
        f"threshold {point.threshold:.4f} for a risk of {risk:.1%}: {point.share:.0%} exit, {point.risk:.1%} of them "
        f"wrong, at most {point.high:.1%}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs=2, default=(20261122, 20261123), help="to calibrate on, to show")
    parser.add_argument("--risk", type=float, default=RISK, help="wanted risk of the answers that exit")
    parser.add_argument("--time", type=int, default=100, help="questions to time; 0 for none")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where answers are kept")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        work = args.work or Path(name)
        work.mkdir(parents=True, exist_ok=True)
        shown, threshold, missed = run(args.count, args.seeds, args.risk, args.time, args.threads, work)
    print()
    for keep in map(label, KEEPS):
        print(f"best point at {keep}: {best(shown, keep)}")
    missed += misses(shown, threshold)
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
