"""A few points of ``python -m tests.kills``."""

from __future__ import annotations

from pathlib import Path

import pytest

from localvlm._native_path import native_library
from localvlm.errors import UnsupportedModel
from tests.kills import campaign

try:
    native_library()
except UnsupportedModel as error:
    pytest.skip(f"the native library is not built: {error}", allow_module_level=True)


@pytest.mark.parametrize("points", [2, pytest.param(14, marks=pytest.mark.slow)])
def test_a_killed_worker_is_told_and_replaced(tmp_path: Path, points: int) -> None:
    kills = list(campaign(points, 0, tmp_path))
    assert len(kills) == points
    assert [(k.stage, k.number.name, k.miss) for k in kills if k.miss] == []
    assert sum(not k.late for k in kills) >= points // 2
