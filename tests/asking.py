"""Questions put to the zoo's models through an engine."""

from __future__ import annotations

import numpy as np

from localvlm.engine.api import Encoded, ImagePart, LoadOptions, Message
from localvlm.engine.client import Engine, RemoteVlm
from tests import zoo

__all__ = ["ONE", "QUESTION", "ask", "in_fresh_process", "load", "picture", "prompt"]

ONE = LoadOptions(threads=1)
QUESTION = "what is the thing in red?"


def load(engine: Engine, model: zoo.ZooModel, **options: int) -> RemoteVlm:
    return engine.load(model.model, model.mmproj, LoadOptions(threads=1, **options))


def picture(width: int = 84, height: int = 84, seed: int = 1) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, (height, width, 3)).astype(np.uint8)


def prompt(vlm: RemoteVlm, encoded: list[Encoded], keep=None, text: str = QUESTION) -> list:
    parts = vlm.chat([Message("user", text, len(encoded))])
    return [ImagePart(encoded[p], keep) if isinstance(p, int) else p for p in parts]


def ask(vlm: RemoteVlm, n: int = 12, keep=None, tap: bool = False, seed: int = 1) -> list[int]:
    encoded = vlm.encode(picture(seed=seed))
    vlm.prefill(prompt(vlm, [encoded], keep), tap=tap)
    vlm.release(encoded)
    return vlm.generate(n).ids.tolist()


def in_fresh_process(model: zoo.ZooModel, **kwargs) -> list[int]:
    with Engine() as fresh:
        return ask(load(fresh, model), **kwargs)
