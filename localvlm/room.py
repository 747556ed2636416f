"""How much memory a worker may take on this machine, now."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["room", "told"]

_CGROUP = Path("/sys/fs/cgroup")


def room() -> int:
    """Bytes of memory that a worker may have now: what is available, and no more than its limits leave."""
    import psutil

    return min([int(psutil.virtual_memory().available), *_limits()])


def _limits() -> Iterator[int]:
    """What a control group and the limit of the address space leave."""
    for most, taken, stat, of_files in (
        ("memory.max", "memory.current", "memory.stat", ""),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_"),
    ):
        try:
            limit, used = (int((_CGROUP / name).read_text()) for name in (most, taken))
            rows = dict(line.split() for line in (_CGROUP / stat).read_text().splitlines())
            # what of files was read stays in memory until somebody needs the room
            files = sum(int(rows.get(f"{of_files}{kind}_file", 0)) for kind in ("active", "inactive"))
            yield max(limit - max(used - files, 0), 0)
        except (OSError, ValueError):
            continue
    if of_worker := os.environ.get("LOCALVLM_WORKER_MEMORY"):  # as localvlm.engine.worker has it
        yield int(of_worker)
    if sys.platform != "win32":
        import resource

        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        if soft != resource.RLIM_INFINITY:
            yield soft


def told(n_bytes: int) -> str:
    """Bytes as people read them."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:.1f} GB"
    return f"{n_bytes / 1e6:.0f} MB" if n_bytes >= 1e6 or not n_bytes else f"{n_bytes / 1e3:.0f} kB"
