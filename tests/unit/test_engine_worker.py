"""The engine's worker process: cancelling, deaths, what it leaves behind."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from localvlm.engine import client, wire
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine, RemoteVlm
from localvlm.errors import EngineCrashed, Interrupted, LocalvlmError, UnsupportedModel
from tests.asking import ONE, ask, in_fresh_process, load, picture, prompt
from tests.damage import Gguf

# cancelling


def busy(engine: Engine) -> float:
    """Seconds of a processor that the worker has had: what it does late it does for as long on a busy machine."""
    times = psutil.Process(engine.pid).cpu_times()
    return float(times.user + times.system)


class Cancelling(threading.Timer):
    """Cancels after some seconds; ``before``: what the worker had had then."""

    before = 0.0

    def __init__(self, engine: Engine, seconds: float) -> None:
        super().__init__(seconds, self._cancel)
        self._engine = engine
        self.start()

    def _cancel(self) -> None:
        self.before = busy(self._engine)
        self._engine.cancel()


def test_cancel_before_a_call_stops_it_and_nothing_after(engine: Engine, llava: RemoteVlm) -> None:
    engine.cancel()
    with pytest.raises(Interrupted):
        llava.encode(picture())
    assert ask(llava) == ask(llava)


@pytest.mark.parametrize("family", ["llava15", "qwen25vl"])
def test_cancel_in_a_long_answer_leaves_the_next_unchanged(engine: Engine, files, family: str) -> None:
    vlm = load(engine, files[family])
    want = in_fresh_process(files[family])
    slow = lambda _: time.sleep(0.001)  # noqa: E731  so that the answer is not over before it is cancelled
    for delay in (0.0, 0.02, 0.1):
        timer = Cancelling(engine, delay)
        finish = ""
        with contextlib.suppress(Interrupted):
            while finish != "cancelled":
                vlm.prefill(prompt(vlm, [vlm.encode(picture(seed=9))]), tap=True)
                finish = vlm.generate(900, on_text=slow).finish
        timer.join()
        assert busy(engine) - timer.before < 2
        assert ask(vlm) == want
    vlm.close()


def test_cancel_in_the_tower_and_in_a_prefill(engine: Engine, llava: RemoteVlm) -> None:
    want = ask(llava)
    outcomes = []
    for i in range(20):
        timer = Cancelling(engine, 0.004 * i)
        try:
            for _ in range(1000):
                encoded = llava.encode(picture(900, 700))
                llava.prefill(prompt(llava, [encoded]))
                llava.release(encoded)
            pytest.fail("was not cancelled")
        except Interrupted:
            timer.join()
            outcomes.append(busy(engine) - timer.before)
    assert max(outcomes) < 2.0, "a second of each of two processors"
    assert ask(llava) == want


def go_on(vlm: RemoteVlm, seconds: float) -> None:
    """Asks for ever; a Ctrl-C comes after some seconds."""
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()
    for _ in range(2000):
        vlm.prefill(prompt(vlm, [vlm.encode(picture())]))
        vlm.generate(50, on_text=lambda _: None)


def test_an_interrupted_client_stays_in_step(files) -> None:
    """Ctrl-C where no handler turns it into a cancel: KeyboardInterrupt out of any call, at any time."""
    with Engine() as engine:
        want = ask(load(engine, files["llava15"]))
        for i in range(6):
            vlm = load(engine, files["llava15"])
            with pytest.raises(KeyboardInterrupt):
                go_on(vlm, 0.004 * i)
            assert ask(load(engine, files["llava15"])) == want


def test_a_reader_of_the_stream_may_fail(engine: Engine, llava: RemoteVlm) -> None:
    want = ask(llava)

    def fail(_: str) -> None:
        raise RuntimeError("the screen is gone")

    llava.prefill(prompt(llava, [llava.encode(picture())]))
    before = busy(engine)
    with pytest.raises(RuntimeError, match="screen"):
        llava.generate(900, on_text=fail)
    assert ask(llava) == want
    assert busy(engine) - before < 2


# deaths


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT, signal.SIGSEGV])
def test_a_worker_killed_between_calls(files, number: signal.Signals) -> None:
    with Engine() as engine:
        vlm = load(engine, files["llava15"])
        want = ask(vlm)
        assert engine.pid is not None
        os.kill(engine.pid, number)
        with pytest.raises(EngineCrashed, match=number.name):
            ask(vlm)
        with pytest.raises(EngineCrashed, match="load it again"):
            vlm.logits()
        vlm.close()
        assert ask(load(engine, files["llava15"])) == want


def test_a_worker_killed_in_a_call(files) -> None:
    with Engine() as engine:
        vlm = load(engine, files["llava15"])
        vlm.prefill(prompt(vlm, [vlm.encode(picture())]))
        pid = engine.pid
        assert pid is not None
        assert engine._process is not None
        assert engine._process.stdout is not None
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # less than the answer: it cannot end before its first piece is read
            fcntl.fcntl(engine._process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        with pytest.raises(EngineCrashed, match="SIGKILL during 'generate'"):
            vlm.generate(900, on_text=lambda _: os.kill(pid, signal.SIGKILL))
        assert ask(load(engine, files["llava15"]))


def test_a_worker_that_talks_nonsense_is_ended_at_once(files, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine() as engine:
        vlm, worker = load(engine, files["llava15"]), psutil.Process(engine.pid)
        with monkeypatch.context() as patched:
            patched.setattr(client, "unpack", lambda read: wire.unpack(lambda n: b"\xff" * n))
            with pytest.raises(EngineCrashed, match="no sound answer to 'logits'"):
                vlm.logits()
        worker.wait(timeout=1)  # no grace: it is not waited for
        assert ask(load(engine, files["llava15"]))


def test_a_cancel_while_a_dead_worker_is_left_writes_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another file has the number of the control pipe as soon as that is closed."""
    close, other = os.close, tmp_path / "another"
    with Engine() as engine:
        engine.holds()

        def close_and_cancel(fd: int) -> None:
            control = engine._process is None and fd == pipe
            close(fd)
            if control:
                taken = os.open(other, os.O_WRONLY | os.O_CREAT)
                os.dup2(taken, fd)
                engine.cancel()
                for one in {taken, fd}:
                    close(one)

        pipe, pid = engine._control, engine.pid
        assert pid is not None
        monkeypatch.setattr(os, "close", close_and_cancel)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineCrashed):
            engine.holds()
    assert other.read_bytes() == b""


def test_a_caller_may_have_many_files_open() -> None:
    """Pipes to a worker then have descriptors above 1,023."""
    program = """
        import os, resource
        from localvlm.engine.client import Engine
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        if hard != resource.RLIM_INFINITY and hard < 2048:
            print("too few")
            raise SystemExit
        resource.setrlimit(resource.RLIMIT_NOFILE, (2048, hard))
        others = [open(os.devnull) for _ in range(1100)]
        with Engine() as engine:
            print(isinstance(engine.holds(), dict))
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.stdout == "too few\n":
        pytest.skip("this system allows fewer files")
    assert done.stdout == "True\n", done.stderr


def test_a_log_is_closed_by_the_thread_that_reads_it() -> None:
    """Whoever ends the worker waits for it two seconds, which may be too few on a busy machine."""
    read, write = os.pipe()
    os.write(write, b"said\n")
    os.close(write)
    engine, worker = Engine(), SimpleNamespace(stderr=os.fdopen(read, "rb", 0))
    engine._drain_stderr(worker)  # type: ignore[arg-type]
    assert (list(engine._stderr), worker.stderr.closed) == (["said"], True)


def test_nothing_is_left_of_twenty_engines(files) -> None:
    def descriptors() -> int:
        return psutil.Process().num_fds()

    with Engine() as engine:
        load(engine, files["llava15"])
    before, threads = descriptors(), set(threading.enumerate())
    pids = []
    for i in range(20):
        with Engine() as engine:
            load(engine, files["llava15"])
            pids.append(engine.pid)
            if i % 4 == 3:
                engine.kill()
    left = [thread for thread in threading.enumerate() if thread not in threads]
    for thread in left:  # one of a worker that has ended ends as soon as it gets a processor
        thread.join(60)
    assert not any(thread.is_alive() for thread in left)
    assert descriptors() <= before
    assert not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids if pid)


@pytest.fixture
def frees_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker whose allocator gives back what is freed: else glibc keeps some 50 MB of it, now and then, for later.

    glibc takes a larger and larger block for one to keep as they are freed, up to 32 MiB, so that whether a context
    goes back to the system depends on what lies behind it.
    """
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", str(64 << 10))
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", str(64 << 10))


@pytest.mark.usefixtures("frees_at_once")
def test_loading_and_closing_again_and_again_needs_no_more_memory(files) -> None:
    with Engine() as engine:

        def cycle() -> tuple[int, int]:
            for _ in range(5):
                vlm = load(engine, files["llava15"])
                ask(vlm, 2, tap=True)
                vlm.close()
            found = psutil.Process(engine.pid).memory_info()
            return found.rss - getattr(found, "shared", 0), found.vms  # pages of files come and go as others need room

        cycle()
        own, mapped = cycle()
        cycle()
        own_after, mapped_after = cycle()
        assert own_after - own < 4 << 20
        assert mapped_after - mapped < 16 << 20, "ten times the files have 27 MB"


@pytest.mark.usefixtures("frees_at_once")
def test_loads_that_fail_leave_no_weights_behind(files, tmp_path: Path) -> None:
    file = Gguf.parse(files["llava15-large"].mmproj.read_bytes())
    body = (7).to_bytes(8, "little") + b"unknown"
    file.values = [(k, t, body if k == b"clip.projector_type" else v) for k, t, v in file.values]
    (tmp_path / "mmproj.gguf").write_bytes(file.bytes())
    with Engine() as engine:

        def cycle(n: int) -> int:
            for _ in range(n):
                with pytest.raises(UnsupportedModel, match=r"mmproj\.gguf"):
                    engine.load(files["llava15-large"].model, tmp_path / "mmproj.gguf", ONE)
            return int(psutil.Process(engine.pid).memory_info().vms)

        before = cycle(4)
        assert cycle(20) - before < 4 << 20, "twenty models of 5 MB"
        assert ask(load(engine, files["llava15"]))


@pytest.mark.usefixtures("frees_at_once")
def test_loads_that_fail_leave_no_context_behind(files) -> None:
    """Positions of an M-RoPE model cannot be compact, which is known when the context is there."""
    compact = LoadOptions(threads=1, compact_positions=True)
    with Engine() as engine:

        def cycle(n: int) -> int:
            for _ in range(n):
                with pytest.raises(UnsupportedModel, match="without gaps"):
                    engine.load(files["qwen25vl"].model, files["qwen25vl"].mmproj, compact)
            return int(psutil.Process(engine.pid).memory_info().vms)

        before = cycle(4)
        assert cycle(20) - before < 4 << 20, "twenty contexts of 23 MB"
        assert ask(load(engine, files["qwen25vl"]))


def test_a_llama_cpp_that_cannot_be_loaded_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that has no libgomp, which no wheel brings along."""
    (tmp_path / "llama_cpp.py").write_text("raise RuntimeError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with Engine() as engine:
        for call in (engine.backend, lambda: engine.load(tmp_path / "m.gguf", tmp_path / "mmproj.gguf", ONE)):
            with pytest.raises(UnsupportedModel, match=r"cannot be loaded: libgomp\.so\.1") as told:
                call()
            assert "libgomp1" in told.value.hint


def test_loading_stops_when_it_is_cancelled(engine: Engine, files) -> None:
    """In the worker's own terms, since the zoo loads faster than anybody can cancel."""
    program = f"""
        from pathlib import Path
        from localvlm.engine.api import LoadOptions
        from localvlm.engine.vlm import LlamaVlm
        from localvlm.errors import Interrupted
        for patience in (0, 1, 3):
            asked = []
            try:
                model, mmproj = Path({str(files["llava15"].model)!r}), Path({str(files["llava15"].mmproj)!r})
                LlamaVlm(model, mmproj, LoadOptions(), lambda: asked.append(1) or len(asked) > patience)
            except Interrupted:
                print("interrupted")
    """
    command = [sys.executable, "-c", textwrap.dedent(program)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "interrupted\n" * 3


CLIENT = """
import sys
from pathlib import Path
import numpy as np
from localvlm.engine.api import ImagePart, LoadOptions, Message
from localvlm.engine.client import Engine

engine = Engine()
vlm = engine.load(Path(sys.argv[1]), Path(sys.argv[2]), LoadOptions(threads=1))
print(engine.pid, flush=True)
if sys.argv[3] == "generate":
    encoded = vlm.encode(np.zeros((84, 84, 3), np.uint8))
    parts = vlm.chat([Message("user", "x", 1)])
    told = iter([None])
    while True:
        vlm.prefill([ImagePart(encoded) if isinstance(p, int) else p for p in parts])
        vlm.generate(900, on_text=lambda _: [print("talks", flush=True) for _ in told])
print("idle", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("state", ["idle", "generate"])
def test_the_worker_does_not_outlive_its_client(files, state: str) -> None:
    model = files["llava15"]
    command = [sys.executable, "-c", CLIENT, str(model.model), str(model.mmproj), state]
    client = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert client.stdin is not None
    assert client.stdout is not None
    worker = psutil.Process(int(client.stdout.readline()))
    assert client.stdout.readline() == {"idle": "idle\n", "generate": "talks\n"}[state]
    client.kill()
    client.wait()
    client.stdin.close()
    client.stdout.close()
    worker.wait(timeout=60)


def test_the_worker_imports_nothing_from_where_the_user_stands(files, tmp_path: Path) -> None:
    for name in ("localvlm", "numpy", "llama_cpp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('imported from the working directory')")
    for name in ("json", "sys", "signal", "sitecustomize", "usercustomize", "jinja2"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported from the working directory')")
    model = files["llava15"]
    program = f"""
        import sys
        sys.path[:0] = {json.dumps(sys.path)}
        assert "" in sys.path
        import json, os, numpy, localvlm.engine.client
        os.chdir({str(tmp_path)!r})
        from pathlib import Path
        from localvlm.engine.client import Engine
        with Engine() as engine:
            print(engine.load(Path({str(model.model)!r}), Path({str(model.mmproj)!r})).info.name)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": "."},
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "llava15\n", "")


def test_worker_output_never_reaches_the_terminal(files, capfd: pytest.CaptureFixture[str]) -> None:
    with Engine() as engine:
        ask(load(engine, files["llava15"]))
        with pytest.raises(LocalvlmError):
            engine.load(files["llava15"].mmproj, files["llava15"].model)
    assert capfd.readouterr() == ("", "")


def test_what_was_loaded_is_told(engine: Engine) -> None:
    backend = engine.backend()
    assert backend.llama_cpp_python
    assert backend.ggml
    assert "CPU" in backend.system_info


def test_a_worker_is_started_once_for_a_gpu_and_anew_where_there_is_none_to_drive(files) -> None:
    model = files["llava15"]
    with Engine() as engine:
        engine.backend()
        first = engine.pid
        with pytest.raises(LocalvlmError):  # there is no GPU here, or the file is no projector
            engine.load(model.model, model.model, LoadOptions(threads=1, gpu_layers=-1))
        assert engine.pid == first
        load(engine, model)
        second = engine.pid
        assert second != first
        load(engine, model)
        assert engine.pid == second


def test_beside_somebody_who_types_its_priority_is_lower() -> None:
    wanted = min(os.nice(0) + 3, 19)
    with Engine(niceness=3) as engine:
        engine.backend()
        assert engine.pid is not None
        assert os.getpriority(os.PRIO_PROCESS, engine.pid) == wanted
        threads = Path(f"/proc/{engine.pid}/task")
        if threads.is_dir():  # Linux has a priority for each
            assert {os.getpriority(os.PRIO_PROCESS, int(thread.name)) for thread in threads.iterdir()} == {wanted}
