"""What was measured of drafts, kept between runs: a process that answers one question gains from those before it.

A file holds the deviations of one model, cut at the same layers, run in one way: see :func:`identity`. Kernels are
chosen by the shape of a batch and not by its values, so what was measured in another process holds as it does later in
the same one, as long as all that chooses them is the same. It is never held to be so on a GPU: nothing is kept of one.

Files are small, private and disposable: written whole or not at all, the oldest go first, and one that cannot be read
is as one that is not there. Of two runs that write at a time one may lose what it measured, and measures it again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from localvlm.engine.api import LoadOptions
from localvlm.engine.drafts import CELLS, SIZES, Deviations, Measured
from localvlm.engine.gguf_header import Header
from localvlm.engine.kept_files import file_identity, keep_file
from localvlm.engine.llama import describe_backend, thread_count

__all__ = ["DraftMemory", "identity"]

MAX_BYTES = 1 << 16
"""Of a file; one that would outgrow it starts anew."""
MAX_FILES = 64
MAX_CONTEXTS = 64


class DraftMemory:
    """Deviations of one model by where it is cut, in a folder; in memory alone without one."""

    def __init__(self, folder: Path | None, identity: str) -> None:
        self._folder, self._identity = folder, identity
        self._known: dict[tuple[int, ...], Deviations] = {}

    @classmethod
    def of(cls, header: Header, options: LoadOptions) -> DraftMemory:
        """That of a model as it was loaded."""
        if not options.cache or options.gpu_layers:
            return cls(None, "")
        return cls(Path(options.cache) / "drafts", identity(header, options))

    def at(self, cuts: tuple[int, ...]) -> Deviations:
        """Those of prompts that go on in another context at the layers ``cuts``."""
        if cuts not in self._known:
            self._known[cuts] = self._opened(cuts)
        return self._known[cuts]

    def _opened(self, cuts: tuple[int, ...]) -> Deviations:
        if self._folder is None:
            return Deviations()
        name = hashlib.sha256(f"{cuts} {self._identity}".encode()).hexdigest()[:32]
        path = self._folder / f"{name}.json"
        return Deviations(_read(path), lambda measured: _add(path, measured))


def identity(header: Header, options: LoadOptions) -> str:
    """All that chooses the kernels of a model on a CPU, and the file itself: its size, time and header."""
    about = [*file_identity(header), describe_backend(), thread_count(options), options.kv_type]
    return json.dumps(about)


def _read(path: Path) -> dict[Measured, float]:
    try:
        if not path.is_file() or path.stat().st_size > MAX_BYTES:
            return {}
        return dict(_checked(row) for row in json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


def _checked(row: Any) -> tuple[Measured, float]:
    """A row of a file: [cells of each context, rows of the batch, deviation].

    Raises:
        ValueError, TypeError: it is something else.
    """
    cells, size, deviation = row
    whole = all(type(n) is int and n > 0 and n % CELLS == 0 for n in cells)
    if not (whole and 1 <= len(cells) <= MAX_CONTEXTS and size in SIZES and isinstance(deviation, float)):
        raise ValueError("no measurement")
    if not (math.isfinite(deviation) and deviation >= 0):
        raise ValueError("no deviation")
    return (tuple(cells), size), deviation


def _add(path: Path, measured: Mapping[Measured, float]) -> None:
    """Adds what one run knows to what others left; where they differ the larger deviation is the careful one."""
    merged = _read(path)
    for key, deviation in measured.items():
        merged[key] = max(deviation, merged.get(key, 0.0))
    text = json.dumps([[*key, deviation] for key, deviation in merged.items()])
    if len(text) > MAX_BYTES:
        text = json.dumps([[*key, deviation] for key, deviation in list(measured.items())[-1:]])
    keep_file(path, text.encode(), max_files=MAX_FILES)
