"""One VLM of a conversation, and what it has seen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Encoded, ImagePart, Message, Part, Vlm, VlmInfo
from localvlm.errors import EngineCrashed, Interrupted
from localvlm.given import Given
from localvlm.guidance import stand_ins
from localvlm.images import Image
from localvlm.pruning import Kept, Need, Tokens, share_of
from localvlm.selection import BLIND, Sight, pick

if TYPE_CHECKING:
    from localvlm.pipeline import Pipeline

__all__ = ["Shown", "Speaker", "altered", "parts_given", "parts_of", "release", "sight_of"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Shown:
    """What of a picture a VLM is shown.

    Attributes:
        tokens: (k,) sorted indices; None: all.
        of: (n,) for each token, the one shown that stands for it.
        share: (n,) how much alike they are, from 0 to 1.
    """

    tokens: Int32 | None
    of: Int32
    share: Float32


class Speaker:
    """The "guide" or the "model" of a pipeline, and the pictures it has encoded, by content.

    Attributes:
        n_tiles: how often a tile was encoded.
    """

    def __init__(self, pipeline: Pipeline, role: str) -> None:
        self._pipeline, self._role = pipeline, role
        self._encoded: dict[bytes, Encoded] = {}
        self._shown: dict[tuple[bytes, float | Tokens | None], Shown] = {}
        self._of: Vlm | None = None
        self.n_tiles = 0

    @property
    def vlm(self) -> Vlm:
        """Loaded if need be. Another than before has encoded nothing yet."""
        vlm = self._pipeline.vlm(self._role)
        if vlm is not self._of:
            self._of, self._encoded, self._shown = vlm, {}, {}
        return vlm

    @property
    def info(self) -> VlmInfo:
        """What it is, or was before it was unloaded."""
        return (self._of or self.vlm).info

    def encode(
        self, images: Sequence[Image], kept: Sequence[Int32 | None] | None = None, tower: bool = False
    ) -> tuple[Encoded, ...]:
        """Of each picture the tiles that hold a kept token (None: all), unless they are there already."""
        vlm = self.vlm
        for i, image in enumerate(images):
            key, keep = image.content, None if kept is None else kept[i]
            begun = self._encoded.get(key)
            if begun is None or begun.n_tiles < begun.layout.n_tiles or (tower and begun.tower is None):
                now = self._encoded[key] = vlm.encode(image.rgb, tower=tower, keep=keep, onto=begun)
                self.n_tiles += now.n_tiles - (0 if begun is None else begun.n_tiles)
        return tuple(self._encoded[image.content] for image in images)

    def shown(self, images: Sequence[Image], keep: float | Tokens | None) -> list[Shown]:
        """What it is shown of each picture: ``keep`` of its tokens, chosen blind to any question and to other pictures,
        so that rows stay the same from prompt to prompt.
        """
        for image, seen in zip(images, self.encode(images), strict=True):
            if (image.content, keep) not in self._shown:
                self._shown[image.content, keep] = _shown(self.vlm, seen, keep)
        return [self._shown[image.content, keep] for image in images]

    def release(self) -> None:
        if self._of is not None:
            release(self._of, self._encoded.values())
        self._encoded.clear()
        self._shown.clear()


def release(vlm: Vlm, pictures: Iterable[Encoded]) -> None:
    """Forgets pictures."""
    for picture in pictures:
        with contextlib.suppress(EngineCrashed, Interrupted):  # the engine is gone, and the picture with it
            vlm.release(picture)


def parts_of(
    vlm: Vlm, messages: Sequence[Message], encoded: Sequence[Encoded], kept: Sequence[Int32 | None] | None = None
) -> list[Part]:
    """The prompt of a conversation about pictures, with the tokens ``kept`` of each or with all."""
    return [
        ImagePart(encoded[part], None if kept is None else kept[part]) if isinstance(part, int) else part
        for part in vlm.chat(messages)
    ]


def parts_given(vlm: Vlm, messages: Sequence[Message], encoded: Sequence[Encoded], given: Given) -> list[Part]:
    """The prompt of a conversation with the tokens ``given``; those that a turn added stand before its text."""
    parts: list[Part] = []
    texts = iter([m for m in messages if m.text])
    turn = -1
    for part in vlm.chat(messages):
        if isinstance(part, int):
            parts.append(ImagePart(encoded[part], given.groups[part][0].tokens))
            continue
        if not part.special and next(texts).role == "user":
            turn += 1
            for number, (_, *added) in enumerate(given.groups):
                parts += [ImagePart(encoded[number], g.tokens, again=number) for g in added if g.turn == turn]
        parts.append(part)
    return parts


def _shown(vlm: Vlm, encoded: Encoded, keep: float | Tokens | None) -> Shown:
    n = encoded.layout.n_tokens
    if share_of(keep, n) == n:
        return Shown(None, np.arange(n, dtype=np.int32), np.ones(n, np.float32))
    features = vlm.features(encoded)
    tokens = pick(BLIND, keep, [encoded.layout], None, sight=Sight(features))[0].index
    return Shown(tokens, *stand_ins(features, tokens))


def sight_of(vlm: Vlm, encoded: Sequence[Encoded], question: str, needs: Set[Need]) -> Sight:
    """What a method needs of pictures, encoded whole and with the tower's attention if that is among it."""
    towers = [e.tower for e in encoded if e.tower is not None]
    return Sight(
        np.concatenate([vlm.features(e) for e in encoded]) if "features" in needs else None,
        np.concatenate(towers, axis=1) if "tower" in needs else None,
        vlm.embed(question) if "text" in needs else None,
    )


@contextlib.contextmanager
def altered(vlm: Vlm, encoded: Sequence[Encoded], picked: Sequence[Kept | None] | None) -> Iterator[Sequence[Encoded]]:
    """The pictures, with other rows in the places of their kept tokens where there are any."""
    shown, others = list(encoded), []
    try:
        for i, kept in enumerate(picked or ()):
            if kept is not None and kept.rows is not None:
                shown[i] = vlm.altered(encoded[i], kept.index, kept.rows)
                others.append(shown[i])
        yield shown
    finally:
        release(vlm, others)
