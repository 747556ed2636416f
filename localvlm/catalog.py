"""Pairs by name: the bundled one, those of the settings file, and what files given by hand mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localvlm.config import PAIR_KEYS
from localvlm.errors import ModelNotFound

if TYPE_CHECKING:
    from localvlm.pipeline import Pair, VlmFiles

__all__ = [
    "DEMO",
    "Entry",
    "as_pair",
    "calibrations",
    "default_entry",
    "entries",
    "entry_named",
    "example_image",
    "models_folder",
    "pair_named",
    "vlm_files",
]

DEMO = "demo"
DEMOS = DEMO, "demo-tiles"
HEADROOM = 1 << 30
"""Bytes of memory that a pair needs beside its files: KV caches and compute buffers."""


@dataclass(frozen=True)
class Entry:
    """A pair that has a name.

    Attributes:
        files: by PAIR_KEYS; the guide's may be missing.
    """

    name: str
    summary: str
    files: Mapping[str, Path]

    @property
    def missing(self) -> list[Path]:
        """Files that are not there."""
        return [path for path in self.files.values() if not path.is_file()]

    @property
    def size(self) -> int:
        """Bytes of all files that are there."""
        return sum(path.stat().st_size for path in set(self.files.values()) if path.is_file())


def models_folder() -> Path:
    """Where the bundled models lie."""
    import localvlm.models

    return Path(localvlm.models.__file__).parent


def example_image() -> Path:
    """The bundled picture that goes with the demo pair."""
    return models_folder() / "demo" / "example.png"


def entries(user_pairs: Mapping[str, Mapping[str, Path]] = {}) -> list[Entry]:
    """All pairs that have a name, the user's own first; these win over bundled ones of the same name."""
    folder = models_folder()
    found = [Entry(name, "from the settings file", files) for name, files in user_pairs.items()]
    for name, table in _bundled().items():
        if name not in user_pairs:
            files = {key: folder / table[key.replace("_", "-")] for key in PAIR_KEYS if key.replace("_", "-") in table}
            found.append(Entry(name, table["summary"], files))
    return found


def calibrations() -> dict[str, dict[str, Any]]:
    """Thresholds of early exit that bundled pairs come with, by digest of their weights (localvlm.calibration)."""
    tables = [table["calibration"] for table in _bundled().values() if "calibration" in table]
    return {table.pop("digest"): table for table in tables}


def _bundled() -> dict[str, Any]:
    import tomllib

    with (models_folder() / "catalog.toml").open("rb") as file:
        return tomllib.load(file)


def entry_named(name: str, user_pairs: Mapping[str, Mapping[str, Path]] = {}) -> Entry:
    """The pair called ``name``.

    Raises:
        ModelNotFound: there is none, or one of its files is missing.
    """
    found = {entry.name: entry for entry in entries(user_pairs)}
    if name not in found:
        raise ModelNotFound(f"there is no pair {name!r}", f"`localvlm list` shows them: {', '.join(found)}")
    entry = found[name]
    if entry.missing:
        raise ModelNotFound(f"pair {name!r} lacks the file '{entry.missing[0]}'", "`localvlm list` shows what is there")
    return entry


def pair_named(name: str) -> Pair:
    """The bundled pair called ``name``, as the pipeline takes it."""
    return as_pair(name, entry_named(name).files)


def default_entry(user_pairs: Mapping[str, Mapping[str, Path]] = {}) -> Entry:
    """The largest installed pair that fits the memory now available, else the demo pair."""
    import psutil

    installed = [e for e in entries(user_pairs) if "model" in e.files and not e.missing and e.name not in DEMOS]
    room = psutil.virtual_memory().available - HEADROOM
    fitting = [e for e in installed if e.size <= room]
    return max(fitting, key=lambda e: e.size) if fitting else entry_named(DEMO, user_pairs)


def as_pair(name: str | None, files: Mapping[str, Path]) -> Pair:
    """Files by PAIR_KEYS as a pair; missing mmproj files are looked for beside their models."""
    from localvlm.pipeline import Pair

    guide, model = files.get("guide"), files.get("model")
    return Pair(
        name,
        vlm_files(guide, files.get("guide_mmproj"), "--guide-mmproj") if guide else None,
        vlm_files(model, files.get("mmproj"), "--mmproj") if model else None,
    )


def vlm_files(model: Path, mmproj: Path | None, flag: str) -> VlmFiles:
    """The two files of a VLM.

    Raises:
        ModelNotFound: a file is missing, or no mmproj was given and none lies beside the model.
    """
    from localvlm.answers import VlmFiles

    for path in (model, mmproj):
        if path is not None and not path.is_file():
            why = "is not a file" if path.exists() else "does not exist"
            raise ModelNotFound(f"model file {str(path)!r} {why}", "check the path")
    return VlmFiles(model, mmproj or _sibling_mmproj(model, flag))


_KINDS = ("f16", "bf16", "q8_0", "f32")
_KIND = re.compile(r"[-_.](bf16|f16|f32|i?q\d\w*)$", re.IGNORECASE)


def _sibling_mmproj(model: Path, flag: str) -> Path:
    """The GGUF beside the model whose name holds "mmproj": most alike in name, then F16 before BF16 before others."""
    own = _KIND.sub("", model.stem.lower())

    def rank(path: Path) -> tuple[int, int, int, str]:
        stem = path.stem.lower()
        bare = _KIND.sub("", stem).replace("mmproj", "").strip("-_.")
        alike = next((i for i, (a, b) in enumerate(zip(bare, own, strict=False)) if a != b), min(len(bare), len(own)))
        found = _KIND.search(stem)
        kind = found[1] if found else ""
        return -alike, len(bare) - alike, _KINDS.index(kind) if kind in _KINDS else len(_KINDS), path.name

    found = [p for p in model.absolute().parent.glob("*.gguf") if "mmproj" in p.name.lower() and p.name != model.name]
    if not found:
        raise ModelNotFound(f"no mmproj file lies beside {str(model)!r}", f"pass it with {flag}")
    return min(found, key=rank)
