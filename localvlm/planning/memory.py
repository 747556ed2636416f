"""Rates kept between runs, and how far real answers were off what they told.

One small, private, disposable file for each machine, build and number of threads; written whole or not at all, and one
that cannot be read is as one that is not there. Of two runs that write at a time one may lose what it measured.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import math
import platform
import statistics
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from localvlm.engine.api import LoadOptions
from localvlm.engine.kept_files import keep_file
from localvlm.engine.llama import thread_count
from localvlm.planning.rates import KNOTS, Rates

__all__ = ["RateMemory", "machine"]

MAX_BYTES = 1 << 16
MAX_SEEN = 64
"""Stages of VLMs of which it is kept how far they were off; the oldest go first."""
LATEST, ENOUGH = 9, 3
"""Answers that the median is taken of, at most and at least."""
BOUNDS = 0.5, 2.0
"""Of a correction: beyond, something else was wrong."""


class RateMemory:
    """Rates of one machine in a folder; in memory alone without one.

    Attributes:
        rates: what is known.
    """

    def __init__(self, folder: Path | None, identity: str) -> None:
        name = hashlib.sha256(identity.encode()).hexdigest()[:32]
        self._path = None if folder is None else folder / f"{name}.json"
        self.rates, self._seen = _read(self._path)

    @classmethod
    def of(cls, options: LoadOptions) -> RateMemory:
        """That of this machine as ``options`` use it."""
        return cls(Path(options.cache) / "rates" if options.cache else None, machine(options))

    def add(self, rates: Rates) -> None:
        """Keeps what was sampled, beside what others have."""
        found, self._seen = _read(self._path)
        rows, patch = {**found.rows, **rates.rows}, {**found.patch, **rates.patch}
        self.rates = replace(rates, rows=rows, patch=patch)
        self._write()

    def learn(self, ratios: Mapping[str, float]) -> None:
        """Notes what stages took over what was predicted of them, by a name of VLM and stage."""
        found, seen = _read(self._path)
        if self._path is not None and self._path.exists():
            self.rates, self._seen = found, seen
        for name, ratio in ratios.items():
            if math.isfinite(ratio) and ratio > 0:
                self._seen[name] = [*self._seen.pop(name, []), float(ratio)][-LATEST:]
        self._seen = dict(list(self._seen.items())[-MAX_SEEN:])
        self._write()

    def correction(self, name: str) -> float:
        """What a prediction is multiplied by: the median of the latest answers, 1 where they are few."""
        seen = self._seen.get(name, [])
        return min(max(statistics.median(seen), BOUNDS[0]), BOUNDS[1]) if len(seen) >= ENOUGH else 1.0

    def _write(self) -> None:
        text = json.dumps({"rates": asdict(self.rates), "seen": self._seen})
        if self._path is not None and len(text) <= MAX_BYTES:
            keep_file(self._path, text.encode())


def machine(options: LoadOptions) -> str:
    """All that rates depend on beside shapes: CPU, libraries, threads, type of the KV cache."""
    try:
        build = version("llama-cpp-python")
    except PackageNotFoundError:
        build = ""
    about = [_cpu(), build, _libraries(), thread_count(options), options.kv_type, KNOTS]
    return json.dumps(about)


def _cpu() -> list[str]:
    found = [platform.machine()]
    with contextlib.suppress(OSError, UnicodeDecodeError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        for key in ("model name", "flags", "Features"):
            found += [line.partition(":")[2] for line in lines if line.startswith(key)][:1]
    return found


def _libraries() -> list[tuple[str, int, int]]:
    """Name, size and time of llama.cpp's libraries, without loading them."""
    with contextlib.suppress(OSError, ImportError, ValueError):
        spec = importlib.util.find_spec("llama_cpp")
        if spec is not None and spec.origin:
            paths = sorted((Path(spec.origin).parent / "lib").glob("*ggml*"))
            return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths]
    return []


def _read(path: Path | None) -> tuple[Rates, dict[str, list[float]]]:
    try:
        if path is None or not path.is_file() or path.stat().st_size > MAX_BYTES:
            return Rates(), {}
        content = json.loads(path.read_bytes())
        return _checked(content["rates"]), {str(k): _positive(v, None) for k, v in content["seen"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return Rates(), {}


def _checked(content: dict[str, Any]) -> Rates:
    """Rates as they were written.

    Raises:
        ValueError, TypeError, LookupError: they are something else.
    """
    cell = _positive(content["cell"], 2)
    return Rates(
        rows={str(kind): tuple(_positive(known, len(KNOTS))) for kind, known in content["rows"].items()},
        patch={str(kind): _positive([known], 1)[0] for kind, known in content["patch"].items()},
        cell=(cell[0], cell[1]),
        **{name: _positive([content[name]], 1)[0] for name in ("pair", "layer", "step", "tile", "load")},
    )


def _positive(values: Any, n: int | None) -> list[float]:
    if not isinstance(values, list) or not all(isinstance(v, float) and math.isfinite(v) and v >= 0 for v in values):
        raise ValueError("no rates")
    if n is not None and len(values) != n:
        raise ValueError("too few or too many rates")
    return values
