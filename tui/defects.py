"""Errors that nobody thought of."""

from __future__ import annotations

from localvlm.errors import LocalvlmError

__all__ = ["defect"]


def defect(raised: Exception) -> LocalvlmError:
    """What is told of one, so that the chat goes on."""
    if isinstance(raised, LocalvlmError):
        return raised
    error = LocalvlmError(f"{type(raised).__name__}: {raised}", "this is a defect of localvlm: report it")
    error.__cause__ = raised
    return error
