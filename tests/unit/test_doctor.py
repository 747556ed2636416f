"""``localvlm doctor`` and ``recommend``: each problem is found, with what mends it."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from localvlm import doctor
from localvlm.catalog import Entry, entries, pair_named
from localvlm.cli.app import App
from localvlm.cli.main import main
from localvlm.engine.api import Backend, LoadOptions
from localvlm.engine.client import Engine
from localvlm.errors import AttentionCheckFailed, EngineCrashed

LOADED = Backend("0.3.36", "0.25", "CPU : SSE3 = 1 | AVX2 = 1 | FMA = 1 | F16C = 1 | ", (), ("CPU",))


class Stub:
    """An engine that tells of a backend and loads nothing."""

    def __init__(self, backend: Backend | Exception) -> None:
        self._backend = backend

    def backend(self) -> Backend:
        if isinstance(self._backend, Exception):
            raise self._backend
        return self._backend

    def holds(self) -> dict[str, str]:
        return {"no network": "by a", "no core dump": "by b", "no other program": "by a"}

    def load(self, *_: object) -> None:
        raise AttentionCheckFailed("the tap is off by 0.2", "report it")


def found(backend: Backend | Exception = LOADED, gpu_layers: int = 0) -> dict[str, doctor.Finding]:
    return {one.name: one for one in doctor.find_installation(Stub(backend), gpu_layers)}


@pytest.fixture(autouse=True)
def _cpu(monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2", "fma", "f16c"})


def test_a_sound_installation_has_one_problem_only_where_the_tap_is_off():
    one = found()
    assert {name for name, finding in one.items() if finding.problem} == {"attention tap"}
    assert (one["attention tap"].exit_code, one["attention tap"].remedy) == (3, "report it")
    assert one["GPU"].value == "none"
    assert "AVX2 F16C FMA SSE3" in one["CPU"].value
    assert one["worker"].value == "no network, no other program (by a); no core dump (by b)"


def test_a_backend_that_was_asked_for_and_did_not_load_is_a_failure():
    gpu = found(gpu_layers=-1)["GPU"]
    assert (gpu.exit_code, "llama.cpp sees none" in gpu.problem, "docs/gpu.md" in gpu.remedy) == (2, True, True)
    built = found(replace(LOADED, backends=("CUDA", "CPU")))["GPU"]
    assert (built.exit_code, "built for CUDA and sees no GPU" in built.problem) == (0, True)
    there = found(replace(LOADED, backends=("CUDA", "CPU"), devices=("CUDA0: a card",), gpu_free=8_000_000_000), -1)[
        "GPU"
    ]
    assert (there.problem, there.value) == ("", "CUDA0: a card; 8.0 GB free")


def test_a_worker_that_dies_is_told_and_ends_the_look_there():
    one = found(EngineCrashed("the engine vanished during 'backend'", "check"))
    assert one["llama.cpp"].exit_code == 4
    assert "attention tap" not in one


def test_a_build_that_leaves_the_processor_s_features_out(monkeypatch):
    monkeypatch.setattr(doctor, "_cpu_flags", lambda: {"avx2", "avx512f"})
    slow = found(replace(LOADED, system_info="CPU : SSE3 = 1 | AVX2 = 0 | "))["CPU"]
    assert "AVX2 AVX512" in slow.problem
    assert "llama-cpp-python" in slow.remedy


def test_files_of_pairs_are_looked_into(tmp_path):
    demo = next(entry for entry in entries() if entry.name == "demo")
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(demo.files["model"].read_bytes()[:50_000])
    swapped = {**demo.files, "model": demo.files["mmproj"], "mmproj": demo.files["model"]}
    damaged = [
        Entry("cut", "", {**demo.files, "model": bad}),
        Entry("swapped", "", swapped),
        demo,
        Entry("away", "", {}, lacking=("x",)),
    ]
    one = list(doctor.find_models(damaged))
    assert [(f.name, f.exit_code) for f in one] == [("pair cut", 3), ("pair swapped", 3), ("pair demo", 0)]
    assert "bad.gguf" in one[0].problem


def test_terminals_are_known_by_what_they_say():
    assert doctor._terminal({"TERM": "xterm-kitty"}) == "kitty's protocol"
    assert doctor._terminal({"TERM": "foot"}) == "sixel"
    assert doctor._terminal({"TERM": "tmux-256color", "KITTY_WINDOW_ID": "1"}) == "half blocks, 256 colours"
    assert doctor._terminal({"TERM": "foot", "LOCALVLM_PICTURES": "none"}) == "none"
    assert "LOCALVLM_PICTURES='jpeg'" in doctor._terminal({"LOCALVLM_PICTURES": "jpeg"})
    assert doctor._terminal({"TERM": "xterm-256color", "COLORTERM": "truecolor"}) == "half blocks, true colour"


def test_a_folder_that_is_closed_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    closed = doctor._folder("cache folder", tmp_path / "a" / "b")
    assert (str(tmp_path) in closed.problem, "LOCALVLM_HOME" in closed.remedy) == (True, True)


def test_self_tests_of_a_pair_hold(native):
    one = list(doctor.find_pair(Engine, pair_named("demo"), LoadOptions(threads=1)))
    assert [f.problem for f in one] == [""] * 4
    assert [f.name for f in one] == ["guide's attention", "guide's answers", "model's attention", "model's answers"]
    assert "as llama.cpp's" in one[1].value


def test_an_answer_that_is_not_llama_cpp_s_is_told(native, monkeypatch):
    from localvlm.engine.stock import StockProcess

    monkeypatch.setattr(StockProcess, "ask", lambda *_: ([1, 2, 3], [0.5, 0.5, 0.5, 0.5]))
    pair = replace(pair_named("demo"), guide=None)
    wrong = list(doctor.find_pair(Engine, pair, LoadOptions(threads=1)))[1]
    assert (wrong.exit_code, "whose best logit led by 0.5" in wrong.problem) == (3, True)


def test_the_command(capsys, native):
    def run(*args: str) -> tuple[int, str]:
        with pytest.raises(SystemExit) as left:
            main(["doctor", *args], App())
        return int(str(left.value.code)), capsys.readouterr().out

    code, out = run("--json")
    told = json.loads(out)
    assert (code, told["ok"]) == (0, True)
    assert {"llama.cpp", "attention tap", "memory", "pair demo"} <= {f["name"] for f in told["findings"]}
    code, out = run("-ngl", "3")
    assert code == 2
    assert "FAIL GPU: -ngl 3 puts layers on a GPU" in out
    assert "     -> pass -ngl 0" in out


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('keep = "abc"', ["'keep'", "'abc' is neither a share"]),
        ("ngl = true", ["'ngl'", "a whole number"]),
        ("keep = ", ["not valid TOML"]),
        ('kep = 0.5\n[pairs.own]\nmodel = "m.gguf"', ["'kep'", "did you mean 'keep'"]),
        ("keep = 0.5\nkeep-tokens = 64", ["'keep' and 'keep-tokens'"]),
        ('keep = 0.5\npreset = "paper-9"', ["'preset' and 'keep'"]),
    ],
)
def test_settings_that_would_stop_every_question_are_told_beside_all_else(cli, monkeypatch, tmp_path, text, said):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "find_installation", lambda *_: iter([doctor.Finding("llama.cpp", "there")]))
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text(text)
    run = cli("doctor", "--json")
    told = json.loads(run.out)
    names = [f["name"] for f in told["findings"]]
    assert (run.code, told["ok"]) == (2, False)
    assert {"llama.cpp", "memory", "pair demo"} <= set(names)
    (one,) = (f for f in told["findings"] if f["name"] == "settings file")
    assert one["exit_code"] == cli.ask().code == 2
    assert all(words in one["problem"] + one["remedy"] for words in ["config.toml", *said])


def test_of_pairs_and_keys_of_the_settings_those_that_are_wrong_are_told(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "find_installation", lambda *_: iter(()))
    (tmp_path / "config").mkdir()
    wrong = "".join(f"[pairs.{name}]\nmodle = 'm.gguf'\n" for name in ("bad", "worse"))
    own = f"[pairs.own]\nmodel = '{cli.pair[1]}'\n[keys]\nbogus = 'f9'\n"
    (tmp_path / "config" / "config.toml").write_text(f"pair = 'own'\n{wrong}{own}")
    run = cli("doctor", "--json")
    found = [(f["name"], f["problem"]) for f in json.loads(run.out)["findings"]]
    told = [problem for name, problem in found if name == "settings file"]
    assert [next(word for word in ("'bad'", "'worse'", "'bogus'") if word in line) for line in told] == [
        "'bad'", "'worse'", "'bogus'",
    ]  # fmt: skip
    assert not any("there is no pair" in problem for _, problem in found)
    assert "pair own" in dict(found)


def test_settings_that_are_sound_are_told(cli, monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path))
    monkeypatch.setattr(doctor, "find_installation", lambda *_: iter(()))
    assert "config.toml', not there" in cli("doctor").out
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "config.toml").write_text('keep = "0.5,0.2"\njson = true\npair = "away"\n')
    run = cli("doctor", "--json")
    findings = {f["name"]: f for f in json.loads(run.out)["findings"]}
    assert findings["settings file"]["problem"] == ""
    assert (run.code, "no pair 'away'" in findings["pair"]["problem"]) == (3, True)


def test_pairs_are_ranked_by_what_fits(cli, monkeypatch):
    from localvlm.cli import recommend

    def ranked(free: int) -> dict[str, str]:
        monkeypatch.setattr(recommend, "room", lambda: free)
        return {one["name"]: one["fits"] for one in json.loads(cli("recommend", "--json").out)["pairs"]}

    large = ranked(200 << 30)
    needs = {one["name"]: one["needs"] for one in json.loads(cli("recommend", "--json").out)["pairs"]}
    known = [needs[name] for name, fits in large.items() if fits == "yes"]
    assert known == sorted(known, reverse=True)
    assert len(known) >= 5
    assert {fits for name, fits in large.items() if needs[name] is None} <= {"unknown"}
    small = ranked(120_000_000)
    assert small["demo"] == "with --low-memory"
    assert set(list(small.values())[:2]) == {"with --low-memory"}
    assert list(small.values())[-1] == "no"
    table = cli("recommend")
    assert "about " in table.out
    assert "of memory are free" in table.err
