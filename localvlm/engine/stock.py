"""llama.cpp as it is, to hold our answers against: its own multimodal helper over raw ctypes.

``python -m localvlm.engine.stock MODEL MMPROJ N_CTX THREADS`` answers requests on stdin with lines on stdout (see
:func:`serve`); :class:`StockProcess` is its client. Nothing of the engine has a part in it.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["MARKER", "Stock", "StockProcess", "serve"]

Float32 = NDArray[np.float32]
RGB = NDArray[np.uint8]
N_CTX = 1024
THREADS = 1
MARKER = "<image-goes-here>"
"""Where a picture stands in the text of a request."""


class Stock:
    """One model and its projector, loaded by llama.cpp's low-level bindings."""

    def __init__(self, model: Path, mmproj: Path, n_ctx: int = N_CTX, threads: int = THREADS) -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._l, self._m = llama_cpp, mtmd_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_log_set(self._quiet, ctypes.c_void_p(0))
        mtmd_cpp.mtmd_helper_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        weights, none = llama_cpp.llama_model_default_params(), (ctypes.c_void_p * 1)(None)
        weights.n_gpu_layers, weights.devices = 0, ctypes.cast(none, ctypes.c_void_p)
        self._model = llama_cpp.llama_model_load_from_file(os.fsencode(model), weights)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {model}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, min(512, n_ctx), min(512, n_ctx)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = 1
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        vision = mtmd_cpp.mtmd_context_params_default()
        vision.use_gpu, vision.print_timings, vision.warmup = False, False, False
        vision.n_threads, vision.flash_attn_type = threads, 1
        self._mtmd = mtmd_cpp.mtmd_init_from_file(os.fsencode(mmproj), self._model, vision)
        if not self._context or not self._mtmd:
            raise RuntimeError(f"llama.cpp cannot load {mmproj}")
        self._vocab = llama_cpp.llama_model_get_vocab(self._model)
        self.n_vocab = int(llama_cpp.llama_vocab_n_tokens(self._vocab))
        self._n_embd = int(llama_cpp.llama_model_n_embd_inp(self._model))
        self._n_batch = int(params.n_batch)
        self._past = 0

    def close(self) -> None:
        """Frees everything; the object is of no use afterwards."""
        self._m.mtmd_free(self._mtmd)
        self._l.llama_free(self._context)
        self._l.llama_model_free(self._model)

    def _chunks(self, text: str, images: Sequence[RGB]) -> Any:
        """Chunks of a prompt with llama.cpp's media marker in place of each picture; the caller frees them."""
        bitmaps = []
        for image in images:
            data = np.ascontiguousarray(image)
            pointer = data.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps.append(self._m.mtmd_bitmap_init(image.shape[1], image.shape[0], pointer))
        raw = text.encode()
        source = self._m.mtmd_input_text(text=raw, text_len=len(raw), add_special=True, parse_special=True)
        array = (self._m.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        chunks = self._m.mtmd_input_chunks_init()
        status = self._m.mtmd_tokenize(self._mtmd, chunks, ctypes.byref(source), array, len(bitmaps))
        for bitmap in bitmaps:
            self._m.mtmd_bitmap_free(bitmap)
        if status != 0:
            raise RuntimeError(f"mtmd_tokenize returned {status}")
        return chunks

    @property
    def marker(self) -> str:
        """What stands for a picture in a prompt."""
        return str(self._m.mtmd_default_marker().decode())

    def tokenize(self, text: str, images: Sequence[RGB]) -> list[int]:
        """Prompt ids, -1 at image tokens."""
        chunks = self._chunks(text, images)
        ids: list[int] = []
        for i in range(self._m.mtmd_input_chunks_size(chunks)):
            chunk = self._m.mtmd_input_chunks_get(chunks, i)
            if self._m.mtmd_input_chunk_get_type(chunk) == self._m.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t(0)
                pointer = self._m.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                ids += pointer[: count.value]
            else:
                ids += [-1] * self._m.mtmd_input_chunk_get_n_tokens(chunk)
        self._m.mtmd_input_chunks_free(chunks)
        return ids

    def encode(self, image: RGB) -> Float32:
        """(n_tokens, width) projected rows of one picture."""
        chunks = self._chunks(self.marker, [image])
        for i in range(self._m.mtmd_input_chunks_size(chunks)):
            chunk = self._m.mtmd_input_chunks_get(chunks, i)
            if self._m.mtmd_input_chunk_get_type(chunk) == self._m.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                n = self._m.mtmd_input_chunk_get_n_tokens(chunk)
                if self._m.mtmd_encode_chunk(self._mtmd, chunk) != 0:
                    raise RuntimeError("mtmd_encode_chunk failed")
                rows = np.ctypeslib.as_array(self._m.mtmd_get_output_embd(self._mtmd), (n, self._n_embd)).copy()
        self._m.mtmd_input_chunks_free(chunks)
        return rows

    def prompt(self, text: str, images: Sequence[RGB]) -> Float32:
        """Empties the cache and runs a prompt by ``mtmd_helper_eval_chunks``; (n_vocab,) logits after it."""
        self._l.llama_memory_clear(self._l.llama_get_memory(self._context), True)
        chunks = self._chunks(text, images)
        past = self._l.llama_pos(0)
        status = self._m.mtmd_helper_eval_chunks(
            self._mtmd, self._context, chunks, 0, 0, self._n_batch, True, ctypes.byref(past)
        )
        self._m.mtmd_input_chunks_free(chunks)
        if status != 0:
            raise RuntimeError(f"mtmd_helper_eval_chunks returned {status}")
        self._past = past.value
        return self._logits()

    def feed(self, token: int) -> Float32:
        """Runs one more token; (n_vocab,) logits after it."""
        ids = (ctypes.c_int32 * 1)(token)
        if self._l.llama_decode(self._context, self._l.llama_batch_get_one(ids, 1)) != 0:
            raise RuntimeError("llama_decode failed")
        return self._logits()

    def _logits(self) -> Float32:
        pointer = self._l.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self.n_vocab,)).copy()

    def greedy(self, text: str, images: Sequence[RGB], n: int) -> tuple[list[int], list[float]]:
        """The ``n`` likeliest tokens one after another, ended by an end-of-generation token (not included), and
        before each choice the margin of the best logit over the second.
        """
        logits, ids, margins = self.prompt(text, images), [], []
        while True:
            second, best = np.sort(logits)[-2:]
            token = int(logits.argmax())
            margins.append(float(best - second))
            if self._l.llama_vocab_is_eog(self._vocab, token):
                break
            ids.append(token)
            if len(ids) == n:
                break
            logits = self.feed(token)
        return ids, margins


class StockProcess:
    """A process that answers as llama.cpp does. A context manager: leaving it ends the process.

    Raises:
        RuntimeError: it has ended.
    """

    def __init__(self, model: Path, mmproj: Path, directory: Path, n_ctx: int = N_CTX, threads: int = THREADS) -> None:
        """``directory``: for pictures on their way."""
        path = os.pathsep.join([str(Path(__file__).parents[2]), *filter(os.path.isabs, sys.path)])
        self._directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-m", "localvlm.engine.stock", str(model), str(mmproj), str(n_ctx), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            text=True,
        )

    def __enter__(self) -> StockProcess:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: object, trace: TracebackType | None) -> None:
        if kind is not None:
            self._process.kill()
        self._process.communicate(timeout=60)
        if kind is None and self._process.returncode != 0:
            raise RuntimeError(f"llama.cpp's side ended with {self._process.returncode}")

    def ask(self, text: str, images: Sequence[RGB], n: int) -> tuple[list[int], list[float]]:
        """The greedy answer's ids to a prompt with MARKERs, at most ``n``, and the margin before each choice."""
        paths = []
        for i, image in enumerate(images):
            paths.append(str(self._directory / f"stock-{i}.npy"))
            np.save(paths[-1], image)
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps({"text": text, "images": paths, "n": n}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"llama.cpp's side ended with {self._process.wait(timeout=10)}")
        reply = json.loads(line)
        return reply["ids"], reply["margins"]


def serve(model: Path, mmproj: Path, n_ctx: int, threads: int) -> None:
    """For each line {"text", "images": [.npy paths], "n"} on stdin, a line {"ids", "margins"} on stdout."""
    stock = Stock(model, mmproj, n_ctx, threads)
    for line in sys.stdin:
        request = json.loads(line)
        images = [np.load(path) for path in request["images"]]
        text = request["text"].replace(MARKER, stock.marker)
        ids, margins = stock.greedy(text, images, request["n"])
        sys.stdout.write(json.dumps({"ids": ids, "margins": margins}) + "\n")
        sys.stdout.flush()
    stock.close()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
