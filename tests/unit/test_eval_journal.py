"""The journal of an evaluation: kept line by line, cut at any byte, never of other inputs."""

from __future__ import annotations

import errno
import os
import stat

import pytest

from localvlm.errors import StorageError, UsageError
from localvlm.evaluation.journal import Journal

INPUTS = {"data": "abc", "options": {"seed": 0, "methods": ["sgl", "grid"]}}
RESULTS = [{"sgl": {"text": "é\n", "ms": 1.5}}, {"sgl": {"text": "x", "ms": 2.25}}, {"sgl": {"text": "", "ms": 0.0}}]


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "work" / "journal.jsonl"
    with Journal(file, INPUTS) as journal:
        for i, results in enumerate(RESULTS):
            journal.add(i, results)
    return file


def held(journal):
    return [journal.of(i) for i in range(journal.answered(["sgl"]))]


def test_results_are_found_again(path):
    before = path.read_bytes()
    with Journal(path, INPUTS) as journal:
        assert held(journal) == RESULTS
        journal.add(3, {"sgl": {"text": "more"}})
    assert path.read_bytes().startswith(before)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with Journal(path, INPUTS) as journal:
        assert held(journal) == [*RESULTS, {"sgl": {"text": "more"}}]


def test_a_name_that_comes_later_is_added(path):
    with Journal(path, INPUTS) as journal:
        journal.add(1, {"grid": {"text": "late"}})
    with Journal(path, INPUTS) as journal:
        assert journal.of(1) == {**RESULTS[1], "grid": {"text": "late"}}
        assert (journal.of(0), journal.of(9)) == (RESULTS[0], {})
        assert [journal.answered(names) for names in (["sgl"], ["grid"], ["sgl", "grid"], ["none"])] == [3, 1, 1, 0]


def test_cut_at_any_byte_it_goes_on_and_ends_the_same(path):
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        with Journal(path, INPUTS) as journal:
            done = len(held(journal))
            assert held(journal) == RESULTS[:done]
            for i in range(done, len(RESULTS)):
                journal.add(i, RESULTS[i])
        assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("inputs", "what"),
    [({**INPUTS, "data": "abd"}, "data differ"), ({**INPUTS, "options": {}, "more": 1}, "more, options differ")],
)
def test_other_inputs_are_refused_and_nothing_is_lost(path, inputs, what):
    before = path.read_bytes()
    with pytest.raises(UsageError, match=what) as refused:
        Journal(path, inputs)
    assert "--restart" in refused.value.hint
    assert path.read_bytes() == before
    with Journal(path, inputs, restart=True) as journal:
        assert held(journal) == []
    with pytest.raises(UsageError, match=what):
        Journal(path, INPUTS)


@pytest.mark.parametrize("line", [b"{", b"3", b"", b"\xff\xfe", b'{"question": 1}', b'{"question": 1, "results": 3}'])
def test_a_damaged_line_is_refused(path, line):
    lines = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join([lines[0], line, *lines[1:]]))
    with pytest.raises(UsageError, match="is damaged"):
        Journal(path, INPUTS)


def test_one_process_holds_it(path):
    with Journal(path, INPUTS), pytest.raises(UsageError, match="another process"):
        Journal(path, INPUTS, restart=True)
    with Journal(path, INPUTS) as journal:
        assert held(journal) == RESULTS


def test_where_it_cannot_be_written_that_is_said(path, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for place in (tmp_path / "file" / "journal.jsonl", tmp_path):
        with pytest.raises(StorageError, match="cannot be written") as refused:
            Journal(place, INPUTS)
        assert refused.value.hint == "name another folder with --work"

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path, INPUTS) as journal:
        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(StorageError, match="No space left") as told:
            journal.add(3, {"sgl": {"text": "lost"}})
        assert told.value.hint == "free some space, then run the same command again to go on"


def test_a_disk_that_is_full_after_a_restart(path, monkeypatch):
    with Journal(path, INPUTS, restart=True) as journal:
        monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        with pytest.raises(StorageError) as told:
            journal.add(0, RESULTS[0])
        assert told.value.hint == "free some space, then run the same command without --restart to go on"
