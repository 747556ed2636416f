"""The bench itself: no row is missing, no test it names is gone, and what it prints is what ran."""

from __future__ import annotations

import re
import socket
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from localvlm.catalog import pair_named
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.engine.native import Tap
from localvlm.errors import UnsupportedModel
from tests.asking import ask
from tests.bench import __main__ as command
from tests.bench import rows, sweeps
from tests.bench.rows import ROWS, Row, functions, nodes_of
from tests.bench.run import Case, Result, run

PROMISED = (
    *("R1", "R2", "R3", "R4", "R5", "R6", "R7", "R8"),
    *("I1", "I2", "I3", "I4", "I5", "I6", "I7", "I8", "I9", "I10", "I11"),
    *("P1", "P2", "P3", "T1", "T2", "T3", "C1", "C2", "D1", "D2", "D3", "D4", "B1", "B2", "B3"),
    *("O1", "O2", "O3", "M1", "M2", "M3", "N1", "N2", "N3", "N4", "N5"),
)


def test_every_promise_has_a_row_and_something_that_shows_it() -> None:
    ids = [row.id for row in ROWS]
    assert len(set(ids)) == len(ids)
    assert set(PROMISED) <= set(ids)
    assert [row.id for row in ROWS if not (nodes_of(row) or row.sweeps)] == []


def test_tests_and_sweeps_that_are_named_are_there() -> None:
    there = {f"{path}::{name}" for path, names in functions().items() for name in names}
    assert [node for row in ROWS for node in nodes_of(row) if node not in there] == []
    named = {name for row in ROWS for name in row.sweeps}
    assert named == set(sweeps.SWEEPS)
    assert all(callable(getattr(import_module(f"tests.bench.{m}"), name)) for name, m in sweeps.SWEEPS.items())


def test_the_page_names_every_row_and_no_other() -> None:
    page = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    table = [line.split("|")[2] for line in page.splitlines() if line.startswith("|")][2:]
    named = set()
    for first, last in re.findall(r"([A-Z]\d+)(?:-[A-Z](\d+))?", ", ".join(table)):
        letter, number = first[0], int(first[1:])
        named |= {f"{letter}{n}" for n in range(number, int(last or number) + 1)}
    assert named == {row.id for row in ROWS}
    assert "[SECURITY.md](SECURITY.md)" in (Path(__file__).parents[2] / "README.md").read_text()


def test_a_row_counts_what_ran() -> None:
    gone = run(Row("X", "", "", "sanitize::a_test_that_is_not_there"), quick=True)
    assert [case.outcome for case in gone.cases] == ["failed"]
    result = run(Row("X", "", "", "sanitize::attacks_leave_nothing"), quick=True)
    assert result.ran == result.passed > 10
    assert result.peak > 10_000_000


def test_what_cannot_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "conftest.py").write_text("")
    (tmp_path / "unit").mkdir()
    (tmp_path / "unit" / "test_a.py").write_text(
        "import pytest\n"
        "def test_a(): pytest.skip('no strace')\n"
        "@pytest.mark.skipif(True, reason='no unshare')\n"
        "def test_b(): pass\n"
        "def test_c(): assert 1 == 2\n"
        "def test_d(): pass\n"
    )
    monkeypatch.setattr("tests.bench.run.TESTS", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    result = run(Row("X", "four", "", "a::a a::b a::c a::d"), quick=False)
    assert (result.ran, result.passed, result.reasons) == (2, 1, {"no strace": 1, "no unshare": 1})
    assert "1 == 2" in result.failed[0].reason
    assert command.line(result).startswith("| X | four | 2 | 1 | ")
    assert command.line(result).endswith(" | FAIL |")
    command._notes([result])
    said = capsys.readouterr().out
    assert "X: 1 not run: no strace" in said
    assert "X: FAILED" in said


def test_a_sweep_that_breaks_has_failed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sweeps.SWEEPS, "none", "files")
    monkeypatch.setattr(
        "tests.bench.files.none", lambda quick, folder: (_ for _ in ()).throw(OSError("gone")), raising=False
    )
    (case,) = sweeps.cases("none", quick=True, folder=tmp_path)
    assert (case.outcome, case.reason) == ("failed", "OSError: gone")
    left = run(Row("X", "", "", sweeps=("no such",)), quick=True)
    assert [case.reason for case in left.cases] == ["left with 2"]


@pytest.mark.parametrize(
    ("took", "outcome"),
    [([3.0, 1.0], "passed"), ([3.0, 3.0, 3.0], "failed"), ([1.0], "passed")],
)
def test_a_slow_attempt_is_made_again(took: list[float], outcome: str) -> None:
    left = iter(took)
    case = Case.within(2.0, lambda: Case.of("one", "", next(left)))
    assert (case.outcome, list(left)) == (outcome, [])
    assert ("took 3.0 s" in case.reason) == (outcome == "failed")
    assert Case.within(2.0, lambda: Case.of("one", "says no", 9.0)).reason == "says no"


@pytest.mark.parametrize(("outcome", "code"), [("passed", 0), ("failed", 1), ("none", 1)])
def test_the_command_leaves_with_what_came_of_it(
    monkeypatch: pytest.MonkeyPatch, capsys, outcome: str, code: int
) -> None:
    def fake(row: Row, *, quick: bool) -> Result:
        assert quick
        return Result(row, [] if outcome == "none" else [rows_case(outcome)])

    monkeypatch.setattr(command, "run", fake)
    assert command.main(["--quick", "--rows", "r1, I3"]) == code
    out = capsys.readouterr().out
    assert "| R1 |" in out
    assert "| I3 |" in out
    assert "\n2 rows, " in out
    with pytest.raises(SystemExit):
        command.main(["--rows", "Z9"])


def rows_case(outcome: str) -> Case:
    return Case("one", outcome, 0.1, "why")


QUICK = ("known_damage", "markers", "retold", "specials")
MARKS = {"faults": [pytest.mark.slow, pytest.mark.loopback]}
"""Of sweeps; the others are slow but for QUICK."""


@pytest.mark.parametrize(
    "name", [n if n in QUICK else pytest.param(n, marks=MARKS.get(n, pytest.mark.slow)) for n in sweeps.SWEEPS]
)
def test_short_sweeps_pass(native: None, tmp_path: Path, name: str) -> None:
    found = list(sweeps.cases(name, quick=True, folder=tmp_path))
    assert [case for case in found if case.outcome == "failed"] == []
    assert any(case.outcome == "passed" for case in found)


# rows without a home elsewhere


def test_o3_a_test_without_a_marker_reaches_no_network() -> None:
    with pytest.raises(PermissionError, match="without the network marker"):
        socket.create_connection(("192.0.2.1", 9), timeout=1)
    with pytest.raises(PermissionError, match="without the network marker"):
        socket.getaddrinfo("example.org", 443)
    with pytest.raises(PermissionError, match="without the network marker"):
        socket.create_connection(("127.0.0.1", 9), timeout=1)


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped is read from /proc")
def test_n1_each_library_is_mapped_once(native: None) -> None:
    """In a worker that has looked at a picture with the tap."""
    files = pair_named("demo").guide
    assert files is not None
    with Engine() as engine:
        assert engine.backend().backends
        assert ask(engine.load(files.model, files.mmproj, LoadOptions(threads=1)), 2, tap=True)
        mapped = {line.split()[-1] for line in Path(f"/proc/{engine.pid}/maps").read_text().splitlines()}
    found: dict[str, list[str]] = {}
    for path in mapped:
        name = Path(path).name.split(".so")[0]
        if name.startswith(("libggml", "libllama", "libmtmd", "liblocalvlm")):
            found.setdefault(name, []).append(path)
    assert {"libggml-base", "libllama", "libmtmd", "liblocalvlm_tap"} <= set(found)
    assert {name: paths for name, paths in found.items() if len(paths) > 1} == {}


def test_n5_more_than_the_tap_holds_is_refused(native: None) -> None:
    """It has no ring that could run full: sums are of a fixed size, and what does not fit is an error."""
    tap = Tap("a model", 1, False)
    tap.configure(2, 2)
    with pytest.raises(UnsupportedModel, match="number of image tokens"):
        tap.reset(5_000_000)
    with pytest.raises(UnsupportedModel, match=r"1\.\.1024"):
        tap.configure(2000, 2)
    tap.reset(10)
    with pytest.raises(UnsupportedModel, match=r"image|range"):
        tap.begin(np.array([10], np.int32), np.array([1], np.uint8), None)
    tap.close()


def test_ids_are_those_of_functions_that_are_read_and_not_imported() -> None:
    assert "test_i1_eight_orientations_of_one_scene_decode_alike" in functions()["unit/test_images.py"]
    assert not any(path.startswith("zoo") for path in functions())
    assert rows.TESTS.name == "tests"
