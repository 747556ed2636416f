"""The history under many processes, kills, full disks, old and damaged files: rows B1-B3; `python -m tests.histories`
does more of each.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
from contextlib import suppress
from pathlib import Path

import pytest

from localvlm.errors import StorageError
from localvlm.history import History, schema
from tests import histories

slow = pytest.mark.slow
READS_ONLY = """
import sys
from pathlib import Path
from localvlm.errors import StorageError
from localvlm.history import History
try:
    with History.open(Path(sys.argv[1])) as history:
        history.begin("t")
except StorageError as error:
    print(error.exit_code, error)
"""


# ---- many processes


@pytest.mark.parametrize(("processes", "turns"), [(4, 20), pytest.param(8, 200, marks=slow)])
def test_processes_add_turns_at_once(tmp_path, processes, turns):
    run = histories.many_writers(tmp_path, processes, turns)
    assert run.passed(processes, turns), run


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize("processes", [3, pytest.param(8, marks=slow)])
def test_first_runs_bring_a_file_up_to_date_once(tmp_path, processes, old):
    run = histories.first_runs(tmp_path, processes, old=old)
    assert run.passed(processes, 1), run


def test_a_step_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "history.db"
    with History.open(path) as history:
        history.begin("kept")
    before = path.read_bytes()
    monkeypatch.setattr(schema, "STEPS", (*schema.STEPS, ("CREATE TABLE more (n)", "INSERT INTO nowhere VALUES (1)")))
    with pytest.raises(StorageError, match="no such table: nowhere"):
        History.open(path)
    assert path.read_bytes() == before
    monkeypatch.undo()
    with History.open(path) as history:
        assert [found.title for found in history.conversations()] == ["kept"]


# ---- files that are not ours to open


def refused(path: Path, *signs: str) -> None:
    """Opening tells why not, and what to do; the file is as it was."""
    before = hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns
    with pytest.raises(StorageError) as caught:
        History.open(path)
    assert (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns) == before
    assert caught.value.exit_code == 8
    assert all(sign in str(caught.value) for sign in (str(path), *signs)), str(caught.value)


def test_a_file_from_the_future_is_left_as_it_is(tmp_path):
    path = tmp_path / "history.db"
    histories.future(path)
    refused(path, "newer localvlm", "999", "upgrade")
    assert [found.name for found in tmp_path.iterdir()] == ["history.db"]


def test_a_journal_from_the_future_is_left_as_it_is(tmp_path):
    path = tmp_path / "history.db"
    histories.future(path, journal=True)
    journal = tmp_path / "history.db-wal"
    before = journal.read_bytes()
    assert before
    refused(path, "newer localvlm", "999")
    assert journal.read_bytes() == before


def test_a_file_of_the_future_that_is_open_is_left_as_it_is(tmp_path):
    path = tmp_path / "history.db"
    with History.open(path) as history:
        history._connection.execute("PRAGMA user_version = 999")
        refused(path, "newer localvlm")


def test_the_database_of_another_program_is_left_as_it_is(tmp_path):
    path = tmp_path / "history.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE bookmark (url TEXT)")
    connection.close()
    refused(path, "another program", "mv")


@pytest.mark.parametrize("content", [b"my diary\n" * 100, b"SQLite format 3\0" + b"\xff" * 5000, b"\0" * 8192])
def test_a_file_that_is_no_database_is_left_as_it_is(tmp_path, content):
    path = tmp_path / "history.db"
    path.write_bytes(content)
    refused(path, "damaged", "mv")
    assert [found.name for found in tmp_path.iterdir()] == ["history.db"]


def test_the_way_out_of_a_damaged_file_works(tmp_path):
    path = tmp_path / "it's here" / "history.db"
    path.parent.mkdir()
    path.write_bytes(b"my diary\n" * 100)
    with pytest.raises(StorageError) as caught:
        History.open(path)
    assert os.system(caught.value.hint.partition("to begin anew: ")[2]) == 0
    assert (path.parent / "damaged" / "history.db").read_bytes() == b"my diary\n" * 100
    History.open(path).close()


def read_all(path: Path) -> None:
    with History.open(path) as history:
        for found in history.conversations():
            history.turns(found.id)


def test_damage_within_a_file_is_told_and_never_written_over(tmp_path):
    path = tmp_path / "history.db"
    with History.open(path) as history:
        for number in range(30):
            history.add(history.begin(f"t{number}"), histories.turn("t", number))
    content = path.read_bytes()
    for start in range(4096, len(content), 3 * 4096):
        damaged = content[:start] + b"\xa5" * 4096 + content[start + 4096 :]
        path.write_bytes(damaged)
        with suppress(StorageError):  # the page may not be needed
            read_all(path)
        assert path.read_bytes() == damaged
    for end in (50, 100, 4096, 10_000, len(content) // 2):
        path.write_bytes(content[:end])
        with pytest.raises(StorageError, match=r"damaged.* mv "):
            read_all(path)
        assert path.read_bytes() == content[:end]


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_no_file_is_told(tmp_path, make):
    make(tmp_path / "history.db")
    with pytest.raises(StorageError, match="not a regular file"):
        History.open(tmp_path / "history.db")


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"history\.db' cannot be opened: .*/file' is no folder"):
        History.open(tmp_path / "file" / "history.db")


# ---- kills and disks


@pytest.mark.parametrize("kills", [10, pytest.param(200, marks=slow)])
def test_a_killed_writer_leaves_whole_turns(tmp_path, kills):
    run = histories.killed_writers(tmp_path, kills)
    assert run.passed, run
    assert run.kills == kills


def test_a_full_disk_is_told_and_what_was_there_stays(tmp_path):
    if not histories.may_mount():
        pytest.skip("no disk can be mounted here")
    found = histories.disk_full(tmp_path)
    assert "the disk is full" in found["error"]
    assert "free some space" in found["error"]
    assert found["added"] > 0
    assert (found["kept"], found["after"], found["sound"]) == (True, True, True), found


def test_a_quota_is_told_and_what_was_there_stays(tmp_path):
    found = histories.quota_met(tmp_path)
    assert "quota" in found["error"]
    assert found["added"] > 0
    assert (found["kept"], found["after"], found["sound"]) == (True, True, True), found


@pytest.mark.parametrize("there", [False, True])
def test_a_home_that_cannot_be_written_is_told(tmp_path, there):
    if not histories.may_mount():
        pytest.skip("no disk can be mounted here")
    path = tmp_path / "data" / "history.db"
    if there:
        History.open(path).close()
    code, out, err = histories.read_only(tmp_path, READS_ONLY, path)
    assert (code, err) == (0, "")
    assert out.startswith("8 history")
    assert str(tmp_path) in out
    assert "--private" in out


WHICH = {"pwrite64": ("1+", "8", "30+", "70", "100+", "150+"), "fdatasync": ("5", "9+"), "ftruncate": ("1+",)}


@pytest.mark.parametrize(("call", "when"), [(call, when) for call, whens in WHICH.items() for when in whens])
def test_a_write_that_fails_leaves_whole_turns(tmp_path, call, when):
    if not histories.may_trace():
        pytest.skip("system calls cannot be made to fail here")
    told, wrong = histories.failing(tmp_path, call, when, "ENOSPC")
    assert not wrong
    assert told > 0


@slow
@pytest.mark.parametrize("error", ["EIO", "ENOSPC"])
@pytest.mark.parametrize("when", ["{}", "{}+"])
@pytest.mark.parametrize("call", histories.CALLS)
def test_whichever_write_fails_turns_are_whole(tmp_path, call, when, error):
    if not histories.may_trace():
        pytest.skip("system calls cannot be made to fail here")
    count = histories.CALLS[call]
    for number in range(1, count + 1, 1 + count // 20):
        folder = tmp_path / str(number)
        folder.mkdir()
        assert histories.failing(folder, call, when.format(number), error)[1] == ""
