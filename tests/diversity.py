"""Whether kept tokens should also differ from each other: attention alone against attention times diversity.

    python -m tests.diversity [--count 300] [--seed 20261125] [--work FOLDER]

Each way picks as many tokens from the guide's attention (`sgl+`) and from how alike the model's projected image rows
are; each answer is a real prefill. Prints exact match in % and differences to the attention alone (paired, 95 %).
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import ImagePart, LoadOptions
from localvlm.pipeline import AskOptions, Pipeline
from localvlm.pruning import method_named, share_of
from localvlm.pruning.base import top
from tests.kept import Kept, weights
from tests.scenes import MAX_TOKENS, Tally, make, normal, say, table

KEEPS = (0.03, 0.05, 0.09, 0.2)
Float64 = NDArray[np.float64]
Pick = Callable[[Float64, Float64, int], list[int]]


def mmr(weight: float) -> Pick:
    """Maximal marginal relevance (Carbonell and Goldstein 1998): relevance against likeness to the nearest chosen."""

    def pick(relevance: Float64, alike: Float64, k: int) -> list[int]:
        nearest = np.zeros(len(relevance))
        return _greedy(lambda: weight * relevance - (1 - weight) * nearest,
                       lambda i: np.maximum(nearest, alike[i], out=nearest), k)  # fmt: skip

    return pick


def facility(relevance: Float64, alike: Float64, k: int) -> list[int]:
    """SCOPE: relevance times what a token adds to how well all tokens are covered."""
    covered = np.zeros(len(relevance))
    return _greedy(lambda: relevance * np.maximum(alike - covered, 0).sum(axis=1),
                   lambda i: np.maximum(covered, alike[i], out=covered), k)  # fmt: skip


def dpp(relevance: Float64, alike: Float64, k: int) -> list[int]:
    """The likeliest set of a determinantal point process with kernel r_i alike_ij r_j (CDPruner), by greedy Cholesky:
    Chen et al., Fast Greedy MAP Inference (1709.05135).
    """
    kernel = relevance[:, None] * alike * relevance[None, :]
    gains, rows = kernel.diagonal().copy(), np.zeros((0, len(relevance)))

    def chosen(i: int) -> None:
        nonlocal rows
        row = (kernel[i] - rows[:, i] @ rows) / np.sqrt(max(gains[i], 1e-12))
        rows = np.vstack([rows, row])
        gains[:] = np.maximum(gains - row**2, 1e-12)

    return _greedy(lambda: gains, chosen, k)


def _greedy(gains: Callable[[], Float64], chosen: Callable[[int], object], k: int) -> list[int]:
    out: list[int] = []
    for _ in range(k):
        left = gains().copy()
        left[out] = -np.inf
        out.append(int(left.argmax()))
        chosen(out[-1])
    return out


WAYS: dict[str, Pick] = {"mmr 0.9": mmr(0.9), "mmr 0.7": mmr(0.7), "dpp": dpp, "facility": facility}


def picked(saliency: NDArray[np.float32], rows: NDArray[np.float32], k: int) -> dict[str, NDArray[np.int32]]:
    """Sorted indices of k tokens by each way; saliency (n,), rows (n, width) of the same tokens."""
    spread = float(np.ptp(saliency)) or 1.0
    relevance = (saliency.astype(np.float64) - saliency.min()) / spread
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    alike = np.maximum(unit @ unit.T, 0).astype(np.float64)
    out = {"attention": top(saliency, np.arange(len(saliency), dtype=np.int32), k)}
    return out | {name: np.sort(pick(relevance, alike, k)).astype(np.int32) for name, pick in WAYS.items()}


def run(rows: Sequence[dict[str, str]], folder: Path, seed: int, threads: int, path: Path) -> Tally:
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        kept = Kept(path, {"seed": seed, "keeps": KEEPS, "ways": [*WAYS], "weights": weights(pipeline.pair)})
        model, method = pipeline.vlm("model"), method_named(AskOptions().method)
        for row in rows[len(kept.found) :]:
            picture = images.load(folder / row["image"])
            look = pipeline.look([picture], row["question"], MAX_TOKENS)
            seen = model.encode(picture.rgb)
            saliency = pipeline.saliency(look, method.aggregation or "sum", [seen.layout])
            features, right = model.embeddings(seen), {}
            assert len(features) == len(saliency)
            for keep in KEEPS:
                for name, tokens in picked(saliency, features, share_of(keep, len(saliency))).items():
                    answer = say(model, row["question"], [ImagePart(seen, tokens)])
                    right[f"{name} {keep:.0%}"] = normal(answer) == normal(row["answer"])
            model.release(seen)
            kept.add({"type": row["type"], "right": right})
    return _tally(kept.found[: len(rows)])


def _tally(found: Sequence[dict[str, Any]]) -> Tally:
    return Tally({name: [e["right"][name] for e in found] for name in found[0]["right"]}, [e["type"] for e in found])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=20261125)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, help="where answers are kept")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        work = args.work or Path(name)
        folder = work / f"{args.seed}-{args.count}"
        rows = [r for r in make(args.count, args.seed, folder) if r["type"] != "describe"]
        tally = run(rows, folder, args.seed, args.threads, work / f"{args.seed}-diversity.jsonl")
    print(f"{args.count} held-out scenes, seed {args.seed}: exact match in %")
    print(table(tally))
    for keep in KEEPS:
        for way in WAYS:
            mean, half = tally.difference(f"{way} {keep:.0%}", f"attention {keep:.0%}")
            print(f"{way} - attention at {keep:.0%}: {mean:+.1f} +- {half:.1f} points")
    return 0


if __name__ == "__main__":
    sys.exit(main())
