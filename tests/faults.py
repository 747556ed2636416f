"""The 1st, 2nd, 3rd ... write, allocation and message fails: ``python -m tests.faults [--quick] [--only NAME]``.

As SQLite does it: a command runs again and again, each time with one more call that goes well before one fails, until a
run ends without a failure. Writes are calls that change something below one folder, in this process or in the
worker's; they fail once (EIO) or from then on (ENOSPC). Each run must leave with the right code and one sentence, and
whole files alone; the next run without a failure must give what it always gives.
"""

from __future__ import annotations

import argparse
import builtins
import contextlib
import errno
import io
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import psutil

from localvlm.cli.app import App
from localvlm.cli.main import main as localvlm
from localvlm.engine import client
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import LocalvlmError
from tests.bench.run import Case

__all__ = ["campaign", "install_in_worker"]

MOST = 300
"""Calls of a run that are made to fail, one after the other, before that counts as endless."""
STRIDE = 7
"""Every so many calls with ``--quick``."""
ENDED = (errno.ENOSPC, True), (errno.EIO, False)
_CHANGES = ("replace", "rename", "mkdir", "link", "symlink", "unlink", "rmdir", "truncate", "utime", "chmod")
_ON_FILES = ("write", "fsync", "ftruncate")


class Faults:
    """While entered, the ``nth`` change below ``folder`` fails, and all later ones if ``lasting``."""

    def __init__(self, folder: Path, nth: int, number: int, lasting: bool, tell: Path | None = None) -> None:
        """``tell``: a file outside of the folder that says afterwards that something failed."""
        self._folder, self._nth, self._number, self._lasting = str(folder), nth, number, lasting
        self._tell = None if tell is None else os.open(tell, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._n, self.fired = 0, False
        self._undo: list[Callable[[], None]] = []

    def __enter__(self) -> Faults:
        for name in _CHANGES:
            self._patch(os, name, self._by_path)
        for name in _ON_FILES:
            self._patch(os, name, self._by_descriptor)
        self._patch(os, "open", self._opening)
        opened = self._opened(builtins.open)
        for place, name in ((builtins, "open"), (io, "open")):
            self._set(place, name, opened)
        return self

    def __exit__(self, *_: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def _set(self, place: Any, name: str, value: object) -> None:
        before = getattr(place, name)
        self._undo.append(lambda: setattr(place, name, before))
        setattr(place, name, value)

    def _patch(self, place: Any, name: str, how: Callable[[Any], Any]) -> None:
        if hasattr(place, name):
            self._set(place, name, how(getattr(place, name)))

    def change(self, path: object) -> None:
        """Counts one, and fails if it is its turn."""
        self._n += 1
        if self._n == self._nth or (self._lasting and self._n > self._nth):
            if self._tell is not None and not self.fired:
                _WRITE(self._tell, b"fired\n")
            self.fired = True
            raise OSError(self._number, os.strerror(self._number), str(path))

    def inside(self, path: object) -> bool:
        with contextlib.suppress(TypeError, ValueError):
            return str(Path(os.fsdecode(path)).absolute()).startswith(self._folder)  # type: ignore[arg-type]
        return False

    def _by_path(self, call: Any) -> Any:
        def changed(path: Any, *args: Any, **more: Any) -> Any:
            if not isinstance(path, int) and self.inside(path):
                self.change(path)
            return call(path, *args, **more)

        return changed

    def _by_descriptor(self, call: Any) -> Any:
        def changed(fd: int, *args: Any, **more: Any) -> Any:
            path = ""
            with contextlib.suppress(OSError):  # Linux tells
                path = str(Path(f"/proc/self/fd/{fd}").readlink())
            if self.inside(path):
                self.change(path)
            return call(fd, *args, **more)

        return changed

    def _opening(self, call: Any) -> Any:
        def opened(path: Any, flags: int, *args: Any, **more: Any) -> int:
            if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and self.inside(path):
                self.change(path)
            return int(call(path, flags, *args, **more))

        return opened

    def _opened(self, call: Any) -> Any:
        def opened(path: Any, mode: str = "r", *args: Any, **more: Any) -> Any:
            changes = set(mode) & set("wax+")
            ours = changes and not isinstance(path, int) and self.inside(path)
            if ours and "opener" not in more:
                self.change(path)
            file = call(path, mode, *args, **more)
            return _File(file, self, path) if ours else file

        return opened


_WRITE = os.write


class _File:
    """A file whose writes may fail."""

    def __init__(self, file: Any, faults: Faults, path: object) -> None:
        self._file, self._faults, self._path = file, faults, path

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _File:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)

    def write(self, data: Any) -> Any:
        self._faults.change(self._path)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()


# ---- in the worker ---------------------------------------------------------------------------------------------------


def install_in_worker(how: str) -> None:
    """What a worker's boot calls: faults of :class:`Faults`, or from the ``nth`` call on no memory."""
    told = json.loads(how)
    if "folder" in told:
        Faults(Path(told["folder"]), told["nth"], told["number"], told["lasting"], Path(told["tell"])).__enter__()
        return
    from localvlm.engine.worker import Worker

    do, left = Worker._do, [told["nth"]]

    def counted(self: Worker, message: dict[str, Any]) -> Any:
        left[0] -= 1
        if left[0] == 0:
            Path(told["tell"]).write_text("fired\n")
            raise MemoryError
        return do(self, message)

    Worker._do = counted  # type: ignore[method-assign]


@contextlib.contextmanager
def _worker_with(how: dict[str, object]) -> Iterator[None]:
    boot = client._BOOT
    first = f"from tests.faults import install_in_worker; install_in_worker({json.dumps(how)!r}); "
    client._BOOT = boot.replace("from localvlm.engine.worker", f"{first}from localvlm.engine.worker")
    try:
        yield
    finally:
        client._BOOT = boot


# ---- what runs -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ran:
    """A command's exit code and what it printed."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Subject:
    """A command, a folder that it writes to, and exit codes that a failed write may lead to."""

    name: str
    run: Callable[[Path], Ran]
    codes: frozenset[int]


def _command(app: App, *args: object) -> Ran:
    """``localvlm`` in this process, with nothing on standard input."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
    code: object = None
    before = sys.stdin
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), Path(os.devnull).open() as sys.stdin:
        try:
            localvlm([str(a) for a in args], app)
        except SystemExit as left:
            code = left.code
        finally:
            sys.stdin = before
    said = [stream.buffer.getvalue().decode() for stream in (out, err)]  # type: ignore[attr-defined]
    return Ran(code if isinstance(code, int) else 99, *said)


_FAKE = App(lambda _: FakeEngine({"guide": Script(answer="red"), "model": Script(answer="dark red")}))
_DEMO = "--pair", "demo", "--threads", 1, "--max-tokens", 4, "--layer", 0


def _subjects() -> Iterator[Subject]:
    def fake(*args: str) -> Callable[[Path], Ran]:
        def run(folder: Path) -> Ran:
            outs = [folder / arg[1:] if arg.startswith("@") else arg for arg in args]
            return _command(_FAKE, *outs, folder.parent / "picture.png", "What?")

        return run

    ask = "ask", "--pair", "demo"
    yield Subject("ask", fake(*ask), frozenset({0}))  # what it keeps for later may be lost
    yield Subject("ask --explain", fake(*ask, "--explain", "@seen.png"), frozenset({0, 8}))
    yield Subject("attention --save", fake("attention", "--pair", "demo", "--save", "@seen.npz"), frozenset({0, 8}))
    yield Subject("ask --jsonl", _jsonl, frozenset({0, 8}))
    yield Subject("config set", lambda _: _command(_FAKE, "config", "set", "keep", "0.5"), frozenset({8}))
    yield Subject("pull", _pull, frozenset({7, 8}))


def _jsonl(folder: Path) -> Ran:
    """What the file holds in the end; a run goes on where the one before it was ended."""
    out = folder / "out.jsonl"
    pictures = folder.parent / "picture.png", folder.parent / "other.png"
    ran = _command(_FAKE, "ask", "--pair", "demo", "--jsonl", out, *pictures, "What?")
    if ran.code:
        return ran
    answers = [json.loads(line) for line in out.read_text().splitlines()]
    return Ran(0, str([(one["image"], one["answer"]) for one in answers]), ran.err)


def _pull(folder: Path) -> Ran:
    """Two files from a server on this machine, by the library that the command calls."""
    import shutil

    from localvlm.hub import Hub
    from tests.hub_server import HubServer

    contents = {"model-Q8_0.gguf": bytes(range(256)) * 1024, "mmproj-model-F16.gguf": b"projector" * 999}
    with HubServer() as server:
        server.add("user/model", contents)
        shutil.rmtree(folder / "hub", ignore_errors=True)
        hub = Hub(server.endpoint, folder / "hub", "hf_right", offline=False, wait_s=0.001)
        try:
            listing = hub.listing("user/model")
            paths = hub.pull([(listing, listing.files)])
        except LocalvlmError as error:
            return Ran(error.exit_code, "", str(error))
        whole = [path.read_bytes() == contents[path.name] for path in paths]
        return Ran(0, str(whole), "")


# ---- what must hold --------------------------------------------------------------------------------------------------


def _unsound(folder: Path) -> str:
    """What is wrong with the files of a folder under their final names."""
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path.name.startswith((".new-", ".")) or path.name.endswith((".incomplete", ".lock")):
            continue
        try:
            _read(path)
        except Exception as error:  # noqa: BLE001  whatever a reader of a half file says
            return f"'{path.name}' is not whole: {type(error).__name__}: {error}"
    return ""


def _read(path: Path) -> None:
    import hashlib
    import tomllib

    if path.suffix == ".png":
        with PIL.Image.open(path) as picture:
            picture.load()
    elif path.suffix == ".npz":
        with np.load(path) as arrays:
            [arrays[name] for name in arrays.files]
    elif path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".toml":
        tomllib.loads(path.read_text())
    elif path.suffix == ".jsonl":
        for line in path.read_text().split("\n")[:-1]:  # what follows the last line break is mended by the next run
            json.loads(line)
    elif path.parent.name == "blobs":
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name, "its name is another check sum"
    elif path.parent.name == "images":
        raw = path.read_bytes()
        digest = hashlib.sha256(bytes.fromhex(path.name) + raw[32:44] + raw[44:]).digest()
        assert digest == raw[:32], "check sum"


def _wrong(ran: Ran, codes: frozenset[int], clean: Ran) -> str:
    """What is wrong with a run in which something failed."""
    if "Traceback" in ran.err:
        return f"traceback: {ran.err[-300:]}"
    if ran.code not in codes:
        return f"exit {ran.code}: {ran.err[-300:]}"
    if ran.code == 0 and ran.out != clean.out:
        return f"said {ran.out!r} in place of {clean.out!r}"
    return ""


def _loop(
    name: str, once: Callable[[int], tuple[bool, Ran]], codes: frozenset[int], folder: Path, again: Callable[[], Ran]
) -> Iterator[Case]:
    """Runs ``once`` with the 1st, 2nd ... call that fails, until none did. ``again`` runs unharmed."""
    clean = again()
    if clean.code:
        yield Case.of(f"{name}, unharmed", f"exit {clean.code}: {clean.err[-300:]}")
        return
    for nth in range(1, MOST):
        started = time.monotonic()
        fired, ran = once(nth)
        if not fired:
            yield Case.of(f"{name}: clean after {nth - 1}", _wrong(ran, frozenset({0}), clean))
            return
        miss = _wrong(ran, codes, clean) or _unsound(folder)
        after = again()
        if (after.code, after.out) != (0, clean.out):
            miss = miss or f"the next run: exit {after.code}, {after.err[-200:]}"
        yield Case.of(f"{name}, {nth}", miss, time.monotonic() - started)
    yield Case.of(name, f"no end after {MOST}")


def _home(folder: Path) -> Path:
    home = folder / "home"
    home.mkdir(parents=True, exist_ok=True)
    os.environ["LOCALVLM_HOME"] = str(home)
    for file, colour in (("picture.png", (200, 10, 10)), ("other.png", (1, 2, 3))):
        PIL.Image.new("RGB", (64, 48), colour).save(folder / file)
    return home


def writes(quick: bool, folder: Path) -> Iterator[Case]:
    """Of this process, by each command that writes."""
    for subject in _subjects():
        for number, lasting in ENDED[:1] if quick else ENDED:
            home = _home(folder / f"{subject.name}-{number}".replace(" ", ""))

            def once(nth: int, subject=subject, home=home, number=number, lasting=lasting) -> tuple[bool, Ran]:
                _empty(home)
                with Faults(home, nth, number, lasting) as faults:
                    ran = subject.run(home)
                return faults.fired, ran

            what = f"{subject.name}: {errno.errorcode[number]}"
            codes = subject.codes if lasting else subject.codes | {0}
            yield from _loop(what, once, codes, home, lambda subject=subject, home=home: subject.run(home))


def _empty(home: Path) -> None:
    import shutil

    shutil.rmtree(home)
    home.mkdir()


def _ask_demo(home: Path) -> Ran:
    return _command(App(), "ask", *_DEMO, "--image-cache", 64, home.parent / "picture.png", "What?")


def worker_writes(quick: bool, folder: Path) -> Iterator[Case]:
    """Of the worker, which keeps encoded pictures and rates: none of it is needed for an answer."""
    for number, lasting in ENDED[:1] if quick else ENDED:
        home, tell = _home(folder / f"worker-{number}"), folder / f"fired-{number}"

        def once(nth: int, home=home, number=number, lasting=lasting, tell=tell) -> tuple[bool, Ran]:
            _empty(home)
            tell.unlink(missing_ok=True)
            how = {"folder": str(home), "nth": nth, "number": number, "lasting": lasting, "tell": str(tell)}
            with _worker_with(how):
                ran = _ask_demo(home)
            return tell.exists() and bool(tell.read_text()), ran

        what = f"worker's writes: {errno.errorcode[number]}"
        yield from _loop(
            what, _every(once, STRIDE if quick else 1), frozenset({0}), home, lambda home=home: _ask_demo(home)
        )


def allocations(quick: bool, folder: Path) -> Iterator[Case]:
    """The nth call that reaches the worker finds no memory."""
    home, tell = _home(folder / "memory"), folder / "fired"

    def once(nth: int) -> tuple[bool, Ran]:
        tell.unlink(missing_ok=True)
        with _worker_with({"nth": nth, "tell": str(tell)}):
            ran = _ask_demo(home)
        return tell.exists(), ran

    yield from _loop(
        "allocations", _every(once, STRIDE if quick else 1), frozenset({0, 5}), home, lambda: _ask_demo(home)
    )


def messages(quick: bool, folder: Path) -> Iterator[Case]:
    """The nth message of the worker is cut off, or is none."""
    home, unpack = _home(folder / "messages"), client.unpack
    for what, error in (("cut off", EOFError), ("no message", ValueError)):

        def once(nth: int, error=error) -> tuple[bool, Ran]:
            count = [0]

            def failing(read: Any) -> dict[str, Any]:
                count[0] += 1
                message = unpack(read)
                if count[0] == nth:
                    if error is EOFError:
                        _end_workers()
                    raise error
                return message

            client.unpack = failing  # type: ignore[assignment]
            try:
                ran = _ask_demo(home)
            finally:
                client.unpack = unpack
            return count[0] >= nth, ran

        run = _every(once, STRIDE if quick else 1)
        yield from _loop(f"message {what}", run, frozenset({0, 4}), home, lambda: _ask_demo(home))


def _end_workers() -> None:
    for child in psutil.Process().children():
        child.kill()


def _every(once: Callable[[int], tuple[bool, Ran]], stride: int) -> Callable[[int], tuple[bool, Ran]]:
    return lambda nth: once(1 + (nth - 1) * stride)


PARTS = {"writes": writes, "worker_writes": worker_writes, "allocations": allocations, "messages": messages}


def campaign(quick: bool, folder: Path, only: str = "") -> Iterator[Case]:
    """All parts, or one."""
    for name, part in PARTS.items():
        if not only or name == only:
            yield from part(quick, folder)


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints each failure that was not met as it should be, and how many were."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=PARTS, default="")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    started, cases = time.monotonic(), []
    with tempfile.TemporaryDirectory() as folder:
        for case in campaign(options.quick, Path(folder), options.only):
            cases.append(case)
            if case.outcome == "failed" or "clean after" in case.name:
                print(f"{case.outcome}: {case.name} {case.reason}", flush=True)
    failed = sum(case.outcome == "failed" for case in cases)
    print(f"{len(cases)} runs in {time.monotonic() - started:.0f} s, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
