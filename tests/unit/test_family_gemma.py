"""Gemma 3: a picture's tokens go in at once and see each other, pruned or not; its marks join the text around it."""

from __future__ import annotations

from collections.abc import Iterator

import llama_cpp
import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, TextPart
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import UnsupportedModel
from tests import zoo
from tests.zoo import gemma3


@pytest.fixture(scope="module")
def vlm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaVlm]:
    model = zoo.build("gemma3", tmp_path_factory.mktemp("zoo"))
    running = LlamaVlm(model.model, model.mmproj, LoadOptions(threads=1))
    yield running
    running.close()


def prompt(vlm: LlamaVlm, keep: np.ndarray | None) -> list[TextPart | ImagePart]:
    case = gemma3.ROW.cases[1]
    pictures = [ImagePart(vlm.encode(image.pixels()), keep) for image in case.images]
    return [TextPart(s, special=True) if isinstance(s, str) else pictures[s] for s in case.segments]


@pytest.mark.parametrize("keep", [None, np.array([1, 4, 9], np.int32)])
def test_each_picture_is_one_batch_without_causal_mask(
    vlm: LlamaVlm, keep: np.ndarray | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    causal, seen = [True], []
    decode, switch = vlm._cache.context.decode, llama_cpp.llama_set_causal_attn

    def recorded(tokens: np.ndarray | None, rows: np.ndarray | None, *rest: np.ndarray) -> None:
        seen.append((causal[0], None if rows is None else len(rows)))
        decode(tokens, rows, *rest)

    def switched(context: object, on: bool) -> None:
        causal[0] = on
        switch(context, on)

    monkeypatch.setattr(vlm._cache.context, "decode", recorded)
    monkeypatch.setattr(llama_cpp, "llama_set_causal_attn", switched)
    vlm.prefill(prompt(vlm, keep))
    text, picture = (True, None), (False, 25 if keep is None else 3)
    assert seen == [text, picture, text, picture, text]
    assert causal == [True]


def test_a_picture_of_more_rows_than_a_batch_is_refused(vlm: LlamaVlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vlm._cache.context, "n_batch", 24)
    with pytest.raises(UnsupportedModel, match="takes 25 rows"):
        vlm.prefill(prompt(vlm, None))


def test_line_breaks_around_a_picture_join_those_of_the_text(vlm: LlamaVlm) -> None:
    parts = [TextPart("<start_of_turn>user\n", special=True), prompt(vlm, None)[1], TextPart("\nwhat?")]
    ids = vlm.prefill(parts).token_ids.tolist()
    three = gemma3.TOKENIZER.tokens.index("ĊĊĊ")
    image = [i for i, token in enumerate(ids) if token < 0]
    assert ids[image[0] - 2] == three
    assert ids[image[-1] + 2] == three
