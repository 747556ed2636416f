"""The cascade on held-out demo scenes: risk curves of early exit, accuracy, LLM FLOPs and time against the model alone.

    python -m tests.cascade [--count 2000] [--risk 0.05] [--json FILE]

The threshold is found on scenes of one seed (by the guide's answers against the labels, as `localvlm calibrate` does)
and everything is shown on scenes of another. Guide and model answer each question apart; a cascade is put together
from these answers and times, and the first CHECKED questions are asked with the threshold as well and must come out the
same. Prints tables and exits non-zero when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from localvlm.models.demo import scenes as scene_maker
from numpy.typing import NDArray

from localvlm import images
from localvlm.calibration import Point, choose, judge, read_examples, risk_curve, same_answer
from localvlm.catalog import pair_named
from localvlm.early_exit import CONSISTENCY_KEEP, exits
from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import read_header
from localvlm.pipeline import AskOptions, Look, Pipeline

KEEPS = (0.35, 0.09)
MAX_TOKENS = 12
CHECKED = 50
SHARES = tuple(i / 10 for i in range(1, 11))
FULL, GUIDE = "model alone", "guide alone"
Values = NDArray[Any]


@dataclass(frozen=True)
class Shape:
    """What one pass of an LLM costs, from the shapes of its tensors.

    Attributes:
        blocks, head: weights of the matrices of all blocks, and of the output.
    """

    blocks: int
    head: int
    n_layer: int
    n_embd: int

    @classmethod
    def of(cls, path: Path) -> Shape:
        header = read_header(path)
        sizes = {name: int(np.prod(t.shape)) for name, t in header.tensors.items() if len(t.shape) > 1}
        return cls(
            sum(size for name, size in sizes.items() if name.startswith("blk.")),
            sizes.get("output.weight", sizes["token_embd.weight"]),
            header.integer(f"{header.architecture}.block_count"),
            header.integer(f"{header.architecture}.embedding_length"),
        )

    def flops(self, prompt: int, fed: int, outputs: int) -> int:
        """Multiplications and additions of ``prompt`` rows and ``fed`` rows after them, ``outputs`` of them projected
        to the vocabulary: 2 per weight and row, and 4 per layer, channel, row and cell that the row attends to.
        """
        rows = prompt + fed
        return 2 * self.blocks * rows + 2 * self.head * outputs + 2 * self.n_layer * self.n_embd * rows * (rows + 1)


@dataclass
class Shown:
    """Arrays over the questions of the seed that is shown, by row of the table: right or wrong, LLM FLOPs, ms. Those of
    "35%" and "9%" are of the pruned model alone; the guide, which always goes before it, is apart.
    """

    kinds: Values
    confidence: Values
    consistency: Values
    whole: Values
    """Whether the guide's answer was not cut off."""
    right: dict[str, Values]
    flops: dict[str, Values]
    ms: dict[str, Values]

    def exited(self, threshold: float | None) -> Values:
        if threshold is None:
            return np.zeros(len(self.kinds), bool)
        return np.asarray(((self.confidence + self.consistency) / 2 >= threshold) & self.whole)

    def cascade(self, keep: str, threshold: float | None) -> tuple[Values, Values, Values]:
        """Right or wrong, FLOPs and ms of each question: the guide's, and the pruned model's where it does not exit."""
        out = self.exited(threshold)
        return (
            np.where(out, self.right[GUIDE], self.right[keep]),
            self.flops[GUIDE] + ~out * self.flops[keep],
            self.ms[GUIDE] + ~out * self.ms[keep],
        )

    def loss(self, right: Values, kind: str | None = None) -> float:
        """Points of accuracy below the model alone."""
        where = np.ones(len(self.kinds), bool) if kind is None else self.kinds == kind
        return 100 * float((self.right[FULL][where].astype(float) - right[where]).mean())


def label(keep: float) -> str:
    return f"{keep:.0%}"


def _guide_flops(shape: Shape, look: Look) -> int:
    """The guide's answer, and the pass on its pruned image."""
    n, prompt, said = look.prompt.n_image, look.prompt.n_past, len(look.answer.ids)
    pruned = prompt - n + max(1, round(CONSISTENCY_KEEP * n))
    return shape.flops(prompt, look.answer.fed + 1, said + 1) + shape.flops(pruned, max(0, said - 1), said)


def ask_all(
    pipeline: Pipeline, rows: Sequence[dict[str, str]], folder: Path, threshold: float | None
) -> tuple[Shown, list[str]]:
    """Asks every question of every VLM; also tells which cascades came out otherwise than put together."""
    found: list[dict[str, Any]] = []
    wrong: list[str] = []
    assert pipeline.pair.guide is not None
    assert pipeline.pair.model is not None
    small, large = Shape.of(pipeline.pair.guide.model), Shape.of(pipeline.pair.model.model)
    for number, row in enumerate(rows):
        picture, question, want = [images.load(folder / row["image"])], row["question"], row["answer"]

        def ask(keep: float | None, exit_at: float | None = None) -> Any:
            method = "none" if keep is None else AskOptions().method
            options = AskOptions(method=method, keep=keep, max_tokens=MAX_TOKENS, exit_at=exit_at)
            return pipeline.ask(picture, question, options)  # noqa: B023 - called within the turn

        look = pipeline.look(picture, question, MAX_TOKENS, method=AskOptions().method)
        answers = {FULL: ask(None), **{label(keep): ask(keep) for keep in KEEPS}}
        guided = answers[label(KEEPS[0])].ms
        assert look.score is not None
        entry = {
            "kind": row["type"],
            "confidence": look.score.confidence,
            "consistency": look.score.consistency,
            "whole": look.answer.finish == "stop",
            "right": {GUIDE: same_answer(look.answer.text, want)},
            "flops": {GUIDE: _guide_flops(small, look)},
            "ms": {GUIDE: sum(guided[s] for s in ("guide_encode", "guide_prefill", "guide_decode"))},
        }
        for name, answer in answers.items():
            said = answer.tokens.generated
            entry["right"][name] = same_answer(answer.text, want)
            entry["flops"][name] = large.flops(answer.tokens.prompt, said, said + 1)
            entry["ms"][name] = sum(answer.ms[s] for s in ("encode", "prefill", "decode"))
        found.append(entry)
        if number < CHECKED:
            real = ask(KEEPS[0], threshold)
            out = exits(look.score, threshold, look.answer.finish)
            text = look.answer.text.strip() if out else answers[label(KEEPS[0])].text
            if (real.answered_by, real.text) != ("guide" if out else "model", text):
                wrong.append(f"question {number} came out as {real.text!r} by the {real.answered_by}, wanted {text!r}")
        _tell(number + 1, len(rows))
    return _stacked(found), wrong


def _stacked(found: Sequence[dict[str, Any]]) -> Shown:
    def column(name: str) -> Values:
        return np.array([entry[name] for entry in found])

    def columns(name: str) -> dict[str, Values]:
        return {row: np.array([entry[name][row] for entry in found]) for row in found[0][name]}

    return Shown(column("kind"), column("confidence"), column("consistency"), column("whole"),
                 columns("right"), columns("flops"), columns("ms"))  # fmt: skip


def _tell(done: int, of: int) -> None:
    if done % 100 == 0:
        print(f"{done} of {of}", file=sys.stderr)


def curves(shown: Shown) -> dict[str, list[Point]]:
    signs = {
        "confidence": shown.confidence,
        "consistency": shown.consistency,
        "both": (shown.confidence + shown.consistency) / 2,
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
    """Accuracy in all and by type, share exited, FLOPs and time against the model alone."""
    rows = {FULL: (shown.right[FULL], shown.flops[FULL], shown.ms[FULL], 0.0)}
    rows[GUIDE] = (shown.right[GUIDE], shown.flops[GUIDE], shown.ms[GUIDE], 1.0)
    for keep in map(label, KEEPS):
        rows[f"no exit, {keep}"] = (*shown.cascade(keep, None), 0.0)
        rows[f"cascade, {keep}"] = (*shown.cascade(keep, threshold), float(shown.exited(threshold).mean()))
    kinds = sorted(set(shown.kinds))
    lines = [f"{'':14s}{'all':>7s}{'exit':>7s}{'FLOPs':>7s}{'time':>7s}" + "".join(f"{k:>10s}" for k in kinds)]
    for name, (right, flops, ms, share) in rows.items():
        cells = "".join(f"{100 * right[shown.kinds == k].mean():10.1f}" for k in kinds)
        ratios = f"{flops.sum() / shown.flops[FULL].sum():7.2f}{ms.sum() / shown.ms[FULL].sum():7.2f}"
        lines.append(f"{name:14s}{100 * right.mean():7.1f}{share:7.0%}{ratios}{cells}")
    return "\n".join(lines)


def best(shown: Shown, keep: str) -> str:
    """The point of the curve where most questions exit and at most one point is lost, or the least is."""
    tried = np.unique(((shown.confidence + shown.consistency) / 2)[shown.whole])
    points = [(float(shown.exited(t).mean()), shown.loss(shown.cascade(keep, t)[0]), float(t)) for t in tried]
    good = [p for p in points if p[1] <= 1]
    if not points:
        return "no answer of the guide may exit"
    share, loss, at = max(good) if good else min(points, key=lambda p: (p[1], -p[0]))
    return (
        f"{share:.0%} exit at {at:.4f} with a loss of {loss:+.2f} points; with no exit it is {_unexited(shown, keep)}"
    )


def _unexited(shown: Shown, keep: str) -> str:
    return f"{shown.loss(shown.right[keep]):+.2f}"


def misses(shown: Shown, threshold: float | None) -> list[str]:
    """Targets that are not reached, in words."""
    out: list[str] = []

    def want(ok: bool, text: str) -> None:
        if not ok:
            out.append(text)

    share = float(shown.exited(threshold).mean())
    want(share >= 0.4, f"{share:.0%} of the questions exit, wanted 40 %")
    for keep in map(label, KEEPS):
        loss = shown.loss(shown.cascade(keep, threshold)[0])
        want(loss <= 1, f"cascade at {keep} loses {loss:.2f} points, wanted 1 (best point: {best(shown, keep)})")
    right = shown.cascade(label(KEEPS[0]), threshold)[0]
    losses = {kind: shown.loss(right, kind) for kind in sorted(set(shown.kinds))}
    worst = max(losses, key=lambda k: losses[k])
    want(losses[worst] <= 5, f"'{worst}' loses {losses[worst]:.1f} points at the defaults, wanted 5 at most")
    return out


def run(
    count: int, seeds: Sequence[int], risk: float, threads: int, say: Callable[[str], None] = print
) -> tuple[Shown, float | None, list[str]]:
    """Calibrates on ``count`` scenes of seeds[0] and asks ``count`` of seeds[1]."""
    with (
        tempfile.TemporaryDirectory() as name,
        Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline,
    ):
        folders = [Path(name) / str(seed) for seed in seeds]
        for folder, seed in zip(folders, seeds, strict=True):
            scene_maker.write_set(folder, seed, count)
        examples = read_examples(folders[0] / "data.jsonl")
        scores, wrong = judge(pipeline, examples, AskOptions().method, MAX_TOKENS, lambda n: _tell(n, count))
        point = choose(risk_curve(scores, wrong), risk)
        threshold = None if point is None else point.threshold
        if point is None:
            say(f"seed {seeds[0]}: {count} questions show no threshold with a risk of {risk:.1%} at most")
        else:
            say(f"seed {seeds[0]}: threshold {threshold:.4f} for a risk of {risk:.1%}: {point.share:.0%} exit, "
                f"{point.risk:.1%} of them wrong, at most {point.high:.1%}")  # fmt: skip
        rows = [json.loads(line) for line in (folders[1] / "data.jsonl").read_text().splitlines()]
        shown, mismatched = ask_all(pipeline, rows, folders[1], threshold)
    return shown, threshold, mismatched


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seeds", type=int, nargs=2, default=(20261122, 20261123), help="to calibrate on, to show")
    parser.add_argument("--risk", type=float, default=0.05, help="wanted risk of the answers that exit")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path, help="where to write what every question gave")
    args = parser.parse_args(argv)
    shown, threshold, missed = run(args.count, args.seeds, args.risk, args.threads)
    print(f"\nseed {args.seeds[1]}, {args.count} questions: share of wrong answers among those that exit")
    print(curve_table(shown))
    print(
        "\nexact match in %; LLM FLOPs and time (guide and model, towers too; loading apart) as a share of the model's"
    )
    print(table(shown, threshold))
    for keep in map(label, KEEPS):
        print(f"best point at {keep}: {best(shown, keep)}")
    if args.json:
        plain = {k: v if isinstance(v, dict) else {"": v} for k, v in vars(shown).items()}
        args.json.write_text(json.dumps({k: {r: a.tolist() for r, a in v.items()} for k, v in plain.items()}))
    missed += misses(shown, threshold)
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
