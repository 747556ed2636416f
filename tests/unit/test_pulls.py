"""`localvlm pull` in processes of its own: killed, twice at once, out of room; `python -m tests.pulls` prints it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from tests import pulls

pytestmark = pytest.mark.loopback
POINTS = [pulls.SIZE * i // 10 for i in range(10)]


@pytest.mark.parametrize(
    "at", [POINTS[4], *(pytest.param(at, marks=pytest.mark.slow) for at in POINTS if at != POINTS[4])]
)
def test_a_killed_pull_goes_on_where_it_was(at, tmp_path):
    run = pulls.killed_at(at, tmp_path)
    assert run.passed, run
    assert run.kept > 0 or at < 1 << 20


@pytest.mark.slow
def test_two_at_once_do_the_work_once(tmp_path):
    assert pulls.two_at_once(tmp_path) == ([0, 0], sum(map(len, pulls.contents().values())))


def _may_mount() -> bool:
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0


@pytest.mark.slow
def test_a_disk_that_is_too_small(tmp_path):
    if not _may_mount():
        pytest.skip("no disk can be mounted here")
    code, err, served = pulls.disk_full(tmp_path)
    assert (code, served) == (8, 0)
    assert "GB free" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_quota_that_is_met_midway(tmp_path):
    code, err, kept = pulls.quota_met(tmp_path)
    assert (code, kept) == (8, 8 << 20)
    assert "is kept" in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_fetched(tmp_path):
    code, err, kept = pulls.interrupted(tmp_path)
    assert code == 130
    assert kept > 1 << 20
    assert err.endswith("(what was fetched is kept; run the command again to go on)\n")
