"""Predictions: what is counted, what is fitted, what is chosen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localvlm.answers import Answer, AskOptions, TileCounts, TokenCounts, VlmFiles
from localvlm.engine.api import Encoded, ImageLayout, LoadOptions, Prefilled
from localvlm.planning import sample as sampling
from localvlm.planning.memory import RateMemory
from localvlm.planning.minis import MiniLlm, MiniTower, write
from localvlm.planning.plans import Asked, Plan, Planner, quickest
from localvlm.planning.rates import KNOTS, STEP, Rates, cells_of
from localvlm.planning.shapes import Llm, Run, Tower, View, VlmShape
from localvlm.planning.work import Counts, Speed, expected_tiles, prompt_batches, prompt_rows
from localvlm.pruning import Tokens, share_of
from tests.unit.planning_help import GUIDE028, LLAVA7, QWEN3B, QWEN7B, SMOL22B, SMOL256, files_of, rates

PHOTO = ((1280, 960),)
QUESTION = "What is written on the sign beside the door?"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> dict[str, VlmShape]:
    folder = tmp_path_factory.mktemp("real")
    return {r.name: VlmShape(files_of(folder, r)) for r in (LLAVA7, GUIDE028, SMOL256, SMOL22B, QWEN3B, QWEN7B)}


def planner(shapes: dict[str, VlmShape], model: str, guide: str | None, known: Rates | None = None) -> Planner:
    memory = RateMemory(None, "")
    memory.rates = known or rates()
    return Planner(shapes[model], None if guide is None else shapes[guide], memory)


# ---- counting


def test_a_7b_and_its_tower_are_counted_from_their_headers(shapes):
    llm, tower = shapes["llava-7b"].llm, shapes["llava-7b"].tower
    layer = LLAVA7.layer("Q4_0")
    assert llm == Llm({layer: 32 * (4 * 4096**2 + 3 * 4096 * 11008)}, {layer: 32064 * 4096}, 32, 4096)
    inside = 23 * (4 * 1024**2 + 2 * 1024 * 4096) + 3 * 14 * 14 * 1024  # LLaVA goes by the last but one
    assert tower == Tower({"F16": inside}, {"F16": 4096 * 1024 + 4096**2}, 1024, 23)
    assert shapes["llava-7b"].view(1280, 960) == View(576, (Run(576, image=True),), ((576, 576),))


def test_tiles_and_what_stands_between_them_are_counted(shapes):
    view = shapes["smolvlm2-2.2b"].view(*PHOTO[0])
    assert view is not None
    assert (view.tokens, len(view.tiles), set(view.tiles)) == (13 * 81, 13, {(27 * 27, 81)})
    assert [run.rows for run in view.runs if run.image] == [81] * 13
    assert view.runs[0] == Run(2, image=False)  # <fake_token_around_image><row_1_col_1>
    few = shapes["smolvlm2-256m"].view(*PHOTO[0], 512)
    assert few is not None
    assert few.tokens <= 512


def test_windows_attend_to_less(shapes):
    tower = shapes["qwen2.5-vl-7b"].tower
    assert (tower.full, tower.windowed) == (4, 28)
    assert tower.pairs(1000) == 1000 * (4 * 1000 + 28 * 64)
    assert [shapes[name].any_size for name in ("qwen2.5-vl-3b", "smolvlm2-2.2b", "llava-7b")] == [True, False, False]


def test_experts_count_as_often_as_they_run_and_rare_types_as_the_commonest(tmp_path):
    files = write(tmp_path, "mini", MiniLlm("Q8_0", 256, 512, 2), MiniTower("F16", 128, 256, 1, 4))
    shape = VlmShape(files)
    assert shape.llm.blocks == {"Q8_0 256 512 128 2 2": 2 * (4 * 256**2 + 3 * 256 * 512)}
    assert shape.llm.head == {"Q8_0 256 512 128 2 2": 259 * 256}  # F32 in the file, and no sample is worth its while
    assert shape.tower.patch == {"F16": 4 * 128**2 + 2 * 128 * 256 + 3 * 14**2 * 128}


# ---- seconds


SIMPLE = Rates({"a": (1.0, 2.0, 4.0, 8.0, 16.0)}, {"f": 0.5}, (0.25, 0.125), 0.5, 10.0, 100.0, 1.0)


def test_a_batch_is_its_weights_its_logits_its_cells_and_its_layers():
    llm = Llm({"a": 3}, {"a": 7}, n_layer=2, width=5)
    assert SIMPLE.batch(llm, 1, 4) == 3 * 1 + 7 * 1 + 0.25 * 2 * 5 * (4 + 1) + 20
    assert SIMPLE.batch(llm, 8, 0, outputs=0) == 3 * 2 + 0.25 * 2 * 5 * 36 + 20
    assert SIMPLE.batch(llm, 80, 0, outputs=0) == 3 * 6 + 0.125 * 2 * 5 * (80 * 81 / 2) + 20
    assert SIMPLE.weight("a", 20) == 2 + 2 * 12 / 24
    assert SIMPLE.weight("a", 2 * KNOTS[-1]) == 32
    assert SIMPLE.batch(llm, 0) == 0
    assert SIMPLE.prompt(llm, [8, 1]) == SIMPLE.batch(llm, 8, 0, 0) + SIMPLE.batch(llm, 1, 8)
    assert SIMPLE.decoded(llm, 3, 10) == 2 * SIMPLE.batch(llm, 1, 11)
    assert SIMPLE.decoded(llm, 1, 10) == 0


def test_a_tile_is_its_patches_their_pairs_and_its_tokens():
    tower = Tower({"f": 6}, {"f": 4}, width=8, full=2)
    assert SIMPLE.tile_of(tower, 10, 5) == 100 + 0.5 * (6 * 10 + 4 * 5) + 0.5 * 8 * 2 * 100


@given(st.integers(1, 300), st.integers(0, 40))
def test_cells_are_those_of_each_row(rows, before):
    assert cells_of(rows, before) == sum(before + i + 1 for i in range(rows))


def test_prompts_are_cut_as_the_engine_cuts_them():
    views = [View(600, (Run(2, image=False), Run(610, image=True), Run(1, image=False)), ((1, 1),))]
    assert prompt_batches(views, 5, 9) == [7, STEP, 610 - STEP, 10]
    assert prompt_rows(views, 5, 9) == 627
    assert prompt_rows(views, 5, 9, kept=100) == 126  # 9 of 10 lines have a kept token, and their end
    assert prompt_rows(views, 5, 9, kept=0) == 17
    assert prompt_rows(views, 5, 9, kept=600) == 627
    assert prompt_rows([], 5, 9, kept=0) == 14


def test_tiles_are_between_one_a_picture_and_all():
    assert expected_tiles(5, 1, 65, 71) == pytest.approx(3.4, abs=0.05)
    assert expected_tiles(5, 1, 252, 71) == pytest.approx(4.9, abs=0.05)
    assert (expected_tiles(5, 1, 9, 0.0), expected_tiles(1, 1, 9, 71.0)) == (5, 1)


# ---- the fit


@dataclass
class Clockwork:
    """Loads VLMs that say they took what the truth says."""

    truth: Rates
    loads: int = 0

    def load(self, model: Path, mmproj: Path, options: LoadOptions = LoadOptions()) -> ClockworkVlm:
        self.loads += 1
        return ClockworkVlm(self.truth, VlmShape(VlmFiles(model, mmproj)))


class ClockworkVlm:
    BESIDE = 4

    def __init__(self, truth: Rates, shape: VlmShape) -> None:
        self.truth, self.shape, self.cells = truth, shape, 0

    def tokenize(self, parts):
        return [0] * (self.BESIDE + sum(len(part.text) for part in parts))

    def prefill(self, parts, *, reuse="nothing") -> Prefilled:
        n = len(self.tokenize(parts))
        stay = 0 if reuse == "nothing" else min(self.cells, n - 1)
        self.cells = n
        seconds = self.truth.step + self.truth.batch(self.shape.llm, n - stay, stay, outputs=0)
        return Prefilled(None, 0, 0, n, (seconds - self._trimmed(n - stay)) * 1e3, n - stay)

    def _trimmed(self, rows: int) -> float:
        """What the last block's feed-forward part takes less, which llama.cpp runs for the last row alone."""
        (kind,) = self.shape.llm.blocks
        width, ffn = map(int, kind.split()[1:3])
        return 3 * width * ffn * (self.truth.weight(kind, rows) - self.truth.weight(kind, 1))

    def encode(self, image) -> Encoded:
        side = image.shape[0] // 14
        tower = replace(self.shape.tower, token={})
        return Encoded(1, ImageLayout(1, None, None, 1), self.truth.tile_of(tower, side**2, 0) * 1e3)

    def release(self, image) -> None: ...

    def close(self) -> None: ...


def test_the_fit_recovers_what_a_machine_takes(monkeypatch):
    monkeypatch.setattr(sampling, "CACHE", 1 << 20)
    monkeypatch.setattr(sampling, "_TOWER", MiniTower("F16", 256, 512, 2, 32))
    wide, narrow = "F16 256 512 128 2 1", "Q4_0 256 512 64 4 4"
    rows = {wide: (2e-10, 9e-10, 3e-9, 1e-8, 2e-8), narrow: (1e-10, 8e-10, 2e-9, 9e-9, 1.5e-8)}
    rows |= dict.fromkeys(("F32 128 256 128 1 1",), (0.0,) * 5) | {"F16 1024 256 128 8 8": rows[wide]}
    truth = Rates(rows, {"F16": 2e-11, "Q8_0": 3e-11}, (3e-10, 1e-10), 4e-11, 2e-5, 0.0, 1.0, 3e-4)
    engine = Clockwork(truth)
    found = sampling.sample(engine, LoadOptions())
    assert (found.layer, found.step) == (pytest.approx(2e-5, rel=0.05), pytest.approx(3e-4, rel=0.05))
    assert found.cell == (pytest.approx(3e-10, rel=0.1), pytest.approx(1e-10, rel=0.1))
    found = sampling.sample(engine, LoadOptions(), replace(found, tile=1e-9), [wide, narrow], ["F16", "Q8_0"])
    for kind in (wide, narrow):
        assert found.rows[kind] == tuple(pytest.approx(known, rel=0.05) for known in rows[kind])
    assert found.patch == {kind: pytest.approx(known, rel=0.05) for kind, known in truth.patch.items()}
    assert found.pair == pytest.approx(4e-11, rel=0.05)
    before = engine.loads
    assert sampling.sample(engine, LoadOptions(), found) == found
    assert engine.loads == before


@pytest.mark.parametrize(
    ("name", "mini"),
    [
        ("Q4_0 4096 11008 128 32 32", MiniLlm("Q4_0", 4096, 11008, 2, 128, 32, 32)),  # 228 MB
        ("Q8_0 896 3072 64 14 2", MiniLlm("Q8_0", 896, 3072, 7, 64, 14, 2)),
        ("Q8_0 576 1536 64 9 3", MiniLlm("Q8_0", 576, 1536, 18, 64, 9, 3)),
        ("Q4_K 896 4864 64 14 2", MiniLlm("Q4_K", 1024, 4864, 7, 64, 16, 2)),  # blocks of 256
    ],
)
def test_what_is_sampled_is_as_wide_as_the_llm_and_outgrows_caches(name, mini):
    assert sampling.full(name) == mini


def test_a_sample_beside_other_work_is_none(monkeypatch, tmp_path):
    bench = sampling._Bench(SimpleNamespace(pid=os.getpid()), LoadOptions(threads=2), tmp_path)
    for watched, used, share in ((4.0, 7.0, 0.875), (4.0, 4.0, 0.5), (0.1, 0.05, 1.0)):
        bench._watched, bench._used = watched, used
        assert bench.share == share
    assert sampling._Bench(Clockwork(Rates()), LoadOptions(), tmp_path).share == 1.0
    monkeypatch.setattr(sampling._Bench, "share", 0.5)
    with pytest.raises(sampling.Disturbed):
        sampling.sample(Clockwork(Rates()), LoadOptions(), rates())


def test_noise_never_makes_a_rate_of_nothing(monkeypatch):
    monkeypatch.setattr(sampling, "CACHE", 1 << 20)
    monkeypatch.setattr(sampling, "_TOWER", MiniTower("F16", 256, 512, 2, 32))
    shape = "Q4_0 256 512 128 2 2"
    shapes = "F32 128 256 128 1 1", "F16 1024 256 128 8 8", shape
    engine = Clockwork(Rates(dict.fromkeys(shapes, (0.0,) * 5), {"F16": 0.0}))
    found = sampling.sample(engine, LoadOptions(), llms=[shape], towers=["F16"])
    assert min(*found.rows[shape], found.patch["F16"], *found.cell, found.pair, found.layer, found.tile) > 0


# ---- the choice


def by_name(plans: list[Plan]) -> dict[str, Plan]:
    return {plan.name: plan for plan in plans}


def test_a_tenth_of_the_parameters_as_a_guide_pays(shapes):
    asked = Asked(PHOTO, QUESTION, keep=0.09, max_tokens=16, loaded=True)
    plans = planner(shapes, "llava-7b", "guide-0.28b").plans(asked)
    plain, best = plans[0], quickest(plans)
    assert (best.name, best.method, best.guide_keep) == ("guided", "sgl+", None)
    assert plain.total / best.total > 3.3
    assert plain.ms["prefill"] == pytest.approx(64e3, rel=0.1)  # 58.4 s of pictures and 6.0 s of text were timed
    assert plain.ms["encode"] == pytest.approx(3.4e3, rel=0.1)


@pytest.mark.parametrize(
    ("guide", "model", "gains"), [("smolvlm2-256m", "smolvlm2-2.2b", 1.0), ("qwen2.5-vl-3b", "qwen2.5-vl-7b", 0.8)]
)
def test_a_guide_that_costs_what_it_saves_is_left_out(shapes, guide, model, gains):
    """At full view, with all tiles encoded, the two pairs come out even at best."""
    asked = Asked(PHOTO, QUESTION, max_tokens=16, tile_price=0.0, guide_tokens=0, loaded=True)
    plans = planner(shapes, model, guide).plans(asked)
    assert [plan.name for plan in plans] == ["plain", "guided"]
    assert plans[0].total / plans[1].total == pytest.approx(gains, abs=0.1)
    assert quickest(plans).name == "plain"
    seen_less = planner(shapes, model, guide).plans(replace(asked, guide_tokens=None, keep=0.09))
    assert quickest(seen_less).guide_tokens == 512


def test_one_tower_runs_once(shapes):
    model, guide, memory = shapes["llava-7b"], shapes["guide-0.28b"], RateMemory(None, "")
    memory.rates = rates()
    apart, joint = (
        by_name(Planner(model, guide, memory, one_tower=one).plans(Asked(PHOTO, QUESTION))) for one in (False, True)
    )
    assert joint["guided"].ms["encode"] < 0.1 * apart["guided"].ms["encode"]
    assert joint["guided"].ms["guide_encode"] == apart["guided"].ms["guide_encode"]
    assert joint["plain"] == apart["plain"]
    assert model.shares_tower(model)
    assert not model.shares_tower(shapes["smolvlm2-2.2b"])


def test_tiles_that_the_guide_has_run_cost_their_projector(tmp_path):
    real = replace(SMOL22B, tower=SMOL256.tower, values=SMOL256.values, mm=((2048, 12288),))
    model, guide = (VlmShape(files_of(tmp_path, each)) for each in (real, SMOL256))
    assert model.shares_tower(guide)
    memory = RateMemory(None, "")
    memory.rates = rates()
    one, two = (Planner(model, guide, memory, one_tower=one) for one in (True, False))
    asked = Asked(PHOTO, QUESTION, keep=0.09, loaded=True)
    n_tiles = len(model.view(*PHOTO[0]).tiles)
    shared, apart = (by_name(planner.plans(replace(asked, guide_tokens=0)))["guided"] for planner in (one, two))
    speed = Speed(model, memory)
    whole, after = (speed.encode([model.view(*PHOTO[0])], 1, ran) for ran in (0, 1))
    assert after < 0.2 * whole
    assert shared.ms["encode"] == pytest.approx(n_tiles * after)
    price = model.tile_price
    kept = round(0.09 * model.view(*PHOTO[0]).tokens)
    assert apart.ms["encode"] == pytest.approx(expected_tiles(n_tiles, 1, kept, price) * whole)
    overview = replace(asked, guide_tokens=64)
    seen, unseen = (planner.plans(overview)[1].ms["encode"] for planner in (one, two))
    assert seen == pytest.approx(unseen - whole + after)


def test_plain_stays_where_little_is_saved():
    plain, others = Plan("plain", "none", ms={"prefill": 100.0}), [89.0, 95.0]
    plans = [plain, *(Plan(str(ms), "sgl+", 0, {"prefill": ms}) for ms in others)]
    assert quickest(plans).name == "89.0"
    assert quickest([plain, plans[2]]) is plain
    quicker, sooner = (replace(plans[1], name=str(ms), ms={"prefill": ms}) for ms in (87.0, 80.0))
    assert quickest([*plans, quicker]).name == "89.0"  # more accurate, and hardly longer
    assert quickest([*plans, quicker, sooner]).name == "80.0"


def test_what_accuracy_allows(shapes):
    asked = Asked(PHOTO, QUESTION, loaded=True)
    qwen = planner(shapes, "qwen2.5-vl-7b", "qwen2.5-vl-3b")
    half, third = (f"guided, at most {n} tokens" for n in (512, 256))
    assert [p.name for p in qwen.plans(asked)] == ["plain", half]
    fast = qwen.plans(asked, "fast")
    shown = [f"{name}{less}" for name in (half, third) for less in ("", ", shown 44 %")]
    assert [p.name for p in fast[1:]] == [*shown, "fastervlm", "divprune"]
    assert {p.guide_tokens for p in qwen.plans(replace(asked, image_tokens=300))} == {None, 300}
    assert [p.guide_tokens for p in qwen.plans(replace(asked, guide_tokens=77), "fast")[:2]] == [None, 77]
    said = qwen.plans(replace(asked, guide_keep=Tokens(99)))
    assert [(p.name, p.guide_keep) for p in said[1:]] == [(f"{half}, shown 99 tokens", Tokens(99))]
    assert "fastervlm" not in by_name(qwen.plans(replace(asked, keep="auto"), "fast"))
    assert [p.name for p in planner(shapes, "llava-7b", None).plans(asked)] == ["plain"]
    smol = planner(shapes, "smolvlm2-2.2b", "smolvlm2-256m")
    assert [p.guide_tokens for p in smol.plans(asked)] == [None, 0, 512]
    calibrated = smol.plans(replace(asked, exits=0.5), "fast")[:2]
    assert [(p.guide_tokens, p.guide_keep) for p in calibrated] == [(None, None), (0, None)]


def test_a_guide_that_is_shown_less_reads_less_and_compares_first(shapes):
    asked = Asked(PHOTO, QUESTION, keep=0.09, max_tokens=16, loaded=True)
    pair = planner(shapes, "llava-7b", "guide-0.28b")
    all_, some = pair.plans(asked, "fast")[1:3]
    text = asked.counts.before + asked.counts.after
    speed = pair._speed("guide_")
    assert some.ms["guide_prefill"] == pytest.approx(speed.prefill([text + 253]) + 2.7e-5 * 576**2)
    assert some.ms["guide_encode"] == all_.ms["guide_encode"]
    assert some.ms["guide_decode"] < all_.ms["guide_decode"]
    assert {stage: some.ms[stage] for stage in ("encode", "prefill", "decode")} == {
        stage: all_.ms[stage] for stage in ("encode", "prefill", "decode")
    }
    applied = some.applied(AskOptions(keep=0.09, exit_at=0.5, max_tokens=16))
    assert (applied.guide_keep, applied.keep) == (0.44, 0.09)


def test_exits_shorten_what_comes_after_the_guide(shapes):
    asked = Asked(PHOTO, QUESTION)
    pair = planner(shapes, "llava-7b", "guide-0.28b")
    unchecked, never, half = (by_name(pair.plans(replace(asked, exits=share)))["guided"] for share in (None, 0.0, 0.5))
    assert unchecked.ms["guide_prefill"] < never.ms["guide_prefill"]
    assert unchecked.ms["decode"] == never.ms["decode"]
    for stage, ms in never.ms.items():
        if stage != "load":
            assert half.ms[stage] == pytest.approx(ms * (1.0 if stage.startswith("guide_") else 0.5))
    assert half.ms["load"] < never.ms["load"]
    assert half.exits == 0.5
    assert by_name(pair.plans(replace(asked, loaded=True)))["plain"].ms["load"] == 0


def test_what_a_plan_makes_of_the_options():
    options = AskOptions(keep=0.2, exit_at=0.9)
    assert Plan("plain", "none").applied(options) == AskOptions(method="none", keep=None)
    assert Plan("guided", "sgl+", 512).applied(options) == options
    assert Plan("divprune", "divprune").applied(options) == AskOptions(method="divprune", keep=0.2)


def test_a_family_that_is_not_known_is_not_planned(shapes, tmp_path):
    unknown = VlmShape(files_of(tmp_path, replace(LLAVA7, name="odd", projector="other")))
    memory = RateMemory(None, "")
    memory.rates = rates()
    assert Planner(unknown, shapes["guide-0.28b"], memory).plans(Asked(PHOTO, QUESTION)) == []
    odd_guide = Planner(shapes["llava-7b"], unknown, memory).plans(Asked(PHOTO, QUESTION))
    assert [plan.name for plan in odd_guide] == ["plain"]


SECONDS = st.floats(1e-13, 1e-6)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    pair=st.sampled_from([("llava-7b", "guide-0.28b"), ("smolvlm2-2.2b", "smolvlm2-256m"),
                          ("qwen2.5-vl-7b", "qwen2.5-vl-3b"), ("guide-0.28b", "llava-7b")]),
    row=st.lists(SECONDS, min_size=5, max_size=5),
    others=st.lists(SECONDS, min_size=7, max_size=7),
    sizes=st.lists(st.tuples(st.integers(1, 4000), st.integers(1, 4000)), min_size=1, max_size=2),
    keep=st.one_of(st.floats(0.001, 1), st.just("auto"), st.integers(1, 5000).map(Tokens)),
    exits=st.one_of(st.none(), st.floats(0, 1)),
    accuracy=st.sampled_from(["high", "fast"]),
)  # fmt: skip
def test_what_is_chosen_is_never_predicted_slower_than_plain(shapes, pair, row, others, sizes, keep, exits, accuracy):
    patch, small, large, *rest = others
    known = Rates(dict.fromkeys(rates().rows, tuple(sorted(row))), {"F16": patch}, (small, large), *rest)
    asked = Asked(tuple(sizes), QUESTION, keep=keep, exits=exits)
    plans = planner(shapes, *pair, known).plans(asked, accuracy)
    best = quickest(plans)
    assert plans[0].name == "plain"
    assert best.total <= plans[0].total
    assert all(ms >= 0 for plan in plans for ms in plan.ms.values())


# ---- what answers teach


def told(asked: Asked, plan: Plan, planned: Planner, factor: float = 1.0, **changed) -> Answer:
    tokens = TokenCounts(576, 52, 52 + 40, 16)
    ms = dict.fromkeys(plan.ms, 1.0)
    answer = Answer("a", (), (), "model", tokens, ms, plan.method, 0.09, None, tiles=TileCounts(1, 1))
    answer = replace(answer, **changed)
    return replace(answer, ms={k: factor * v for k, v in planned.again(asked, plan, answer).ms.items()})


@pytest.fixture
def learning(shapes) -> Iterator[tuple[Planner, Asked, Plan, RateMemory]]:
    memory = RateMemory(None, "")
    memory.rates = rates()
    planned = Planner(shapes["llava-7b"], shapes["guide-0.28b"], memory)
    asked = Asked(PHOTO, QUESTION, keep=0.09, loaded=True)
    return planned, asked, by_name(planned.plans(asked))["guided"], memory


def test_answers_correct_the_predictions(learning):
    planned, asked, plan, _ = learning
    for _ in range(2):
        planned.learn(asked, plan, told(asked, plan, planned, 1.5))
    assert by_name(planned.plans(asked))["guided"] == plan  # two are too few
    planned.learn(asked, plan, told(asked, plan, planned, 1.5))
    after = by_name(planned.plans(asked))["guided"]
    for stage in ("guide_encode", "guide_prefill", "encode", "prefill", "decode"):
        assert after.ms[stage] == pytest.approx(1.5 * plan.ms[stage])
    assert after.ms["guide_decode"] == plan.ms["guide_decode"]
    planned.learn(asked, after, told(asked, after, planned, 20.0))  # one that was disturbed
    assert by_name(planned.plans(asked))["guided"].ms["prefill"] == pytest.approx(1.5 * plan.ms["prefill"])


def test_of_an_exit_the_guide_alone_is_learnt(learning):
    planned, asked, plan, _ = learning
    asked = replace(asked, exits=0.0)
    plan = by_name(planned.plans(asked))["guided"]
    for _ in range(3):
        by_guide = told(asked, plan, planned, 2.0, answered_by="guide", tokens=TokenCounts(576, None, 616, 3))
        assert by_guide.ms["encode"] == by_guide.ms["prefill"] == by_guide.ms["decode"] == 0
        planned.learn(asked, plan, by_guide)
    after = by_name(planned.plans(asked))["guided"]
    assert after.ms["guide_prefill"] == pytest.approx(2 * plan.ms["guide_prefill"])
    assert after.ms["prefill"] == plan.ms["prefill"]


def test_a_draft_that_was_taken_over_teaches_nothing_of_decoding(learning):
    planned, asked, plan, _ = learning
    for _ in range(3):
        drafted = told(asked, plan, planned, 2.0, tokens=TokenCounts(576, 52, 92, 16, drafted=16, accepted=16))
        planned.learn(asked, plan, drafted)
    after = by_name(planned.plans(asked))["guided"]
    assert (after.ms["decode"], after.ms["prefill"]) == (plan.ms["decode"], pytest.approx(2 * plan.ms["prefill"]))


def test_how_many_tiles_are_opened_is_learnt(shapes):
    """A guide that looks at one place opens fewer tiles than the kept tokens let expect, and a picture has one."""
    planned, asked = planner(shapes, "smolvlm2-2.2b", "smolvlm2-256m"), Asked(PHOTO, QUESTION, loaded=True)
    before = by_name(planned.plans(asked))["guided"]
    n_tiles = len(shapes["smolvlm2-2.2b"].view(*PHOTO[0]).tiles)
    kept = share_of(asked.keep, shapes["smolvlm2-2.2b"].view(*PHOTO[0]).tokens)
    expected = expected_tiles(n_tiles, 1, kept, shapes["smolvlm2-2.2b"].tile_price)
    for _ in range(3):
        tokens = TokenCounts(1377, kept, kept + 90, 16)
        answer = told(asked, before, planned, tokens=tokens, tiles=TileCounts(n_tiles, 8))
        planned.learn(asked, before, answer)
    after = by_name(planned.plans(asked))["guided"]
    assert 8 < expected < n_tiles
    assert after.ms["encode"] == pytest.approx(before.ms["encode"] * 8 / expected)


def test_what_was_not_known_before_is_put_in_after(learning, shapes):
    planned, asked, plan, memory = learning
    answer = told(asked, plan, planned)
    speed = Speed(shapes["llava-7b"], memory)
    views = [shapes["llava-7b"].view(*PHOTO[0])]
    again = planned.again(asked, plan, answer)
    exact = speed.answer(views, Counts(16, 24, 16, 32, kept=52, tiles=1.0))
    assert {stage: again.ms[stage] for stage in exact} == exact
