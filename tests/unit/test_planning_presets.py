"""What is planned for pairs of published shapes, on a machine of two cores."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from localvlm.answers import AskOptions, VlmFiles
from localvlm.bench import shapes as bench_shapes
from localvlm.bench.presets import PRESETS
from localvlm.planning.memory import RateMemory
from localvlm.planning.plans import CLEARLY, Asked, Plan, Planner, quickest
from localvlm.planning.rates import Rates
from localvlm.planning.shapes import VlmShape
from tests.unit.planning_help import rates

SLOWER = {"Q4_0": 1.0, "Q4_K": 1.05, "Q5_0": 1.3, "Q6_K": 1.3, "Q8_0": 1.2}
"""Types of weights, against Q4_0."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[VlmShape, VlmShape]]:
    """Guide and model of each preset: headers without a vocabulary, before files full of holes."""
    folder, found = tmp_path_factory.mktemp("presets"), {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_shapes, "write_gguf", _hollow)
        patch.setattr(bench_shapes, "check_room", lambda *_: None)
        for name in ("add_pieces", "add_bytes"):
            patch.setattr(bench_shapes, name, lambda *_: None)
        for name, preset in PRESETS.items():
            files = bench_shapes.write_vlms(folder / name, [preset.guide, preset.model])
            guide, model = (VlmShape(VlmFiles(*one)) for one in files)
            found[name] = guide, model
    return found


def _hollow(path: Path, arch: str, describe: Any, tensors: Any, _: int) -> None:
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    for t in tensors:
        kind = gguf.GGMLQuantizationType[t.kind]
        writer.add_tensor_info(t.name, (*t.shape[:-1], t.row_bytes), np.dtype(np.uint8), t.n_bytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + sum(-(-t.n_bytes // 32) * 32 for t in tensors) + 32)


def planner(guide: VlmShape, model: VlmShape) -> Planner:
    known = rates()
    row = next(iter(known.rows.values()))
    names, towers = Rates().missing((guide.llm, model.llm), (guide.tower, model.tower))
    rows = {name: tuple(SLOWER[name.split()[0]] * t for t in row) for name in names}
    memory = RateMemory(None, "")
    memory.rates = replace(known, rows=rows, patch=dict.fromkeys(towers, known.patch["F16"]))
    return Planner(model, guide, memory, one_tower=guide.shares_tower(model))


def plans(pairs: dict[str, tuple[VlmShape, VlmShape]], name: str, accuracy: str, keep: float) -> list[Plan]:
    options = AskOptions(keep=keep, max_tokens=16)
    asked = Asked.of([PRESETS[name].size], "a b c d e f g h", options, answer=16, loaded=True)
    return planner(*pairs[name]).plans(asked, accuracy)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("accuracy", ["high", "fast"])
@pytest.mark.parametrize("keep", [0.09, 0.35])
def test_the_choice_is_clearly_sooner_or_plain(pairs, name, accuracy, keep):
    found = plans(pairs, name, accuracy, keep)
    best = quickest(found)
    assert best is found[0] or best.total < CLEARLY * found[0].total
    assert best.method in (("none", "sgl+") if accuracy == "high" else ("none", "sgl+", "fastervlm", "divprune"))
    assert best.guide_keep is None or accuracy == "fast"
    for plan in found:
        assert plan.ms["decode"] <= found[0].ms["decode"]
        assert plan.ms["prefill"] <= found[0].ms["prefill"]
        assert plan.ms["encode"] <= found[0].ms["encode"]


@pytest.mark.parametrize(
    ("name", "chosen", "gains"),
    [("llava15", "guided", 2.0), ("next", "guided, at most 512 tokens", 2.4),
     ("internvl3", "guided, at most 512 tokens", 2.0), ("smolvlm2", "guided, at most 512 tokens", 1.2),
     ("qwen25vl", "guided, at most 512 tokens", 1.1)],
)  # fmt: skip
def test_what_is_chosen_by_default(pairs, name, chosen, gains):
    found = plans(pairs, name, "high", AskOptions.keep)
    best = quickest(found)
    assert best.name == chosen
    assert gains < found[0].total / best.total < 1.5 * gains


def test_a_guide_of_the_same_tower_spares_the_model_its_own(pairs):
    shared = {name for name, (guide, model) in pairs.items() if guide.shares_tower(model)}
    assert shared == {"llava15", "next", "internvl3", "qwen25vl"}
    for name in ("llava15", "next", "internvl3"):
        guided = next(plan for plan in plans(pairs, name, "high", 0.35) if plan.name == "guided")
        assert guided.ms["encode"] < 0.1 * guided.ms["guide_encode"]


def test_planning_takes_no_time(pairs):
    """Counted in calls, of which a slow or busy machine makes as many: 90,000 take 25 ms."""
    for name, (guide, model) in pairs.items():
        calls = 0

        def count(_frame: object, event: str, _arg: object) -> None:
            nonlocal calls
            calls += event in ("call", "c_call")

        asked = Asked.of([PRESETS[name].size], "what?", AskOptions())
        before = sys.getprofile()
        sys.setprofile(count)
        try:
            fresh = [VlmShape(shape.files) for shape in (guide, model)]
            found = planner(*fresh).plans(asked, "fast")
        finally:
            sys.setprofile(before)
        assert quickest(found)
        assert calls < 150_000, name
