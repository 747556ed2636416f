"""Every error that localvlm raises on purpose.

    LocalvlmError
    ├── UsageError            2   flags or arguments that do not go together
    ├── ModelError            3   a model file cannot be used
    │   ├── ModelNotFound         the file or pair does not exist
    │   ├── NotGguf               not a GGUF file, or one cut short or damaged
    │   ├── RoleMismatch          a projector where a model belongs, or the reverse
    │   ├── ProjectorMismatch     model and projector do not fit each other
    │   ├── UnsupportedModel      llama.cpp or localvlm cannot do this with this model
    │   └── AttentionCheckFailed  the tap does not reproduce this model's attention
    ├── EngineCrashed         4   the worker process died
    ├── NotEnoughMemory       5   weights, cache or buffers do not fit
    ├── ImageError            6   a picture cannot be read
    ├── DownloadError         7   a download failed
    ├── StorageError          8   a file cannot be written
    ├── ContextOverflow       9   image and question do not fit the context
    └── Interrupted         130   stopped by the user

A message is one sentence that quotes the offending value; ``hint`` is the next step.
"""

from __future__ import annotations

__all__ = [
    "AttentionCheckFailed",
    "ContextOverflow",
    "DownloadError",
    "EngineCrashed",
    "ImageError",
    "Interrupted",
    "LocalvlmError",
    "ModelError",
    "ModelNotFound",
    "NotEnoughMemory",
    "NotGguf",
    "ProjectorMismatch",
    "RoleMismatch",
    "StorageError",
    "UnsupportedModel",
    "UsageError",
    "by_name",
]


class LocalvlmError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        message: one sentence, values quoted.
        hint: what to do next, or ``""``.
        exit_code: what the command line exits with.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class UsageError(LocalvlmError):
    """Flags or arguments that do not go together."""

    exit_code = 2


class ModelError(LocalvlmError):
    """A model file cannot be used."""

    exit_code = 3


class ModelNotFound(ModelError):
    """The model file or pair does not exist."""


class NotGguf(ModelError):
    """The file is not a GGUF file, or is cut short or damaged."""


class RoleMismatch(ModelError):
    """A projector was given where a language model belongs, or the reverse."""


class ProjectorMismatch(ModelError):
    """The projector's output width is not the language model's input width."""


class UnsupportedModel(ModelError):
    """This llama.cpp, or localvlm, cannot do what was asked with this model."""


class AttentionCheckFailed(ModelError):
    """The tap's attention does not reproduce the model's own."""


class EngineCrashed(LocalvlmError):
    """The worker process died; the message holds how, and the last line it logged."""

    exit_code = 4


class NotEnoughMemory(LocalvlmError):
    """Weights, cache or compute buffers could not be allocated."""

    exit_code = 5


class ImageError(LocalvlmError):
    """A picture is missing, unreadable, truncated, too large or of an unknown format."""

    exit_code = 6


class DownloadError(LocalvlmError):
    """A download failed."""

    exit_code = 7


class StorageError(LocalvlmError):
    """A file could not be written."""

    exit_code = 8


class ContextOverflow(LocalvlmError):
    """Image and question need more positions than the context has."""

    exit_code = 9


class Interrupted(LocalvlmError):
    """Stopped by the user; ``partial`` holds what was answered so far."""

    exit_code = 130

    def __init__(self, message: str = "interrupted", hint: str = "", partial: str = "") -> None:
        super().__init__(message, hint)
        self.partial = partial


def by_name(name: str) -> type[LocalvlmError]:
    """The error class called ``name``, as the worker names it on the wire; ``LocalvlmError`` if unknown."""
    found = globals().get(name)
    if isinstance(found, type) and issubclass(found, LocalvlmError):
        return found
    return LocalvlmError
