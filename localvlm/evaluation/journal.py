"""What an evaluation has found so far, on disk line by line: killed at any point, it is taken up again."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from localvlm.errors import StorageError, UsageError
from localvlm.json_lines import JsonLines

__all__ = ["Journal"]

_HINT = "pass --restart to begin anew, or another --work"
_ELSEWHERE = "name another folder with --work"


class Journal:
    """A file of JSON lines: first the inputs that all results hang on, then results of one question a line, by name.

    Further lines of a question add to it, so methods that are asked for later are run alone. One process at a time
    holds it. A context manager.
    """

    def __init__(self, path: Path, inputs: Mapping[str, Any], *, restart: bool = False) -> None:
        """Opens ``path``, or begins it.

        Raises:
            UsageError: another process holds it, it is damaged, or it is of other inputs.
            StorageError: it cannot be written.
        """
        self.path = path
        self._found: dict[int, dict[str, Any]] = {}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"'{path}' cannot be written: {error.strerror or error}", _ELSEWHERE) from error
        self._file = JsonLines(path, _HINT, elsewhere=_ELSEWHERE, restart=restart)
        try:
            self._read(json.loads(json.dumps(inputs)))
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def of(self, question: int) -> Mapping[str, Any]:
        """Results of a question by name."""
        return self._found.get(question, {})

    def add(self, question: int, results: Mapping[str, Any]) -> None:
        """Keeps more results of a question for good.

        Raises:
            StorageError: the disk is full or gone.
        """
        self._file.add({"question": question, "results": results})
        self._found.setdefault(question, {}).update(results)

    def answered(self, names: Collection[str]) -> int:
        """Questions that have results of all these names."""
        return sum(found.keys() >= set(names) for found in self._found.values())

    def _read(self, inputs: dict[str, Any]) -> None:
        if not self._file.lines:
            self._file.add(inputs)
            return
        first, *rest = self._file.lines
        if first != inputs:
            other = ", ".join(_differences(first, inputs))
            raise UsageError(f"'{self.path}' is of another run: {other} differ", _HINT)
        try:
            for line in rest:
                self._found.setdefault(int(line["question"]), {}).update(line["results"])
        except (ValueError, TypeError, KeyError) as error:
            raise UsageError(f"'{self.path}' is damaged: {error}", _HINT) from error


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Keys under which two objects hold other things."""
    return sorted(key for key in {*a, *b} if a.get(key) != b.get(key))
