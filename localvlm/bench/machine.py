"""What a measurement ran on, and the memory that it took."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import psutil

from localvlm.engine.api import Engine

__all__ = ["Peak", "build", "machine"]


def machine() -> dict[str, Any]:
    """Processor, cores that may be used, and memory in bytes."""
    return {
        "cpu": _cpu(),
        "cores": psutil.cpu_count(logical=False),
        "threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "ram": psutil.virtual_memory().total,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def build(engine: Engine) -> dict[str, Any]:
    """Versions of localvlm and of the llama.cpp that ``engine`` loaded, with the flags it was built with."""
    import localvlm

    found: dict[str, Any] = {"localvlm": localvlm.__version__}
    backend = getattr(engine, "backend", None)
    if backend is not None:
        told = backend()
        found |= {
            "llama-cpp-python": told.llama_cpp_python,
            "ggml": told.ggml,
            "commit": told.commit,
            "flags": told.system_info.strip(),
        }
    return found


class Peak:
    """The most memory that a process has held since the last call, in bytes.

    On Linux that is the high-water mark of its resident set, which is set back each time; elsewhere, where nothing sets
    it back, what it holds now.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def _folder(self) -> Path:
        return Path(f"/proc/{getattr(self._engine, 'pid', None)}")

    def begin(self) -> None:
        """Sets the mark back."""
        with contextlib.suppress(OSError):
            (self._folder / "clear_refs").write_text("5")

    def read(self) -> int | None:
        """None where there is no process to ask."""
        pid = getattr(self._engine, "pid", None)
        if pid is None:
            return None
        with contextlib.suppress(OSError):
            for line in (self._folder / "status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) << 10
        return int(psutil.Process(pid).memory_info().rss)
