"""Files that commands write."""

from __future__ import annotations

import os

import pytest

from localvlm.cli.files import write_text


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664])
def test_a_file_keeps_its_permissions(tmp_path, mode):
    target = tmp_path / "out.json"
    target.write_text("old")
    target.chmod(mode)
    write_text(target, "new")
    assert (target.read_text(), target.stat().st_mode & 0o777) == ("new", mode)


def test_a_new_file_has_those_of_any_other(tmp_path):
    mask = os.umask(0o027)
    try:
        write_text(tmp_path / "out.json", "new")
    finally:
        os.umask(mask)
    assert (tmp_path / "out.json").stat().st_mode & 0o777 == 0o640
