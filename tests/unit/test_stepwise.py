"""Methods within the LLM on the fake engine: who stays, what is told of it, and conversations."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, TextPart
from localvlm.engine.fake import FakeEngine, FakeVlm, Script
from localvlm.errors import UsageError
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from localvlm.pruning import IN_LLM, Tokens, mean_kept
from localvlm.pruning.dyvte import Gate, dyvte
from localvlm.stepwise import prefill_in_steps
from tests.unit.test_cli_eval import LARGE, data, figures  # noqa: F401 - a fixture
from tests.unit.test_extras import write

PAIR = Pair("fake", *(VlmFiles(Path(f"{role}.gguf"), Path("mmproj.gguf")) for role in ("guide", "model")))
DEEP = Script("dark red", n_layer=32, pruned_answer="red")
N = 144
SWEEPING = [name for name, method in IN_LLM.items() if method.sweeps]


class Logged(FakeVlm):
    """Notes each pause: layer, image tokens, rows of text that rate; and rows that were replaced."""

    def __init__(self, *args):
        super().__init__(*args)
        self.log, self.merged = [], []

    def pause(self, parts, layer, *, attend=(-1,), hidden=False):
        self.log.append((layer, attend))
        return super().pause(parts, layer, attend=attend, hidden=hidden)

    def resume(self, keep, rows=None, *, layer, attend=(-1,), hidden=False):
        self.log.append((layer, attend))
        self.merged.append(rows)
        return super().resume(keep, rows, layer=layer, attend=attend, hidden=hidden)


def load(script: Script = DEEP) -> Logged:
    engine = FakeEngine({"model": script})
    return Logged(engine, "model", script, LoadOptions())


def asked(vlm: FakeVlm, question: str = "what is it?") -> list:
    shown = vlm.encode(np.zeros((48, 64, 3), np.uint8))
    return [TextPart("USER: ", special=True), ImagePart(shown), TextPart(question)]


def picture(seed: int = 1) -> Image:
    return Image(np.random.default_rng(seed).integers(0, 256, (40, 60, 3), dtype=np.uint8), f"{seed}.png")


def opened(model: Script = DEEP) -> Pipeline:
    return Pipeline.open(PAIR, LoadOptions(), FakeEngine({"guide": Script("red"), "model": model}))


def test_fastv_keeps_what_the_last_row_attends_to() -> None:
    vlm = load()
    parts = asked(vlm)
    vlm.prefill(parts, tap=True)
    scores = vlm.attention().last[1].mean(axis=0)
    done = prefill_in_steps(vlm, parts, IN_LLM["fastv"], 0.35)
    k = round((0.35 * 32 - 2) / 30 * N)
    assert done.steps == ((0, N), (2, k))
    assert list(done.kept) == sorted(sorted(range(N), key=lambda i: (-scores[i], i))[:k])
    assert (done.prompt.n_image, done.prompt.n_kept) == (N, k)
    assert vlm.log == [(2, (-1,))]


@pytest.mark.parametrize("name", SWEEPING)
@pytest.mark.parametrize("keep", [0.64, 0.35, Tokens(50)])
def test_a_layer_has_the_share_asked_for_on_average(name: str, keep: float | Tokens) -> None:
    vlm = load()
    done = prefill_in_steps(vlm, asked(vlm), IN_LLM[name], keep)
    share = 50 / N if isinstance(keep, Tokens) else keep
    assert mean_kept(done.steps, 32) == pytest.approx(share * N, abs=0.5)
    assert done.prompt.n_kept == len(done.kept) == done.steps[-1][1]


def test_sparsevlm_s_raters_are_asked_at_each_stage() -> None:
    vlm = load()
    prefill_in_steps(vlm, asked(vlm, "what?"), IN_LLM["sparsevlm"], 0.2)
    (begins, nobody), *stages = vlm.log
    assert (begins, nobody) == (0, ())
    assert [layer for layer, _ in stages] == [2, 6, 15]
    assert len({rating for _, rating in stages}) == 1
    assert 0 < len(stages[0][1]) < len("what?")
    assert [rows is None for rows in vlm.merged] == [True, False, False]


def gate(exits: bool) -> Gate:
    bias = np.array([0, 1] if exits else [1, 0], np.float32)
    return Gate(np.zeros((4, 16), np.float32), np.zeros(4, np.float32), np.zeros((2, 4), np.float32), bias)


def test_dyvte_s_first_gate_that_opens_lets_all_leave() -> None:
    vlm = load()
    done = prefill_in_steps(vlm, asked(vlm), dyvte({layer: gate(layer >= 5) for layer in range(1, 32)}), 0.35)
    assert done.steps == ((0, N), (5, 0))
    assert done.kept == ()
    assert vlm.log == [(layer, (-1,)) for layer in range(1, 6)]
    shut = prefill_in_steps(vlm, asked(vlm), dyvte({layer: gate(exits=False) for layer in range(1, 32)}), 0.35)
    assert shut.steps == ((0, N),)


@pytest.mark.parametrize("name", IN_LLM)
def test_a_prompt_without_pictures(name: str) -> None:
    done = prefill_in_steps(load(), [TextPart("what is it?")], IN_LLM[name], 0.35)
    assert (done.steps, done.kept) == (((0, 0),), ())


# asking


@pytest.mark.parametrize("name", SWEEPING)
def test_an_answer_tells_the_steps(name: str) -> None:
    with opened() as pipeline:
        answer = pipeline.ask([picture()], "what?", AskOptions(name, 0.35))
    assert (answer.text, answer.answered_by, answer.guide_text, answer.layer) == ("red", "model", None, 0)
    assert answer.tokens.mean_kept == mean_kept(answer.steps, 32) == pytest.approx(0.35 * N, abs=0.5)
    assert answer.tokens.kept == len(answer.kept_indices) == answer.steps[-1][1] < N


def test_all_methods_tell_the_steps() -> None:
    with opened() as pipeline:
        for options, steps in (
            (AskOptions("grid", 0.25), ((0, 36),)),
            (AskOptions("grid", 0.25, layer=3), ((0, N), (3, 36))),
            (AskOptions("none"), ((0, N),)),
            (AskOptions("fastv", None), ((0, N),)),
            (AskOptions("sgl+", exit_at=0.0), ()),
        ):
            assert pipeline.ask([picture()], "what?", options).steps == steps


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer": 3}, "layer 3"),
        ({"preset": "paper-9"}, "preset 'paper-9'"),
        ({"keep": "auto"}, "keep 'auto'"),
    ],
)
def test_a_method_has_layers_of_its_own(options: dict, words: str) -> None:
    with opened() as pipeline, pytest.raises(UsageError, match=words):
        pipeline.ask([picture()], "what?", AskOptions("fastv", **options))


def test_turns_of_a_conversation_are_prefilled_anew() -> None:
    fastv = AskOptions("fastv", 0.35)
    with opened() as pipeline, pipeline.session([picture()]) as session:
        first = session.ask("what?", fastv)
        second = session.ask("where?", fastv)
        assert first.steps == second.steps
        assert second.ran[1] == second.tokens.prompt
        session.add(picture(2))
        third = session.ask("and now?", fastv)
        assert third.tokens.image == third.steps[0][1] == 2 * N
        chosen = session.ask("which?", AskOptions("sgl+", 0.2))
        assert chosen.tokens.kept == round(0.2 * 2 * N)
        assert session.ask("who?", fastv).steps == third.steps


def test_ask_says_where_tokens_left(cli, tmp_path) -> None:
    run = cli.ask("--method", "sparsevlm-v2", "--keep", "0.6", "-v", "--explain", tmp_path / "o.png", "--json")
    answer = json.loads(run.out)
    assert answer["steps"][0] == [0, N]
    (_, one), (_, two) = answer["steps"][1:]  # of its 4 layers, two stages fall on the first cut
    assert f"layers: {one} from 1 on, {two} from 2 on, {answer['tokens']['mean_kept']:.1f} of 144" in run.err
    assert (tmp_path / "o.png").exists()


def test_ask_says_if_fewer_were_asked_for(cli) -> None:
    told = "method 'pyramiddrop' keeps 26% of the image tokens here"
    assert told in cli.ask("--method", "pyramiddrop", "--keep", "0.1").err
    assert "keeps" not in cli.ask("--method", "pyramiddrop", "--keep", "0.5").err


def weigh(model: Path, n_layer: int, exits: int) -> None:
    """Gates for the fake model of that file, the first that opens before layer ``exits``."""
    arrays = {}
    for layer in range(1, n_layer):
        bias = np.array([0, 1] if layer >= exits else [1, 0], np.float32)
        shapes = {"up.weight": (32, 16), "up.bias": (32,), "down.weight": (2, 32)}
        arrays |= {f"gate.{layer}.{name}": np.zeros(shape, np.float32) for name, shape in shapes.items()}
        arrays[f"gate.{layer}.down.bias"] = bias
    write(model.with_name(f"{model.stem}.dyvte.gguf"), "dyvte", arrays)


def test_dyvte_goes_by_the_weights_beside_the_model(tmp_path) -> None:
    pair = Pair("fake", None, VlmFiles(tmp_path / "model.gguf", tmp_path / "mmproj.gguf"))
    with Pipeline.open(pair, LoadOptions(), FakeEngine({"model": Script("dark red")})) as pipeline:
        with pytest.raises(UsageError, match=r"needs weights trained for 'model\.gguf'"):
            pipeline.ask([picture()], "what?", AskOptions("dyvte"))
        weigh(tmp_path / "model.gguf", 4, 2)
        answer = pipeline.ask([picture()], "what?", AskOptions("dyvte"))
    assert (answer.steps, answer.tokens.mean_kept, answer.kept_indices) == (((0, N), (2, 0)), N / 2, ())


# eval


def test_eval_prunes_within_the_llm(cli, data, tmp_path) -> None:  # noqa: F811 - the fixture
    methods = f"{','.join(SWEEPING)},layer,paper-64,paper-9,dyvte"
    run = cli("eval", data, *cli.pair, "--methods", "fastv,dyvte")
    assert (run.code, "needs weights trained for" in run.err, "questions are answered" in run.err) == (2, True, False)
    weigh(Path(cli.pair[cli.pair.index("--model") + 1]), LARGE.llm.layers, 1)
    run = cli("eval", data, *cli.pair, "--methods", methods, "--keep", "0.6,0.09", "--json", tmp_path / "o.json")
    assert run.code == 0, run.err
    rows = figures(tmp_path / "o.json")
    assert (rows["dyvte"]["keep"], rows["dyvte"]["cost"]["share"]) == (None, 0.25)
    assert [name for name in rows if name.startswith("paper")] == ["paper-64", "paper-9"]
    for name in (*SWEEPING, "layer"):
        row = rows[f"{name} 60%"]
        assert (row["reached"], row["cost"]["mean_kept"]) == (True, pytest.approx(0.6 * N, abs=0.5))
        assert not rows[f"{name} 9%"]["reached"]
        assert (row["cost"]["guide_flops"] > 0) == (name == "layer")
        assert rows["none"]["cost"]["model_flops"] > row["cost"]["model_flops"]
        assert f"{name} " in run.out
    least = (N + (LARGE.llm.layers - 1)) / LARGE.llm.layers / N
    assert rows["fastv 9%"]["cost"]["share"] == pytest.approx(least)
    assert f"min {100 * least:.3g}%" in run.out
    paper = rows["paper-64"]["cost"]  # layer 19 of 48 and 40 %
    assert (paper["kept"], paper["mean_kept"]) == (58, (2 * N + 2 * 58) / 4)
