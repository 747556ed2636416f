"""From which score a guide's answer may be final: a risk curve over examples, and one threshold kept per pair.

The risk of a threshold is the share of wrong answers among those that exit; an answer is wrong if it is not the label,
or, without labels, not the model's own unpruned answer.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localvlm.catalog import calibrations
from localvlm.config import directories
from localvlm.engine.kept_files import write_private
from localvlm.errors import StorageError, UsageError
from localvlm.json_files import read_json
from localvlm.scoring import plain

if TYPE_CHECKING:
    from localvlm.pipeline import Pair, Pipeline

__all__ = ["Calibration", "Example", "Point", "choose", "clopper_pearson", "fingerprint", "judge", "read_examples",
           "risk_curve", "same_answer", "store", "stored"]  # fmt: skip

LEVEL = 0.95
"""Confidence with which all intervals of a curve hold at once."""
SHARES = tuple(i / 20 for i in range(1, 21))
"""Shares of the questions at which a curve is drawn."""
_EDGE = 1 << 16
"""Bytes from either end of a file that tell its weights from others."""

Bools = NDArray[np.bool_]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Example:
    """A picture's file and a question about it; ``answer`` None: whatever the model says, unpruned."""

    image: str
    question: str
    answer: str | None = None


@dataclass(frozen=True)
class Point:
    """One point of a risk curve: with ``threshold``, ``exited`` questions (``share`` of all) exit, the share ``risk``
    of them wrong; ``low`` and ``high`` bound that share in truth.
    """

    threshold: float
    exited: int
    share: float
    risk: float
    low: float
    high: float


@dataclass(frozen=True)
class Calibration:
    """A threshold and what it was found on."""

    threshold: float
    method: str
    """How the guide's own image was pruned for the consistency."""
    wanted: float
    """The risk asked for."""
    risk: float
    high: float
    share: float
    questions: int
    labelled: bool
    image_tokens: int | None = None
    """Most image tokens of the guide; 0: its family's own bound; None: as many as it looks at if nothing is said."""


# the curve


def clopper_pearson(wrong: int, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Exact two-sided confidence interval of a share of which ``wrong`` in ``n`` were seen."""
    tail = (1 - level) / 2
    low = 0.0 if wrong == 0 else 1 - _upper(n - wrong, n, tail)
    return low, (1.0 if wrong == n else _upper(wrong, n, tail))


def _upper(k: int, n: int, tail: float) -> float:
    """The p at which k or fewer of n have probability ``tail``, by bisection."""
    i = np.arange(k + 1)
    ways = np.array([math.lgamma(n + 1) - math.lgamma(j + 1) - math.lgamma(n - j + 1) for j in range(k + 1)])
    low, high = 0.0, 1.0
    for _ in range(60):
        p = (low + high) / 2
        if float(np.exp(ways + i * math.log(p) + (n - i) * math.log1p(-p)).sum()) > tail:
            low = p
        else:
            high = p
    return high


def risk_curve(scores: Float64, wrong: Bools, shares: Sequence[float] = SHARES) -> list[Point]:
    """Risk against share exited. The intervals hold for all points at once (Bonferroni), so any of them may be chosen.

    Args:
        scores: (n,) combined scores; -inf for answers that may not exit.
        wrong: (n,) whether each answer of the guide is wrong.
        shares: where the curve is drawn.
    """
    ordered = np.sort(scores)[::-1]
    level = 1 - (1 - LEVEL) / len(shares)
    points: dict[float, Point] = {}
    for share in shares:
        threshold = float(ordered[max(1, round(share * len(scores))) - 1])
        if threshold == -math.inf:
            break
        out = scores >= threshold
        n, k = int(out.sum()), int(wrong[out].sum())
        points[threshold] = Point(threshold, n, n / len(scores), k / n, *clopper_pearson(k, n, level))
    return list(points.values())


def choose(curve: Sequence[Point], wanted: float) -> Point | None:
    """The point at which most questions exit with a risk that is surely no more than ``wanted``."""
    return max((p for p in curve if p.high <= wanted), key=lambda p: p.exited, default=None)


# examples


def same_answer(a: str, b: str) -> bool:
    """Whether two answers are the same but for case, punctuation and white space."""
    return plain(a) == plain(b)


def read_examples(path: Path) -> list[Example]:
    """Lines of JSON with ``image`` (relative to the file), ``question`` and, in all lines or in none, ``answer``.

    Raises:
        UsageError: the file cannot be read, or a line is something else.
    """
    hint = 'write {"image": "a.png", "question": "...", "answer": "..."} a line'
    rows = read_json(path, hint)
    found = []
    for number, row in enumerate(rows if rows and isinstance(rows, list) else [rows], 1):
        try:
            image, question, answer = row["image"], row["question"], row.get("answer")
            if not all(isinstance(v, str) for v in (image, question, answer or "")):
                raise TypeError("not text")
        except (TypeError, KeyError, AttributeError) as error:
            raise UsageError(f"entry {number} of '{path}' is not an example", hint) from error
        found.append(Example(str(path.parent / image), question, answer))
    if len({e.answer is None for e in found}) > 1:
        raise UsageError(f"some lines of '{path}' have an answer and some have none", "give all or none")
    return found


def judge(
    pipeline: Pipeline, examples: Sequence[Example], method: str, max_tokens: int, on_done: Callable[[int], None]
) -> tuple[Float64, Bools]:
    """(n,) scores of the guide's answers, -inf where ``max_tokens`` cut one off, and (n,) whether they are wrong.

    ``on_done`` gets the number of examples judged so far. The model is loaded only where an example has no answer.
    """
    from localvlm import images
    from localvlm.pipeline import AskOptions

    scores, wrong = [], []
    for number, example in enumerate(examples, 1):
        picture = [images.load(example.image)]
        look = pipeline.look(picture, example.question, max_tokens, method=method)
        assert look.score is not None
        want = example.answer
        if want is None:
            want = pipeline.ask(picture, example.question, AskOptions(method="none", keep=None)).text
        scores.append(look.score.combined if look.answer.finish == "stop" else -math.inf)
        wrong.append(not same_answer(look.answer.text, want))
        on_done(number)
    return np.array(scores, np.float64), np.array(wrong, np.bool_)


# what is kept


def store(pair: Pair, found: Calibration) -> Path:
    """Keeps the threshold of a pair; returns the file, which is either complete or as it was.

    Raises:
        StorageError: it cannot be written.
    """
    target = _place(_digest(pair, found.method))
    try:
        write_private(target, json.dumps(dataclasses.asdict(found)).encode())
    except OSError as error:
        raise StorageError(f"'{target}' cannot be written: {error.strerror}", "set LOCALVLM_HOME elsewhere") from error
    return target


def stored(pair: Pair, method: str) -> Calibration | None:
    """The threshold kept for a pair, else the one it is bundled with; None if there is neither for these files."""
    try:
        digest = _digest(pair, method)
        place = _place(digest)
        found = Calibration(**(json.loads(place.read_text()) if place.exists() else calibrations()[digest]))
        return found if 0 <= found.threshold <= 1 else None
    except (OSError, ValueError, TypeError, LookupError):
        return None


def _place(digest: str) -> Path:
    return directories().state / "calibration" / f"{digest}.json"


def _digest(pair: Pair, method: str) -> str:
    """What names a method and the weights of a pair, wherever these lie."""
    digest = hashlib.sha256(method.encode())
    for vlm in (pair.guide, pair.model):
        for path in (vlm.model, vlm.mmproj) if vlm is not None else ():
            digest.update(fingerprint(path))
    return digest.hexdigest()[:32]


def fingerprint(path: Path) -> bytes:
    """Size and both ends of a file: enough to tell its weights from others."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        head = file.read(_EDGE)
        file.seek(max(0, size - _EDGE))
        return b"%d;" % size + head + file.read(_EDGE)
