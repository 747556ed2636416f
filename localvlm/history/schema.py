"""The database file: made, looked into before it is opened, brought up to date, and its errors told as ours."""

from __future__ import annotations

import os
import shlex
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import TypeVar

from localvlm.errors import StorageError

__all__ = [
    "APPLICATION_ID",
    "IN_THE_WAY",
    "PATIENCE",
    "STEPS",
    "damaged",
    "identity",
    "open_database",
    "patiently",
    "told",
    "transaction",
]

T = TypeVar("T")

APPLICATION_ID = 0x6C766C6D
"""In the file's header: "lvlm", so that the database of another program is never taken for ours."""
PATIENCE = 60.0
"""Seconds that a process waits for others to finish what they write; each write takes milliseconds."""
IN_THE_WAY = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)
STEPS: tuple[tuple[str, ...], ...] = (
    (
        """CREATE TABLE conversation (
            id INTEGER PRIMARY KEY AUTOINCREMENT, -- never given again: another process may still hold a removed one's
            title BLOB NOT NULL, pair BLOB, system BLOB, folded TEXT NOT NULL,
            created REAL NOT NULL, updated REAL NOT NULL)""",
        """CREATE TABLE turn (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            conversation INTEGER NOT NULL REFERENCES conversation (id) ON DELETE CASCADE,
            created REAL NOT NULL, question BLOB NOT NULL, answer BLOB NOT NULL, guide_text BLOB,
            answered_by TEXT, status TEXT NOT NULL, pair BLOB, method TEXT NOT NULL, details TEXT NOT NULL,
            folded TEXT NOT NULL)""",
        """CREATE TABLE image (
            id INTEGER PRIMARY KEY AUTOINCREMENT,
            turn INTEGER NOT NULL REFERENCES turn (id) ON DELETE CASCADE,
            name BLOB NOT NULL, path BLOB, sha256 BLOB NOT NULL,
            width INTEGER NOT NULL, height INTEGER NOT NULL, page INTEGER)""",
        "CREATE INDEX turn_by_conversation ON turn (conversation)",
        "CREATE INDEX image_by_turn ON image (turn)",
    ),
)
"""What makes a file of version n one of version n + 1; the version is in its header, ``user_version``. A step that was
released stays as it is.
"""
_FILE, _BEFORE_READ = 0o600, 20
_creating = threading.Lock()


def open_database(path: Path) -> sqlite3.Connection:
    """Opens the file, or begins it, up to date and in WAL mode; statements are not in transactions by themselves.

    Raises:
        StorageError: it cannot be opened or written, is damaged, or is of a newer localvlm or of another program. It
            is as it was then.
    """
    with told(path):
        for _ in range(_BEFORE_READ):
            _create(path)
            before = identity(path)
            _look(path)
            connection = patiently(lambda: _connected(path))
            if before is not None and identity(path) == before:
                return connection
            connection.close()  # it was removed before we had read it, and is nowhere any more
    raise StorageError(f"history '{path}' is removed again and again", "end what removes it")


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Tells errors of SQLite and of the system about the history as StorageError."""
    try:
        yield
    except sqlite3.Error as error:
        if isinstance(error, sqlite3.ProgrammingError):  # wrong use by us
            raise
        raise _as_ours(path, error) from error
    except OSError as error:
        why = error.strerror or error
        if isinstance(error, FileExistsError | NotADirectoryError):
            why = f"'{path.parent}' is no folder"
        hint = f"check '{path.parent}', or use --private"
        raise StorageError(f"history '{path}' cannot be opened: {why}", hint) from error


def patiently(attempt: Callable[[], T]) -> T:
    """Tries again while others are in the way: SQLite itself does not wait in each case, such as when several processes
    turn to WAL at once.
    """
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return attempt()
        except sqlite3.OperationalError as error:
            if _code(error) not in IN_THE_WAY or time.monotonic() > end:
                raise
        time.sleep(0.005)


@contextmanager
def transaction(connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
    """All of what is written within, or nothing; "IMMEDIATE": alone among all processes, "DEFERRED": to read only."""
    connection.execute(f"BEGIN {kind}")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:  # some errors have ended it
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
        raise


def identity(path: Path) -> tuple[int, int] | None:
    """Which file lies there; None: none."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


# ---- opening -----------------------------------------------------------------------------------------------------


def _create(path: Path) -> None:
    """An empty file that its owner alone can read, if there is none. SQLite gives its other files the same mode.

    The file is not opened by us once SQLite has it: closing it would drop the locks of this process.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _creating, suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, _FILE))
    with suppress(FileNotFoundError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            raise StorageError(f"history '{path}' is not a regular file", _away(path))
        if mode & 0o077:
            with suppress(PermissionError):  # another user's, or a disk that cannot be written, which is told later
                path.chmod(_FILE)


def _look(path: Path) -> None:
    """Refuses a file of a newer version or of another program before anything could be changed.

    The header is read without a lock and without the journal, then, where a process left one, with it but read-only:
    leaving such a connection does not write the journal into the file.
    """
    journal = Path(f"{path.resolve()}-wal")
    for how in ("immutable=1", "mode=ro"):
        with suppress(sqlite3.Error, FileNotFoundError):  # opening for real tells
            if how == "immutable=1" or journal.stat().st_size:
                with closing(_uri(path, f"mode=ro&{how}")) as connection:
                    _version(connection, path)


def _uri(path: Path, how: str) -> sqlite3.Connection:
    address = f"{path.absolute().as_uri()}?{how}"
    return sqlite3.connect(address, uri=True, timeout=PATIENCE, isolation_level=None, check_same_thread=False)


def _connected(path: Path) -> sqlite3.Connection:
    connection = _uri(path, "mode=rw")
    try:
        for pragma in (
            "secure_delete = ON",  # what is removed is overwritten
            "temp_store = MEMORY",  # nothing of it in temporary files
            "foreign_keys = ON",
            "trusted_schema = OFF",
            "synchronous = FULL",  # a turn that was added survives a loss of power
        ):
            connection.execute(f"PRAGMA {pragma}")
        _version(connection, path)
        if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
            connection.execute("PRAGMA journal_mode = WAL")  # where the file system cannot, it goes on without
        if _version(connection, path) < len(STEPS):
            with transaction(connection):
                for statement in chain(*STEPS[_version(connection, path) :]):  # another process may have been first
                    connection.execute(statement)
                connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
                connection.execute(f"PRAGMA user_version = {len(STEPS)}")
        connection.execute("SELECT count(*) FROM conversation, turn, image WHERE 0")
    except BaseException:
        connection.close()
        raise
    connection.row_factory = sqlite3.Row
    return connection


def _version(connection: sqlite3.Connection, path: Path) -> int:
    """Of the file.

    Raises:
        StorageError: it is newer than we are, or of another program.
    """
    # tables first: another process that begins the file commits them with both numbers, maybe between our reads
    tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    (program,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    if tables and program != APPLICATION_ID:
        raise StorageError(f"history '{path}' is a database of another program", _away(path))
    if version > len(STEPS):
        raise StorageError(
            f"history '{path}' was written by a newer localvlm (its format is {version}, this one knows {len(STEPS)})",
            "upgrade localvlm, or move the file away; it was not changed",
        )
    return int(version)


# ---- errors ------------------------------------------------------------------------------------------------------

_DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _code(error: sqlite3.Error) -> int:
    """The primary result code."""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _as_ours(path: Path, error: sqlite3.Error) -> StorageError:
    code = _code(error)
    if code in _DAMAGED or not code:  # 0: a text that is none, which Python finds
        return damaged(path, "what lies there is no text" if not code else str(error))
    if code in IN_THE_WAY:
        return StorageError(
            f"another program has kept history '{path}' to itself for {PATIENCE:.0f} s", "end it, then try again"
        )
    before = "what was kept before is still there"
    why, hint = {
        sqlite3.SQLITE_FULL: ("cannot be written: the disk is full", f"free some space; {before}"),
        sqlite3.SQLITE_READONLY: ("may not be written", f"check permissions in '{path.parent}', or use --private"),
        sqlite3.SQLITE_CANTOPEN: ("cannot be opened", f"check permissions in '{path.parent}', or use --private"),
        sqlite3.SQLITE_IOERR: (f"cannot be read or written: {error}", f"check the disk and your quota; {before}"),
    }.get(code, (f"cannot be used: {error}", before))
    return StorageError(f"history '{path}' {why}", hint)


def damaged(path: Path, why: str) -> StorageError:
    """The error of a file that holds what it cannot hold."""
    return StorageError(f"history '{path}' is damaged: {why}", _away(path))


def _away(path: Path) -> str:
    """How to move the file and its journal away."""
    folder, file = shlex.quote(str(path.with_name("damaged"))), shlex.quote(str(path))
    return f"nothing was changed; to begin anew: mkdir -p {folder} && mv {file}* {folder}"
