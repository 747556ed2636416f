"""The engine as its callers see it: a worker process that may die at any time, and the client that outlives it."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import (
    Attention,
    Backend,
    Completion,
    Encoded,
    ImageLayout,
    LoadOptions,
    Message,
    Part,
    Paused,
    Prefilled,
    Reuse,
    SamplingOptions,
    TextPart,
    VlmInfo,
)
from localvlm.engine.gguf_header import parts_of
from localvlm.engine.wire import pack, unpack
from localvlm.errors import EngineCrashed, Interrupted, ModelError, by_name

__all__ = ["Engine", "RemoteVlm"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

_CONTROL = struct.Struct("<Q")
_BOOT = (
    "import json, os, sys; sys.path[:] = json.loads(sys.argv[1]); os.nice(int(sys.argv[4])); "
    "from localvlm.engine.isolation import close_to_processes; sys.argv[3] == 'apart' and close_to_processes(); "
    "from localvlm.engine.worker import main; main(int(sys.argv[2]))"
)
"""The worker finds packages where its client does, and never in the directory the user happens to stand in. It imports
NumPy, which starts threads: only before can all of them be kept from other processes, and be of the same priority.
"""
_QUICK_S = 25.0
"""Seconds after which a call that only looks at text or sizes counts as hung."""
_TEMPLATE_S = 60.0
"""Seconds after which a chat template counts as hung; its worker gives up earlier, by processor time."""
_SLOWEST_READ = 10e6
"""Bytes a second of the slowest disk that a load is waited for."""


class Engine:
    """Implements :class:`localvlm.engine.api.Engine` with one worker process, started at the first load.

    If the worker dies, the call in progress raises EngineCrashed and the next :meth:`load` starts another; VLMs of the
    dead one stay dead.

    Args:
        verbose: its log goes to standard error.
        niceness: by how much its priority is below that of this process, for one in which somebody types.
    """

    def __init__(self, *, verbose: bool = False, niceness: int = 0) -> None:
        self._verbose, self._niceness = verbose, niceness
        self._process: subprocess.Popen[bytes] | None = None
        self._control = -1
        self._loaded = False
        """The worker was started for a load without a GPU, or holds a model: it is kept."""
        self._generation = 0
        self._call_number = 0
        self._in_call = False
        self.hung = False
        """The last worker was ended because a call took too long."""
        self._cancelled = False
        self._state = threading.RLock()  # a signal handler may come while its own thread holds it
        self._stderr: deque[str] = deque(maxlen=40)
        self._stderr_reader: threading.Thread | None = None

    # life

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @property
    def pid(self) -> int | None:
        """Process id of the worker, None while there is none."""
        return self._process.pid if self._process else None

    def check(self) -> None:
        """Looks whether the worker, if there is one, still runs; between calls, by the thread that makes them.

        Raises:
            EngineCrashed: it ended by itself; the next :meth:`load` starts another.
        """
        if self._process is not None and self._process.poll() is not None:
            raise self._crashed("while it waited")

    def _start(self, *, apart: bool = False) -> None:
        """``apart``: the worker is kept from other processes, which a GPU's driver may need."""
        control_read, self._control = os.pipe()
        env = {**os.environ, "GGML_NO_BACKTRACE": "1", "PYTHONUNBUFFERED": "1"}
        if self._verbose:
            env["LOCALVLM_ENGINE_LOG"] = "1"
        command = [sys.executable, "-E", "-P", "-c", _BOOT, json.dumps(_import_path()), str(control_read)]
        self._process = subprocess.Popen(
            [*command, "apart" if apart else "", str(self._niceness)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(control_read,),
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
            env=env,
            bufsize=0,
        )
        os.close(control_read)
        self._generation += 1
        self.hung = self._loaded = False
        self._stderr.clear()
        self._stderr_reader = threading.Thread(target=self._drain_stderr, args=(self._process,), daemon=True)
        self._stderr_reader.start()

    def _drain_stderr(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        for raw in iter(process.stderr.readline, b""):
            line = "".join(c if c.isprintable() else "\ufffd" for c in raw.decode("utf-8", "replace").rstrip())
            if line:  # printable alone: a file's metadata may come with escape sequences
                self._stderr.append(line)
                if self._verbose:
                    sys.stderr.write(f"engine: {line}\n")
        process.stderr.close()  # whoever ended the worker may not have waited so long

    def kill(self) -> None:
        """Ends the worker at once, whatever it is doing."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        self._close_pipes(process)

    def close(self) -> None:
        """Ends the worker; open VLMs are gone."""
        process, self._process = self._process, None
        if process is None:
            return
        self._close_pipes(process, stdin_only=True)  # the worker leaves when its stdin closes
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        self._close_pipes(process)

    def _close_pipes(self, process: subprocess.Popen[bytes], stdin_only: bool = False) -> None:
        for stream in (process.stdin,) if stdin_only else (process.stdin, process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if stdin_only:
            return
        if self._stderr_reader is not None:
            self._stderr_reader.join(timeout=2)
        if process.stderr is not None and not (self._stderr_reader and self._stderr_reader.is_alive()):
            process.stderr.close()
        with self._state:  # a cancel from another thread must not write to a file that gets the number next
            control, self._control = self._control, -1
        if control >= 0:
            os.close(control)

    # calls

    def cancel(self) -> None:
        """Stops the call in progress, or the next one; from any thread or a signal handler."""
        with self._state:
            self._cancelled = True
            if self._in_call and self._control >= 0:
                with contextlib.suppress(OSError):
                    os.write(self._control, _CONTROL.pack(self._call_number))

    def _cancel_pending(self) -> bool:
        return self._cancelled

    def call(
        self,
        method: str,
        *args: Any,
        vlm: int | None = None,
        on_text: Callable[[str], None] | None = None,
        timeout: float | None = None,
        cancellable: bool = True,
        **kwargs: Any,
    ) -> Any:
        """One request and its answer.

        Raises:
            EngineCrashed: the worker died or did not answer within ``timeout`` seconds.
            Interrupted: cancelled.
            LocalvlmError: whatever the worker raised.
        """
        with self._state:
            if self._cancelled and cancellable:
                self._cancelled = False
                raise Interrupted()
            if self._process is None:
                self._start()
            self._call_number += 1
            self._in_call = cancellable
        request = {"call": self._call_number, "method": method, "args": list(args), "kwargs": kwargs}
        if vlm is not None:
            request["vlm"] = vlm
        if on_text is not None:
            request["stream"] = True
        deadline = None if timeout is None else time.monotonic() + timeout
        try:
            with self._dying(method, timeout):
                self._write(request)
            if cancellable and self._cancel_pending():
                self.cancel()
            while True:
                with self._dying(method, timeout):
                    reply = unpack(lambda n: self._read(n, deadline))
                if reply.get("call") != self._call_number:
                    continue
                if "text" not in reply:
                    return self._result(reply)
                if on_text is not None:
                    self._tell(on_text, reply["text"])
        except KeyboardInterrupt:  # where no handler turns it into a cancel: half a frame may have been read
            self.kill()
            raise
        finally:
            with self._state:
                self._in_call = False

    @contextlib.contextmanager
    def _dying(self, method: str, timeout: float | None) -> Iterator[None]:
        """Turns what happens when the worker dies, hangs or talks nonsense into EngineCrashed."""
        try:
            yield
        except (EOFError, BrokenPipeError) as error:
            raise self._crashed(f"during '{method}'") from (None if isinstance(error, EOFError) else error)
        except ValueError as error:  # it lives, and is not waited for
            self.kill()
            raise EngineCrashed(
                f"the engine gave no sound answer to '{method}' and was stopped",
                "check the model files, or run with -vv to see its log",
            ) from error
        except TimeoutError:
            self.kill()
            self.hung = True
            raise EngineCrashed(
                f"the engine did not finish '{method}' in {timeout:.0f} s and was stopped", "check the model files"
            ) from None

    def _tell(self, on_text: Callable[[str], None], text: str) -> None:
        """Hands a piece of the answer to the caller; where that fails, nobody wants the rest."""
        try:
            on_text(text)
        except Exception:
            with self._state, contextlib.suppress(OSError):
                os.write(self._control, _CONTROL.pack(self._call_number))
            raise

    def _write(self, request: dict[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        fd = self._process.stdin.fileno()
        for buffer in pack(request):
            view = memoryview(buffer)
            while view:
                view = view[os.write(fd, view) :]

    def _result(self, reply: dict[str, Any]) -> Any:
        if "error" in reply:
            error = by_name(reply["error"])(reply["message"], reply["hint"])
            if isinstance(error, Interrupted):
                self._cancelled = False
            raise error
        result = reply["result"]
        if isinstance(result, Completion) and result.finish == "cancelled":
            self._cancelled = False
        return result

    def _read(self, n: int, deadline: float | None) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        fd = self._process.stdout.fileno()
        out = bytearray()
        ready = select.poll()  # select itself takes no descriptor above 1,023, and a caller may have many files open
        ready.register(fd, select.POLLIN)
        while len(out) < n:
            if deadline is not None and not ready.poll(1000 * max(0.0, deadline - time.monotonic())):
                raise TimeoutError
            chunk = os.read(fd, min(n - len(out), 1 << 20))
            if not chunk:
                raise EOFError
            out += chunk
        return bytes(out)

    def _crashed(self, when: str) -> EngineCrashed:
        process, self._process = self._process, None
        how = "vanished"
        if process is not None:
            try:
                code = process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait()
            self._close_pipes(process)
            how = f"was ended by {_signal_name(-code)}" if code < 0 else f"left with code {code}"
        if how == "was ended by SIGKILL":  # from outside, so whatever it said last has nothing to do with it
            return EngineCrashed(
                f"the engine {how} {when}", "if memory ran out, choose a smaller model or lower --ctx-size"
            )
        last = f"; its last words: {_brief(self._stderr[-1])}" if self._stderr else ""
        return EngineCrashed(f"the engine {how} {when}{last}", "check the model files, or run with -vv to see its log")

    # engine API

    def load(self, model: Path, mmproj: Path, options: LoadOptions = LoadOptions()) -> RemoteVlm:
        with self._state:
            if self._process is None or not (self._loaded or options.gpu_layers):
                self.close()  # one that was started when nobody knew that no GPU's driver would run in it
                self._start(apart=not options.gpu_layers)
                self._loaded = not options.gpu_layers
        size = sum(p.stat().st_size for p in (*parts_of(model), mmproj) if p.is_file())
        result = self.call("load", str(model), str(mmproj), options, timeout=_QUICK_S + size / _SLOWEST_READ)
        self._loaded = True
        return RemoteVlm(self, self._generation, int(result["vlm"]), result["info"])

    def backend(self) -> Backend:
        """What llama.cpp really loaded."""
        return Backend(**self.call("backend", timeout=_QUICK_S))

    def holds(self) -> dict[str, str]:
        """What the worker is kept from, and by whom: see :func:`localvlm.engine.isolation.holds`."""
        found: dict[str, str] = self.call("holds", timeout=_QUICK_S)
        return found


def _import_path() -> list[str]:
    """Where this process finds packages, without entries that mean the working directory of the day."""
    return [*filter(os.path.isabs, sys.path), str(Path(__file__).resolve().parents[2])]


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _brief(line: str) -> str:
    """A line of llama.cpp's log without the folders it was compiled in."""
    return re.sub(r"\S*/(?=[\w.+-]+\.\w+:\d+:)", "", line)[:300]


class RemoteVlm:
    """Implements :class:`localvlm.engine.api.Vlm` for a VLM in the worker."""

    def __init__(self, engine: Engine, generation: int, number: int, info: VlmInfo) -> None:
        self._engine, self._generation, self._number, self._info = engine, generation, number, info

    @property
    def info(self) -> VlmInfo:
        return self._info

    @property
    def alive(self) -> bool:
        """Whether the worker that holds it still runs, as far as is known."""
        return self._generation == self._engine._generation and self._engine.pid is not None

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        if not self.alive:
            raise EngineCrashed(f"'{self._info.name}' was in an engine that has ended", "load it again")
        return self._engine.call(method, *args, vlm=self._number, **kwargs)

    def layout(self, width: int, height: int) -> ImageLayout:
        result: ImageLayout = self._call("layout", width, height, timeout=_QUICK_S)
        return result

    def encode(
        self, image: NDArray[np.uint8], *, tower: bool = False, keep: Int32 | None = None, onto: Encoded | None = None
    ) -> Encoded:
        result: Encoded = self._call("encode", image, tower=tower, keep=keep, onto=onto)
        return result

    def release(self, image: Encoded) -> None:
        self._call("release", image, cancellable=False)

    def embeddings(self, image: Encoded) -> Float32:
        result: Float32 = self._call("embeddings", image)
        return result

    def features(self, image: Encoded) -> Float32:
        result: Float32 = self._call("features", image)
        return result

    def altered(self, image: Encoded, tokens: Int32, rows: Float32) -> Encoded:
        result: Encoded = self._call("altered", image, tokens, rows)
        return result

    def embed(self, text: str) -> Float32:
        result: Float32 = self._call("embed", text)
        return result

    def chat(self, messages: Sequence[Message]) -> list[TextPart | int]:
        try:
            result: list[TextPart | int] = self._call("chat", list(messages), timeout=_TEMPLATE_S)
        except EngineCrashed as error:
            if not self._engine.hung:
                raise
            raise ModelError(f"the chat template of '{self._info.name}' cannot be used: {error.message}") from None
        return result

    def tokenize(self, parts: Sequence[TextPart | int]) -> Int32:
        result: Int32 = self._call("tokenize", list(parts), timeout=_QUICK_S)
        return result

    def prefill(
        self,
        parts: Sequence[Part],
        *,
        tap: bool = False,
        layer: int = 0,
        reuse: Reuse = "nothing",
        since: int = 0,
    ) -> Prefilled:
        result: Prefilled = self._call("prefill", list(parts), tap=tap, layer=layer, reuse=reuse, since=since)
        return result

    def pause(
        self, parts: Sequence[Part], layer: int, *, attend: Sequence[int] | None = (-1,), hidden: bool = False
    ) -> Paused:
        rows = None if attend is None else [int(i) for i in attend]
        result: Paused = self._call("pause", list(parts), layer, attend=rows, hidden=hidden)
        return result

    def resume(
        self,
        keep: Int32 | None,
        rows: Float32 | None = None,
        *,
        layer: int,
        attend: Sequence[int] | None = (-1,),
        hidden: bool = False,
    ) -> Paused:
        asked = None if attend is None else [int(i) for i in attend]
        result: Paused = self._call("resume", keep, rows, layer=layer, attend=asked, hidden=hidden)
        return result

    def finish(self, keep: Int32 | None, rows: Float32 | None = None) -> Prefilled:
        result: Prefilled = self._call("finish", keep, rows)
        return result

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_text: Callable[[str], None] | None = None,
        draft: Int32 | None = None,
    ) -> Completion:
        result: Completion = self._call("generate", max_tokens, sampling, on_text=on_text, draft=draft)
        return result

    def feed(self, ids: Int32) -> None:
        self._call("feed", ids)

    def score(self, ids: Int32, parts: Sequence[Part] | None = None) -> Float32:
        result: Float32 = self._call("score", ids, None if parts is None else list(parts))
        return result

    def logits(self) -> Float32:
        result: Float32 = self._call("logits")
        return result

    def attention(self) -> Attention:
        result: Attention = self._call("attention")
        return result

    def close(self) -> None:
        if self.alive:
            self._call("close", cancellable=False)
        self._generation = 0  # of no worker
