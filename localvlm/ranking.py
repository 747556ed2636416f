"""Pairs by what a machine can hold: told from the headers of files that are there, else from the catalogue's sizes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from localvlm.catalog import Entry
    from localvlm.memory import Need

__all__ = ["Ranked", "ranked"]

ABOUT, BESIDE = 1.15, 500_000_000
"""Bytes that a pair takes of which the sizes of the files alone are known: so many times these, and so many beside. By
their headers SmolVLM2, InternVL3 and Qwen2.5-VL take 97 % of that."""


@dataclass(frozen=True)
class Ranked:
    """A pair, the bytes that it needs and with --low-memory, and whether that is told from its files' headers."""

    entry: Entry
    need: int | None
    low: int | None
    exact: bool

    def fits(self, free: int) -> str:
        if self.need is None or self.low is None:
            return "unknown"
        return "yes" if self.need <= free else "with --low-memory" if self.low <= free else "no"

    def rank(self, free: int) -> tuple[int, int]:
        order = ["yes", "with --low-memory", "unknown", "no"].index(self.fits(free))
        return order, (self.need or 0) * (1 if order == 3 else -1)


def ranked(found: Iterable[Entry], free: int) -> list[Ranked]:
    """Pairs by what ``free`` bytes can hold: the largest that fits comes first."""
    return sorted((_told(entry) for entry in found), key=lambda one: one.rank(free))


def _told(entry: Entry) -> Ranked:
    if (found := _of_files(entry)) is not None:
        both, apart = found
        return Ranked(entry, both.total, apart.total, exact=True)
    told_of = entry.about.get("gb", {})
    sizes = [1e9 * told_of[role] for role in ("guide", "model") if role in told_of]
    if len(sizes) < 2:
        return Ranked(entry, None, None, exact=False)
    both_files, larger = (round(ABOUT * size + BESIDE) for size in (sum(sizes), max(sizes)))
    return Ranked(entry, both_files, larger, exact=False)


def _of_files(entry: Entry) -> tuple[Need, Need] | None:
    """What a pair needs, and with --low-memory; None where its files are not there, or cannot be read."""
    from localvlm.catalog import as_pair
    from localvlm.engine.api import LoadOptions
    from localvlm.errors import ModelError
    from localvlm.memory import pair_need

    if entry.lacking or "model" not in entry.files:
        return None
    try:
        pair, plain = as_pair(entry.name, entry.files), LoadOptions()
        return pair_need(pair, plain, plain), pair_need(pair, plain, plain, low_memory=True)
    except (ModelError, OSError):
        return None
