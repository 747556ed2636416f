"""JSON and JSONL files that people write, read alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from localvlm.errors import UsageError

__all__ = ["read_json"]


def read_json(path: Path, hint: str) -> Any:
    """The content of a JSON file, or the list of the objects of a JSONL file, whatever its name ends in.

    A file of one line that holds a question is JSONL. ``hint`` says what the file should be.

    Raises:
        UsageError: it cannot be read, or is neither.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"'{path}' does not exist", "check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or error
        raise UsageError(f"'{path}' cannot be read: {why}", "check the path") from error
    lines = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UsageError(f"'{path}' is empty", hint)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not lines[0][1].rstrip().endswith("}"):
            raise UsageError(f"'{path}' is not JSON: {error}", hint) from error
        return [_entry(line, f"line {n} of '{path}'", hint) for n, line in lines]
    one_line = isinstance(content, dict) and not content.keys().isdisjoint(("question", "question_id"))
    return [content] if one_line else content


def _entry(line: str, where: str, hint: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{where} is not JSON: {error}", hint) from error
