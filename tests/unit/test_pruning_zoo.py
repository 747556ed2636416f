"""Each method against its formula on what llama.cpp gives: features, the tower's attention and embeddings of a text."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from localvlm.engine.client import Engine
from localvlm.pruning import Inputs, Kept, Method, Tokens
from localvlm.selection import pick
from localvlm.speaker import release, sight_of
from tests import zoo
from tests.asking import load
from tests.unit.test_pruning_references import AVERAGING, REFERENCES, check

SIZES = [(300, 200), (90, 210)]
"""(width, height) of two pictures: methods choose jointly."""


@pytest.fixture(scope="module", params=["llava15", "qwen25vl", "internvl", "llavanext"])
def given(request, engine: Engine, tmp_path_factory) -> Iterator[Inputs]:
    """What a method is given of two pictures of noise."""
    vlm = load(engine, zoo.build(request.param, tmp_path_factory.mktemp("zoo")))
    rng = np.random.default_rng(3)
    pictures = [rng.integers(0, 256, (height, width, 3), np.uint8) for width, height in SIZES]
    encoded = [vlm.encode(picture, tower=True) for picture in pictures]
    sight = sight_of(vlm, encoded, "what is the thing in red?", {"features", "tower", "text"})
    seen: list[Inputs] = []

    def chosen(inputs: Inputs, k: int) -> Kept:
        seen.append(inputs)
        return Kept(inputs.candidates[:k])

    pick(Method("seen", "", lambda i, k: chosen(i, k).index, average=chosen), Tokens(4), [e.layout for e in encoded],
         None, sight=sight)  # fmt: skip
    release(vlm, encoded)
    yield seen[0]
    vlm.close()


@pytest.mark.parametrize("name", [*REFERENCES, *AVERAGING])
def test_the_same_tokens_as_the_formula(name: str, given: Inputs) -> None:
    assert len(given.candidates) > 24
    for k in (1, 7, 24):
        check(name, given, k)
