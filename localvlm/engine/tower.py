"""Pictures to embedding rows through libmtmd, with the tower's attention and the repairs of the tap."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import ImageLayout, LoadOptions
from localvlm.engine.families import Block, Cut, Family, Patches, Tile, describe, draw
from localvlm.engine.gguf_header import Header
from localvlm.engine.image_cache import ImageCache
from localvlm.engine.last_block import LAST_BLOCK, add_block
from localvlm.engine.llama import Model, flash_attention, last_log_lines, short_of_memory, thread_count
from localvlm.engine.native import REPAIRS, Tap, TowerMode
from localvlm.engine.price import tile_price
from localvlm.engine.shared_tower import Member, Output, Towers
from localvlm.engine.token_table import vector
from localvlm.errors import ImageError, Interrupted, LocalvlmError, NotEnoughMemory, UnsupportedModel

__all__ = ["Picture", "Piece", "VisionTower", "failure"]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class Piece:
    """A stretch of the prompt that a picture becomes: wrapper tokens (``ids``), or rows of the projector.

    Attributes:
        ids: text; the rest is empty then.
        first: index of the first row among the picture's rows.
        token: (n,) int32 index of each row among the picture's image tokens; -1: it shows nothing and always stays.
        relative: (n, 3) int32 t, y, x from where the piece begins.
        n_pos: positions that the piece takes.
    """

    ids: tuple[int, ...] = ()
    first: int = 0
    token: Int32 = field(default_factory=lambda: np.zeros(0, np.int32))
    relative: Int32 = field(default_factory=lambda: np.zeros((0, 3), np.int32))
    n_pos: int = 0

    @property
    def n(self) -> int:
        return len(self.token)


@dataclass
class Picture:
    """A laid out, and after encoding also encoded, picture.

    Attributes:
        pieces: what stands for it in the prompt.
        before, after: control texts around the pieces, to be tokenised together with the text that the picture stands
            in, as processors do.
        size: width, height in pixels.
        places: (n, 2) int32 tile, and row among those of the tile, of each of its rows in the prompt; tile -1: the
            family's row end.
        tiles: by number the rows of the tiles encoded so far, and the row end as tile -1, (n, width) each.
        tower, shared: see :class:`localvlm.engine.api.Encoded`.
        looked: tiles whose attention is in ``tower``.
        outputs: of the tower, kept for other VLMs while the picture is there.
        ms: that the last encoding took.
    """

    layout: ImageLayout
    pieces: tuple[Piece, ...]
    before: str = ""
    after: str = ""
    size: tuple[int, int] = (0, 0)
    places: Int32 = field(default_factory=lambda: np.zeros((0, 2), np.int32))
    tiles: dict[int, Float32] = field(default_factory=dict)
    tower: Float32 | None = None
    looked: set[int] = field(default_factory=set)
    shared: int = 0
    outputs: list[Output] = field(default_factory=list)
    ms: float = 0.0

    @property
    def n_encoded(self) -> int:
        """Tiles encoded so far."""
        return len(self.tiles.keys() - {-1})

    @property
    def tokens(self) -> Int32:
        """(n,) int32 index of each row among the picture's image tokens; -1: it shows nothing."""
        return np.concatenate([piece.token for piece in self.pieces if piece.n])

    def rows_of(self, tokens: Int32) -> Int32:
        """(n,) int32 index of each of these image tokens among the picture's rows."""
        shown = np.flatnonzero(self.tokens >= 0).astype(np.int32)
        where = np.empty(len(shown), np.int32)
        where[self.tokens[shown]] = shown
        return where[tokens]

    def with_rows(self, tokens: Int32, rows: Float32) -> Picture:
        """The same with other rows at these image tokens, all of tiles that are encoded."""
        tiles = {number: found.copy() for number, found in self.tiles.items()}
        for (tile, at), row in zip(self.places[self.rows_of(tokens)].tolist(), rows, strict=True):
            tiles[tile][at] = row
        tower = None if self.tower is None else self.tower.copy()
        return replace(self, tiles=tiles, tower=tower, looked=set(self.looked), outputs=list(self.outputs))

    def needs(self, keep: Int32 | None) -> set[int]:
        """Tiles whose rows may be in a prompt that keeps the tokens ``keep``, or all; rows without a token count."""
        tokens, tile = self.tokens, self.places[:, 0]
        return set(tile.tolist()) if keep is None else set(tile[(tokens < 0) | np.isin(tokens, keep)].tolist())

    def at(self, rows: Int32) -> Float32:
        """(n, width) what the projector gave for those of the picture's rows."""
        tile, row = self.places[rows].T
        out = np.empty((len(rows), next(iter(self.tiles.values())).shape[1]), np.float32)
        for number in np.unique(tile).tolist():
            out[tile == number] = self.tiles[number][row[tile == number]]
        return out


def failure(what: str) -> LocalvlmError:
    """An error with llama.cpp's last words."""
    log = last_log_lines()
    short = [line for line in log if "failed" in line and short_of_memory(line)]
    if short:
        return NotEnoughMemory(
            f"{what}: {short[0].strip()[:300]}", "lower --image-max-tokens, or pass -ngl 0 on a small GPU"
        )
    return UnsupportedModel(f"{what}: {log[-1].strip() if log else 'no reason given'}")


class VisionTower:
    """One mtmd context and its tap."""

    def __init__(self, path: Path, model: Model, options: LoadOptions, header: Header, towers: Towers) -> None:
        from llama_cpp import mtmd_cpp

        self._lib, self._model = mtmd_cpp, model
        family = describe(header, options.image_tokens)
        self.family: Family = replace(family, cut=None) if options.stock_tiling else family
        stock = options.stock_tower or not options.tap
        self.repair_names = () if stock else family.repairs
        self.repairs = sum(REPAIRS[name] for name in self.repair_names if name != LAST_BLOCK)
        unmended = LAST_BLOCK in family.repairs and stock
        self.tower = replace(family.tower, n_layer=family.tower.n_layer - unmended)
        self._header = header
        how = family.name, self.repair_names, self.tower, options.tap, options.gpu_layers != 0, thread_count(options)
        self._shared = Member(towers, header, family.row_end, how)
        self.fingerprint = self._shared.fingerprint if options.tap else ""
        """Equal for VLMs of which one goes on from what the other's tower gave; "" for one that does not."""
        self._kept = ImageCache.of(header, options, (*how, family.bounds))
        self._end: Float32 | None = None
        self.tap = Tap(path.name, thread_count(options), options.gpu_layers != 0)
        params = mtmd_cpp.mtmd_context_params_default()
        params.use_gpu = options.gpu_layers != 0
        params.print_timings = False
        params.n_threads = thread_count(options)
        params.warmup = False
        params.flash_attn_type = self._flash_attention = flash_attention(options)
        if not options.stock_tiling:
            params.image_min_tokens, params.image_max_tokens = family.bounds
        if options.tap:
            params.cb_eval = type(params.cb_eval)(self.tap.function("lv_tap_eval"))
            params.cb_eval_user_data = self.tap.user_data
        self.handle = mtmd_cpp.mtmd_init_from_file(os.fsencode(path), model.handle, params)
        if not self.handle:
            raise failure(f"projector '{path.name}' cannot be loaded")
        if not mtmd_cpp.mtmd_support_vision(self.handle):
            self.close()
            raise UnsupportedModel(f"projector '{path.name}' has no vision tower")
        if LAST_BLOCK in self.repair_names and not add_block(mtmd_cpp._libmtmd, self.handle, header):
            self.close()
            raise UnsupportedModel(
                f"projector '{path.name}' lacks a block, and this llama.cpp cannot be told", "pass --stock-tower"
            )
        self.causal = not mtmd_cpp.mtmd_decode_use_non_causal(self.handle, None)

    def lay_out(self, width: int, height: int) -> Picture:
        """Where the tokens of a width x height picture lie, without encoding it."""
        if self.family.cut is not None:
            return self._laid(self.family.cut(width, height), width, height)
        with self._chunks(width, height, None) as chunks:
            return self._stock_laid(chunks)

    def encode(self, image: RGB, attention: bool, keep: Int32 | None = None, onto: Picture | None = None) -> Picture:
        """Encodes (height, width, 3) uint8 RGB, as far as the tokens ``keep`` need it and ``onto`` lacks it: the rows,
        or the attention.

        Raises:
            Interrupted: the tap was cancelled.
        """
        height, width = image.shape[:2]
        pixels = np.ascontiguousarray(image, np.uint8)
        if self.family.cut is None:
            return onto or self._stock_encode(pixels)
        cut = self.family.cut(width, height)
        picture = onto or self._laid(cut, width, height)
        started = time.perf_counter()
        known = picture.tiles.keys() & picture.looked if attention else picture.tiles.keys()
        wanted = sorted(picture.needs(keep) - known - {-1})
        tiles = [t for block in cut if isinstance(block, Block) for t in block.tiles]
        if attention and picture.tower is None:
            picture.tower = np.full((self.tower.n_layer, picture.layout.n_tokens), np.nan, np.float32)
        for number, drawn in zip(wanted, draw(pixels, [tiles[i] for i in wanted]), strict=True):
            rows, mass, shared = self._tile(tiles[number], drawn, attention, picture)
            picture.shared += shared and number not in picture.tiles
            picture.tiles.setdefault(number, rows)
            if picture.tower is not None and mass is not None:
                here = (picture.places[:, 0] == number) & (picture.tokens >= 0)
                picture.tower[:, picture.tokens[here]] = mass[:, picture.places[here, 1]]
                picture.looked.add(number)
        picture.ms = (time.perf_counter() - started) * 1e3
        return picture

    @property
    def runs(self) -> str:
        """How, for people."""
        return f"tower: flash attention {'on' if self._flash_attention == 1 else 'automatic'}"

    def price(self, model: Header) -> float:
        """See :func:`localvlm.engine.price.tile_price`."""
        return tile_price(model, self._header, self.tower)

    def close(self) -> None:
        if self.handle:
            self._lib.mtmd_free(self.handle)
            self.handle = None
            self._shared.leave()
        self.tap.close()

    # pictures cut by us

    def _laid(self, cut: Cut, width: int, height: int) -> Picture:
        pieces: list[Piece] = []
        boxes: list[Float32] = []
        places: list[Int32] = []
        at = [i for i, part in enumerate(cut) if isinstance(part, Block)]
        before, after = ("".join(map(str, texts)) for texts in (cut[: at[0]], cut[at[-1] + 1 :]))
        n_pos = sum(len(self._model.vocabulary.tokenize_run([(text, True)])) for text in (before, after) if text)
        first = n_tokens = n_tiles = 0
        for part in cut[at[0] : at[-1] + 1]:
            if isinstance(part, str):
                ids = self._model.vocabulary.tokenize_run([(part, True)])
                pieces.append(Piece(ids=tuple(int(i) for i in ids)))
                n_pos += len(ids)
                continue
            shows = part.shows()
            token = np.where(shows, n_tokens + np.cumsum(shows) - 1, -1).astype(np.int32)
            relative, taken = self._relative(part)
            pieces.append(Piece((), first, token, relative, taken))
            boxes.append(part.boxes(width, height)[shows])
            place = part.places()
            places.append(np.where(place[:, :1] < 0, place, place + np.array([n_tiles, 0], np.int32)))
            first, n_tokens, n_pos = first + part.n, n_tokens + int(shows.sum()), n_pos + taken
            n_tiles += len(part.tiles)
        blocks = [p for p in cut if isinstance(p, Block)]
        grid = blocks[0].raster if len(blocks) == 1 else None
        place = np.concatenate(places)
        tile = place[np.concatenate([p.token for p in pieces if p.n]) >= 0, 0]
        layout = ImageLayout(n_tokens, np.concatenate(boxes), grid, n_pos, len(np.unique(tile)), tile)
        ends = {-1: self._row_end()[None]}
        return Picture(layout, tuple(pieces), before, after, (width, height), place, ends)

    def _relative(self, block: Block) -> tuple[Int32, int]:
        """Positions of a block's rows from where it begins, and how many it takes.

        M-RoPE (Qwen2-VL, 2409.12191): a picture of R x C tokens that begins at p gives its token (r, c) the place
        (p, p + r, p + c), and text goes on at p + max(R, C).
        """
        n = block.n
        if self.family.text_positions or not self._model.mrope:
            return np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1), n
        if block.raster is None or block.raster[0] * block.raster[1] != n:
            raise UnsupportedModel("this family's tiles have no place in an M-RoPE model", "pass --stock-tiling")
        rows, columns = block.raster
        place = np.zeros((rows, columns, 3), np.int32)
        place[..., 1], place[..., 2] = np.arange(rows)[:, None], np.arange(columns)
        return place.reshape(-1, 3), max(rows, columns)

    def _row_end(self) -> Float32:
        """(width,) the row that the family puts after each row of tokens."""
        if not self.family.row_end:
            return np.zeros(self._model.n_embd_input, np.float32)
        if self._end is None:
            self._end = vector(self._header, self.family.row_end)
        return self._end

    def _tile(self, tile: Tile, pixels: RGB, attention: bool, picture: Picture) -> tuple[Float32, Float32 | None, bool]:
        """Rows (n, width) of a tile, and its attention (n_layer, n) if asked, merged patches summed: those of another
        process, if they were kept. If the same tower of another VLM has run on these pixels, which is told last, the
        projector goes on from there.
        """
        width = self._model.n_embd_input
        kept = self._kept.find(pixels, tile.n, width, self.tower.n_layer if attention else 0)
        if kept is not None:
            return *kept, False
        rows, mass, shared = self._run(tile, pixels, attention, picture)
        self._kept.keep(pixels, rows, mass)
        return rows, mass, shared

    def _run(self, tile: Tile, pixels: RGB, attention: bool, picture: Picture) -> tuple[Float32, Float32 | None, bool]:
        """As :meth:`_tile`, in this process."""
        known = self._shared.find(pixels, attention)
        height, width = pixels.shape[:2]
        patches = Patches(height // self.tower.patch, width // self.tower.patch, tile)
        n_patches = patches.rows * patches.columns
        mode = TowerMode.OFF
        if attention and known is None:
            mode = TowerMode.CLS if self.tower.cls else TowerMode.RECEIVED
        with self._chunks(width, height, pixels) as chunks:
            chunk = next(self._image_chunks(chunks))
            n = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
            if n != tile.n:
                raise UnsupportedModel(
                    f"llama.cpp makes {n} tokens of a {width}x{height} tile where {self.family.name} has {tile.n}",
                    "pass --stock-tiling",
                )
            self.tap.tower_begin(self.tower.n_layer, n_patches, n_patches if self.tower.cls else -1, mode, self.repairs)
            self.tap.tower_cut(self.tower.last, None if known is None else known.rows)
            rows = self._encode_chunk(chunk, n)
        if known is not None:
            picture.outputs.append(known)
            return rows, known.attention if attention else None, True
        mass = self._mass(patches, n) if attention else None
        kept = self.tap.tower_cut_read()
        output = None if kept is None else self._shared.keep(pixels, kept, mass)
        picture.outputs += [output] if output is not None else []
        return rows, mass, False

    def _mass(self, patches: Patches, n: int) -> Float32:
        """(n_layer, n) attention of the run just ended, over the tokens of a tile."""
        mass = self.tap.tower_read()
        owner = self.family.token_of_patch(replace(patches, window=self.tap.window_index()))
        out = np.zeros((mass.shape[0], n), np.float32)
        np.add.at(out.T, owner, mass.T)
        return out

    # pictures cut by llama.cpp

    def _stock_laid(self, chunks: Any) -> Picture:
        pieces: list[Piece] = []
        first = n_pos = 0
        for i in range(self._lib.mtmd_input_chunks_size(chunks)):
            chunk = self._lib.mtmd_input_chunks_get(chunks, i)
            kind = self._lib.mtmd_input_chunk_get_type(chunk)
            if kind == self._lib.MTMD_INPUT_CHUNK_TYPE_TEXT:
                count = ctypes.c_size_t(0)
                ids = self._lib.mtmd_input_chunk_get_tokens_text(chunk, ctypes.byref(count))
                pieces.append(Piece(ids=tuple(ids[: count.value])))
            elif kind == self._lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                piece = self._stock_piece(chunk, first)
                pieces.append(piece)
                first += piece.n
            n_pos += pieces[-1].n_pos or len(pieces[-1].ids)
        places = np.stack([np.zeros(first, np.int32), np.arange(first, dtype=np.int32)], axis=1)
        return Picture(ImageLayout(first, None, None, n_pos), tuple(pieces), places=places)

    def _stock_piece(self, chunk: Any, first: int) -> Piece:
        n = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
        n_pos = int(self._lib.mtmd_input_chunk_get_n_pos(chunk))
        tokens = self._lib.mtmd_input_chunk_get_tokens_image(chunk)
        relative = np.repeat(np.arange(n, dtype=np.int32)[:, None], 3, axis=1)
        if self._model.mrope:
            places = [self._lib.mtmd_image_tokens_get_decoder_pos(tokens, 0, i) for i in range(n)]
            relative = np.array([(p.t, p.y, p.x) for p in places], np.int32).reshape(n, 3)
        return Piece((), first, np.arange(first, first + n, dtype=np.int32), relative, n_pos)

    def _stock_encode(self, pixels: RGB) -> Picture:
        height, width = pixels.shape[:2]
        with self._chunks(width, height, pixels) as chunks:
            picture = self._stock_laid(chunks)
            started = time.perf_counter()
            rows: list[Float32] = []
            for chunk in self._image_chunks(chunks):
                n = int(self._lib.mtmd_input_chunk_get_n_tokens(chunk))
                n_patches = n * self.tower.merge**2
                cls = n_patches if self.tower.cls else -1
                self.tap.tower_begin(self.tower.n_layer, n_patches, cls, TowerMode.OFF, self.repairs)
                rows.append(self._encode_chunk(chunk, n))
            picture.size = width, height
            picture.tiles[0] = np.concatenate(rows)
            picture.ms = (time.perf_counter() - started) * 1e3
            return picture

    # libmtmd

    @contextmanager
    def _chunks(self, width: int, height: int, pixels: RGB | None) -> Iterator[Any]:
        """The input chunks of one picture."""
        data = None if pixels is None else pixels.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        bitmap = self._lib.mtmd_bitmap_init(width, height, data)
        if not bitmap:
            raise ImageError("the picture could not be handed to the vision tower")
        part = self._lib.mtmd_input_part(text=None, bitmap=bitmap)
        parts = (ctypes.POINTER(self._lib.mtmd_input_part) * 1)(ctypes.pointer(part))
        chunks = self._lib.mtmd_input_chunks_init()
        status = self._lib.mtmd_tokenize_from_parts(self.handle, chunks, parts, 1, False)
        self._lib.mtmd_bitmap_free(bitmap)
        try:
            if status != 0:
                raise ImageError(f"the vision tower refused the picture (code {status})")
            yield chunks
        finally:
            self._lib.mtmd_input_chunks_free(chunks)

    def _image_chunks(self, chunks: Any) -> Iterator[Any]:
        for i in range(self._lib.mtmd_input_chunks_size(chunks)):
            chunk = self._lib.mtmd_input_chunks_get(chunks, i)
            if self._lib.mtmd_input_chunk_get_type(chunk) == self._lib.MTMD_INPUT_CHUNK_TYPE_IMAGE:
                yield chunk

    def _encode_chunk(self, chunk: Any, n: int) -> Float32:
        """Rows (n, width) of a chunk; the tap's tower_begin was called."""
        try:
            status = self._lib.mtmd_encode_chunk(self.handle, chunk)
        finally:
            self.tap.tower_end()
        if status != 0:
            raise failure(f"the vision tower failed (code {status})")
        if self.repairs and self.tap.repaired() != self.repairs:
            raise UnsupportedModel("the vision tower's graph has changed: its repair did not run", "pass --stock-tower")
        pointer = self._lib.mtmd_get_output_embd(self.handle)
        if not pointer:
            raise Interrupted()
        return np.ctypeslib.as_array(pointer, (n, self._model.n_embd_input)).copy()
