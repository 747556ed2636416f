"""The history under many processes, kills, full disks and old files: ``python -m tests.histories [--kills 200]``.

Each case runs real processes on one file of a folder of its own. Writers say which turn they have added once ``add``
has returned; whatever happens to them then, each such turn must be there, whole, and no other but the one that was
being added.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

from localvlm.history import History, StoredImage, StoredTurn
from localvlm.history.schema import STEPS

WAIT_S = 600
"""How long a process may take: machines are shared."""
FULL_KIB = 768
"""Size of the disk that fills up."""
_WRITE = """
import sys
from pathlib import Path
from tests.histories import write
write(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
"""
_MIGRATE = """
import sys
from pathlib import Path
from localvlm.history import History, schema
schema.STEPS = (*schema.STEPS, ("CREATE TABLE more (n INTEGER)", "INSERT INTO more VALUES (1)"))
print("ready", flush=True)
sys.stdin.read(1)
with History.open(Path(sys.argv[1])) as history:
    history.begin(sys.argv[2])
"""


def turn(name: str, number: int) -> StoredTurn:
    """A turn that tells whether it is whole: its answer has the hash of its question in it, over several pages."""
    question = f"{name}-{number}"
    answer = hashlib.sha256(question.encode()).hexdigest() * 100
    images = (StoredImage(question, Path("/") / question, b"\0" * 32, 1, 1),)
    return StoredTurn(question, answer, "model", images=images, created=float(number))


def write(path: Path, name: str, count: int) -> None:
    """Adds ``count`` turns to a conversation of its own, and says the number of each that is there for good."""
    with History.open(path) as history:
        conversation = history.begin(name)
        for number in range(count):
            history.add(conversation, turn(name, number))
            print(number, flush=True)
            history.conversations(f"{name}-{number}")


def start(
    code: str, *args: object, before: Sequence[str] = (), stdin: int = subprocess.DEVNULL
) -> subprocess.Popen[str]:
    command = [*before, sys.executable, "-c", code, *map(str, args)]
    streams = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, **streams)


def sound(path: Path) -> bool:
    """Whether SQLite finds nothing wrong with the file, nor with what its rows refer to."""
    with closing(sqlite3.connect(path)) as connection:
        fine = connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return fine and connection.execute("PRAGMA foreign_key_check").fetchall() == []


@dataclass
class Writers:
    """What processes that wrote at once left.

    Attributes:
        said: what they wrote to stderr, which is nothing.
    """

    codes: list[int]
    rows: int
    whole: bool
    sound: bool
    said: str = ""

    def passed(self, processes: int, turns: int) -> bool:
        right = self.codes == [0] * processes and self.rows == processes * turns
        return right and self.whole and self.sound and not self.said


def many_writers(folder: Path, processes: int = 8, turns: int = 200) -> Writers:
    """B1: processes that add turns to one file at once, the file being made by whoever is first."""
    path = folder / "history.db"
    running = [start(_WRITE, path, f"writer-{i}", turns) for i in range(processes)]
    said = "".join(process.communicate(timeout=WAIT_S)[1] for process in running)
    with History.open(path) as history:
        found = {c.title: history.turns(c.id) for c in history.conversations()}
    whole = all(kept == [turn(name, n) for n in range(turns)] for name, kept in found.items())
    return Writers([p.returncode for p in running], sum(map(len, found.values())), whole, sound(path), said)


# ---- old and new files -------------------------------------------------------------------------------------------


def first_runs(folder: Path, processes: int = 8, *, old: bool = True) -> Writers:
    """B2: processes of a next version, which has one step more, open a file of this version, or none, at once."""
    path = folder / "history.db"
    if old:
        with History.open(path) as history:
            history.add(history.begin("before"), turn("before", 0))
    running = [start(_MIGRATE, path, f"run-{i}", stdin=subprocess.PIPE) for i in range(processes)]
    for process in running:
        assert process.stdout is not None
        process.stdout.readline()
    for process in running:  # all have started, and are let go at once
        assert process.stdin is not None
        process.stdin.write("g")
        process.stdin.flush()
    said = "".join(process.communicate(timeout=WAIT_S)[1] for process in running)
    with closing(sqlite3.connect(path)) as connection:
        steps = connection.execute("SELECT n FROM more").fetchall()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (rows,) = connection.execute("SELECT count(*) FROM conversation").fetchone()
        kept = connection.execute("SELECT question FROM turn").fetchall()
    whole = steps == [(1,)] and version == len(STEPS) + 1 and kept == [(b"before-0",)] * old
    return Writers([p.returncode for p in running], rows - old, whole, sound(path), said)


def future(path: Path, *, journal: bool = False) -> None:
    """Makes a file of a version that is not there yet; ``journal``: only its journal says so, as a kill leaves it."""
    with History.open(path) as history:
        history.begin("kept")
    code = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1], isolation_level=None);"
        "c.execute('PRAGMA user_version = 999'); c.execute('CREATE TABLE later (x)');"
        "sys.argv[2] == 'True' and os.kill(os.getpid(), 9); c.close()"
    )
    start(code, path, journal).communicate(timeout=WAIT_S)


# ---- kills -------------------------------------------------------------------------------------------------------


@dataclass
class Kills:
    """What writers left that were killed; ``wrong`` has a line for each that left what it should not."""

    kills: int = 0
    acknowledged: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.wrong and self.acknowledged > 0


def killed_writers(folder: Path, kills: int, seed: int = 0) -> Kills:
    """B3: a writer after the other is sent SIGKILL at a random moment of its writing; all on one file."""
    path, choose, result = folder / "history.db", random.Random(seed), Kills()
    for number in range(kills):
        name = f"writer-{number}"
        process = start(_WRITE, path, name, 10**9)
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(choose.randrange(1, 6))]
        time.sleep(choose.random() * 0.01)  # so that it is killed anywhere in a write
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()  # communicate() would lose what was read ahead of these lines
        _, err = process.communicate(timeout=WAIT_S)
        added = sum(line.endswith("\n") for line in said)
        result.kills, result.acknowledged = result.kills + 1, result.acknowledged + added
        with History.open(path) as history:
            found = [history.turns(c.id) for c in history.conversations(limit=number + 1) if c.title == name]
        kept = found[0] if found else []
        if kept != [turn(name, n) for n in range(len(kept))] or len(kept) - added not in (0, 1) or err:
            result.wrong.append(f"{name}: {added} acknowledged, {len(kept)} kept, {err}")
        if not sound(path):
            result.wrong.append(f"{name}: damaged")
    return result


# ---- no room -----------------------------------------------------------------------------------------------------

_FILL = """
import json, sys
from pathlib import Path
from tests.histories import fill
print(json.dumps(fill(Path(sys.argv[1]))))
"""
_FAIL = """
import sys
from pathlib import Path
from tests.histories import go_on
go_on(Path(sys.argv[1]))
"""
CALLS = {"pwrite64": 160, "fdatasync": 15, "ftruncate": 3}
"""System calls that :func:`go_on` makes to write its file, and how many there are of each, about."""


def fill(path: Path) -> dict[str, object]:
    """Adds turns until that fails; what is there then, and after room was made."""
    from localvlm.errors import StorageError

    spare = path.with_name("spare")
    spare.write_bytes(b"x" * (FULL_KIB << 8))
    with History.open(path) as history:
        conversation, added, error = history.begin("t"), 0, None
        while error is None and added < 10_000:
            try:
                history.add(conversation, turn("t", added))
                added += 1
            except StorageError as failed:
                error = failed
        kept = history.turns(conversation) == [turn("t", n) for n in range(added)]
        spare.unlink()
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        history.add(conversation, turn("t", added))
        after = history.turns(conversation) == [turn("t", n) for n in range(added + 1)]
    return {"added": added, "error": str(error), "kept": kept, "after": after, "sound": sound(path)}


def disk_full(folder: Path) -> dict[str, object]:
    """B3: a disk that fills up."""
    mount = f"mount -t tmpfs -o size={FULL_KIB}k tmpfs '{folder}' && exec \"$@\""
    out, err = start(_FILL, folder / "history.db", before=["unshare", "-rm", "sh", "-c", mount, "sh"]).communicate()
    return dict(json.loads(out)) if out else {"error": err}


def quota_met(folder: Path) -> dict[str, object]:
    """B3: files that may not grow over a limit, as under a quota."""
    limit = f'ulimit -S -f {FULL_KIB // 2}; exec "$@"'
    out, err = start(_FILL, folder / "history.db", before=["bash", "-c", limit, "bash"]).communicate(timeout=WAIT_S)
    return dict(json.loads(out)) if out else {"error": err}


STEPS_TAKEN = ("add 0", "add 1", "add 2", "remove", "add 3")


def go_on(path: Path) -> None:
    """Takes STEPS_TAKEN whatever fails, and says what came of each."""
    from localvlm.errors import StorageError

    try:
        with History.open(path) as history:
            conversation = history.begin("t")
            for step in STEPS_TAKEN:
                try:
                    if step == "remove":
                        newest = max((kept.id or 0 for kept in history.turns(conversation)), default=0)
                        history.remove(conversation, newest)
                    else:
                        history.add(conversation, turn("t", int(step[4:])))
                    print("done", flush=True)
                except StorageError as error:
                    print(f"failed: {error}", flush=True)
    except StorageError as error:
        print(f"failed: {error}", flush=True)


def failing(folder: Path, call: str, when: str, error: str) -> tuple[int, str]:
    """A writer whose system call ``call`` fails, the one that ``when`` says as strace has it ("7", or "7+": from the
    seventh on); how many errors it told, and what is wrong with what it left, if anything is.
    """
    path = folder / "history.db"
    inject = ("-e", f"trace={call}", "-e", f"inject={call}:error={error}:when={when}")
    process = start(_FAIL, path, before=["strace", "-f", "-qq", "-o", str(folder / "calls"), *inject])
    out, err = process.communicate(timeout=WAIT_S)
    lines = out.splitlines()
    failures = [line for line in lines if line.startswith("failed: ")]
    if err or not all(str(path) in line for line in failures):
        return len(failures), f"said {err} {failures}"
    with History.open(path) as history:
        found = history.conversations()
        kept = history.turns(found[0].id) if found else []
        history.add(history.begin("after"), turn("after", 0))
    names = tuple(kept_turn.question for kept_turn in kept)
    whole = kept == [turn("t", int(name[2:])) for name in names]
    wrong = "" if whole and names in _may_be(lines) else f"{names} is left after {lines}"
    return len(failures), wrong or ("" if sound(path) else "damaged")


def _may_be(lines: Sequence[str]) -> set[tuple[str, ...]]:
    """Turns that may be there: a step that failed has been taken, or not, but nothing in between."""
    states: set[tuple[str, ...]] = {()}
    for step, line in zip(STEPS_TAKEN, lines, strict=False):
        taken = {s[:-1] if step == "remove" else (*s, f"t-{step[4:]}") for s in states}
        states = taken if line == "done" else states | taken
    return states


def read_only(folder: Path, code: str, *args: object) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of Python code under a folder that cannot be written."""
    mount = f"mount --bind '{folder}' '{folder}' && mount -o remount,ro,bind '{folder}' && exec \"$@\""
    process = start(code, *args, before=["unshare", "-rm", "sh", "-c", mount, "sh"])
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


def may_mount() -> bool:
    """Whether this user can mount file systems of their own."""
    if shutil.which("unshare") is None:
        return False
    return subprocess.run(["unshare", "-rm", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode == 0


def may_trace() -> bool:
    """Whether strace is there and can make system calls fail."""
    if shutil.which("strace") is None:
        return False
    return subprocess.run(["strace", "-o", os.devnull, "true"], capture_output=True).returncode == 0


def main(args: Sequence[str] | None = None) -> int:
    """Prints a line a case; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(args)
    verdicts = []

    def told(name: str, passed: bool, what: object) -> None:
        verdicts.append(passed)
        print(f"{name}: {what}, {'ok' if passed else 'FAILED'}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        run = many_writers(Path(folder))
        told("8 processes x 200 turns", run.passed(8, 200), f"{run.rows:,} rows, {run.said.count('locked')} locked")
    with tempfile.TemporaryDirectory() as folder:
        run = first_runs(Path(folder))
        told("8 first runs on an old file", run.passed(8, 1), f"exit {run.codes}, {run.rows} conversations added")
    with tempfile.TemporaryDirectory() as folder:
        kills = killed_writers(Path(folder), given.kills, given.seed)
        told(
            f"{kills.kills} kills", kills.passed, f"{kills.acknowledged:,} turns acknowledged, {len(kills.wrong)} wrong"
        )
        print(*kills.wrong, sep="\n", end="" if not kills.wrong else "\n")
    for name, case in (("a full disk", disk_full), ("a quota", quota_met)):
        if case is disk_full and not may_mount():
            print(f"{name}: no disk can be mounted here")
            continue
        with tempfile.TemporaryDirectory() as folder:
            found = case(Path(folder))
            told(name, bool(found.get("kept") and found["after"] and found["sound"]), found)
    if may_trace():
        for (call, count), error in product(CALLS.items(), ("ENOSPC", "EIO")):
            for end in ("", "+"):
                runs = {}
                for number in range(1, count + 1):
                    with tempfile.TemporaryDirectory() as folder:
                        runs[number] = failing(Path(folder), call, f"{number}{end}", error)
                wrong = {number: text for number, (_, text) in runs.items() if text}
                failures = sum(n > 0 for n, _ in runs.values())
                told(f"{call} 1..{count}{end} {error}", not wrong, f"{failures} told, {len(wrong)} wrong {wrong or ''}")
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
