"""Files of VLMs are read ahead in the order in which they are needed, as far as there is memory."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from localvlm.engine.fake import FakeEngine
from localvlm.engine.read_ahead import PIECE, read_ahead
from localvlm.pipeline import Pair, Pipeline, VlmFiles

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="this system cannot be asked to read ahead")
NAMES = ("guide", "guide-mmproj", "model", "mmproj")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    for number, name in enumerate(NAMES):
        (tmp_path / name).write_bytes(bytes(100 + number))
    return [tmp_path / name for name in NAMES]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, int, int]]:
    """(file, first byte, bytes) of what the kernel was asked for; a thread of an earlier test may ask for others."""
    found: list[tuple[str, int, int]] = []

    def advise(fd: int, at: int, n: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        path = Path(f"/proc/self/fd/{fd}").readlink()
        if path.parent == tmp_path.resolve():
            found.append((path.name, at, n))

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def available(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=n))


def test_it_takes_no_more_than_half_of_the_memory(files, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 500)
    read_ahead([Path("absent"), *files]).join()
    assert asked == [("guide", 0, 100), ("guide-mmproj", 0, 101), ("model", 0, 49)]


def test_large_files_are_asked_for_in_pieces(files, asked, monkeypatch: pytest.MonkeyPatch) -> None:
    available(monkeypatch, 1 << 40)
    os.truncate(files[0], 2 * PIECE + 5)
    read_ahead(files[:1]).join()
    assert asked == [("guide", 0, PIECE), ("guide", PIECE, PIECE), ("guide", 2 * PIECE, 5)]


def test_the_kernel_takes_the_advice(files) -> None:
    thread = read_ahead(files)
    thread.join()
    assert thread.daemon


@pytest.mark.parametrize(("role", "first"), [("guide", 0), ("model", 2)])
def test_a_pipeline_reads_what_it_will_load(files, monkeypatch: pytest.MonkeyPatch, role: str, first: int) -> None:
    """Once; the guide's files before the model's, and not the guide's where it is not asked."""
    asked: list[list[Path]] = []
    monkeypatch.setattr("localvlm.pipeline.read_ahead", asked.append)
    pipeline = Pipeline(Pair("p", VlmFiles(*files[:2]), VlmFiles(*files[2:])), FakeEngine())
    for each in (role, "model"):
        pipeline.vlm(each)
    assert asked == [files[first:]]
