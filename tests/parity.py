"""Compares localvlm with llama.cpp's own multimodal helper: ``python -m tests.parity [NAME ...] [--images N]``.

With nothing pruned and llama.cpp's own tower and tiles (``--method none --keep all --stock-tower --stock-tiling``),
localvlm must give the greedy answer of ``mtmd_helper_eval_chunks`` on the same GGUF files and pixels, token for token.
Its side runs in a process of its own over raw ctypes (``localvlm/engine/stock.py``), ours through
:class:`localvlm.pipeline.Pipeline`; both with one thread, the same context and batch sizes. Subjects are the zoo (noise
and drawn rectangles of all shapes) and the demo pair (its held-out scenes), each VLM by itself. Prints how many answers
are equal and, for those that are not, where they part and by how much the best logit led there. Leaves with 1 on a
difference.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.catalog import DEMO, as_pair, entries
from localvlm.engine.api import Engine, LoadOptions, Message, TextPart
from localvlm.engine.stock import MARKER, StockProcess
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from tests import zoo

__all__ = ["Parity", "Question", "Subject", "compare", "demo_subjects", "main", "zoo_subject"]

RGB = NDArray[np.uint8]
TOKENS = 16
N_CTX = 1024
WORDS = ("what is the thing in red?", "how many?", "is the left one larger than the other?", "read the text")


@dataclass(frozen=True)
class Question:
    """Pictures (each (height, width, 3) uint8) and a question about them."""

    images: tuple[RGB, ...]
    text: str


@dataclass(frozen=True)
class Subject:
    """One VLM and what it is asked."""

    name: str
    files: VlmFiles
    questions: tuple[Question, ...]


@dataclass
class Parity:
    """Answers that are equal, and a line for each that is not. ``answers`` are llama.cpp's different ones: many, if
    the pictures matter."""

    subject: str
    asked: int = 0
    equal: int = 0
    tokens: int = 0
    answers: set[tuple[int, ...]] = field(default_factory=set)
    differences: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.equal == self.asked


def _noise(random: np.random.RandomState, width: int, height: int) -> RGB:
    return random.randint(0, 256, (height, width, 3)).astype(np.uint8)


def _rectangles(random: np.random.RandomState, width: int, height: int) -> RGB:
    image = np.full((height, width, 3), random.randint(0, 256, 3), np.uint8)
    for _ in range(random.randint(1, 7)):
        x, y = random.randint(0, width), random.randint(0, height)
        w, h = random.randint(1, width + 1), random.randint(1, height + 1)
        image[y : y + h, x : x + w] = random.randint(0, 256, 3)
    return image


def pictures(n: int, seed: int, largest: int = 320) -> Iterator[RGB]:
    """``n`` seeded pictures of all shapes: noise and rectangles in turn, sides from 20 pixels on, 1:6 to 6:1."""
    random = np.random.RandomState(seed)
    for i in range(n):
        long = random.randint(60, largest + 1)
        short = max(20, round(long / random.uniform(1, 6)))
        width, height = (long, short) if random.randint(2) else (short, long)
        yield (_rectangles if i % 2 else _noise)(random, width, height)


def zoo_subject(name: str, directory: Path, n: int) -> Subject:
    """A family of the zoo and ``n`` questions; every tenth has two pictures."""
    model = zoo.build(name, directory)
    images = list(pictures(n + n // 10 + 1, seed=50))
    questions = []
    for i in range(n):
        extra = (images[n + i // 10],) if i % 10 == 9 else ()
        questions.append(Question((images[i], *extra), WORDS[i % len(WORDS)]))
    return Subject(name, VlmFiles(model.model, model.mmproj), tuple(questions))


def demo_subjects(n: int, directory: Path) -> list[Subject]:
    """The demo pair's guide and model on ``n`` held-out scenes; empty if the files are not there."""
    entry = next(e for e in entries() if e.name == DEMO)
    if entry.lacking:
        return []
    from PIL import Image as Pillow

    from localvlm.models.demo.scenes import write_set

    write_set(directory, seed=7, count=n)
    questions = []
    for line in (directory / "data.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with Pillow.open(directory / row["image"]) as picture:
            questions.append(Question((np.array(picture.convert("RGB")),), row["question"]))
    pair = as_pair(entry.name, entry.files)
    files = {"guide": pair.guide, "model": pair.model}
    return [Subject(f"demo {role}", f, tuple(questions)) for role, f in files.items() if f is not None]


def compare(subject: Subject, engine: Engine, directory: Path) -> Parity:
    """Asks both sides every question."""
    options = LoadOptions(n_ctx=N_CTX, threads=1, stock_tower=True, stock_tiling=True)
    pipeline = Pipeline(Pair(subject.name, None, subject.files), engine, model=options)
    ask = AskOptions(method="none", keep=None, max_tokens=TOKENS)
    parity = Parity(subject.name)
    vlm = pipeline.vlm("model")
    with StockProcess(subject.files.model, subject.files.mmproj, directory, N_CTX) as stock:
        for number, question in enumerate(subject.questions):
            images = [Image(rgb, f"picture {number}") for rgb in question.images]
            ours = list(pipeline.ask(images, question.text, ask).answer_ids)
            parts = vlm.chat([Message("user", question.text, len(images))])
            prompt = "".join(p.text if isinstance(p, TextPart) else MARKER for p in parts)
            theirs, margins = stock.ask(prompt, question.images, TOKENS)
            parity.asked += 1
            parity.equal += ours == theirs
            parity.tokens += len(theirs)
            parity.answers.add(tuple(theirs))
            if ours != theirs:
                at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
                at = min(len(ours), len(theirs)) if at is None else at
                margin = margins[min(at, len(margins) - 1)]
                size = "x".join(map(str, question.images[0].shape[1::-1]))
                parity.differences.append(
                    f"question {number} ({size}): from token {at} on, {ours[at : at + 3]} against "
                    f"{theirs[at : at + 3]}; the best logit led by {margin:.4f}"
                )
    vlm.close()
    return parity


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="parity", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--images", type=int, default=50, metavar="N", help="questions per VLM (default 50)")
    known = [*zoo.FAMILIES, "demo"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(known)}; default all")
    parser.add_argument("--all", action="store_true", help="all of them")
    args = parser.parse_args(arguments)
    names = known if args.all or not args.names else args.names
    if unknown := set(names) - set(known):
        parser.error(f"unknown name {sorted(unknown)[0]!r}; known are {', '.join(known)}")
    from localvlm.engine.client import Engine as LlamaEngine

    bad = 0
    with tempfile.TemporaryDirectory() as folder, LlamaEngine() as engine:
        directory = Path(folder)
        subjects = [zoo_subject(name, directory, args.images) for name in names if name != "demo"]
        if "demo" in names:
            demo = demo_subjects(args.images, directory / "demo")
            if not demo:
                print("demo: skipped, its files are not there")
            subjects += demo
        for subject in subjects:
            parity = compare(subject, engine, directory)
            print(
                f"{parity.subject}: {parity.equal} of {parity.asked} answers equal "
                f"({parity.tokens} tokens, {len(parity.answers)} different answers)",
                flush=True,
            )
            print("".join(f"  {line}\n" for line in parity.differences), end="")
            bad += not parity.ok
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
