"""What was measured of drafts serves later runs, and only those it is true of."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine import draft_memory
from localvlm.engine.api import LoadOptions
from localvlm.engine.draft_memory import DraftMemory, identity
from localvlm.engine.drafts import CELLS
from localvlm.engine.gguf_header import read_header
from tests import zoo

ROWS = np.zeros((4, 7), np.float32)
KEY = (CELLS,)


def measured(folder: Path, deviation: float = 0.0, who: str = "a", layer: int = 0, n_kv: tuple[int, ...] = KEY) -> Path:
    before = set(folder.glob("*.json"))
    DraftMemory(folder, who).at((layer,)).measure(n_kv, ROWS, ROWS + np.float32(deviation))
    return max(folder.glob("*.json"), key=lambda path: (path not in before, path))


def test_another_run_knows_what_was_measured(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "drafts"
    path = measured(folder, 0.5)
    measured(folder, 0.0, n_kv=(CELLS, 2 * CELLS))
    known = DraftMemory(folder, "a").at((0,))
    assert (known.of(KEY, 4), known.of((CELLS, 2 * CELLS), 4), known.of(KEY, 8)) == (0.5, 0.0, None)
    assert known.tolerance == 4.0
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("other", [{"who": "b"}, {"layer": 1}])
def test_another_model_or_layer_does_not(tmp_path: Path, other: dict) -> None:
    measured(tmp_path)
    assert DraftMemory(tmp_path, other.get("who", "a")).at((other.get("layer", 0),)).of(KEY, 4) is None


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[", b"[1]", b"\xff\xfe", b"[" * 60_000, b'[[[256], 4, "0.0"]]', b"[[[256], 4, NaN]]",
     b"[[[256], 4, -1.0]]", b"[[[255], 4, 0.0]]", b"[[[], 4, 0.0]]", b"[[[256], 5, 0.0]]", b"[[[256] * 3, 4, 0.0]]",
     b"[[[true], 4, 0.0]]", b"[[[256], 4, 0.0], 7]", b"[[[256], 4, 0.0]]" + b" " * draft_memory.MAX_BYTES],
)  # fmt: skip
def test_a_damaged_file_is_as_none(tmp_path: Path, content: bytes) -> None:
    path = measured(tmp_path, 0.5)
    path.write_bytes(content)
    assert DraftMemory(tmp_path, "a").at((0,)).of(KEY, 4) is None
    measured(tmp_path, 0.25)
    assert DraftMemory(tmp_path, "a").at((0,)).of(KEY, 4) == 0.25


def test_a_folder_that_cannot_be_written_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = DraftMemory(tmp_path / "file" / "drafts", "a")
    memory.at((0,)).measure(KEY, ROWS, ROWS)
    assert memory.at((0,)).of(KEY, 4) == 0.0
    path = measured(tmp_path / "drafts")
    path.unlink()
    path.mkdir()
    assert measured(tmp_path / "drafts") == path


def test_files_are_few_and_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_memory, "MAX_FILES", 3)
    monkeypatch.setattr(draft_memory, "MAX_BYTES", 100)
    for i in range(6):
        measured(tmp_path, who=str(i))
    assert len(list(tmp_path.iterdir())) == 3
    assert DraftMemory(tmp_path, "5").at((0,)).of(KEY, 4) == 0.0
    memory = DraftMemory(tmp_path, "5").at((0,))
    for i in range(1, 9):
        memory.measure((i * CELLS,), ROWS, ROWS)
        assert max(p.stat().st_size for p in tmp_path.iterdir()) <= 100
        assert DraftMemory(tmp_path, "5").at((0,)).of((i * CELLS,), 4) == 0.0


MEASURE_MANY = """
import sys
from pathlib import Path
import numpy as np
from localvlm.engine.draft_memory import DraftMemory
from localvlm.engine.drafts import CELLS
rows = np.zeros((4, 7), np.float32)
for i in range(20):
    DraftMemory(Path(sys.argv[1]), "a").at((0,)).measure(((int(sys.argv[2]) + i) * CELLS,), rows, rows)
"""


def test_runs_at_a_time_leave_a_whole_file(tmp_path: Path) -> None:
    """They may lose each other's measurements, and never one measured before them."""
    measured(tmp_path, 0.5)
    runs = [subprocess.Popen([sys.executable, "-c", MEASURE_MANY, str(tmp_path), str(start)]) for start in (2, 30, 60)]
    assert [run.wait() for run in runs] == [0, 0, 0]
    (path,) = tmp_path.iterdir()
    kept = json.loads(path.read_text())
    assert 2 <= len(kept) <= 61  # that before them, and the last of whichever came last
    assert DraftMemory(tmp_path, "a").at((0,)).of(KEY, 4) == 0.5
    measured(tmp_path, n_kv=(99 * CELLS,))
    assert json.loads(path.read_text())[:-1] == kept


# on llama.cpp


@pytest.fixture(scope="module")
def model(native: None, tmp_path_factory: pytest.TempPathFactory) -> zoo.ZooModel:
    return zoo.build("llava15", tmp_path_factory.mktemp("zoo"))


def test_what_tells_one_way_of_running_from_another(model: zoo.ZooModel, tmp_path: Path) -> None:
    header, options = read_header(model.model), LoadOptions(threads=1)
    same = identity(header, options)
    assert identity(header, options) == same
    others = [
        identity(header, replace(options, threads=2)),
        identity(header, replace(options, kv_type="q8_0")),
    ]
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(model.model.read_bytes())
    others.append(identity(read_header(copy), options))  # another time
    assert len({same, *others}) == 4
    assert str(model.model) not in same
    gpu = DraftMemory.of(header, LoadOptions(gpu_layers=1, cache=str(tmp_path / "gpu")))
    gpu.at((0,)).measure(KEY, ROWS, ROWS)
    assert not (tmp_path / "gpu").exists()


_ASK = """
import sys
from pathlib import Path
from localvlm import catalog, images
from localvlm.engine.api import ImagePart, LoadOptions, Message, TextPart
from localvlm.engine.vlm import LlamaVlm
files = catalog.pair_named("demo").model
vlm = LlamaVlm(files.model, files.mmproj, LoadOptions(threads=int(sys.argv[2]), cache=sys.argv[1]))
seen = vlm.encode(images.load(catalog.example_image()).rgb)
parts = vlm.chat([Message("user", "Describe the picture.", 1)])
parts = [part if isinstance(part, TextPart) else ImagePart(seen) for part in parts]
vlm.prefill(parts)
plain = vlm.generate(64)
vlm.prefill(parts)
calls, feed = [], vlm._cache.feed
vlm._cache.feed = lambda ids: calls.append(len(ids)) or feed(ids)
done = vlm.generate(64, draft=plain.ids)
assert done.ids.tolist() == plain.ids.tolist()
print(len(calls))
vlm.close()
"""


@pytest.fixture
def decodes(native: None, tmp_path: Path) -> Callable[..., int]:
    """Batches that a new process runs to answer once along a draft that is right."""

    def run(threads: int = 1) -> int:
        command = [sys.executable, "-c", _ASK, str(tmp_path), str(threads)]
        return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    return run


def test_a_second_process_gains(decodes: Callable[..., int], tmp_path: Path) -> None:
    first = decodes()
    assert first >= 20  # one by one, and a batch that is measured
    (path,) = (tmp_path / "drafts").iterdir()
    damaged = path.read_bytes()[:-3]
    assert decodes() < first / 2
    path.write_bytes(damaged)
    assert decodes() == first
    assert decodes(threads=2) >= 20  # kernels go by the threads too
