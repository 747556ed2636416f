"""How times grow with the image tokens, the answer, the turns and the pictures: plain llama.cpp against ours."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from localvlm.answers import AskOptions
from localvlm.bench.cases import PLAIN, Bench, Case, answer_of, drawn
from localvlm.bench.report import Grown
from localvlm.engine.api import Message
from localvlm.errors import ContextOverflow, EngineCrashed, NotEnoughMemory
from localvlm.images import Image
from localvlm.speaker import parts_of, release

__all__ = ["GROWING", "grow"]

GROWING: dict[str, tuple[int, ...]] = {
    "tokens": (64, 256, 1024, 4096, 16_384),
    "answers": (1, 16, 64, 256),
    "turns": (1, 2, 5, 10, 20),
    "images": (1, 2, 4, 8, 16),
}
"""What grows, and how far."""
NEAR = 1.3
"""A picture is taken for one of n tokens if it has no more than so many times as many, nor as few."""
SPARE = 256
"""Cells of a context that are left for text."""
SIDES = range(28, 4096, 28)
"""Sides of square pictures that are tried, in pixels."""


def grow(
    bench: Bench, what: str, upto: Sequence[int], ours: Sequence[Case], images: Sequence[Image], question: str,
    runs: int, tell: Callable[[str], None],
) -> Iterator[Grown | str]:  # fmt: skip
    """One row for each of ``upto``, or what was left out and why: ``what`` is of GROWING, ``ours`` are cases to hold
    against plain, medians are of ``runs`` in turn, and ``tell`` gets what begins.
    """
    if what == "turns":
        try:
            yield from _turns(bench, upto, ours, images, question, runs, tell)
        except (EngineCrashed, NotEnoughMemory) as error:
            bench.rest()
            yield f"turns: {error.message}"
        return
    for n in upto:
        tell(f"{what} {n}")
        shown = _shown(bench, what, n, images)
        answer = n if what == "answers" else bench.setting.answer
        image = sum(bench.plain.layout(*one.size).n_tokens for one in shown)
        if not shown:
            yield f"tokens {n}: no picture of this family has so many; --image-max-tokens bounds them"
        elif image + answer > bench.plain.info.n_ctx - SPARE:
            yield f"{what} {n}: {image} image tokens do not fit a context of {bench.plain.info.n_ctx}; raise --ctx-size"
        else:
            try:
                with bench.answering(answer):
                    times = _timed(bench, ours, shown, question, runs)
            except (ContextOverflow, EngineCrashed, NotEnoughMemory) as error:
                bench.rest()
                yield f"{what} {n}: {error.message}"
            else:
                yield _row(what, n, image, times)


def _shown(bench: Bench, what: str, n: int, images: Sequence[Image]) -> Sequence[Image]:
    """The pictures that are asked about; none if there are none such."""
    if what == "images":
        return [drawn(*images[0].size, seed=i) for i in range(n)]
    if what != "tokens":
        return images
    tokens = {side: bench.plain.layout(side, side).n_tokens for side in SIDES}
    side = min(tokens, key=lambda s: abs(tokens[s] - n))
    return [drawn(side, side)] if n / NEAR <= tokens[side] <= n * NEAR else []


def _timed(
    bench: Bench, ours: Sequence[Case], images: Sequence[Image], question: str, runs: int
) -> dict[str, list[float]]:
    times = {case.name: list[float]() for case in (PLAIN, *ours)}
    for i in range(runs):
        for case in [PLAIN, *ours][:: 1 if i % 2 == 0 else -1]:
            times[case.name].append(bench.run(case, images, question).total_ms)
    return times


def _row(what: str, n: int, image: int, times: dict[str, list[float]]) -> Grown:
    plain, medians = times[PLAIN.name], {name: statistics.median(ms) for name, ms in times.items()}
    ratios = {
        name: statistics.median(p / o for p, o in zip(plain, ms, strict=True))
        for name, ms in times.items()
        if name != PLAIN.name
    }
    return Grown(what, n, image, medians.pop(PLAIN.name), medians, ratios)


def _turns(
    bench: Bench, upto: Sequence[int], ours: Sequence[Case], images: Sequence[Image], question: str, runs: int,
    tell: Callable[[str], None],
) -> Iterator[Grown | str]:  # fmt: skip
    """Time of all turns of a conversation up to each of ``upto``, with the KV caches of both gone on with, as far as
    all contexts hold them. What random weights say hardly ever comes back to the same tokens, so answers stand in the
    conversation as one text of as many, of which both prefill every row.
    """
    n, found = max(upto), {case.name: list[list[float]]() for case in (PLAIN, *ours)}
    said = answer_of(bench.plain, bench.setting.answer)
    for i in range(runs):
        for case in [PLAIN, *ours][:: 1 if i % 2 == 0 else -1]:
            tell(f"{n} turns of {case.name}")
            talk = _plain_turns if case == PLAIN else _our_turns
            with bench.saying(said):
                found[case.name].append(talk(bench, case, images, question, n))
    image = sum(bench.plain.layout(*image.size).n_tokens for image in images)
    fitted = min(len(ms) for all_ in found.values() for ms in all_)
    for turn in upto:
        if turn <= fitted:
            yield _row("turns", turn, image, {name: [ms[turn - 1] for ms in all_] for name, all_ in found.items()})
        else:
            yield f"turns {turn}: a context is full after {fitted}; raise --ctx-size"


def _plain_turns(bench: Bench, case: Case, images: Sequence[Image], question: str, n: int) -> list[float]:  # noqa: ARG001
    """Milliseconds to the end of each turn that the context has room for."""
    vlm, messages, out = bench.plain, list[Message](), list[float]()
    began = time.perf_counter()
    seen = [vlm.encode(image.rgb) for image in images]
    with contextlib.suppress(ContextOverflow):
        for turn in range(n):
            messages.append(Message("user", _asked(question, turn), 0 if turn else len(images)))
            vlm.prefill(parts_of(vlm, messages, seen), reuse="rows" if turn else "nothing")
            messages.append(Message("assistant", vlm.generate(bench.setting.answer).text or "."))
            out.append((time.perf_counter() - began) * 1e3)
    release(vlm, seen)
    return out


def _our_turns(bench: Bench, case: Case, images: Sequence[Image], question: str, n: int) -> list[float]:
    out = list[float]()
    bench.ours.forget()
    began = time.perf_counter()
    options: AskOptions = replace(bench.options(case), exit_at=None)
    with bench.pipeline().session(images) as session, contextlib.suppress(ContextOverflow):
        for turn in range(n):
            session.ask(_asked(question, turn), options)
            out.append((time.perf_counter() - began) * 1e3)
    return out


def _asked(question: str, turn: int) -> str:
    return f"{turn} {question}"
