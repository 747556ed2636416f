"""Answers along a draft against those without one: ``python -m tests.draft [--count N]``.

- demo: the guide's answer drafts the model's, on held-out scenes, half of them to be described (longer answers), and
  the whole way of ``ask``, pruning included; some also as the one question of a process of its own, which goes by what
  processes before it measured;
- pairs of the zoo: random weights, so flat logits. The guide's answer is hardly ever accepted there; so the model's own
  answer is a draft too, whole, and wrong from a drawn token on. Prompts of more than 512 cells, over which a single row
  and a batch go through kernels of their own, and others; one thread and two, between which these kernels differ.

Each question is answered with and without, in turns, on one loaded model. Shown are the questions, those answered with
the same tokens, the drafted tokens that were accepted (for the demo the guide's end among them), and the time of all
decoding without a draft over that with one. Leaves with 1 if an answer differs, or if an expected case did not occur.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import Completion, Engine, ImagePart, LoadOptions, Message, Part, TextPart, Vlm
from localvlm.engine.client import Engine as LlamaEngine
from localvlm.pipeline import Answer, AskOptions, Pipeline
from tests import scenes, zoo

ALONE = 20
"""Questions that have a process each."""
MAX_TOKENS = 32
ZOO = ("llava15", "qwen25vl")
LONG = 512
"""Cells from which llama.cpp's flash attention on a CPU has a kernel of its own for a single row."""


@dataclass
class Tally:
    """What one row of the table counts."""

    name: str
    questions: int = 0
    same: int = 0
    long: int = 0
    """Questions over LONG cells."""
    drafted: int = 0
    accepted: int = 0
    plain_ms: float = 0.0
    draft_ms: float = 0.0

    def add(self, same: bool, cells: int, drafted: int, accepted: int, plain_ms: float, draft_ms: float) -> None:
        self.questions += 1
        self.same += same
        self.long += cells > LONG
        self.drafted += drafted
        self.accepted += accepted
        self.plain_ms += plain_ms
        self.draft_ms += draft_ms

    def __str__(self) -> str:
        share = self.accepted / self.drafted if self.drafted else 0.0
        speed = self.plain_ms / self.draft_ms if self.draft_ms else 0.0
        verdict = "ok" if self.same == self.questions else "MISS"
        return (
            f"{self.name:34s}{self.same:6d} of {self.questions:<6d}{self.long:6d}{share:10.1%}{speed:9.2f}  {verdict}"
        )


def _generate(vlm: Vlm, parts: Sequence[Part], draft: Completion | None) -> Completion:
    vlm.prefill(parts)
    return vlm.generate(MAX_TOKENS, draft=None if draft is None else draft.ids)


def _wrong(plain: Completion, rng: np.random.Generator, n_vocab: int) -> Completion:
    """The answer with other tokens from a drawn one on."""
    ids = plain.ids.copy()
    start = int(rng.integers(len(ids))) if len(ids) else 0
    ids[start:] = (ids[start:] + rng.integers(1, n_vocab, len(ids) - start)) % n_vocab
    return Completion(plain.text, ids.astype(np.int32), plain.logprobs, plain.finish, 0.0, 0.0, 0)


def _parts(vlm: Vlm, pixels: np.ndarray, question: str) -> list[Part]:
    image = vlm.encode(pixels)
    return [p if isinstance(p, TextPart) else ImagePart(image) for p in vlm.chat([Message("user", question, 1)])]


def run_zoo(engine: Engine, folder: Path, family: str, threads: int, count: int) -> Iterator[Tally]:
    """Three rows for a pair of the zoo: drafts of the guide, of the model itself, and wrong ones."""
    options = LoadOptions(threads=threads)
    guide, model = (engine.load(m.model, m.mmproj, options) for m in zoo.pair(folder, family))
    assert guide.info.vocab_hash == model.info.vocab_hash
    tallies = [Tally(f"{family}, {threads} threads, {kind}") for kind in ("guide's", "its own", "wrong")]
    for number in range(count):
        rng = np.random.default_rng([number, threads])
        pixels = rng.integers(0, 256, (56, 84, 3), dtype=np.uint8)
        question = "what is " * int(rng.integers(1, 220))
        looked = _parts(guide, pixels, question)
        guess = _generate(guide, looked, None)
        parts = _parts(model, pixels, question)
        cells = model.prefill(parts).n_past
        own = model.generate(MAX_TOKENS)
        for tally, draft in zip(tallies, (guess, own, _wrong(own, rng, model.info.n_vocab)), strict=True):
            plain, drafted = _in_turns(model, parts, draft, number % 2 == 0)
            same = plain.ids.tolist() == drafted.ids.tolist() and plain.finish == drafted.finish
            tally.add(same, cells, drafted.drafted, drafted.accepted, plain.ms, drafted.ms)
        for vlm, prompt in ((guide, looked), (model, parts)):
            for part in prompt:
                if isinstance(part, ImagePart):
                    vlm.release(part.image)
    guide.close()
    model.close()
    yield from tallies


def _in_turns(vlm: Vlm, parts: Sequence[Part], draft: Completion, first: bool) -> tuple[Completion, Completion]:
    if first:
        plain = _generate(vlm, parts, None)
        return plain, _generate(vlm, parts, draft)
    drafted = _generate(vlm, parts, draft)
    return _generate(vlm, parts, None), drafted


def run_demo(rows: Sequence[dict[str, str]], folder: Path, threads: int = 0) -> Tally:
    """``ask`` with and without the guide's draft on held-out scenes."""
    tally = Tally("demo, guide's")
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline:
        for number, row in enumerate(rows):
            order = (False, None) if number % 2 else (None, False)
            found = {draft: _ask(pipeline, row, folder, draft) for draft in order}
            _compare(tally, found[False], found[None])
    return tally


def run_alone(rows: Sequence[dict[str, str]], folder: Path, threads: int = 0) -> Tally:
    """The same, each time in a new process that knows what those before it measured, in other questions too."""
    tally = Tally("demo, one question a process")
    options = LoadOptions(threads=threads, cache=str(folder / "cache"))

    def ask(row: dict[str, str], draft: bool | None) -> Answer:
        with Pipeline.open(pair_named("demo"), options) as pipeline:
            return _ask(pipeline, row, folder, draft)

    for row in rows[len(rows) // 2 :][:ALONE]:
        ask(row, None)
    for row in rows[:ALONE]:
        _compare(tally, ask(row, False), ask(row, None))
    return tally


def _ask(pipeline: Pipeline, row: dict[str, str], folder: Path, draft: bool | None) -> Answer:
    return pipeline.ask([images.load(folder / row["image"])], row["question"], AskOptions(draft=draft))


def _compare(tally: Tally, plain: Answer, drafted: Answer) -> None:
    same = (plain.answer_ids, plain.finish) == (drafted.answer_ids, drafted.finish)
    tokens = drafted.tokens
    tally.add(same, tokens.prompt, tokens.drafted, tokens.accepted, plain.ms["decode"], drafted.ms["decode"])


def misses(tallies: Sequence[Tally]) -> list[str]:
    """What is not as promised, in words."""
    out = [f"{t.name}: {t.questions - t.same} of {t.questions} answers differ" for t in tallies if t.same < t.questions]
    if not any(t.long for t in tallies):
        out.append(f"no prompt was longer than {LONG} cells")
    if not any(t.accepted for t in tallies):
        out.append("no draft was ever accepted")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="draft", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--count", type=int, default=500, metavar="N", help="questions to each pair (default 500)")
    parser.add_argument("--seed", type=int, default=20261122, help="of the demo's scenes")
    args = parser.parse_args(argv)
    tallies: list[Tally] = []
    print(f"{'pair and draft':34s}{'same answer':>16s}{f'>{LONG}':>9s}{'accepted':>10s}{'speed-up':>9s}")
    with tempfile.TemporaryDirectory() as name:
        rows = scenes.make(-(-args.count // 2), args.seed, Path(name))[: args.count]
        for run in (run_demo, run_alone):
            tallies.append(run(rows, Path(name)))
            print(tallies[-1], flush=True)
        with LlamaEngine() as engine:
            for family in ZOO:
                for threads in (1, 2):
                    for tally in run_zoo(engine, Path(name), family, threads, args.count):
                        tallies.append(tally)
                        print(tally, flush=True)
    missed = misses(tallies)
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
