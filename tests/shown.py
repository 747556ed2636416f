"""Accuracy of the demo pair where its guide is shown a share of its image tokens, by method, share and stand-ins.

    python -m tests.shown [--count 500] [--methods divprune fastervlm grid] [--shares 0.66 0.44 0.25] [--fills like]

Methods that know no question choose what the guide is shown. Image tokens that it was not shown score ``like`` the most
similar one that was, as in ``ask --guide-keep``; or as the nearest in the ``place``; or ``zero``. Printed are exact
match in %, and paired differences (95 %) to a guide that is shown all.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import Encoded, ImagePart, LoadOptions, Message, Vlm
from localvlm.guidance import AGGREGATIONS, stand_ins
from localvlm.pipeline import AskOptions, Pipeline
from localvlm.pruning import METHODS, share_of
from localvlm.pruning.base import top
from localvlm.selection import guiding, pick
from localvlm.speaker import parts_of, sight_of
from tests.scenes import MAX_TOKENS, Tally, make, normal, say

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

FILLS = ("like", "place", "zero")
AGGREGATION = AGGREGATIONS[guiding(METHODS[AskOptions().method]).aggregation or "sum"]


def filled(scores: Float32, seen: Int32, features: Float32, boxes: Float32, fill: str) -> Float32:
    """(n,) scores of all tokens, from those (n,) of the tokens ``seen``."""
    if fill == "zero":
        return scores
    if fill == "like":
        of, share = stand_ins(features, seen)
        return np.asarray(scores[of] * share, np.float32)
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    apart = ((centres[:, None] - centres[seen]) ** 2).sum(axis=2)
    return np.asarray(scores[seen[apart.argmin(axis=1)]], np.float32)


def look(guide: Vlm, question: str, encoded: Encoded, seen: Int32 | None) -> tuple[str, Float32]:
    """The guide's answer, and the scores of what it was shown."""
    guide.prefill(parts_of(guide, [Message("user", question, 1)], [encoded], [seen]), tap=True)
    answer = guide.generate(MAX_TOKENS)
    return normal(answer.text), AGGREGATION(guide.attention())


def answers(
    model: Vlm, question: str, encoded: Encoded, scores: Float32, keeps: Sequence[float]
) -> Iterator[tuple[float, str]]:
    """The model's answer from each share of the tokens, those of the highest scores."""
    n = len(scores)
    for keep in keeps:
        kept = top(scores, np.arange(n, dtype=np.int32), share_of(keep, n))
        yield keep, normal(say(model, question, [ImagePart(encoded, kept)]))


def run(rows: Sequence[dict[str, str]], folder: Path, args: argparse.Namespace) -> Tally:
    tally = Tally(types=[row["type"] for row in rows])
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=args.threads)) as pipeline:
        guide, model = pipeline.vlm("guide"), pipeline.vlm("model")
        for number, row in enumerate(rows):
            picture, question, want = images.load(folder / row["image"]), row["question"], normal(row["answer"])
            encoded, target = guide.encode(picture.rgb, tower=True), model.encode(picture.rgb)
            sight = sight_of(guide, [encoded], question, {"features", "tower", "text"})
            boxes = encoded.layout.boxes
            assert boxes is not None
            assert sight.features is not None
            said, scores = look(guide, question, encoded, None)
            tally.add("all", said == want)
            for keep, answer in answers(model, question, target, scores, args.keeps):
                tally.add(f"all, {keep:g}", answer == want)
            for name in args.methods:
                for share in args.shares:
                    shown = pick(METHODS[name], share, [encoded.layout], None, number, sight=sight)[0].index
                    said, scores = look(guide, question, encoded, shown)
                    tally.add(f"{name} {share:g}", said == want)
                    for fill in args.fills:
                        wide = filled(scores, shown, sight.features, boxes, fill)
                        for keep, answer in answers(model, question, target, wide, args.keeps):
                            tally.add(f"{name} {share:g} {fill}, {keep:g}", answer == want)
            guide.release(encoded)
            model.release(target)
    return tally


def table(tally: Tally) -> str:
    """Exact match in %, and the difference to the same row of a guide that is shown all."""
    lines = []
    for name in tally.rows:
        whole = f"all,{name.partition(',')[2]}" if "," in name else "all"
        mean, half = tally.difference(name, whole)
        lines.append(f"{name:32s}{tally.percent(name):7.1f}{mean:+8.1f} +- {half:.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=20261126)
    parser.add_argument("--methods", nargs="+", default=["divprune"])
    parser.add_argument("--shares", nargs="+", type=float, default=[0.66, 0.5, 0.44, 0.33, 0.25])
    parser.add_argument("--fills", nargs="+", choices=FILLS, default=["like"])
    parser.add_argument("--keeps", nargs="+", type=float, default=[0.09, 0.35], help="shares that the model is given")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        rows = [r for r in make(args.count, args.seed, Path(name)) if r["type"] != "describe"]
        tally = run(rows, Path(name), args)
    print(f"{args.count} held-out scenes, seed {args.seed}: exact match in %, and against a guide that is shown all")
    print(table(tally))


if __name__ == "__main__":
    main()
