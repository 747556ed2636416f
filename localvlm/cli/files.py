"""Files that commands write: refused early if they cannot be, and never left half written."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from localvlm.errors import StorageError, UsageError

__all__ = ["check_writable", "target_of", "write_text", "write_whole"]


def check_writable(target: Path) -> None:
    """Fails before the models are loaded rather than after.

    Raises:
        StorageError: ``target`` is a directory, or its folder does not exist or is closed.
    """
    folder = _place(target).parent
    if target.is_dir():
        raise StorageError(f"'{target}' is a directory", "give the name of a file")
    if not folder.is_dir():
        raise StorageError(f"folder '{folder}' does not exist", "create it, or save elsewhere")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise StorageError(f"folder '{folder}' may not be written to by you", "save elsewhere")


def target_of(name: str | None, kind: str) -> Path | None:
    """The file that option ``--kind`` names, whose suffix is that too, if it is given.

    Raises:
        UsageError: it has another suffix.
        StorageError: see :func:`check_writable`.
    """
    if name is None:
        return None
    target = Path(name).expanduser()
    if target.suffix.lower() != f".{kind}":
        raise UsageError(f"--{kind} {name!r} is not the name of a .{kind} file", f"give a name that ends in .{kind}")
    check_writable(target)
    return target


def write_text(target: Path, text: str) -> None:
    """Writes a file of UTF-8; see :func:`write_whole`."""
    write_whole(target, lambda file: file.write(text.encode("utf-8", "replace")))


def write_whole(target: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Lets ``write`` fill a file so that ``target`` is either complete or as it was. A symbolic link stays one, and a
    file that was there keeps its permissions.

    Raises:
        StorageError: the disk is full, or the folder cannot be written to.
    """
    import tempfile

    temporary: Path | None = None
    place = _place(target)
    try:
        with tempfile.NamedTemporaryFile(dir=place.parent, prefix=".localvlm-", delete=False) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(_mode(place))
        temporary.replace(place)
    except OSError as error:
        raise StorageError(f"{str(target)!r} cannot be written: {error.strerror or error}", "save elsewhere") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def _place(target: Path) -> Path:
    """Where the file lies that ``target`` names or, as a symbolic link, leads to; that need not be there."""
    return Path(os.path.realpath(target))  # pathlib's raises for a loop of them


def _mode(place: Path) -> int:
    """The permissions of the file that lies there, or that one would have."""
    with suppress(FileNotFoundError):
        return place.stat().st_mode & 0o777
    mask = os.umask(0o022)
    os.umask(mask)
    return 0o666 & ~mask
