"""What results hang on, as hashes: with any of it changed, those of a journal are of another run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import localvlm
from localvlm.calibration import fingerprint
from localvlm.engine.api import LoadOptions
from localvlm.errors import ImageError
from localvlm.evaluation.data import Question
from localvlm.evaluation.runner import RunOptions
from localvlm.extras import weights_path
from localvlm.pipeline import Pair, VlmFiles
from localvlm.pruning import IN_LLM, METHODS

__all__ = ["digest", "inputs_of"]


def inputs_of(
    questions: Sequence[Question],
    pair: Pair,
    options: RunOptions,
    guide: LoadOptions,
    model: LoadOptions,
) -> dict[str, Any]:
    """What the first line of a journal holds. Methods are none of it, since results have their names; nor are right
    answers and how they are scored, which are looked at after the run. ``guide``, ``model``: how the VLMs are loaded.

    Raises:
        ImageError: a picture is missing.
        OSError: a model file cannot be read.
    """
    return {
        "localvlm": localvlm.__version__,
        "llama-cpp-python": version("llama-cpp-python"),
        "questions": digest([[q.id, q.images, q.text] for q in questions]),
        "pictures": _pictures(questions),
        "guide": _weights(pair.guide),
        "model": _weights(pair.model),
        "trained": _trained(pair.model),
        "options": asdict(options),
        "loading": [_loading(guide), _loading(model)],
    }


def _loading(options: LoadOptions) -> dict[str, Any]:
    """All but what is kept for later runs, which changes no answer."""
    return asdict(replace(options, cache="", image_cache=0))


def digest(value: Any) -> str:
    """Of anything that JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _pictures(questions: Sequence[Question]) -> str:
    """Of the contents of all pictures, each read once."""
    found = hashlib.sha256()
    for name in dict.fromkeys(image for q in questions for image in q.images):
        try:
            with Path(name).open("rb") as file:
                found.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ImageError(
                f"image '{name}' cannot be read: {error.strerror}", "--images names their folder"
            ) from error
    return found.hexdigest()


def _trained(files: VlmFiles | None) -> dict[str, str]:
    """Of what methods learnt for the model, by their names."""
    if files is None:
        return {}
    paths = {name: weights_path(files.model, name) for name in (*METHODS, *IN_LLM)}
    return {name: hashlib.sha256(fingerprint(path)).hexdigest() for name, path in paths.items() if path.exists()}


def _weights(files: VlmFiles | None) -> str | None:
    if files is None:
        return None
    return hashlib.sha256(fingerprint(files.model) + fingerprint(files.mmproj)).hexdigest()
