"""llama.cpp's model, context and vocabulary behind small Python objects; nothing of images here."""

from __future__ import annotations

import ctypes
import os
import re
from collections import deque
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import LoadOptions
from localvlm.engine.devices import backends, check_gpu, gpus
from localvlm.engine.gguf_header import Header
from localvlm.engine.native import Tap, library
from localvlm.errors import Interrupted, NotEnoughMemory, NotGguf, UnsupportedModel

__all__ = [
    "DEFAULT_CTX",
    "MAX_OUTPUTS",
    "MICRO_BATCH",
    "PADDING",
    "ROOM",
    "Context",
    "Model",
    "Vocabulary",
    "backend",
    "flash_attention",
    "last_log_lines",
    "physical_cores",
    "short_of_memory",
    "thread_count",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]

MICRO_BATCH = 512
"""Rows of one graph. Batches never exceed it, so that one llama_decode is one graph, which the tap relies on."""
MAX_OUTPUTS = 64
"""Rows of one batch that may ask for logits; bounds llama.cpp's output buffer."""
DEFAULT_CTX = 4096
PADDING = 256
"""llama.cpp makes and reads cells in multiples of this."""
ROOM = 256
"""Cells for the answer, or for what else comes after, that are made with a prompt's."""
_NO_DEVICES = (ctypes.c_void_p * 1)(None)
"""An empty list of GPUs. Without it llama.cpp takes all there are even for no layers, and lends them large batches
(op_offload): the CPU's results would be those of a GPU, and weights of layers left out would be moved.
"""
_BUFFER = re.compile(r"(\S{1,40}) model buffer size = {0,20}([\d.]{1,20}) MiB")
_log: deque[str] = deque(maxlen=40)
_buffers: list[str] = []
"""Where the weights of the model that was loaded last are, as llama.cpp told."""


def last_log_lines() -> list[str]:
    """llama.cpp's last lines, newest last."""
    return list(_log)


@cache
def backend() -> Any:
    """The llama_cpp module, initialised once. Warnings and errors of its log are kept, and go to the worker's stderr,
    where the client finds the last words of one that died; LOCALVLM_ENGINE_LOG=1 lets everything through.
    """
    import llama_cpp
    from llama_cpp import mtmd_cpp

    echo = os.environ.get("LOCALVLM_ENGINE_LOG") == "1"

    def keep(level: int, text: bytes, _: ctypes.c_void_p) -> None:
        line = text.decode("utf-8", "replace").rstrip("\n")
        if level >= 3 and line:
            _log.append(line)
        if "model buffer size" in line and (found := _BUFFER.search(line)):  # a line may be a megabyte of a file's
            _buffers.append(f"{found[1]} {float(found[2]):.0f} MiB")
        if echo or level >= 3:
            os.write(2, text)

    callback = llama_cpp.llama_log_callback(keep)
    _keep_alive.append(callback)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_log_set(callback, ctypes.c_void_p(0))
    mtmd_cpp.mtmd_helper_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp


_keep_alive: list[object] = []


def physical_cores() -> int:
    """CPU cores this process may use, hyper-threads counted once."""
    import psutil

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(psutil.cpu_count(logical=False) or allowed, allowed))


def thread_count(options: LoadOptions) -> int:
    """Threads of a context, its tower and their taps: one number, since OpenMP keeps one pool."""
    return options.threads or physical_cores()


def flash_attention(options: LoadOptions) -> int:
    """The llama_flash_attn_type: enabled on the CPU, automatic elsewhere."""
    return 1 if options.gpu_layers == 0 else -1


def short_of_memory(reason: str) -> bool:
    """Whether a line of llama.cpp's log says so, of the machine's memory or a GPU's."""
    return "alloc" in reason.lower() or "memory" in reason.lower()


def _why(fallback: str) -> str:
    for line in reversed(_log):
        if "error" in line.lower() or "failed" in line.lower() or "unknown" in line.lower():
            return line.strip()[:300]
    return _log[-1].strip()[:300] if _log else fallback


class Model:
    """A loaded language model."""

    def __init__(
        self, path: Path, options: LoadOptions, header: Header, cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """``cancelled`` is asked again and again while the weights are read.

        Raises:
            Interrupted: it said yes.
            UsageError: layers shall go to a GPU, and there is none.
        """
        lib = backend()
        check_gpu(options.gpu_layers, gpus() if options.gpu_layers else (), backends())
        self.path = path
        params = lib.llama_model_default_params()
        params.n_gpu_layers = options.gpu_layers if options.gpu_layers >= 0 else 10_000
        if not options.gpu_layers:
            params.devices = ctypes.cast(_NO_DEVICES, ctypes.c_void_p)
        params.progress_callback = lib.llama_progress_callback(lambda _progress, _data: not cancelled())
        _log.clear()
        _buffers.clear()
        self.handle = lib.llama_model_load_from_file(os.fsencode(path), params)
        if not self.handle:
            if cancelled():
                raise Interrupted()
            reason = _why("llama.cpp gave no reason")
            if short_of_memory(reason):
                raise NotEnoughMemory(f"model '{path.name}' does not fit into memory: {reason}")
            if "unknown model architecture" in reason.lower():
                raise UnsupportedModel(
                    f"model '{path.name}' has architecture '{header.architecture}', which this llama.cpp lacks"
                )
            raise NotGguf(f"model '{path.name}' cannot be loaded: {reason}", "check or download the file again")
        self.buffers = tuple(_buffers)
        """Backends that hold its weights, with how much; CPU_REPACK: a copy in the order in which kernels read it."""
        self.vocabulary = Vocabulary(lib.llama_model_get_vocab(self.handle))
        self.n_layer = int(lib.llama_model_n_layer(self.handle))
        self.n_head = int(lib.llama_model_n_head(self.handle))
        self.n_embd = int(lib.llama_model_n_embd(self.handle))
        self.n_embd_input = int(lib.llama_model_n_embd_inp(self.handle))
        self.n_ctx_train = int(lib.llama_model_n_ctx_train(self.handle))
        self.n_params = int(lib.llama_model_n_params(self.handle))
        self.mrope = int(lib.llama_model_rope_type(self.handle)) in (lib.LLAMA_ROPE_TYPE_MROPE, 40)
        self.forgets = not (lib.llama_model_is_recurrent(self.handle) or lib.llama_model_is_hybrid(self.handle))
        """Whether any last tokens can be taken back; a recurrent state cannot be."""
        window = header.integer(f"{header.architecture}.attention.sliding_window")
        self.resizable = not window and "rope_factors_long.weight" not in header.tensors
        """Whether its context may grow: LongRoPE takes other factors in a long one, and after its cells were moved,
        llama.cpp puts new rows in place of those that left a sliding window.
        """

    def close(self) -> None:
        if self.handle:
            backend().llama_model_free(self.handle)
            self.handle = None


class Vocabulary:
    """Tokenizer of one model."""

    def __init__(self, handle: Any) -> None:
        self._lib, self.handle = backend(), handle
        self.size = int(self._lib.llama_vocab_n_tokens(handle))
        self.bos = int(self._lib.llama_vocab_bos(handle))
        self.eos = int(self._lib.llama_vocab_eos(handle))
        self.add_bos = bool(self._lib.llama_vocab_get_add_bos(handle))

    def tokenize(self, text: str, special: bool) -> list[int]:
        """Token ids; control tokens are recognised in ``text`` only with ``special``."""
        data = text.encode("utf-8", "replace")
        if not data:
            return []
        room = len(data) + 8
        for _ in range(2):
            out = (ctypes.c_int32 * room)()
            n = self._lib.llama_tokenize(self.handle, data, len(data), out, room, False, special)
            if n >= 0:
                return list(out[:n])
            room = -n
        raise UnsupportedModel("the tokenizer gave no tokens")

    def tokenize_run(self, parts: Iterable[tuple[str, bool]]) -> list[int]:
        """Tokenizes adjacent (text, special) parts as one text, so that tokens may span their borders, unless that
        would let a control token arise outside the parts marked special.
        """
        parts = [(text, special) for text, special in parts if text]
        apart = [self.tokenize(text, special) for text, special in parts]
        if len(parts) == 1:
            return apart[0]
        if any(self.tokenize(text, True) != ids for (text, special), ids in zip(parts, apart, strict=True)):
            return [t for ids in apart for t in ids]
        joint = self.tokenize("".join(text for text, _ in parts), True)
        if self.controls(joint) != self.controls([t for ids in apart for t in ids]):
            return [t for ids in apart for t in ids]
        return joint

    def controls(self, ids: Iterable[int]) -> list[int]:
        """Those of ``ids`` that plain text cannot spell: control and user-defined tokens."""
        special = self._lib.LLAMA_TOKEN_ATTR_CONTROL | self._lib.LLAMA_TOKEN_ATTR_USER_DEFINED
        return [t for t in ids if self._lib.llama_vocab_get_attr(self.handle, t) & special]

    def piece(self, token: int, special: bool = False) -> bytes:
        """The bytes a token stands for; control tokens are empty unless ``special``."""
        room = 64
        for _ in range(2):
            out = ctypes.create_string_buffer(room)
            n = self._lib.llama_token_to_piece(self.handle, token, out, room, 0, special)
            if n >= 0:
                return out.raw[:n]
            room = -n
        return b""

    def text(self, token: int) -> str:
        return "" if token < 0 else self.piece(token, special=True).decode("utf-8", "replace")

    def ends(self, token: int) -> bool:
        """Whether the model ends its turn with this token."""
        return bool(self._lib.llama_vocab_is_eog(self.handle, token))


def _padded(cells: int) -> int:
    return -(-cells // PADDING) * PADDING


class Context:
    """One llama_context with one sequence, its tap and its abort flag. Its cells are made as they are needed.

    Attributes:
        n_ctx: most cells there may be.
        n_batch: most rows of a batch.
        size: cells there are.
        tapped: the tap sees what is run.
    """

    def __init__(
        self, model: Model, options: LoadOptions, tap: Tap, outputs: int = MAX_OUTPUTS, cells: int = 0
    ) -> None:
        """``outputs``: most rows of a batch that ask for logits. ``cells``: those to begin with."""
        self._lib = backend()
        self.model, self.tap = model, tap
        self._options, self._outputs = options, outputs
        quantized = options.kv_type != "f16"
        self._flash_attention = 1 if quantized else flash_attention(options)  # V can be quantized with it alone
        self.tapped = options.tap
        wanted = options.n_ctx or min(model.n_ctx_train or DEFAULT_CTX, DEFAULT_CTX)
        self.n_ctx = _padded(wanted)
        self.n_batch = min(MICRO_BATCH, self.n_ctx)
        self._seq = (ctypes.c_int32 * 1)(0)
        seq_pointers = [ctypes.cast(self._seq, ctypes.POINTER(ctypes.c_int32))] * self.n_batch
        self._seq_ids = (ctypes.POINTER(ctypes.c_int32) * self.n_batch)(*seq_pointers)
        self._n_seq_id = np.ones(self.n_batch, np.int32)
        self._open(self._enough(cells) if model.resizable else self.n_ctx)

    def _enough(self, cells: int) -> int:
        return min(_padded(cells + ROOM), self.n_ctx)

    def _open(self, size: int) -> None:
        lib, options, model = self._lib, self._options, self.model
        params = lib.llama_context_default_params()
        params.n_ctx = size
        params.n_batch = params.n_ubatch = self.n_batch
        params.n_seq_max = 1
        params.n_outputs_max = min(self._outputs, self.n_batch)
        params.n_threads = params.n_threads_batch = thread_count(options)
        params.flash_attn_type = self._flash_attention
        params.type_k = params.type_v = getattr(lib, f"GGML_TYPE_{options.kv_type.upper()}")
        if options.tap:
            params.cb_eval = lib.ggml_backend_sched_eval_callback(self.tap.function("lv_tap_eval"))
            params.cb_eval_user_data = self.tap.user_data
        params.no_perf = True
        _log.clear()
        self.handle = lib.llama_init_from_model(model.handle, params)
        if not self.handle:
            if options.kv_type != "f16" and "block size" in (reason := _why("")):
                raise UnsupportedModel(
                    f"'{model.path.name}' cannot have a {options.kv_type} KV cache: {reason}", "pass --kv-type f16"
                )
            raise NotEnoughMemory(
                f"no context of {size} cells could be made for '{model.path.name}': {_why('out of memory')}",
                "lower --ctx-size",
            )
        abort = ctypes.cast(ctypes.c_void_p(self.tap.function("lv_tap_abort")), lib.ggml_abort_callback)
        lib.llama_set_abort_callback(self.handle, abort, self.tap.user_data)
        self.size = int(lib.llama_n_ctx(self.handle))
        self._memory = lib.llama_get_memory(self.handle)

    def reserve(self, cells: int) -> None:
        """Makes sure of ``cells`` in all, and of room after them; those in use keep what they hold, bit for bit.

        Raises:
            NotEnoughMemory: they cannot be had; nothing has changed, unless those that there were cannot be had again:
                then all are lost, and :meth:`clear` tries to make some.
        """
        self._check_there()
        if cells <= self.size:
            return
        before, held = self.size, self._held()
        self.close()  # first, so that two caches are never there at once
        try:
            self._open(self._enough(cells))
        except NotEnoughMemory:
            self._open(before)
            raise
        finally:
            if self.handle and held is not None:
                self._hold(held)

    @property
    def runs(self) -> str:
        """How, for people."""
        options, attention = self._options, "on" if self._flash_attention == 1 else "automatic"
        return (
            f"threads {thread_count(options)}, rows of a batch and micro-batch {self.n_batch}, KV cells up to "
            f"{self.n_ctx} in {options.kv_type}, flash attention {attention}, weights {', '.join(self.model.buffers)}"
        )

    @property
    def lost(self) -> bool:
        """Whether it could not be made again; :meth:`clear` tries to."""
        return not self.handle

    def _check_there(self) -> None:
        if self.lost:
            raise NotEnoughMemory(
                f"what '{self.model.path.name}' had read is lost: its context could not be made again",
                "lower --ctx-size, or choose a smaller model",
            )

    def _held(self) -> NDArray[np.uint8] | None:
        """What the cells hold, as llama.cpp packs it; None if nothing."""
        if self._lib.llama_memory_seq_pos_max(self._memory, 0) < 0:
            return None
        out = np.empty(self._lib.llama_state_get_size(self.handle), np.uint8)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return out[: self._lib.llama_state_get_data(self.handle, pointer, out.size)]

    def _hold(self, held: NDArray[np.uint8]) -> None:
        pointer = held.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if self._lib.llama_state_set_data(self.handle, pointer, held.size) != held.size:
            self.close()  # nobody shall take it for what it was
            raise UnsupportedModel(f"the cells of '{self.model.path.name}' cannot be moved", "pass another --ctx-size")

    def clear(self) -> None:
        """Empties the KV cache.

        Raises:
            NotEnoughMemory: the context was lost, and cannot be made again.
        """
        if self.lost:
            self._open(self._enough(0) if self.model.resizable else self.n_ctx)
        self._lib.llama_memory_clear(self._memory, False)

    def trim(self, first: int) -> bool:
        """Removes all cells at batch position ``first`` and later; False if this model cannot.

        Raises:
            NotEnoughMemory: the context was lost.
        """
        self._check_there()
        return bool(self._lib.llama_memory_seq_rm(self._memory, 0, first, -1))

    def decode(self, tokens: Int32 | None, rows: Float32 | None, positions: Int32, outputs: NDArray[np.int8]) -> None:
        """Runs one batch of token ids (n,) or embedding rows (n, width).

        positions: (n,), or (4 n,) section-major t, y, x, 0 for embedding rows of an M-RoPE model.

        Raises:
            Interrupted: the tap was cancelled; the caller must trim the cache.
            NotEnoughMemory: a graph of this size has no room, or the context was lost.
        """
        self._check_there()
        n = len(outputs)
        as_i32 = ctypes.POINTER(ctypes.c_int32)
        batch = self._lib.llama_batch(
            n_tokens=n,
            token=None if tokens is None else tokens.ctypes.data_as(as_i32),
            embd=None if rows is None else rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float)),
            pos=positions.ctypes.data_as(as_i32),
            n_seq_id=self._n_seq_id.ctypes.data_as(as_i32),
            seq_id=ctypes.cast(self._seq_ids, ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
            logits=outputs.ctypes.data_as(ctypes.POINTER(ctypes.c_int8)),
        )
        status = self._lib.llama_decode(self.handle, batch)
        if status == 2 or self.tap.cancelled:  # a graph whose nodes the tap left out ends well, on a GPU any
            raise Interrupted()
        if status == -2:
            raise NotEnoughMemory(f"there is no memory to run {n} rows: {_why('no reason given')}", "lower --ctx-size")
        if status != 0:
            raise UnsupportedModel(f"llama.cpp refused a batch of {n} rows (code {status}): {_why('no reason given')}")

    def logits(self, row: int = -1) -> Float32:
        """(n_vocab,) float32 copy of one output row's logits."""
        self._check_there()
        pointer = self._lib.llama_get_logits_ith(self.handle, row)
        return np.ctypeslib.as_array(pointer, (self.model.vocabulary.size,)).copy()

    def close(self) -> None:
        if self.handle:
            self._lib.llama_free(self.handle)
            self.handle = None


def describe_backend() -> dict[str, Any]:
    """Versions and devices, as the fields of :class:`localvlm.engine.api.Backend`."""
    from importlib.metadata import version

    lib = backend()
    ggml = library()  # the tap, which is linked to libggml
    ggml.ggml_version.restype = ggml.ggml_commit.restype = ctypes.c_char_p
    return {
        "llama_cpp_python": version("llama-cpp-python"),
        "ggml": ggml.ggml_version().decode(),
        "commit": ggml.ggml_commit().decode(),
        "system_info": lib.llama_print_system_info().decode(),
        "devices": gpus(),
        "backends": backends(),
    }
