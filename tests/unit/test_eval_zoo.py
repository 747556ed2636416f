"""An evaluation on llama.cpp itself: a pair of the zoo whose tower takes pictures of any size."""

from __future__ import annotations

import numpy as np
import PIL.Image
import pytest

from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.evaluation.data import Question
from localvlm.evaluation.journal import Journal
from localvlm.evaluation.plan import cells
from localvlm.evaluation.runner import RunOptions, ask_all
from localvlm.images import load
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from tests import zoo


def test_a_pair_is_evaluated_as_it_answers(native, tmp_path):
    pixels = np.random.RandomState(7).randint(0, 256, (336, 448, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    guide, model = zoo.pair(tmp_path, "qwen25vl")
    pair = Pair("zoo", *(VlmFiles(half.model, half.mmproj) for half in (guide, model)))
    question = Question("1", (str(tmp_path / "a.png"),), "what is the thing in red?", ("x",), "", "exact")
    plan = cells(["sgl", "random", "downscale"], [0.5, 0.1], guide=True)
    with Engine() as engine, Journal(tmp_path / "answers.jsonl", {}) as journal:
        pipeline = Pipeline.open(pair, LoadOptions(threads=1), engine)
        (found,) = ask_all(pipeline, [question], plan, RunOptions(max_tokens=8), journal, lambda _: None)
        n = found["none"].image
        kept = {name: outcome.steps[0][1] for name, outcome in found.items()}
        assert kept["none"] == n > 40
        assert kept["blind"] == 0
        for keep in (0.5, 0.1):
            budget = round(keep * n)
            assert kept[f"sgl {100 * keep:g}%"] == kept[f"random {100 * keep:g}%"] == budget
            assert 0.5 * budget < kept[f"downscale {100 * keep:g}%"] <= budget
        assert len({outcome.rows for name, outcome in found.items() if name not in ("blind", "guide")}) == 1
        for name, options in (
            ("none", AskOptions("none", None, 8)),
            ("sgl 10%", AskOptions("sgl", 0.1, 8, draft=False)),
        ):
            assert pipeline.ask([load(tmp_path / "a.png")], question.text, options).text == found[name].text


@pytest.mark.parametrize(("family", "how"), [("llava15", "pooled"), ("internvl", "fewer tiles, pooled")])
def test_rows_are_pooled_where_no_picture_is_small_enough(native, tmp_path, family, how):
    pixels = np.random.RandomState(7).randint(0, 256, (200, 400, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(tmp_path / "a.png")
    files = zoo.build(family, tmp_path)
    pair = Pair("zoo", None, VlmFiles(files.model, files.mmproj))
    question = Question("1", (str(tmp_path / "a.png"),), "what is the thing in red?", ("x",), "", "exact")
    with Engine() as engine, Journal(tmp_path / "answers.jsonl", {}) as journal:
        pipeline = Pipeline.open(pair, LoadOptions(threads=1), engine)
        plan = cells(["downscale"], [0.1], guide=False)
        (found,) = ask_all(pipeline, [question], plan, RunOptions(max_tokens=8), journal, lambda _: None)
    whole, small = found["none"], found["downscale 10%"]
    budget = round(0.1 * whole.image)
    assert (small.how, whole.how) == (how, "")
    assert 0.5 * budget <= small.steps[0][1] <= budget < whole.image
