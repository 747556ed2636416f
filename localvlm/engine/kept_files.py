"""Small private folders of what can be made again: files are written whole or not at all, and the oldest go first."""

from __future__ import annotations

import contextlib
import hashlib
import tempfile
from pathlib import Path

from localvlm.engine.gguf_header import Header

__all__ = ["file_identity", "keep_file", "write_private"]


def file_identity(header: Header) -> tuple[int, int, str]:
    """What tells a model's file from others of its name, without reading all of it: size, time, hash of the header."""
    found = header.path.stat()
    end = min((tensor.offset for tensor in header.tensors.values()), default=0)
    with header.path.open("rb") as file:
        return found.st_size, found.st_mtime_ns, hashlib.sha256(file.read(end)).hexdigest()


def write_private(path: Path, data: bytes) -> None:
    """Writes a file that its owner alone can read, in a folder that is made for it.

    Raises:
        OSError: it cannot be written; all is as before.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".new-", delete=False) as file:
        try:
            file.write(data)
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink()
            raise


def keep_file(path: Path, data: bytes, *, max_files: int | None = None, max_bytes: int | None = None) -> None:
    """Writes a private file, and removes the oldest others of its folder that would be too many with it. Where it
    cannot be written, all is as before.
    """
    with contextlib.suppress(OSError):
        if max_bytes is not None and len(data) > max_bytes:
            return
        _make_room(path, max_files, None if max_bytes is None else max_bytes - len(data))
        write_private(path, data)


def _make_room(path: Path, max_files: int | None, n_bytes: int | None) -> None:
    """Leaves one place less than ``max_files``, and ``n_bytes`` in all, for those beside ``path``."""
    found = []
    for other in path.parent.glob("*"):  # none where there is no folder yet
        with contextlib.suppress(FileNotFoundError):  # another run was quicker
            if other != path:
                status = other.stat()
                found.append((status.st_mtime_ns, status.st_size, other))
    found.sort(reverse=True, key=lambda one: one[0])
    total = 0
    for number, (_, size, other) in enumerate(found, 2):
        total += size
        if (max_files is not None and number > max_files) or (n_bytes is not None and total > n_bytes):
            other.unlink(missing_ok=True)
