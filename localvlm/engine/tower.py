"""Pictures to embedding rows through libmtmd, with the tower's attention and the repairs of the tap."""

from __future__ import annotations

import ctypes
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import ImageLayout, LoadOptions
from localvlm.engine.families import Family, Tower, describe, raster_boxes
from localvlm.engine.gguf_header import Header
from localvlm.engine.llama import Model, flash_attention, last_log_lines, thread_count
from localvlm.engine.native import REPAIR_LLAVA_CLS, Tap, TowerMode
from localvlm.errors import ImageError, Interrupted, UnsupportedModel

__all__ = ["Picture", "Piece", "VisionTower"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt that a picture becomes: wrapper tokens (``ids``), or ``n`` image tokens from ``first``
    with their relative positions (n, 3) t, y, x and the positions they take.
    """

    ids: tuple[int, ...] = ()
    first: int = 0
    n: int = 0
    relative: Int32 | None = None
    n_pos: int = 0
    raster: tuple[int, int] | None = None


@dataclass
class Picture:
    """A laid out, and after encoding also encoded, picture."""

    layout: ImageLayout
    pieces: tuple[Piece, ...]
    rows: Float32 | None = None
    tower: Float32 | None = None
    ms: float = 0.0


class VisionTower:
    """One mtmd context and its tap."""

    def __init__(self, path: Path, model: Model, options: LoadOptions, header: Header) -> None:
        from llama_cpp import mtmd_cpp

        self._lib, self._model = mtmd_cpp, model
        self.family: Family
        self.tower: Tower
        self.family, self.tower = describe(header)
        self.repairs = 0 if options.stock_tower else self._repairs_needed()
        self.tap = Tap(path.name, thread_count(options), options.gpu_layers != 0)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = options.gpu_layers != 0
        params.print_timings = False
        params.n_threads = thread_count(options)
        params.warmup = False
        params.flash_attn_type = flash_attention(options)
        params.cb_eval = type(params.cb_eval)(self.tap.function("lv_tap_eval"))
        params.cb_eval_user_data = self.tap.user_data
        self.handle = mtmd_cpp.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not self.handle:
            log = last_log_lines()
            raise UnsupportedModel(f"projector '{path.name}' cannot be loaded: {log[-1] if log else 'no reason given'}")
        if not mtmd_cpp.mtmd_support_vision(self.handle):
            self.close()
            raise UnsupportedModel(f"projector '{path.name}' has no vision tower")
        self.causal = not mtmd_cpp.mtmd_decode_use_non_causal(self.handle, None)

    def _repairs_needed(self) -> int:
        return REPAIR_LLAVA_CLS if self.family.name == "llava" and self.tower.cls else 0

    @property
    def repair_names(self) -> tuple[str, ...]:
        return ("llava-cls-order",) if self.repairs & REPAIR_LLAVA_CLS else ()

    def lay_out(self, width: int, height: int) -> Picture:
        """Where the tokens of a width x height picture lie, without encoding it."""
        bitmap = self._lib.mtmd_bitmap_init(width, height, None)
        chunks = self._chunks(bitmap)
        try:
            return self._picture(chunks, width, height)
        finally:
            self._lib.mtmd_input_chunks_free(chunks)

    def encode(self, image: NDArray[np.uint8], attention: bool) -> Picture:
        """Encodes (height, width, 3) uint8 RGB.

        Raises:
            Interrupted: the tap was cancelled.
        """
        height, width = image.shape[:2]
        pixels = np.ascontiguousarray(image, np.uint8)
        data = pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        chunks = self._chunks(self._lib.mtmd_bitmap_init(width, height, data))
        try:
            picture = self._picture(chunks, width, height)
            started = time.perf_counter()
            picture.rows = np.empty((picture.layout.n_tokens, self._model.n_embd_input), np.float32)
            towers: list[Float32] = []
            at = 0
            for i in range(self._lib.mtmd_input_chunks_size(chunks)):
                chunk = self._lib.mtmd_input_chunks_get(chunks, i)
                if self._lib.mtmd_input_chunk_get_type(chunk) == self._lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                    n = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
                    picture.rows[at : at + n] = self._encode_chunk(chunk, n, attention, towers)
                    at += n
            if attention and towers:
                picture.tower = np.concatenate(towers, axis=1)
            picture.ms = (time.perf_counter() - started) * 1e3
            return picture
        finally:
            self._lib.mtmd_input_chunks_free(chunks)

    def close(self) -> None:
        if self.handle:
            self._lib.mtmd_free(self.handle)
            self.handle = None
        self.tap.close()

    def _chunks(self, bitmap: Any) -> Any:
        """The input chunks of one bitmap, which is freed."""
        if not bitmap:
            raise ImageError("the picture could not be handed to the vision tower")
        part = self._lib.mtmd_input_part(text=None, bitmap=bitmap)
        parts = (ctypes.POINTER(self._lib.mtmd_input_part) * 1)(ctypes.pointer(part))
        chunks = self._lib.mtmd_input_chunks_init()
        status = self._lib.mtmd_tokenize_from_parts(self.handle, chunks, parts, 1, False)
        self._lib.mtmd_bitmap_free(bitmap)
        if status != 0:
            self._lib.mtmd_input_chunks_free(chunks)
            raise ImageError(f"the vision tower refused the picture (code {status})")
        return chunks

    def _picture(self, chunks: Any, width: int, height: int) -> Picture:
        pieces: list[Piece] = []
        first = 0
        for i in range(self._lib.mtmd_input_chunks_size(chunks)):
            chunk = self._lib.mtmd_input_chunks_get(chunks, i)
            kind = self._lib.mtmd_input_chunk_get_type(chunk)
            if kind == self._lib.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t(0)
                ids = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                pieces.append(Piece(ids=tuple(ids[: count.value])))
            elif kind == self._lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                piece = self._image_piece(chunk, first)
                pieces.append(piece)
                first += piece.n
        images = [p for p in pieces if p.n]
        grid = images[0].raster if len(images) == 1 else None
        boxes = None
        if grid is not None and self.family.name != "unknown" and grid[0] * grid[1] == first:
            cell = self.tower.patch * self.tower.merge
            boxes = raster_boxes(width, height, grid[1], grid[0], cell)
        n_pos = sum(p.n_pos or len(p.ids) for p in pieces)
        return Picture(ImageLayout(first, boxes, grid, n_pos), tuple(pieces))

    def _image_piece(self, chunk: Any, first: int) -> Piece:
        n = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
        n_pos = int(self._lib.mtmd_input_chunk_get_n_pos(chunk))
        tokens = self._lib.mtmd_input_chunk_get_tokens_image(chunk)
        raster: tuple[int, int] | None
        if self._model.mrope:
            places = [self._lib.mtmd_image_tokens_get_decoder_pos(tokens, 0, i) for i in range(n)]
            relative = np.array([(p.t, p.y, p.x) for p in places], np.int32).reshape(n, 3)
            raster = (int(relative[:, 1].max()) + 1, int(relative[:, 2].max()) + 1)
        else:
            relative = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
            side = round(n**0.5)
            raster = (side, side) if self.family.fixed and side * side == n else None
        return Piece(first=first, n=n, relative=relative, n_pos=n_pos, raster=raster)

    def _encode_chunk(self, chunk: Any, n: int, attention: bool, towers: list[Float32]) -> Float32:
        n_patches = n * self.tower.merge**2
        mode = TowerMode.OFF
        if attention and self.family.name != "unknown":
            mode = TowerMode.CLS if self.tower.cls else TowerMode.RECEIVED
        self.tap.tower_begin(self.tower.n_layer, n_patches, n_patches if self.tower.cls else -1, mode, self.repairs)
        try:
            status = self._lib.mtmd_encode_chunk(self.handle, chunk)
        finally:
            self.tap.tower_end()
        if status != 0:
            raise UnsupportedModel(f"the vision tower failed (code {status})")
        if self.repairs and self.tap.repaired() != self.repairs:
            raise UnsupportedModel("the vision tower's graph has changed: its repair did not run", "pass --stock-tower")
        if mode != TowerMode.OFF:
            towers.append(self._per_token(self.tap.tower_read(), n))
        pointer = self._lib.mtmd_get_output_embd(self.handle)
        if not pointer:
            raise Interrupted()
        return np.ctypeslib.as_array(pointer, (n, self._model.n_embd_input)).copy()

    def _per_token(self, patches: Float32, n: int) -> Float32:
        """(n_layer, n_patches) in tower order -> (n_layer, n) in token order, merged patches summed."""
        if self.family.token_of_patch is None:
            return patches
        owner = self.family.token_of_patch(patches.shape[1], self.tap.window_index())
        out = np.zeros((patches.shape[0], n), np.float32)
        np.add.at(out.T, owner, patches.T)
        return out
