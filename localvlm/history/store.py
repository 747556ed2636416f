"""The store of conversations."""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from localvlm.config import directories
from localvlm.errors import StorageError, UsageError
from localvlm.history.records import (
    ConversationSummary,
    StoredImage,
    StoredTurn,
    folded,
    image_of,
    image_row,
    moment,
    pack,
    turn_of,
    turn_row,
    unpack,
)
from localvlm.history.schema import IN_THE_WAY, PATIENCE, damaged, identity, open_database, patiently, told, transaction

if TYPE_CHECKING:
    from typing import Self

__all__ = ["MAX_WORDS", "History", "history_file", "remove_history"]

T = TypeVar("T")

MAX_WORDS = 64
"""Words of a query that are looked for; those behind them are not."""
_SUMMARY = """
SELECT c.id, c.title, c.pair, c.system, c.created, c.updated,
    (SELECT count(*) FROM turn WHERE conversation = c.id) AS turns,
    (SELECT count(*) FROM turn JOIN image ON image.turn = turn.id WHERE conversation = c.id) AS images
FROM conversation AS c"""
_COUNT = "SELECT count(*) FROM conversation AS c"
_HAS_WORD = """(instr(c.folded, ?)
    OR EXISTS (SELECT 1 FROM turn WHERE conversation = c.id AND instr(turn.folded, ?)))"""
_SHOWN = """
SELECT turn.conversation, image.sha256, image.path FROM turn JOIN image ON image.turn = turn.id
WHERE image.sha256 = ? OR instr(image.path, ?)"""
_TURNS = """
SELECT id, created, question, answer, guide_text, answered_by, status, pair, method, details
FROM turn WHERE conversation = ? ORDER BY id"""
_IMAGES = "SELECT image.* FROM image JOIN turn ON turn.id = image.turn WHERE turn.conversation = ? ORDER BY image.id"
_SWEEP_MS = 2000
"""How long a removal waits for readers of other processes; each takes milliseconds."""


def history_file() -> Path:
    """Where the history of this user is, whether it exists or not."""
    return directories().data / "history" / "history.db"


class History:
    """Conversations in a file. A context manager; leaving it closes the file.

    Any number of processes may have the file open, and any thread may call any method: calls of one History wait for
    each other. Each takes milliseconds, or as long as others write, so that a user interface calls from a thread of
    its own. What a method has returned from is on disk; what it raised for has left nothing. What is removed is
    overwritten, in the file and in its journal.

    All methods raise StorageError where the file cannot be read or written; the others then work on.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        self._identity = identity(path)
        self._closed = False
        self._lock = threading.RLock()

    @classmethod
    def open(cls, path: Path | None = None) -> Self:
        """Opens the history, and begins it if there is none; ``path``: :func:`history_file` if None.

        Raises:
            StorageError: it cannot be opened or written, is damaged, or is of a newer localvlm; it is as it was then.
        """
        path = path or history_file()
        return cls(path, open_database(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; methods that are called then raise StorageError."""
        with self._lock, told(self.path):
            self._closed = True
            self._connection.close()

    # ---- writing

    def begin(self, title: str, pair: str | None = None, system: str | None = None) -> int:
        """A new conversation, without turns yet; gives its id, which no other one ever gets."""
        return self._write(lambda c: _insert(c, "conversation", _begun(title, pair, system)))

    def begin_with(
        self, turn: StoredTurn, title: str, pair: str | None = None, system: str | None = None
    ) -> tuple[int, int]:
        """A new conversation and its first turn, both or neither; gives the ids of the two."""
        adds = _adds(turn)

        def write(connection: sqlite3.Connection) -> tuple[int, int]:
            conversation = _insert(connection, "conversation", _begun(title, pair, system))
            return conversation, adds(connection, conversation)

        return self._write(write)

    def add(self, conversation: int, turn: StoredTurn) -> int:
        """Adds a turn, its pictures with it; gives the turn's id.

        Raises:
            UsageError: there is no such conversation; it may have been removed by another process.
        """
        adds = _adds(turn)

        def write(connection: sqlite3.Connection) -> int:
            _touch(connection, conversation)
            return adds(connection, conversation)

        return self._write(write)

    def rename(self, conversation: int, title: str) -> None:
        """Gives a conversation another title.

        Raises:
            UsageError: there is no such conversation.
        """
        self._write(lambda c: _rename(c, conversation, title), sweep=True)

    # ---- reading

    def conversations(self, query: str = "", limit: int | None = 200) -> list[ConversationSummary]:
        """Those that hold every word of ``query``, the newest first, ``limit`` of them at the most; None: all.

        A word is looked for in titles, questions, answers and names of pictures, within longer words too, whatever its
        case; no character of it means anything else than itself.
        """
        where, values = _holding(query)
        values.append(-1 if limit is None else limit)
        found = self._read(f"{_SUMMARY} WHERE {where} ORDER BY c.updated DESC, c.id DESC LIMIT ?", values)
        return self._summaries(found)

    def count(self, query: str = "") -> int:
        """How many there are of those that :meth:`conversations` gives without a limit."""
        where, values = _holding(query)
        (found,) = self._read(f"{_COUNT} WHERE {where}", values)
        return int(found[0])

    def conversation(self, conversation: int) -> ConversationSummary:
        """One of them.

        Raises:
            UsageError: there is no such conversation.
        """
        found = self._read(f"{_SUMMARY} WHERE c.id = ?", (conversation,))
        if not found:
            raise _unknown(conversation)
        return self._summaries(found)[0]

    def turns(self, conversation: int) -> list[StoredTurn]:
        """The turns of a conversation, the oldest first.

        Raises:
            UsageError: there is no such conversation.
        """

        def read(connection: sqlite3.Connection) -> list[StoredTurn]:
            _require(connection, conversation)
            turns = connection.execute(_TURNS, (conversation,)).fetchall()
            images: dict[int, list[StoredImage]] = {}
            rows = connection.execute(_IMAGES, (conversation,)).fetchall()
            with self._decoding():
                for row in rows:
                    images.setdefault(row["turn"], []).append(image_of(row))
                return [turn_of(row, images.get(row["id"], ())) for row in turns]

        return self._snapshot(read)

    def export(self, conversation: int, folder: Path) -> Path:
        """Writes a conversation as Markdown, with its pictures, into a new folder in ``folder``; gives the file.

        Pictures are decoded in a process apart, to see whether they are still the same: a quarter of a second each.

        Raises:
            UsageError: there is no such conversation.
        """
        from localvlm.history.export import export

        return export(self.conversation(conversation), self.turns(conversation), folder)

    def as_json(self, conversation: int) -> str:
        """All that is kept of a conversation, as :func:`localvlm.history.export.as_json` writes it.

        Raises:
            UsageError: there is no such conversation.
        """
        from localvlm.history.export import as_json

        return as_json(self.conversation(conversation), self.turns(conversation))

    # ---- removing

    def remove(self, conversation: int, turn: int, titled: Callable[[str], str] = str) -> bool:
        """Takes a turn back, if it is there; whether the conversation still is.

        A title that ``titled`` makes of the turn's question goes with it: the conversation is called by the first
        question that stays, and goes itself where none does. Another title, given by hand, stays.

        Raises:
            UsageError: there is no such conversation.
        """

        def write(connection: sqlite3.Connection) -> bool:
            _require(connection, conversation)
            where = "FROM turn WHERE id = ? AND conversation = ?"
            gone = connection.execute(f"SELECT question {where}", (turn, conversation)).fetchone()
            if gone is None:
                return True
            connection.execute(f"DELETE {where}", (turn, conversation))
            _touch(connection, conversation)
            with self._decoding():
                return _retitled(connection, conversation, unpack(gone["question"]), titled)

        return self._write(write, sweep=True)

    def delete(self, conversation: int, *more: int) -> None:
        """Removes conversations for good, those of them that are there."""

        def write(connection: sqlite3.Connection) -> None:
            values = [(one,) for one in (conversation, *more)]
            connection.executemany("DELETE FROM conversation WHERE id = ?", values)

        self._write(write, sweep=True)

    def clear(self) -> None:
        """Removes all conversations for good."""
        self._write(lambda c: c.execute("DELETE FROM conversation"), sweep=True)

    def with_image(self, sha256: bytes | None = None, path: Path | None = None) -> list[ConversationSummary]:
        """Conversations in which a picture of these pixels (``Image.content``), or from this path, was shown; however
        the path is written, and whether or not a file is there still.
        """

        def read(connection: sqlite3.Connection) -> list[sqlite3.Row]:
            shown = self._shown(connection, sha256, path)
            return [row for one in shown for row in connection.execute(f"{_SUMMARY} WHERE c.id = ?", (one,))]

        return sorted(self._summaries(self._snapshot(read)), key=lambda one: (one.updated, one.id), reverse=True)

    def forget_image(self, sha256: bytes | None = None, path: Path | None = None) -> int:
        """Removes those conversations for good, since any turn of them may tell of the picture; gives their number."""

        def write(connection: sqlite3.Connection) -> int:
            shown = self._shown(connection, sha256, path)
            connection.executemany("DELETE FROM conversation WHERE id = ?", [(one,) for one in shown])
            return len(shown)

        return self._write(write, sweep=True)

    # ---- how

    def _shown(self, connection: sqlite3.Connection, sha256: bytes | None, path: Path | None) -> list[int]:
        """Conversations with such a picture."""
        wanted = set() if path is None else _spellings(str(path))
        name = None if path is None else pack(path.name)
        with self._decoding():
            found = connection.execute(_SHOWN, (sha256, name)).fetchall()
            of_it = (
                r for r in found if r["sha256"] == sha256 or (r["path"] and wanted & _spellings(unpack(r["path"])))
            )
            return list(dict.fromkeys(row["conversation"] for row in of_it))

    def _read(self, query: str, values: Sequence[object]) -> list[sqlite3.Row]:
        return self._run(lambda c: c.execute(query, values).fetchall())

    def _summaries(self, rows: Sequence[sqlite3.Row]) -> list[ConversationSummary]:
        with self._decoding():
            return [_summary(row) for row in rows]

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Tells values that their columns cannot hold as damage of the file."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
            raise damaged(self.path, f"a row holds what it cannot ({type(error).__name__})") from error

    def _snapshot(self, read: Callable[[sqlite3.Connection], T]) -> T:
        """Reads what is of one moment."""

        def work(connection: sqlite3.Connection) -> T:
            with transaction(connection, "DEFERRED"):
                return read(connection)

        return self._run(work)

    def _write(self, write: Callable[[sqlite3.Connection], T], *, sweep: bool = False) -> T:
        """All of it or nothing; ``sweep``: nothing of what it removed stays in the journal."""

        def work(connection: sqlite3.Connection) -> T:
            with transaction(connection):
                return write(connection)

        with self._lock:
            done = self._run(work)
            if sweep:
                self._sweep()
        return done

    def _run(self, work: Callable[[sqlite3.Connection], T]) -> T:
        with self._lock, told(self.path):
            if self._closed:
                raise StorageError(f"history '{self.path}' was closed")
            if identity(self.path) != self._identity:  # it was removed, and ours is nowhere any more
                connection = open_database(self.path)
                self._connection.close()
                self._connection, self._identity = connection, identity(self.path)
            return patiently(lambda: work(self._connection))

    def _sweep(self) -> None:
        """Leaves nothing of what was removed. SQLite overwrites it, but not what moved to another page before, so that
        the file is written anew; then the journal goes into it and is emptied.
        """
        connection = self._connection
        try:
            connection.execute(f"PRAGMA busy_timeout = {_SWEEP_MS}")
            connection.execute("VACUUM")
            busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
            why = "another program is reading it" if busy else ""
        except sqlite3.Error as error:
            busy = error.sqlite_errorcode & 0xFF in IN_THE_WAY
            why = "another program is writing it" if busy else str(error)
        finally:
            connection.execute(f"PRAGMA busy_timeout = {int(PATIENCE * 1000)}")
        if why:
            raise StorageError(
                f"it was removed, but traces of it are left beside '{self.path}': {why}",
                "`localvlm forget --all` wipes them; so does the next removal",
            )


def remove_history(path: Path | None = None) -> bool:
    """Removes the file, whatever it holds, and what SQLite put beside it; False: other processes have it open, and all
    conversations were removed from it instead. ``path``: :func:`history_file` if None.

    Raises:
        StorageError: it cannot be removed.
    """
    path = (path or history_file()).resolve()  # a link does not keep what it leads to
    with told(path):
        if path.is_file() and not _remove_alone(path):
            with History.open(path) as history:
                history.clear()
            return False
    return True


def _remove_alone(path: Path) -> bool:
    """Removes the file while no other process has it open; a process that opens it now finds that it is gone."""
    with closing(sqlite3.connect(path, timeout=1, isolation_level=None)) as connection:
        try:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            if error.sqlite_errorcode & 0xFF in IN_THE_WAY:
                return False
        # After any other error too: a file that cannot be opened is open nowhere. The file itself goes last: once it is
        # gone, another process may begin one with a journal of the same name.
        for end in ("-wal", "-shm", "-journal", ""):
            path.with_name(path.name + end).unlink(missing_ok=True)
    return True


def _holding(query: str) -> tuple[str, list[object]]:
    """A condition, and its values: that a conversation holds every word."""
    words = list(dict.fromkeys(folded(query).split()))[:MAX_WORDS]
    return " AND ".join([_HAS_WORD] * len(words)) or "1", [word for word in words for _ in range(2)]


def _insert(connection: sqlite3.Connection, table: str, values: dict[str, Any]) -> int:
    names, marks = ", ".join(values), ", ".join("?" * len(values))
    done = connection.execute(f"INSERT INTO {table} ({names}) VALUES ({marks})", tuple(values.values()))  # noqa: S608
    assert done.lastrowid is not None
    return done.lastrowid


def _begun(title: str, pair: str | None, system: str | None) -> dict[str, Any]:
    """The columns of a conversation that begins now."""
    values = {"title": pack(title), "pair": pack(pair), "system": pack(system), "folded": folded(title)}
    return values | dict.fromkeys(("created", "updated"), time.time())


def _adds(turn: StoredTurn) -> Callable[[sqlite3.Connection, int], int]:
    """What adds the rows of a turn, made before others have to wait for it; gives the turn's id."""
    values, images = turn_row(turn), [image_row(image) for image in turn.images]

    def write(connection: sqlite3.Connection, conversation: int) -> int:
        added = _insert(connection, "turn", {**values, "conversation": conversation})
        for image in images:
            _insert(connection, "image", {**image, "turn": added})
        return added

    return write


def _retitled(connection: sqlite3.Connection, conversation: int, gone: str, titled: Callable[[str], str]) -> bool:
    """Leaves nothing of the question that is gone in the title; whether the conversation is still there."""
    (title,) = connection.execute("SELECT title FROM conversation WHERE id = ?", (conversation,)).fetchone()
    if unpack(title) != titled(gone):
        return True
    questions = "SELECT question FROM turn WHERE conversation = ? ORDER BY id"
    first = connection.execute(questions, (conversation,)).fetchone()
    if first is None:
        connection.execute("DELETE FROM conversation WHERE id = ?", (conversation,))
        return False
    _rename(connection, conversation, titled(unpack(first["question"])))
    return True


def _rename(connection: sqlite3.Connection, conversation: int, title: str) -> None:
    values = pack(title), folded(title), conversation
    if not connection.execute("UPDATE conversation SET title = ?, folded = ? WHERE id = ?", values).rowcount:
        raise _unknown(conversation)


def _touch(connection: sqlite3.Connection, conversation: int) -> None:
    done = connection.execute("UPDATE conversation SET updated = ? WHERE id = ?", (time.time(), conversation))
    if not done.rowcount:
        raise _unknown(conversation)


def _require(connection: sqlite3.Connection, conversation: int) -> None:
    if connection.execute("SELECT 1 FROM conversation WHERE id = ?", (conversation,)).fetchone() is None:
        raise _unknown(conversation)


def _unknown(conversation: int) -> UsageError:
    return UsageError(f"there is no conversation {conversation} in the history", "it may have been removed meanwhile")


def _spellings(path: str) -> set[str]:
    """How a file's path may be written: by its folder as it is written, without ``..``, and without links."""
    plain = os.path.abspath(path)  # noqa: PTH100 - pathlib's keeps ".."
    with suppress(OSError, ValueError):  # no name of a file, or links in a circle
        return {plain, str(Path(os.path.realpath(Path(path).parent), Path(path).name))}
    return {plain}


def _summary(row: sqlite3.Row) -> ConversationSummary:
    pair, system = (None if row[name] is None else unpack(row[name]) for name in ("pair", "system"))
    counts = row["turns"], row["images"]
    times = moment(row["created"]), moment(row["updated"])
    return ConversationSummary(row["id"], unpack(row["title"]), pair, system, *counts, *times)
