"""A file of JSON lines that only grows: killed at any point, it is taken up again."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from localvlm.errors import StorageError, UsageError

__all__ = ["JsonLines"]


class JsonLines:
    """An object a line. Each is on disk before the next is begun; a last line that was cut off is dropped. One process
    at a time holds the file. A context manager.

    Attributes:
        lines: what was found in the file.
    """

    def __init__(self, path: Path, hint: str, *, elsewhere: str = "name another file", restart: bool = False) -> None:
        """Opens ``path``, or begins it; ``hint`` says what to do where it holds other things, ``elsewhere`` where it
        cannot be written. Of a full disk neither is said: what is there is good, and the same command goes on.

        Raises:
            UsageError: another process holds it, or it holds other things than objects; it is then left as it was.
            StorageError: it cannot be written.
        """
        self.path, self._hint, self._elsewhere = path, hint, elsewhere
        self._again = "run the same command without --restart" if restart else "run the same command again"
        try:
            self._file: IO[bytes] = path.open("ab+", buffering=0)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            self._hold()
            if restart:
                self._file.truncate(0)
            self.lines = self._read()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> JsonLines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Lets go of the file."""
        self._file.close()

    def add(self, line: Mapping[str, Any]) -> None:
        """Writes a line, for good.

        Raises:
            StorageError: the disk is full or gone.
        """
        self._write(json.dumps(line).encode() + b"\n")

    def _hold(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"another process is at work on '{self.path}'", "wait for it, or name another file"
            ) from error
        except OSError as error:
            raise self._unwritable(error) from error

    def _read(self) -> list[dict[str, Any]]:
        self._file.seek(0)
        *whole, last = self._file.read().split(b"\n")
        try:
            found = [json.loads(line) for line in whole]
            if not all(isinstance(line, dict) for line in found):
                raise ValueError("a line is not an object")
            if last[:1] not in (b"", b"{"):
                raise ValueError("its last line is not an object")
        except (ValueError, RecursionError) as error:
            raise UsageError(f"'{self.path}' is damaged: {error}", self._hint) from error
        if last:
            try:
                found.append(json.loads(last))
                self._write(b"\n")
            except (ValueError, RecursionError):
                self._file.truncate(self._file.tell() - len(last))
        return found

    def _write(self, data: bytes) -> None:
        try:
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> StorageError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = f"free some space, then {self._again} to go on" if full else self._elsewhere
        return StorageError(f"'{self.path}' cannot be written: {error.strerror or error}", hint)
