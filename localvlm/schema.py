"""What shape an answer is to have: a JSON schema, or a line of fields."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from localvlm.errors import UsageError

__all__ = ["schema_of", "told"]

TYPES = {"str": "string", "int": "integer", "float": "number", "bool": "boolean"}
MAX_BYTES = 1 << 20
_FIELD = re.compile(r"([^\s,:{}\[\]\"']+)(?:\s+(\w+)(\[\])?)?")
_HINT = 'give a file of JSON schema, or fields such as "name, age int, tags str[]"; types: ' + ", ".join(TYPES)


def schema_of(text: str) -> str:
    """The JSON schema, as JSON, that ``text`` means: its file, itself, or an object of fields such as "name, age int".

    Raises:
        UsageError: it is none of these.
    """
    if text.lstrip().startswith("{"):
        return _checked(text, "the schema")
    if os.path.isfile(os.path.expanduser(text)):  # noqa: PTH111, PTH113 - fields may be too long for a path
        return _checked(_read(Path(text).expanduser()), f"schema {text!r}")
    if text.endswith(".json"):
        raise UsageError(f"schema {text!r} does not exist", "check the path")
    return json.dumps(_object(text))


def told(question: str, schema: str) -> str:
    """A question, and below it the schema that the answer follows, so that the model knows what is asked of it."""
    if not schema:
        return question
    content = json.loads(schema)
    fields = {key: value for key, value in content.items() if key != "additionalProperties"}
    asked = f"Answer in JSON by this schema: {json.dumps(fields, ensure_ascii=False)}"
    return f"{question}\n{asked}" if question else asked


def _read(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UsageError(f"schema {str(path)!r} is over {MAX_BYTES >> 20} MiB", "make it simpler")
        return data.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"schema {str(path)!r} cannot be read: {error}", "check the file") from error


def _checked(text: str, what: str) -> str:
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{what} is not JSON: {error}", _HINT) from error
    if not isinstance(schema, dict):
        raise UsageError(f"{what} is not an object", _HINT)
    return json.dumps(schema)


def _object(text: str) -> dict[str, Any]:
    properties: dict[str, Any] = {}
    for field in text.split(","):
        match = _FIELD.fullmatch(field.strip())
        if match is None or (match[2] or "str") not in TYPES or match[1] in properties:
            raise UsageError(f"{field.strip()!r} in schema {text!r} is not a field", _HINT)
        kind = {"type": TYPES[match[2] or "str"]}
        properties[match[1]] = {"type": "array", "items": kind} if match[3] else kind
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
