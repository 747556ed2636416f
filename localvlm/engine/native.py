"""The attention tap of ``native/localvlm_tap.h`` as a Python object."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.errors import AttentionCheckFailed, Interrupted, UnsupportedModel

__all__ = ["ROW_GENERATED", "ROW_LAST", "ROW_PROMPT", "Tap", "TowerMode", "library"]

ABI = 4
ROW_PROMPT, ROW_GENERATED, ROW_LAST = 1, 2, 4
REDUCTIONS = 3
REPAIRS = {"llava-cls-order": 1, "internvl-positions": 2, "siglip-gelu": 4}
"""Repairs of llama.cpp's towers by name (enum lv_repair)."""
_E_CHECK, _E_CANCELLED = -4, -5
_LAYER_TOLERANCE = 0.05
"""Largest allowed difference of the self-check, as a share of the row's largest sum of p |v|. llama.cpp sums v in half
precision: 0.012 was measured on a sound model over 630 cells, 0.05 over 900, and more is allowed over more than 256; a
wrong scale, mask or head is off by far more."""


class TowerMode:
    """What to read from a vision tower (enum lv_tower_mode)."""

    OFF = 0
    CLS = 1
    RECEIVED = 2


@cache
def library() -> ctypes.CDLL:
    """Loads the tap beside llama.cpp.

    Raises:
        UnsupportedModel: the tap was built against another llama.cpp than the one loaded.
    """
    import llama_cpp  # noqa: F401  maps libggml, whose symbols the tap resolves against

    from localvlm._native_path import native_library

    lib = ctypes.CDLL(str(native_library()))
    ptr, i32, f32p = ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_float)
    i32p, u8p = ctypes.POINTER(ctypes.c_int32), ctypes.POINTER(ctypes.c_uint8)
    signatures: dict[str, tuple[Any, Sequence[Any]]] = {
        "lv_tap_guard": (ctypes.c_char_p, []),
        "lv_tap_abi": (ctypes.c_int, []),
        "lv_tap_new": (ptr, []),
        "lv_tap_free": (None, [ptr]),
        "lv_tap_error": (ctypes.c_char_p, [ptr]),
        "lv_tap_abort": (ctypes.c_bool, [ptr]),
        "lv_tap_cancel": (None, [ptr]),
        "lv_tap_cancel_reset": (None, [ptr]),
        "lv_tap_cancel_points": (ctypes.c_int, [ptr, ctypes.c_bool]),
        "lv_tap_threads": (ctypes.c_int, [ptr, i32]),
        "lv_tap_llm": (ctypes.c_int, [ptr, i32, i32]),
        "lv_tap_reset": (ctypes.c_int, [ptr, i32, ctypes.c_uint32]),
        "lv_tap_begin": (ctypes.c_int, [ptr, i32, i32p, u8p, i32p]),
        "lv_tap_end": (ctypes.c_int, [ptr]),
        "lv_tap_read": (ctypes.c_int, [ptr, i32, i32, f32p, ctypes.c_size_t]),
        "lv_tap_rows": (ctypes.c_int64, [ptr, i32]),
        "lv_tap_check": (ctypes.c_int, [ptr, ctypes.c_bool, ctypes.c_float]),
        "lv_tap_check_worst": (ctypes.c_float, [ptr]),
        "lv_stage": (ctypes.c_int, [ptr, i32, i32, i32, f32p, ctypes.c_bool]),
        "lv_stage_read": (ctypes.c_int, [ptr, f32p, ctypes.c_size_t]),
        "lv_tower_begin": (ctypes.c_int, [ptr, i32, i32, i32, ctypes.c_int, u8p, ctypes.c_uint32]),
        "lv_tower_cut": (ctypes.c_int, [ptr, i32, f32p, ctypes.c_size_t]),
        "lv_tower_cut_read": (ctypes.c_int64, [ptr, f32p, ctypes.c_size_t]),
        "lv_tower_end": (ctypes.c_int, [ptr]),
        "lv_tower_read": (ctypes.c_int, [ptr, f32p, ctypes.c_size_t]),
        "lv_tower_window_index": (ctypes.c_int64, [ptr, i32p, ctypes.c_size_t]),
        "lv_tower_repaired": (ctypes.c_uint32, [ptr]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    mismatch = lib.lv_tap_guard()
    if mismatch:
        raise UnsupportedModel(
            f"the native tap does not match the loaded llama.cpp: {mismatch.decode()}", "reinstall localvlm"
        )
    if lib.lv_tap_abi() != ABI:
        raise UnsupportedModel(f"the native tap has ABI {lib.lv_tap_abi()}, not {ABI}", "reinstall localvlm")
    return lib


def _i32(values: NDArray[np.int32] | None) -> Any:
    return None if values is None else values.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))


class Tap:
    """One ``lv_tap``: given to one llama or mtmd context as its ``cb_eval``, and outliving it.

    Args:
        name: of the model, for messages.
        threads: as many as the context decodes with.
        gpu: the graph runs on a GPU, where a cancel must be looked for between layers.
    """

    def __init__(self, name: str, threads: int, gpu: bool) -> None:
        self._lib = library()
        self._name, self._staged = name, False
        self._tap = self._lib.lv_tap_new()
        if not self._tap:
            raise MemoryError("lv_tap_new")
        self._checked(self._lib.lv_tap_threads(self._tap, threads))
        self._checked(self._lib.lv_tap_cancel_points(self._tap, gpu))
        self._shape = (0, 0, 0)

    @property
    def user_data(self) -> ctypes.c_void_p:
        return ctypes.c_void_p(self._tap)

    def function(self, name: str) -> int:
        """Address of ``lv_tap_eval`` or ``lv_tap_abort``."""
        address = ctypes.cast(getattr(self._lib, name), ctypes.c_void_p).value
        assert address is not None
        return address

    def close(self) -> None:
        if self._tap:
            self._lib.lv_tap_free(self._tap)
            self._tap = None

    def cancel(self) -> None:
        """Stops the graph in progress; callable from any thread."""
        if self._tap:
            self._lib.lv_tap_cancel(self._tap)

    @property
    def cancelled(self) -> bool:
        return bool(self._lib.lv_tap_abort(self._tap))

    def cancel_reset(self) -> None:
        self._lib.lv_tap_cancel_reset(self._tap)

    def _checked(self, status: int) -> None:
        if status >= 0:
            return
        message = (self._lib.lv_tap_error(self._tap) or b"").decode("utf-8", "replace")
        if status == _E_CANCELLED:
            raise Interrupted()
        if status == _E_CHECK:
            raise AttentionCheckFailed(
                f"the attention read from '{self._name}' is not the model's own: {message}",
                "use a method that needs no attention, such as --method grid",
            )
        if self._staged:
            raise UnsupportedModel(
                f"the layers of '{self._name}' cannot be run apart: {message}",
                "prune before the first layer (--layer 0, --method sgl)",
            )
        raise UnsupportedModel(f"attention of '{self._name}' cannot be read: {message}")

    def configure(self, n_layer: int, n_head: int) -> None:
        self._checked(self._lib.lv_tap_llm(self._tap, n_layer, n_head))
        self._shape = (n_layer, n_head, 0)

    def reset(self, n_image: int, reductions: int = REDUCTIONS) -> None:
        """Forgets all sums; the first ``reductions`` are recorded over ``n_image`` image tokens from here on."""
        self._checked(self._lib.lv_tap_reset(self._tap, n_image, (1 << reductions) - 1))
        self._shape = (*self._shape[:2], n_image)

    def begin(
        self,
        image: NDArray[np.int32],
        rows: NDArray[np.uint8],
        positions: NDArray[np.int32] | None,
    ) -> None:
        """Describes the batch of the next ``llama_decode`` (one micro-batch); each array (n_rows,)."""
        self._staged = False
        rows_pointer = rows.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        self._checked(self._lib.lv_tap_begin(self._tap, len(image), _i32(image), rows_pointer, _i32(positions)))

    def end(self) -> None:
        self._checked(self._lib.lv_tap_end(self._tap))

    def restore(self) -> None:
        """Gives the nodes that a cancel left out, of a run that was not begun, back to their graph: llama.cpp may run
        it again.
        """
        self._lib.lv_tap_end(self._tap)

    def stage(self, first: int, end: int, width: int, hidden: NDArray[np.float32] | None, keep: bool) -> None:
        """Leaves layers out of the run just begun: only those from ``first`` to ``end`` - 1 run, from ``hidden``
        (n_rows, width), what layer ``first`` - 1 gave (None where ``first`` is 0). With ``keep``, the caches of the
        layers before them keep what they hold.
        """
        self._staged = True
        pointer = None if hidden is None else hidden.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._checked(self._lib.lv_stage(self._tap, first, end, width, pointer, keep))

    def stage_read(self, n_rows: int, width: int) -> NDArray[np.float32]:
        """(n_rows, width) float32, what the last layer of the run just ended gave, where others follow it."""
        out = np.empty((n_rows, width), np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._checked(self._lib.lv_stage_read(self._tap, pointer, out.size))
        return out

    def read(self, cls: int, reduction: int) -> NDArray[np.float32]:
        """(n_layer, n_head, n_image) float32; cls 0 prompt, 1 generated, 2 last; reduction as enum lv_reduction."""
        out = np.zeros(self._shape, np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._checked(self._lib.lv_tap_read(self._tap, cls, reduction, pointer, out.size))
        return out

    def rows(self, cls: int) -> int:
        return int(self._lib.lv_tap_rows(self._tap, cls))

    def check(self, on: bool) -> None:
        self._checked(self._lib.lv_tap_check(self._tap, on, _LAYER_TOLERANCE))

    def tower_begin(self, n_layer: int, n_patches: int, cls_row: int, mode: int, repairs: int) -> None:
        self._checked(self._lib.lv_tower_begin(self._tap, n_layer, n_patches, cls_row, mode, None, repairs))
        self._tower_shape = (n_layer, n_patches)

    def tower_cut(self, layer: int, rows: NDArray[np.float32] | None) -> None:
        """Keeps what block ``layer`` gives in the run just begun, or leaves out the blocks up to it and goes on from
        ``rows`` (n,), what it gave in another context of the same tower for the same pixels.
        """
        pointer = None if rows is None else rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._checked(self._lib.lv_tower_cut(self._tap, layer, pointer, 0 if rows is None else rows.size))

    def tower_cut_read(self) -> NDArray[np.float32] | None:
        """(n,) float32 that was kept in the run just ended; None: this graph cannot be cut."""
        out = np.empty(int(self._lib.lv_tower_cut_read(self._tap, None, 0)), np.float32)
        self._lib.lv_tower_cut_read(self._tap, out.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), out.size)
        return out if out.size else None

    def tower_end(self) -> None:
        self._checked(self._lib.lv_tower_end(self._tap))

    def tower_read(self) -> NDArray[np.float32]:
        """(n_layer, n_patches) float32 head means in the tower's row order; NaN rows for layers not seen."""
        out = np.full(self._tower_shape, np.nan, np.float32)
        pointer = out.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        self._checked(self._lib.lv_tower_read(self._tap, pointer, out.size))
        return out

    def window_index(self) -> NDArray[np.int32] | None:
        """The tower's ``inv_window_idx`` input, or None if its graph had none."""
        n = int(self._lib.lv_tower_window_index(self._tap, None, 0))
        if n <= 0:
            return None
        out = np.zeros(n, np.int32)
        self._lib.lv_tower_window_index(self._tap, _i32(out), n)
        return out

    def repaired(self) -> int:
        return int(self._lib.lv_tower_repaired(self._tap))
