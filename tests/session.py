"""Conversations: pictures are encoded once, nothing is mixed up, and 20 turns cost no more than with the model alone.

    python -m tests.session [--scenes 20] [--seed 20261125] [--threads 0] [--only same rows time]

Prints its figures and exits non-zero when a target is missed. "Plain" is the model alone with all image tokens, which
keeps its KV cache between turns, as llama.cpp's server does.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.bench.shapes import Llm, VlmShape, write_vlm
from localvlm.bench.towers import Tower
from localvlm.catalog import pair_named
from localvlm.engine.api import LoadOptions
from localvlm.given import Given
from localvlm.images import Image
from localvlm.models.demo import questions, scenes, world
from localvlm.pipeline import Answer, AskOptions, Pair, Pipeline, Session, VlmFiles
from tests import zoo
from tests.asking import picture
from tests.scenes import normal

TURNS = (1, 2, 5, 10, 20)
ZOO = ("llava15", "qwen25vl", "gemma3")
PLAIN = AskOptions("none", None)
MAX_TOKENS = 12
NOISE = 0.03
"""Of a ratio of times."""
TOWER = Tower("clip", 2, 256, 4, 1024, 336, 14)
GUIDE = VlmShape("guide-0.11b", Llm("llama", 16, 640, 10, 2, 1728, 32_000), TOWER, "Q8_0")
MODEL = VlmShape("model-1.2b", Llm("llama", 24, 2048, 16, 4, 5632, 32_000), TOWER, "Q4_0")
TIMED_TOKENS = 8


@dataclass(frozen=True)
class Scene:
    """A held-out picture with questions and their right answers."""

    image: Image
    asked: tuple[tuple[str, str], ...]


def held_out(count: int, seed: int, turns: int) -> list[Scene]:
    out = []
    for index in range(count):
        rng = world.scene_rng(world.Stream.HELD_OUT, seed, index)
        scene = world.sample_scene(rng)
        drawn = np.ascontiguousarray(np.asarray(scenes.draw_scene(scene).convert("RGB")))
        kinds = (str(kind) for _ in range(turns) for kind in rng.permutation(list(questions.TYPES)))
        found = (questions.question_for(kind, scene, rng, i) for i, kind in enumerate(kinds))
        asked = [(turn.question, normal(turn.answer)) for turn in islice(filter(None, found), turns)]
        out.append(Scene(Image(drawn, f"scene {index}"), tuple(asked)))
    return out


class Free(Session):
    """Looks and adds whatever that costs."""

    def _room(self, counts: Sequence[int], more: float = 0.0) -> float:
        del more
        return float(sum(counts))


class Rebuilt(Free):
    """Prefills all rows anew, image tokens in order, when a question wants others."""

    def _chosen(self, *args: object) -> Given:
        given = super()._chosen(*args)  # type: ignore[arg-type]
        return given.more(len(self.turns), [np.zeros(0, np.int32)] * len(given.attended), in_order=True)


# one by one


class Counted:
    """How often pictures are encoded."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.calls: dict[str, int] = {}
        for role in ("guide", "model"):
            vlm = pipeline.vlm(role)
            vlm.encode = self._counting(role, vlm.encode)  # type: ignore[method-assign]

    def _counting(self, role: str, encode: Callable[..., object]) -> Callable[..., object]:
        def counted(*args: object, **options: object) -> object:
            self.calls[role] = self.calls.get(role, 0) + 1
            return encode(*args, **options)

        return counted


def told(answer: Answer) -> tuple[object, ...]:
    """What two runs of a question must agree in."""
    return answer.answer_ids, answer.kept_indices, answer.score, answer.answered_by


def same(pipeline: Pipeline, shown: Sequence[Image], asked: Sequence[str], options: AskOptions) -> tuple[int, int]:
    """(questions, those answered as in a run of their own). Two pictures take turns, each in a session of its own."""
    apart = [[told(pipeline.ask([image], q, options)) for q in asked] for image in shown]
    counted, hits, open_ones = Counted(pipeline), 0, [pipeline.session([i], history=False) for i in shown]
    for k, question in enumerate(asked):
        for j, session in enumerate(open_ones):
            hits += told(session.ask(question, options)) == apart[j][k]
    for session in open_ones:
        session.close()
    if counted.calls != dict.fromkeys(counted.calls, len(shown)):
        return len(shown) * len(asked), 0
    return len(shown) * len(asked), hits


def all_same(found: Sequence[Scene], folder: Path, threads: int) -> Iterator[tuple[str, int, int]]:
    for name, options in (("pruned", AskOptions(keep=0.35, max_tokens=MAX_TOKENS)), ("all tokens", PLAIN)):
        total = right = 0
        with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
            for one, two in zip(found[::2], found[1::2], strict=False):
                n, hits = same(pipeline, [one.image, two.image], [q for q, _ in one.asked[:5]], options)
                total, right = total + n, right + hits
        yield f"demo, {name}", total, right
    shown = [Image(picture(seed=s), "noise") for s in (1, 2)]
    asked = ["what is the thing in red?", "where?", "what?"]
    for family in ZOO:
        guide, model = (VlmFiles(m.model, m.mmproj) for m in _zoo_pair(family, folder))
        for layer in (0, 1):
            with Pipeline.open(Pair(family, guide, model), LoadOptions(threads=1)) as pipeline:
                options = AskOptions("sgl", 0.3, 6, layer=layer)
                yield f"{family}, layer {layer}", *same(pipeline, shown, asked, options)


def _zoo_pair(family: str, folder: Path) -> tuple[zoo.ZooModel, zoo.ZooModel]:
    if family in zoo.LARGE:
        return zoo.pair(folder, family)
    return zoo.build(family, folder), zoo.build(family, folder)


# 20 turns


def converse(make: Callable[[], Session], scene: Scene, options: AskOptions, turns: int) -> list[Answer]:
    with make() as session:
        return [session.ask(question, options) for question, _ in scene.asked[:turns]]


def modes(pipeline: Pipeline, keep: float, max_tokens: int) -> dict[str, tuple[Callable[[Image], Session], AskOptions]]:
    pruned = AskOptions(keep=keep, max_tokens=max_tokens)
    return {
        "plain": (lambda i: pipeline.session([i]), AskOptions("none", None, max_tokens)),
        "independent": (lambda i: pipeline.session([i], history=False), pruned),
        "history": (lambda i: pipeline.session([i]), pruned),
        "whatever it costs": (lambda i: Free(pipeline, [i]), pruned),
        "  rebuilt in order": (lambda i: Rebuilt(pipeline, [i]), pruned),
    }


def rows(found: Sequence[Scene], keep: float, threads: int) -> dict[str, NDArray[np.float64]]:
    """(turns, 2) mean rows that guide and model have prefilled after each turn, and accuracy of each turn."""
    out: dict[str, NDArray[np.float64]] = {}
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        for name, (make, options) in modes(pipeline, keep, MAX_TOKENS).items():
            ran, right = [], []
            for scene in found:
                answers = converse(lambda make=make, scene=scene: make(scene.image), scene, options, max(TURNS))
                ran.append(np.cumsum([a.ran for a in answers], axis=0))
                wanted = [want for _, want in scene.asked]
                right.append([normal(a.text) == w for a, w in zip(answers, wanted, strict=False)])
            out[name] = np.concatenate([np.mean(ran, axis=0), np.mean(right, axis=0)[:, None]], axis=1)
    return out


# time


def timed(folder: Path, threads: int, rounds: int) -> dict[str, dict[int, float]]:
    """Median ratio of cumulative times to plain's, by mode and turns, of rounds in alternation; loading left out. The
    independent ones, which take longest, are timed once.
    """
    files = [VlmFiles(*write_vlm(folder, shape)) for shape in (GUIDE, MODEL)]
    rng = np.random.default_rng(0)
    asked = tuple((f"what is {i:2d} in red?", "") for i in range(max(TURNS)))
    ratios: dict[str, list[NDArray[np.float64]]] = {}
    with Pipeline.open(Pair("timed", *files), LoadOptions(threads=threads)) as pipeline:
        chosen = modes(pipeline, 0.35, TIMED_TOKENS)
        for number in range(rounds + 1):
            scene = Scene(Image(rng.integers(0, 256, (336, 336, 3), dtype=np.uint8), "noise"), asked)
            seconds = {}
            names = ["plain", "history", *(["independent"] if number == 1 else [])]
            for name in names if number % 2 else names[::-1]:
                make, options = chosen[name]
                turns = max(TURNS) if number else 2
                answers = converse(lambda make=make, scene=scene: make(scene.image), scene, options, turns)
                seconds[name] = np.cumsum([a.ms["total"] - a.ms["load"] for a in answers])
            if number:  # the first one warms up, and checks the tap
                for name, ms in seconds.items():
                    ratios.setdefault(name, []).append(ms / seconds["plain"])
    return {n: {t: statistics.median(r[t - 1] for r in found) for t in TURNS} for n, found in ratios.items()}


# figures


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="session", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--scenes", type=int, default=20)
    parser.add_argument("--seed", type=int, default=20261125)
    parser.add_argument("--keep", type=float, default=0.2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3, help="of the timed conversations")
    parser.add_argument("--work", type=Path, help="keeps the timed models there")
    parser.add_argument("--only", nargs="+", choices=("same", "rows", "time"), default=["same", "rows", "time"])
    args = parser.parse_args(argv)
    missed: list[str] = []
    found = held_out(args.scenes, args.seed, max(TURNS))
    with tempfile.TemporaryDirectory() as name:
        if "same" in args.only:
            print("independent turns, as in runs of their own, each picture encoded once for each VLM")
            for label, n, hits in all_same(found, Path(name), args.threads):
                print(f"  {label:24s}{hits:5d} of {n}", flush=True)
                missed += [f"{label}: {n - hits} of {n} differ"] * (hits < n)
        if "rows" in args.only:
            missed += print_rows(rows(found, args.keep, args.threads), args.scenes, args.keep)
        if "time" in args.only:
            missed += print_times(timed(args.work or Path(name), args.threads, args.rounds))
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


def print_rows(found: dict[str, NDArray[np.float64]], count: int, keep: float) -> list[str]:
    """Prints the table; what is missed."""
    print(f"\ndemo pair, {count} scenes, keep {keep}: rows prefilled up to a turn, guide + model; exact match in %")
    print(f"{'':18s}" + "".join(f"{f'turn {t}':>14s}" for t in TURNS) + f"{'turn 1':>9s}{'2-5':>7s}{'6-20':>7s}")
    for name, table in found.items():
        cells = "".join(f"{table[t - 1, 0]:7.0f} +{table[t - 1, 1]:5.0f}" for t in TURNS)
        shares = (100 * table[0, 2], 100 * table[1:5, 2].mean(), 100 * table[5:, 2].mean())
        print(f"{name:18s}{cells}{shares[0]:9.1f}{shares[1]:7.1f}{shares[2]:7.1f}")
    over = [t for t in range(max(TURNS)) if found["history"][t, 1] > found["plain"][t, 1]]
    return [f"history: more rows of the model than plain at turn {t + 1}" for t in over[:1]]


def print_times(ratios: dict[str, dict[int, float]]) -> list[str]:
    """Prints the curve; what is missed."""
    print(f"\ncumulative time over plain's, {GUIDE.name} and {MODEL.name}, 576 image tokens, keep 0.35")
    for name, curve in ratios.items():
        print(f"{name:18s}" + "".join(f"{f'turn {t}':>9s}{r:6.2f}" for t, r in curve.items()))
    return [f"history: {r:.2f} of plain's time at turn {t}" for t, r in ratios["history"].items() if r > 1 + NOISE]


if __name__ == "__main__":
    sys.exit(main())
