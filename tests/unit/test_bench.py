"""What `localvlm bench` measures: on the fake engine what is asked, on tiny files of every preset that it runs."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
import xml.dom.minidom
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest

from localvlm.answers import Pair, VlmFiles
from localvlm.bench import growth, presets, shapes
from localvlm.bench.cases import NEVER, PLAIN, STAGES, Bench, Case, Run, Setting, answer_of, cases, drawn, question_of
from localvlm.bench.fixed import FixedEngine
from localvlm.bench.machine import Peak
from localvlm.bench.peer import run_of
from localvlm.bench.plan import plan_ahead
from localvlm.bench.presets import PRESETS, tiny
from localvlm.bench.report import Grown, Report, Row
from localvlm.bench.shapes import write_vlms
from localvlm.bench.start import from_start
from localvlm.cli import bench as command
from localvlm.config import config_file, directories
from localvlm.engine.api import LoadOptions, TextPart
from localvlm.engine.client import Engine
from localvlm.engine.drafts import SIZES
from localvlm.engine.fake import FakeEngine, FakeVlm, Script
from localvlm.errors import ModelError
from localvlm.pipeline import Pipeline
from localvlm.planning.memory import RateMemory
from tests.unit.planning_help import GUIDE028, LLAVA7, files_of, rates

LOG = """
encoding mtmd batch, n_chunks = 5 (done = 0, total = 7)
mtmd batch encoding done in 3400 ms
image decoded (batch 1/2) in 100 ms
llama_perf_context_print:        load time =    1200.00 ms
llama_perf_context_print: prompt eval time =   58400.50 ms /   608 tokens (   96.05 ms per token, 10.4 per second)
llama_perf_context_print:        eval time =    3000.25 ms /    15 runs   (  200.0 ms per token,     5.0 per second)
llama_perf_context_print:       total time =   65000.00 ms /   623 tokens
"""


@pytest.fixture
def fake(tmp_path):
    """A bench on fake VLMs, the model's picture in four tiles and the whole."""
    files = {name: VlmFiles(tmp_path / f"{name}.gguf", tmp_path / f"{name}-mmproj.gguf") for name in ("guide", "model")}
    scripts = {
        "guide": Script(answer="a red star", tiles=(2, 2), grid=(4, 4), token_s=0.001),
        "model": Script(answer="dark red", tiles=(2, 2), grid=(4, 4), tile_price=1.0),
    }
    setting = Setting(Pair("p", **files), answer=8)
    with Bench(setting, lambda: FakeEngine(scripts)) as found:
        yield found


def test_cases_of_tiled_pictures_and_of_others():
    names = [case.name for case in cases([0.09], 1, 0)]
    guided = ["guided, 9 %", "guided, 9 %, own answer replayed", "early exit"]
    assert names == ["plain llama.cpp", "all tokens", "default plan", "downscale, 9 %", *guided]
    tiled = [case.name for case in cases([0.09], 13, 5)]
    assert set(tiled) - set(names) == {"guided, 9 %, overview", "early exit, overview"}
    shown = {case.name: case.guide_keep for case in cases([0.09], 1, 0, [None, 0.25])}
    assert [name for name, look in shown.items() if look == 0.25] == [
        "guided, 9 %, guide sees 25 %", "guided, 9 %, guide sees 25 %, own answer replayed",
        "early exit, guide sees 25 %",
    ]  # fmt: skip
    alone = [case.name for case in cases([0.35], 13, 5, guided=False)]
    assert alone == ["plain llama.cpp", "all tokens", "downscale, 35 %"]


def test_what_is_forced_is_what_runs(fake):
    images, found = [drawn(64, 64)], {case.name: case for case in cases([0.25], 5, 3)}
    plan_ahead(fake, found["default plan"], images, "what?")
    fake.prepare(list(found.values()), images, "what?")
    assert bytes(fake.prepared(found["guided, 25 %, own answer replayed"]).draft) == b"dark red"
    assert fake.prepared(found["guided, 25 %, overview"]).guide_tokens == 16
    runs = {name: fake.run(case, images, "what?") for name, case in found.items()}
    assert {name: (run.kept, run.encoded) for name, run in runs.items()} == {
        "plain llama.cpp": (80, 5),
        "all tokens": (80, 5),
        "default plan": (28, runs["default plan"].encoded),
        "downscale, 25 %": (20, 5),
        "guided, 25 %": (20, runs["guided, 25 %"].encoded),
        "guided, 25 %, own answer replayed": (20, runs["guided, 25 %"].encoded),
        "guided, 25 %, overview": (20, 3),
        "early exit": (None, 5),
        "early exit, overview": (None, 1),
    }
    assert runs["guided, 25 %, own answer replayed"].accepted == 8
    assert runs["guided, 25 %"].accepted == 0
    assert runs["early exit"].generated == 8 < len("a red star")
    for run in runs.values():
        assert sum(run.ms.values()) == pytest.approx(run.total_ms)
        assert 0 < run.first_ms <= run.total_ms
        assert run.peak is None
    assert runs["plain llama.cpp"].ms["guide_encode"] == 0 < runs["guided, 25 %"].ms["guide_decode"]
    assert fake.ours.fixed.draft is None
    assert fake.options(found["guided, 25 %"]).exit_at == NEVER


def test_what_cases_share_is_found_out_by_one_answer(fake, monkeypatch):
    asked = []
    ask = Bench._ask
    monkeypatch.setattr(Bench, "_ask", lambda bench, case, *rest: asked.append(case) or ask(bench, case, *rest))
    fake.prepare(cases([0.25], 5, 3), [drawn(64, 64)], "what?")
    assert [(case.keep, case.tiles, case.replay, case.exits) for case in asked] == [
        (0.25, 0, False, False),
        (0.25, 3, False, False),
    ]
    fake.prepare(cases([0.25], 5, 3), [drawn(64, 64)], "what?")
    fake.prepare([PLAIN, Case("all tokens", "ours")], [drawn(64, 64)], "what?")
    assert len(asked) == 2


def test_the_sizes_of_drafts_are_measured_on_one_prompt(fake, monkeypatch):
    taken = []
    generate = FakeVlm.generate

    def noted(vlm, *args, **options):
        done = generate(vlm, *args, **options)
        taken.append(done.accepted)
        return done

    monkeypatch.setattr(FakeVlm, "generate", noted)
    case = Case("replayed", "ours", 0.25, replay=True)
    fake.prepare([case], [drawn(64, 64)], "what?")
    assert taken.count(8) == len(SIZES)
    taken.clear()
    fake.run(case, [drawn(64, 64)], "what?")
    assert taken.count(8) == 1


def test_plain_has_no_tap_and_is_apart(fake):
    fake.run(PLAIN, [drawn(64, 64)], "what?")
    assert [vlm.options.tap for vlm in fake.bare.engine.loaded] == [False]
    assert fake.ours.engine.loaded == []


def test_nothing_of_the_run_before_is_in_a_cache(fake, monkeypatch):
    ran = []
    prefill = FakeVlm.prefill

    def counted(vlm, parts, **options):
        done = prefill(vlm, parts, **options)
        ran.append(done.n_run - done.n_past)
        return done

    monkeypatch.setattr(FakeVlm, "prefill", counted)
    for _ in range(2):
        fake.run(cases([0.25], 5, 3)[1], [drawn(64, 64)], "what?")
    assert min(ran) >= -1  # the begin-of-sequence token


def test_no_picture_comes_from_disk(fake):
    kept = LoadOptions(cache="folder", image_cache=1 << 30)
    with Bench(replace(fake.setting, guide=kept, model=kept), fake.new_engine) as bench:
        for case in (PLAIN, Case("guided", "ours", 0.25)):
            bench.run(case, [drawn(64, 64)], "what?")
        loaded = [*bench.bare.engine.loaded, *bench.ours.engine.loaded]
        assert [(vlm.options.cache, vlm.options.image_cache) for vlm in loaded] == [("folder", 0)] * 3


def test_a_guide_is_shown_the_share_asked_for(fake, monkeypatch):
    shown = []
    ask = Pipeline.ask
    monkeypatch.setattr(Pipeline, "ask", lambda *a: shown.append(ask(*a)) or shown[-1])
    for case in cases([0.25], 1, 0, [None, 0.5]):
        if case.forced == "no exit":
            fake.run(case, [drawn(64, 64)], "what?")
    assert [answer.tokens.guide for answer in shown] == [80, 40]


def test_tokens_that_need_more_tiles_get_them(fake):
    tight = Case("tight", "ours", 0.9, tiles=1)
    fake.prepare([tight], [drawn(64, 64)], "what?")
    assert fake.run(tight, [drawn(64, 64)], "what?").encoded == 5


def test_a_guide_ends_and_more_tiles_are_encoded(tmp_path):
    engine = FixedEngine(FakeEngine(Script(answer="abcdef", tiles=(2, 2), grid=(2, 2))), tmp_path / "guide.gguf")
    guide, model = (engine.load(tmp_path / f"{name}.gguf", tmp_path / "mm.gguf") for name in ("guide", "model"))
    assert engine.load(tmp_path / "guide.gguf", tmp_path / "mm.gguf") is guide
    for vlm, finish in ((guide, "stop"), (model, "length")):
        vlm.prefill(vlm.chat([]) or [])
        assert vlm.generate(3).finish == finish
    picture = np.zeros((8, 8, 3), np.uint8)
    engine.fixed.tiles = 3
    assert model.encode(picture, keep=np.array([7], np.int32)).n_tiles == 3
    assert guide.encode(picture, keep=np.array([7], np.int32)).n_tiles == 1
    assert model.encode(picture).n_tiles == 5


def test_both_conversations_hold_the_same_text(fake, monkeypatch):
    seen = {}
    prefill = FakeVlm.prefill

    def noted(vlm, parts, **options):
        seen.setdefault(vlm.options.tap, []).append("".join(part.text for part in parts if isinstance(part, TextPart)))
        return prefill(vlm, parts, **options)

    monkeypatch.setattr(FakeVlm, "prefill", noted)
    list(growth.grow(fake, "turns", [3], [Case("a", "ours")], [drawn(64, 64)], "what?", 1, print))
    said = answer_of(fake.plain, 8)
    assert seen[False][-1] == seen[True][-1]
    assert seen[False][-1].count(said) == 2
    assert fake.bare.fixed.text is fake.ours.fixed.text is None


def test_growth_ends_where_a_context_is_full(fake):
    small = replace(fake.setting, guide=LoadOptions(n_ctx=64), model=LoadOptions(n_ctx=200))
    with Bench(small, fake.new_engine) as bench:
        found = list(growth.grow(bench, "turns", [1, 20], [Case("a", "ours")], [drawn(64, 64)], "what?", 2, print))
        assert isinstance(found[0], Grown)
        assert found[0].n == 1
        assert found[1:] == ["turns 20: a context is full after 3; raise --ctx-size"]
        led = [Case("guided", "ours", 0.25)]
        roomy = replace(small, model=LoadOptions())
    with Bench(roomy, fake.new_engine) as bench:
        (told,) = growth.grow(bench, "answers", [2], led, [drawn(64, 64)], "what?", 1, print)
        assert "guide's context has 64" in str(told)


def test_the_question_has_the_tokens_asked_for(fake):
    vlm = fake.plain
    template = len("USER: \nASSISTANT:") + 1
    assert len(question_of(vlm, template + 20)) == pytest.approx(20, abs=4)
    assert question_of(vlm, 1) == "a"


# ---- what is told


def run(total: float, **more) -> Run:
    ms = dict.fromkeys(STAGES, 0.0) | {"encode": total / 4, "prefill": total / 4, "decode": total / 2}
    return Run(ms, total / 2, total, 576, 52, 84, 16, **more)


def report() -> Report:
    plain = tuple(run(t) for t in (1000.0, 1200.0, 1100.0))
    ours = tuple(run(t, peak=5 << 30, drafted=16) for t in (200.0, 300.0, 500.0))
    rows = [Row(PLAIN, plain, plain), Row(Case("guided <9 %>", "ours", 0.09, forced="no exit"), ours, plain)]
    return Report({"what": "a & b", "cpu": "x", "build": {"ggml": "1"}}, rows)


def test_ratios_are_medians_of_rounds():
    told = json.loads(report().as_json())
    assert [case["ratio"] for case in told["cases"]] == [1.0, 4.0]  # of 5, 4 and 2.2
    assert told["cases"][1]["total_ms"] == 300.0
    assert told["cases"][1]["peak_bytes"] == 5 << 30
    assert told["cases"][1]["ms"]["encode"] == 75.0
    assert len(told["cases"][1]["runs"]) == 3
    assert any("threshold over 1" in note for note in told["notes"])
    assert not any("threshold of 0" in note for note in told["notes"])
    line = next(line for line in report().as_text().splitlines() if line.startswith("guided"))
    assert line.split()[-8:] == ["4.00", "4.00", "52/576", "84", "0/16", "1/1", "5.37", "GB"]


def test_the_peak_is_held_against_plain_and_what_is_wanted():
    plain, ours = (run(1000.0, peak=4_000_000_000),), (run(200.0, peak=4_500_000_000),)
    rows = [Row(PLAIN, plain, plain), Row(Case("guided", "ours", 0.09), ours, plain),
            Row(Case("llama-mtmd-cli", "peer"), (run(1.0, peak=9_000_000_000),), plain)]  # fmt: skip
    found = Report({}, guide_bytes=500_000_000, rows=rows)
    assert json.loads(found.as_json())["peaks"] == {
        "loaded": {
            "plain": 4_000_000_000, "ours": 4_500_000_000, "case": "guided", "at_most": 4_950_000_000, "ratio": 1.125,
        },
        "from_start": {},
    }  # fmt: skip
    lines = [line.split() for line in found.as_text().splitlines()]
    assert ["wanted", "at", "most", "4.95", "GB", "1.24", "x"] in lines
    assert json.loads(Report({}).as_json())["peaks"] == {"loaded": {}, "from_start": {}}


def test_ratios_of_growth_are_medians_of_rounds():
    row = growth._row("turns", 2, 576, {PLAIN.name: [1000.0, 1200.0, 1100.0], "a": [200.0, 300.0, 500.0]})
    assert (row.plain, row.ours, row.ratio) == (1100.0, {"a": 300.0}, {"a": 4.0})


def test_bars_are_drawn_to_scale():
    drawing = xml.dom.minidom.parseString(report().as_svg())
    wide = [float(r.getAttribute("width")) for r in drawing.getElementsByTagName("rect") if r.childNodes]
    assert wide[2] == pytest.approx(2 * wide[0], abs=0.2)
    assert sum(wide[:3]) / sum(wide[3:]) == pytest.approx(1100 / 300, rel=0.01)
    texts = [t.firstChild.data for t in drawing.getElementsByTagName("text")]
    assert {"guided <9 %>", "0.30 s, 4.00 x", "a & b - x"} <= set(texts)


# ---- the peer


def test_the_peers_own_timings_are_read():
    found = run_of(LOG)
    assert (found.first_ms, found.total_ms) == (61_800.5, 64_800.75)
    assert (found.ms["encode"], found.prompt, found.generated, found.tiles) == (3400.0, 608, 16, 5)
    with pytest.raises(ModelError, match="no timings"):
        run_of("hello")


def peer(folder, text: str, code: int = 0):
    program = folder / "llama-mtmd-cli"
    program.write_text(f"#!{sys.executable}\nimport sys\nprint({text!r}, sys.argv)\nsys.exit({code})\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


def test_a_peer_is_a_row(cli, tmp_path):
    out = tmp_path / "o.json"
    done = cli("bench", *cli.pair, "--image", cli.image, "--runs", 2, "--peer", peer(tmp_path, LOG), "--json", out)
    assert done.code == 0, done.err
    row = json.loads(out.read_text())["cases"][-1]
    assert (row["name"], row["first_ms"], len(row["runs"])) == ("llama-mtmd-cli", 61_800.5, 2)
    failed = cli("bench", *cli.pair, "--peer", peer(tmp_path, "no such file", 1), "--runs", 1)
    assert failed.code == 3
    assert "no such file" in failed.err
    assert cli("bench", *cli.pair, "--peer", tmp_path).code == 2


# ---- the command


def test_names_are_those_that_there_are():
    assert tuple(presets.PRESETS) == command.PRESETS
    assert tuple(growth.GROWING) == command.GROWING
    assert shapes.QUANTS == command.QUANTS


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--quant", "Q8_0"], "go with a preset"),
        (["--preset", "next", "--pair", "demo"], "both given"),
        (["--json", "o.txt"], "not the name of a .json file"),
        (["--growth", "size"], "none of tokens"),
        (["--growth", "turns=0"], "whole numbers"),
        (["--image", "none.png"], "none.png"),
    ],
)
def test_wrong_arguments(cli, arguments, said):
    done = cli("bench", *arguments)
    assert done.code in (2, 6)
    assert said in done.err


def test_growth_without_a_guide_is_refused_before_anything_is_loaded(cli):
    done = cli("bench", "--growth", "all", "--model", cli.pair[3])
    assert (done.code, cli.engine) == (2, None)
    assert "no guide was given" in done.err


def test_only_some_cases(cli, tmp_path):
    out = tmp_path / "o.json"
    assert cli("bench", *cli.pair, "--runs", 1, "--case", "exit", "--case", "all", "--json", out).code == 0
    assert [case["name"] for case in json.loads(out.read_text())["cases"]] == [
        "plain llama.cpp",
        "all tokens",
        "early exit",
    ]
    one = cli("bench", *cli.pair, "--runs", 1, "--guide-keep", "all, 0.5", "--case", "exit, guide", "--json", out)
    assert one.code == 0, one.err
    assert json.loads(out.read_text())["cases"][1]["guide_keep"] == 0.5
    config_file().parent.mkdir(parents=True)
    config_file().write_text("guide-keep = 0.44\n")
    one = cli("bench", *cli.pair, "--runs", 1, "--case", "exit, guide", "--json", out)
    assert one.code == 0, one.err
    assert json.loads(out.read_text())["cases"][1]["guide_keep"] == 0.44
    done = cli("bench", *cli.pair, "--case", "nothing")
    assert done.code == 2
    assert "early exit" in done.err


def test_the_default_plan_is_that_of_ask_and_told_ahead(cli, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setattr("localvlm.cli.fit.room", lambda: 64 << 30)
    RateMemory.of(LoadOptions(cache=str(directories().cache))).add(rates())
    for role, real in (("model", LLAVA7), ("guide", GUIDE028)):
        files_of(cli.folder, replace(real, name=role))
    out = tmp_path / "o.json"
    few = ["--max-tokens", 8, "--guide-max-tokens", 8]
    asked = json.loads(cli("ask", *cli.pair, *few, "--json", cli.image, "a b c d").out)["plan"]
    what = ["--image", cli.image, "--runs", 1, "--case", "plan", "--answer", 8, "--text", 24, "--json", out]
    done = cli("bench", *cli.pair, *what)
    assert done.code == 0, done.err
    told = json.loads(out.read_text())
    plan, row = told["plan"], told["cases"][1]
    assert (plan["name"], list(plan["others_ms"])) == ("guided", ["plain"])
    for stage in ("guide_encode", "encode", "decode"):  # all that does not depend on the question's length
        assert plan["predicted_ms"][stage] == asked["predicted_ms"][stage]
    assert plan["predicted_ms"]["load"] == 0 < asked["predicted_ms"]["load"]
    assert (row["name"], row["tokens"]["kept"], row["tokens"]["generated"]) == ("default plan", 50, 8)
    assert plan["measured_ms"]["total"] == row["total_ms"]
    assert plan["ratio"] == row["ratio"]
    assert plan["predicted_of_measured"] == pytest.approx(plan["predicted_ms"]["total"] / row["total_ms"], rel=0.01)
    assert plan["knowing_of_measured"] == pytest.approx(plan["knowing_ms"]["total"] / row["total_ms"])
    assert plan["knowing_ms"]["guide_encode"] == pytest.approx(plan["predicted_ms"]["guide_encode"], abs=0.5)
    assert "default plan: guided; " in done.out
    assert any("told before the rounds" in note for note in told["notes"])


def test_growth_is_told_in_place_of_cases(cli, tmp_path):
    out = tmp_path / "o.json"
    what = [part for one in ("answers=2,4", "turns=1,3", "images=1,2", "tokens=144,5000") for part in ("--growth", one)]
    done = cli("bench", *cli.pair, "--runs", 1, "--keep", "0.35", *what, "--json", out)
    assert done.code == 0, done.err
    told = json.loads(out.read_text())
    assert [(one["what"], one["n"], one["image"]) for one in told["growth"]] == [
        ("answers", 2, 144), ("answers", 4, 144), ("turns", 1, 144), ("turns", 3, 144), ("images", 1, 144),
        ("images", 2, 288), ("tokens", 144, 144),
    ]  # fmt: skip
    assert told["cases"] == []
    assert "tokens 5000: no picture" in done.out
    assert told["growth"][3]["plain"] > told["growth"][2]["plain"]


def test_a_tiny_preset_from_end_to_end(native, tmp_path):
    out, svg = tmp_path / "o.json", tmp_path / "o.svg"
    command = [
        sys.executable, "-m", "localvlm", "bench", "--preset=next", "--tiny", "--threads=1", "--runs=1", "--keep=0.35",
        f"--json={out}", f"--svg={svg}", f"--keep-files={tmp_path / 'files'}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(out.read_text())
    found = {case["name"]: case for case in told["cases"]}
    assert len(found) == 9
    assert "too small" in told["plan"]["why"]
    for case in found.values():
        assert case["tokens"]["generated"] == 16
        assert case["peak_bytes"] > 1 << 25
    assert found["guided, 35 %, own answer replayed"]["tokens"]["accepted"] == 16
    assert found["guided, 35 %, overview"]["tiles"] == {"total": 5, "encoded": 2}
    assert len(list((tmp_path / "files").glob("*.gguf"))) == 4
    assert xml.dom.minidom.parse(str(svg)).documentElement.tagName == "svg"


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_runs_every_case(native, name, tmp_path):
    preset = tiny(PRESETS[name])
    guide, model = (VlmFiles(*files) for files in write_vlms(tmp_path, [preset.guide, preset.model]))
    one = LoadOptions(threads=1)
    with Bench(Setting(Pair(name, guide, model), one, one, 6), Engine) as bench:
        images = [drawn(*preset.size)]
        question = question_of(bench.plain, 32)
        n_tiles = bench.plain.layout(*preset.size).n_tiles
        ways = cases([0.35], n_tiles, max(1, round(0.4 * n_tiles)))
        assert plan_ahead(bench, ways[2], images, question).plan is None
        bench.prepare(ways, images, question)
        runs = {case.name: bench.run(case, images, question) for case in ways}
        plain = runs["plain llama.cpp"]
        assert plain.image == plain.kept == runs["all tokens"].kept
        assert plain.prompt == runs["all tokens"].prompt
        assert 32 <= plain.prompt - plain.image <= 80
        assert all(run.generated == 6 for run in runs.values())
        for case in ways:
            if case.keep is not None and not case.exits:
                assert runs[case.name].kept <= round(0.35 * plain.image)
            if case.tiles and not case.exits:
                assert case.tiles <= runs[case.name].encoded <= case.tiles + 1
        if name == "smolvlm2":
            PIL.Image.fromarray(images[0].rgb).save(tmp_path / "picture.png")
            for case in (PLAIN, Case("early exit", "ours", 0.35, exits=True)):
                process = from_start(bench, case, tmp_path / "picture.png", question)
                assert 0 < process.first <= process.whole
                assert process.peak > 1 << 24
        peak = Peak(bench.ours.engine)
        peak.begin()
        assert 1 << 24 < (peak.read() or 0) < 1 << 30
