"""Lines of results that outlive the run that found them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from localvlm.answers import Pair

__all__ = ["Kept", "weights"]


class Kept:
    """What was found out about each question so far, a line of JSON each.

    Raises:
        SystemExit: the file is of other weights, scenes or options.
    """

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        about = json.loads(json.dumps(about))
        text = path.read_text() if path.exists() else ""
        first, *found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")] or [about]
        if first != about:
            raise SystemExit(f"'{path}' is of other weights, scenes or options; give another --work")
        self.found: list[dict[str, Any]] = found
        path.write_text("".join(json.dumps(line) + "\n" for line in [first, *found]))  # without what a kill cut off
        self._path = path

    def add(self, entry: dict[str, Any]) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps(entry) + "\n")
        self.found.append(entry)


def weights(pair: Pair) -> str:
    """Hash of a pair's files."""
    digest = hashlib.sha256()
    for vlm in (pair.guide, pair.model):
        if vlm is not None:
            digest.update(vlm.model.read_bytes() + vlm.mmproj.read_bytes())
    return digest.hexdigest()
