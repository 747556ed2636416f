"""The worker process: it alone maps llama.cpp, so that a bad file takes nothing else with it.

Started by :mod:`localvlm.engine.client`. Requests come on stdin and
answers go to the original stdout; whatever libraries print goes to stderr. Numbers of calls to cancel come on the
control pipe. It ends when stdin closes, whatever it is doing. Before it opens a model file it gives up what
:mod:`localvlm.engine.isolation` tells.
"""

from __future__ import annotations

import os
import signal
import struct
import sys
import threading
import traceback
from pathlib import Path
from queue import SimpleQueue
from typing import Any, BinaryIO

from localvlm.engine.isolation import close_to_python, close_to_system, holds, no_core_dump
from localvlm.engine.shared_tower import Towers
from localvlm.engine.wire import pack, unpack
from localvlm.errors import Interrupted, LocalvlmError, NotEnoughMemory, UnsupportedModel

_CONTROL = struct.Struct("<Q")
_METHODS = frozenset(
    (
        "attention",
        "chat",
        "close",
        "altered",
        "embed",
        "embeddings",
        "features",
        "encode",
        "feed",
        "finish",
        "generate",
        "layout",
        "logits",
        "pause",
        "prefill",
        "release",
        "resume",
        "score",
        "tokenize",
    )
)


def _exactly(stream: BinaryIO, n: int) -> bytes:
    data = stream.read(n)
    if len(data) < n:
        raise EOFError
    return data


class Worker:
    """Serves calls one at a time; loaded VLMs are known by number."""

    def __init__(self, requests: BinaryIO, replies: int, control: int) -> None:
        self._requests, self._replies, self._control = requests, replies, control
        self._queue: SimpleQueue[dict[str, Any]] = SimpleQueue()
        self._vlms: dict[int, Any] = {}
        self._towers = Towers()
        self._turn = threading.Lock()
        self._current = self._cancel_upto = 0
        self._closed = False

    def run(self) -> None:
        threading.Thread(target=self._read_requests, daemon=True).start()
        threading.Thread(target=self._read_control, daemon=True).start()
        while True:
            message = self._queue.get()
            self._serve(message)

    def _read_requests(self) -> None:
        try:
            while True:
                self._queue.put(unpack(lambda n: _exactly(self._requests, n)))
        except BaseException:  # noqa: BLE001  the client is gone, or sends nonsense: nobody is left to answer
            os._exit(0)

    def _read_control(self) -> None:
        while data := os.read(self._control, _CONTROL.size):
            if len(data) == _CONTROL.size:
                with self._turn:
                    self._cancel_upto = max(self._cancel_upto, _CONTROL.unpack(data)[0])
                    late = self._cancel_upto < self._current
                    for vlm in () if late else list(self._vlms.values()):
                        vlm.cancel()

    def _send(self, message: dict[str, Any]) -> None:
        for buffer in pack(message):
            view = memoryview(buffer)
            while view:
                view = view[os.write(self._replies, view) :]

    def _serve(self, message: dict[str, Any]) -> None:
        call = int(message["call"])
        with self._turn:
            self._current = call
            cancelled = call <= self._cancel_upto
            for vlm in self._vlms.values():
                vlm.cancel_reset()
        try:
            if cancelled:
                raise Interrupted()
            reply = {"result": self._do(message)}
        except MemoryError:
            error = NotEnoughMemory("the engine ran out of memory", "lower --ctx-size or choose a smaller model")
            reply = self._error(error)
        except LocalvlmError as error:
            reply = self._error(error)
        except Exception as error:  # noqa: BLE001  a defect of ours must reach the client as an error
            traceback.print_exc()
            reply = self._error(LocalvlmError(f"internal error in the engine: {type(error).__name__}: {error}"))
        self._send({"call": call, **reply})

    @staticmethod
    def _error(error: LocalvlmError) -> dict[str, Any]:
        return {"error": type(error).__name__, "message": error.message, "hint": error.hint}

    def _do(self, message: dict[str, Any]) -> Any:
        name, args, kwargs = message["method"], message.get("args", []), message.get("kwargs", {})
        if name == "load":
            return self._load(int(message["call"]), *args)
        if name == "holds":
            return holds()
        if name == "backend":
            _map_llama_cpp()
            from localvlm.engine.devices import gpu_memory
            from localvlm.engine.llama import describe_backend

            free, unified = gpu_memory()
            return {**describe_backend(), "gpu_free": free, "unified": unified}
        if name not in _METHODS:
            raise LocalvlmError(f"the engine has no method '{name}'")
        vlm = self._vlms[int(message["vlm"])]
        if name == "generate" and message.get("stream"):
            kwargs["on_text"] = lambda text: self._send({"call": message["call"], "text": text})
        result = getattr(vlm, name)(*args, **kwargs)
        if name == "close":
            del self._vlms[int(message["vlm"])]
        return result

    def _load(self, call: int, model: str, mmproj: str, options: Any) -> dict[str, Any]:
        if not (self._closed or options.gpu_layers):  # a GPU's driver may start helpers, and talk to other GPUs
            self._closed = True
            close_to_system()
        _map_llama_cpp()
        from localvlm.engine.vlm import LlamaVlm

        number = max(self._vlms, default=0) + 1
        vlm = LlamaVlm(Path(model), Path(mmproj), options, lambda: call <= self._cancel_upto, self._towers)
        self._vlms[number] = vlm
        return {"vlm": number, "info": vlm.info}


def _map_llama_cpp() -> None:
    """Loads the library.

    Raises:
        UnsupportedModel: it cannot be loaded.
    """
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:  # the last where another library is missing
        raise UnsupportedModel(
            f"llama.cpp cannot be loaded: {error}",
            "install the library that is missing (libgomp.so.1 is of the package libgomp1), or llama-cpp-python anew",
        ) from error


def _limit_memory() -> None:
    """LOCALVLM_WORKER_MEMORY bounds the worker's address space, in bytes."""
    limit = os.environ.get("LOCALVLM_WORKER_MEMORY")
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (int(limit), int(limit)))


def main(control: int) -> None:
    """Serves until stdin closes. ``control``: read end of the pipe that carries numbers of cancelled calls."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    no_core_dump()
    close_to_python()
    _limit_memory()
    replies = os.dup(1)
    os.dup2(2, 1)
    Worker(sys.stdin.buffer, replies, control).run()
