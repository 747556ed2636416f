"""Which files are asked: two VLMs of two files each. Loads nothing heavy, for what shows before numpy is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Pair", "VlmFiles"]


@dataclass(frozen=True)
class VlmFiles:
    """The two GGUF files of one VLM."""

    model: Path
    mmproj: Path


@dataclass(frozen=True)
class Pair:
    """A guide and a model; either may be missing (``attention`` needs no model, guide-free methods no guide)."""

    name: str | None
    guide: VlmFiles | None
    model: VlmFiles | None
