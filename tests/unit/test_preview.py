"""A preview keeps what a question with that setting keeps: token for token, without a run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.answers import Answer, AskOptions, Look
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import UnsupportedModel, UsageError
from localvlm.images import Image
from localvlm.pipeline import Pair, Pipeline, VlmFiles
from localvlm.preview import Preview
from localvlm.pruning import Tokens
from localvlm.selection import joint

PAIR = Pair("fake", VlmFiles(Path("guide"), Path("p")), VlmFiles(Path("model"), Path("p")))
QUESTION = "How many are there?"
GUIDE = Script(answer="two", focus=(0.4, 0.1, 0.8, 0.6), n_params=1)
MODELS = {
    "same": Script(n_params=10),
    "another grid": Script(grid=(6, 8), n_params=10),
    "tiles": Script(grid=(4, 4), tiles=(2, 3), tile_price=6.0, n_params=10),
}
PICTURES = [
    Image(np.full((height, width, 3), 90, np.uint8), f"{width}x{height}") for width, height in ((300, 200), (80, 90))
]
KEEPS = (0.01, 0.05, 0.2, 0.35, 0.5, 0.99, 1.0, None, Tokens(7), Tokens(5000), "auto")


def pipeline_of(model: Script, guide: Script = GUIDE) -> Pipeline:
    return Pipeline.open(PAIR, engine=FakeEngine({"guide": guide, "model": model}))


def asked(pipeline: Pipeline, pictures: list[Image], options: AskOptions) -> tuple[Answer, Look | None]:
    looks: list[Look] = []
    with pipeline.session(pictures, history=False) as session:
        return session.ask(QUESTION, options, on_look=looks.append), next(iter(looks), None)


@pytest.mark.parametrize("n_pictures", [1, 2])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("method", ["sgl", "sgl+", "random", "grid", "none"])
def test_a_preview_keeps_what_a_question_keeps(method: str, model: str, n_pictures: int) -> None:
    """One look at 20 %; every other budget is previewed from it, and asked."""
    pictures = PICTURES[:n_pictures]
    with pipeline_of(MODELS[model]) as pipeline:
        answer, look = asked(pipeline, pictures, AskOptions("sgl+", keep=0.2))
        infos = {"guide": pipeline.vlm("guide").info, "model": pipeline.vlm("model").info}
        preview = Preview(answer.layouts, look, question=QUESTION, **infos)
        for keep in KEEPS:
            options = AskOptions(method, keep=keep, seed=5)
            if keep == "auto" and method in ("random", "grid"):
                with pytest.raises(UsageError, match="auto"):
                    preview.kept(options)
                continue
            expected, _ = asked(pipeline, pictures, options)
            assert joint(answer.layouts, preview.kept(options)) == expected.kept_indices, keep


@pytest.mark.parametrize("options", [AskOptions(preset="paper-35"), AskOptions(layer=2), AskOptions(tile_price=0.0),
                                     AskOptions(tile_price=40.0), AskOptions(guide_keep=0.4)])  # fmt: skip
def test_layers_and_prices_count(options: AskOptions) -> None:
    with pipeline_of(MODELS["tiles"]) as pipeline:
        answer, look = asked(pipeline, PICTURES, options)
        infos = {"guide": pipeline.vlm("guide").info, "model": pipeline.vlm("model").info}
        preview = Preview(answer.layouts, look, question=QUESTION, **infos)
        assert joint(answer.layouts, preview.kept(options)) == answer.kept_indices


def test_tiles_that_the_guide_has_encoded_cost_nothing() -> None:
    one_tower = replace(MODELS["tiles"], tower="t")
    guide = replace(one_tower, focus=(0.0, 0.0, 0.3, 0.9), answer="two")
    with pipeline_of(one_tower, guide) as pipeline:
        options = AskOptions(keep=0.2, tile_price=10.0)
        answer, look = asked(pipeline, PICTURES[:1], options)
        infos = {"guide": pipeline.vlm("guide").info, "model": pipeline.vlm("model").info}
        kept = Preview(answer.layouts, look, question=QUESTION, **infos).kept(options)
        assert joint(answer.layouts, kept) == answer.kept_indices
        apart = Preview(answer.layouts, look, question=QUESTION, model=infos["model"]).kept(options)
        assert joint(answer.layouts, apart) != answer.kept_indices


def test_an_answer_alone_tells_its_own_method() -> None:
    with pipeline_of(MODELS["another grid"]) as pipeline:
        answer, _ = asked(pipeline, PICTURES, AskOptions("sgl", keep=0.2))
        other, _ = asked(pipeline, PICTURES, AskOptions("sgl", keep=0.6))
        preview = Preview(answer.layouts, answer=answer, question=QUESTION)
        assert joint(answer.layouts, preview.kept(AskOptions("sgl", keep=0.6))) == other.kept_indices
        assert np.array_equal(preview.saliency("sgl"), answer.saliency)
        with pytest.raises(UsageError, match="look"):
            preview.kept(AskOptions("sgl+", keep=0.6))


def test_the_guides_own_grid_does_for_a_model_that_is_not_loaded() -> None:
    with pipeline_of(MODELS["another grid"]) as pipeline:
        answer, look = asked(pipeline, PICTURES[:1], AskOptions(exit_at=0.0))
        assert answer.answered_by == "guide"
        [kept] = Preview(answer.layouts, look, question=QUESTION).kept(AskOptions(keep=0.25))
        assert len(kept) == 36
        assert set(np.argsort(-answer.saliency, kind="stable")[:36].tolist()) == set(kept.tolist())


@pytest.mark.parametrize(("method", "words"), [("divprune", "features"), ("fasterv", "no method"), ("fastv", "layers"),
                                               ("visionzip", "features"), ("pyramiddrop", "layers")])  # fmt: skip
def test_methods_that_need_more_say_so(method: str, words: str) -> None:
    with pipeline_of(MODELS["same"]) as pipeline:
        answer, look = asked(pipeline, PICTURES[:1], AskOptions())
    with pytest.raises(UsageError, match=words):
        Preview(answer.layouts, look).kept(AskOptions(method))


def test_without_a_look_methods_without_a_guide_remain() -> None:
    with pipeline_of(MODELS["same"]) as pipeline:
        answer, look = asked(pipeline, PICTURES[:1], AskOptions("grid", keep=0.25))
    assert look is None
    preview = Preview(answer.layouts, answer=answer)
    assert preview.saliency("grid") is None
    assert joint(answer.layouts, preview.kept(AskOptions("grid", keep=0.25))) == answer.kept_indices
    with pytest.raises(UsageError, match="look"):
        preview.kept(AskOptions("sgl"))


def test_unknown_places_are_refused() -> None:
    with pipeline_of(MODELS["same"]) as pipeline:
        answer, look = asked(pipeline, PICTURES[:1], AskOptions())
    unknown = [replace(answer.layouts[0], boxes=None)]
    with pytest.raises(UnsupportedModel, match="not known"):
        Preview(unknown, look).kept(AskOptions())


def test_a_tap_without_all_reductions_is_no_look_for_some() -> None:
    with pipeline_of(MODELS["same"]) as pipeline:
        answer, look = asked(pipeline, PICTURES[:1], AskOptions())
    assert look is not None
    bare = replace(look, attention=replace(look.attention, weighted=None, maximum=None))
    preview = Preview(answer.layouts, bare)
    assert preview.saliency("sgl+") is None
    assert preview.saliency("sgl") is not None
