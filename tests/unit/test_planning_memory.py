"""Rates serve later runs on the same machine, and only those."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from localvlm.engine.api import LoadOptions
from localvlm.planning import memory as memory_module
from localvlm.planning.memory import LATEST, RateMemory, machine
from localvlm.planning.rates import Rates
from tests.unit.planning_help import rates


def kept(folder: Path) -> Path:
    memory = RateMemory(folder, "a")
    memory.add(rates())
    return next(folder.glob("*.json"))


def test_another_run_knows_them(tmp_path):
    folder = tmp_path / "cache" / "rates"
    path = kept(folder)
    RateMemory(folder, "a").learn({"x prefill": 1.25})
    assert RateMemory(folder, "a").rates == rates()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == [path]
    assert RateMemory(folder, "b").rates == Rates()


def test_types_add_up_from_run_to_run(tmp_path):
    first, second = RateMemory(tmp_path, "a"), RateMemory(tmp_path, "a")
    first.add(rates())
    other = rates(Q8_0=2.0)
    more = {name: row for name, row in other.rows.items() if name.startswith("Q8_0")}
    second.add(replace(other, rows=more, patch={"Q8_0": 1e-11}))
    assert set(RateMemory(tmp_path, "a").rates.rows) == set(other.rows)
    assert set(second.rates.patch) == {"F16", "Q8_0"}


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"{", b"\xff", b"[" * 60_000, b'{"rates": {}, "seen": {}}', b'{"rates": 1, "seen": {}}',
     b" " * (memory_module.MAX_BYTES + 1)],
)  # fmt: skip
def test_a_damaged_file_is_as_none(tmp_path, content):
    path = kept(tmp_path)
    path.write_bytes(content)
    memory = RateMemory(tmp_path, "a")
    assert memory.rates == Rates()
    memory.add(rates())
    assert RateMemory(tmp_path, "a").rates == rates()


@pytest.mark.parametrize(
    ("key", "value"),
    [("rows", {"Q4_0": [1.0]}), ("rows", {"Q4_0": [1.0, 1.0, 1.0, 1.0, -1.0]}), ("rows", [1.0]), ("cell", [1.0]),
     ("pair", "1"), ("layer", None), ("tile", float("nan")), ("patch", {"F16": float("inf")}), ("load", True)],
)  # fmt: skip
def test_rates_that_are_none_are_not_taken(tmp_path, key, value):
    path = kept(tmp_path)
    content = json.loads(path.read_text())
    content["rates"][key] = value
    path.write_text(json.dumps(content))
    assert RateMemory(tmp_path, "a").rates == Rates()


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path):
    (tmp_path / "file").write_text("")
    memory = RateMemory(tmp_path / "file" / "rates", "a")
    memory.add(rates())
    memory.learn({"x": 2.0})
    assert memory.rates == rates()
    assert RateMemory(None, "a").rates == Rates()


def test_the_median_of_the_latest_answers_corrects(tmp_path):
    for ratio in (1.5, 1.5, float("nan"), 0.0):
        RateMemory(tmp_path, "a").learn({"x": ratio})
        assert RateMemory(tmp_path, "a").correction("x") == 1.0
    RateMemory(tmp_path, "a").learn({"x": 30.0})
    assert RateMemory(tmp_path, "a").correction("x") == 1.5
    assert RateMemory(tmp_path, "a").correction("y") == 1.0
    memory = RateMemory(tmp_path, "a")
    for _ in range(LATEST):
        memory.learn({"x": 30.0})
    assert memory.correction("x") == memory_module.BOUNDS[1]
    for i in range(2 * memory_module.MAX_SEEN):
        memory.learn({f"{i}": 1.0})
    assert len(memory._seen) == memory_module.MAX_SEEN
    assert len(next(tmp_path.glob("*.json")).read_bytes()) < memory_module.MAX_BYTES


def test_a_machine_is_its_cpu_its_build_and_its_threads(monkeypatch):
    one = machine(LoadOptions(threads=1))
    assert one == machine(LoadOptions(threads=1, n_ctx=99, image_tokens=5, cache="x"))
    assert one != machine(LoadOptions(threads=2))
    assert one != machine(LoadOptions(threads=1, kv_type="q8_0"))
    for name, other in (("_cpu", ["another"]), ("_libraries", [("libggml.so", 1, 2)]), ("version", "9.9")):
        with monkeypatch.context() as patch:
            patch.setattr(memory_module, name, lambda *_, found=other: found)
            assert machine(LoadOptions(threads=1)) != one


def test_the_libraries_are_found_without_loading_them():
    code = (
        "import sys\nfrom localvlm.planning.memory import _libraries\n"
        "assert _libraries()\nassert 'llama_cpp' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


WRITE_MANY = """
import sys
from pathlib import Path
from localvlm.planning.memory import RateMemory
from tests.unit.planning_help import rates
for i in range(30):
    memory = RateMemory(Path(sys.argv[1]), "a")
    memory.add(rates())
    memory.learn({sys.argv[2]: 1.5})
    assert RateMemory(Path(sys.argv[1]), "a").rates == rates()
"""


def test_runs_at_a_time_leave_a_whole_file(tmp_path):
    root = Path(__file__).parents[2]
    runs = [subprocess.Popen([sys.executable, "-c", WRITE_MANY, tmp_path, str(i)], cwd=root) for i in range(3)]
    assert [run.wait(timeout=120) for run in runs] == [0, 0, 0]
    assert len(list(tmp_path.iterdir())) == 1
