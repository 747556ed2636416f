"""Memory is told before it is taken, and what cannot fit is refused with what would."""

from __future__ import annotations

from dataclasses import replace

import pytest

from localvlm.answers import AskOptions
from localvlm.catalog import entries, example_image, pair_named
from localvlm.engine.api import LoadOptions
from localvlm.engine.fake import FakeEngine, Script
from localvlm.images import load
from localvlm.memory import TEXT, Asked, Need, asked_of, pair_need, vlm_need
from localvlm.pipeline import Pipeline
from localvlm.room import room
from tests import memory, zoo

PLAIN = LoadOptions()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    return zoo.build("llava15", tmp_path_factory.mktemp("zoo"))


@pytest.mark.parametrize("name", ["demo", "zoo llava15, a pair"])
def test_predictions_hold(name, tmp_path):
    case = next(case for case in memory.own_cases(tmp_path) if case.name == name)
    found = memory.measure(case)
    assert found.ok, f"{found.off:+.1%}"


def test_a_cache_takes_what_its_cells_do(llava):
    def cells(rows: int, options: LoadOptions = PLAIN) -> int:
        return vlm_need(llava, options, Asked((), text=rows)).cache

    text = llava.row.text
    one = text.layers * text.kv_heads * text.head_dim * 2 * 2
    assert cells(100) == 512 * one
    assert cells(300) == 768 * one
    assert cells(10_000) == text.context * one
    assert cells(100, replace(PLAIN, n_ctx=256)) == 256 * one
    assert cells(100, replace(PLAIN, kv_type="q8_0")) == 512 * one * 17 / 32


def test_pictures_take_memory_and_a_guide_that_is_looked_into_more(llava):
    none, one, two = (vlm_need(llava, PLAIN, Asked(((84, 84),) * n)).image for n in (0, 1, 2))
    assert none == 0 < one < two
    assert vlm_need(llava, PLAIN, guides=True).image > vlm_need(llava, PLAIN).image


def test_layers_on_a_gpu_are_counted_there():
    model = pair_named("demo").model
    whole, half, none = (vlm_need(model, LoadOptions(gpu_layers=n)) for n in (-1, 3, 0))
    assert none.gpu == 0 < half.gpu < whole.gpu < whole.total == none.total
    assert whole.host < whole.weights  # the table of embeddings stays
    assert whole.copies > half.copies > none.copies


def test_of_a_pair_that_takes_turns_the_larger_counts():
    both, turns = (pair_need(pair_named("demo"), PLAIN, PLAIN, low_memory=low) for low in (False, True))
    assert both.total - turns.total == min(both.guide.total, both.model.total)
    assert Need(None, both.model).total == turns.total


def test_contexts_of_layers_are_counted(llava):
    """One more for each layer before which tokens leave; what it does not run it gives back."""
    row = (84, 84)
    n = vlm_need(llava, PLAIN, Asked((row,)))
    layers = llava.row.text.layers
    two = vlm_need(llava, PLAIN, Asked((row,), cuts=lambda n, n_layer: [(n_layer // 2, n // 2)]))
    assert n.buffers < two.buffers < 2.5 * n.buffers
    assert n.cache < two.cache <= 2 * n.cache
    late = vlm_need(llava, PLAIN, Asked((row,), cuts=lambda n, n_layer: [(n_layer - 1, n)]))
    assert late.cache == n.cache + n.cache * (layers - 1) // layers
    idle = vlm_need(llava, PLAIN, Asked((row,), cuts=lambda n, n_layer: [(1, n), (n_layer - 1, n)]))
    assert idle == late  # where none leave, the context before goes on
    assert vlm_need(llava, PLAIN, Asked((row,), cuts=lambda n, n_layer: [])) == n
    on_gpu = vlm_need(llava, LoadOptions(gpu_layers=-1), Asked((row,), cuts=lambda n, n_layer: [(n_layer - 1, n)]))
    assert on_gpu.cache == 2 * n.cache  # nothing is given back there


@pytest.mark.parametrize("name", ["fastv", "sparsevlm", "pyramiddrop", "dyvte", "flashsloth", "sgl+"])
def test_what_a_method_takes_is_asked_of_it(llava, name):
    plain = vlm_need(llava, PLAIN, asked_of(AskOptions(method="none", keep=None)))
    there = vlm_need(llava, PLAIN, asked_of(AskOptions(method=name, keep=0.35)))
    at_layer = vlm_need(llava, PLAIN, asked_of(AskOptions(method="sgl+", keep=0.35, layer=1)))
    preset = vlm_need(llava, PLAIN, asked_of(AskOptions(method="sgl+", preset="paper-9")))
    assert (there.buffers > plain.buffers) == (name != "sgl+")
    assert min(at_layer.buffers, preset.buffers) > plain.buffers


def test_room_is_that_of_the_machine():
    assert 1 << 24 < room() < 1 << 50


def test_the_guide_goes_before_the_model_comes():
    gone = []

    class Engine(FakeEngine):
        def load(self, model, mmproj, options=PLAIN):
            gone.append([vlm.gone for vlm in self.loaded])
            return super().load(model, mmproj, options)

    pair, image = pair_named("demo"), load(example_image())
    texts = []
    for low in (False, True):
        gone.clear()
        with (
            Pipeline(pair, Engine(Script(answer="red")), low_memory=low) as pipeline,
            pipeline.session([image]) as talk,
        ):
            texts.append([talk.ask("What?", AskOptions(exit_at=None)).text for _ in range(2)])
            assert gone[:2] == [[], [low]]
    assert texts[0] == texts[1]


def test_what_cannot_fit_is_refused_with_what_does(cli):
    demo = ("ask", "--pair", "demo", "example", "What?")
    assert cli(*demo, "--max-memory", "0").code == cli(*demo).code == 0
    run = cli(*demo, "--max-memory", "0.03")
    assert (run.code, run.out, cli.engine.loaded) == (5, "", [])
    assert "30 MB are free" in run.err
    assert "weights 6 MB" in run.err
    assert "--max-memory 0 loads it all the same" in run.err
    asked = Asked((load(example_image()).size,), TEXT + 1, kept=0.35)
    most = pair_need(pair_named("demo"), PLAIN, PLAIN, asked).total - 2_000_000
    run = cli(*demo, "--max-memory", most / 1e9)
    assert (run.code, "pass --low-memory, which needs" in run.err) == (5, True)
    run = cli(*demo, "--low-memory", "--max-memory", most / 1e9)
    assert (run.code, "this is tight" in run.err) == (0, True)
    less = pair_need(pair_named("demo"), PLAIN, PLAIN, asked, low_memory=True).total - 100_000
    run = cli(*demo, "--low-memory", "--max-memory", less / 1e9)
    assert (run.code, "pass --kv-type q8_0, which needs" in run.err) == (5, True)


def test_another_pair_is_proposed_where_no_flag_helps(cli, monkeypatch):
    from localvlm.cli import fit

    assert fit._smaller(3_200_000_000) == "run `localvlm pull smolvlm2-2.2b`"
    assert fit._smaller(1 << 20) == "close other programs"
    demo = [replace(entry, name="mine") for entry in entries() if entry.name == "demo"]
    monkeypatch.setattr("localvlm.catalog.entries", lambda: demo)
    assert fit._smaller(1 << 30) == "pass --pair mine"
    assert fit._smaller(120_000_000) == "pass --pair mine --low-memory"


def test_verbose_tells_the_parts(cli):
    run = cli("ask", "-v", "--pair", "demo", "example", "What?")
    assert "guide 1" in run.err
    assert "projector 5 MB" in run.err


def test_files_that_cannot_be_read_are_told_by_those_that_load_them(cli):
    assert cli.ask("-v", "--max-memory", "0.000001").code == 0  # the fake needs no files


@pytest.mark.parametrize(
    ("most", "taken", "folder", "before"),
    [
        ("memory.max", "memory.current", "", ""),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory", "total_"),
    ],
)
def test_a_control_group_has_room_where_it_holds_files_that_were_read(
    monkeypatch, tmp_path, most, taken, folder, before
):
    place = tmp_path / folder
    place.mkdir(exist_ok=True)
    (place / most).write_text("100000\n")
    (place / taken).write_text("90000\n")
    (place / "memory.stat").write_text(f"anon 20000\n{before}inactive_file 40000\n{before}active_file 20000\n")
    monkeypatch.setattr("localvlm.room._CGROUP", tmp_path)
    assert room() == 70_000
    (place / most).write_text("max\n")
    assert room() > 100_000


def test_limits_of_the_worker_and_of_processes_bound_the_room(monkeypatch):
    monkeypatch.setenv("LOCALVLM_WORKER_MEMORY", "123456789")
    assert room() == 123_456_789


def test_all_that_load_a_pair_look_first(cli, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(f'{{"image": "{cli.image}", "question": "What?", "answer": "red"}}\n')
    for command in (
        ("attention", "--save", tmp_path / "a.npz", "--pair", "demo", "example", "What?"),
        ("eval", "--pair", "demo", "--work", tmp_path / "work", data),
        ("calibrate", "--pair", "demo", data),
    ):
        run = cli(*command, "--max-memory", "0.03")
        assert (run.code, "30 MB are free" in run.err, cli.engine.loaded) == (5, True, []), command
