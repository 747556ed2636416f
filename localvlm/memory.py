"""What a pair takes of the machine's memory, told from the headers of its files in milliseconds, before it is loaded.

Sizes are those that llama.cpp reserves: buffers of a graph follow from its widest step (``ggml-alloc``), KV caches from
their cells. Weights are counted once. Where llama.cpp keeps them in another order (``CPU_REPACK``, ``repack.cpp``), the
pages of the file stay mapped beside that copy until the system wants them back: they are told apart, and not needed.
``python -m tests.memory`` holds predictions against what workers took.
"""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import partial

from localvlm.answers import AskOptions, Pair, VlmFiles
from localvlm.engine.api import LoadOptions
from localvlm.engine.gguf_header import Header, TensorInfo
from localvlm.engine.llama import DEFAULT_CTX, MAX_OUTPUTS, MICRO_BATCH, PADDING, ROOM
from localvlm.engine.shared_tower import LIMIT
from localvlm.planning.shapes import VlmShape
from localvlm.room import told

__all__ = ["TEXT", "Asked", "Cuts", "Need", "VlmNeed", "asked_of", "pair_need", "table", "vlm_need"]

PROCESS = 69 << 20
"""Bytes of a worker that has loaded its libraries, cut a picture and rendered a prompt: 46 MiB before."""
TOKEN = 250
"""Bytes of each token of a tokenizer."""
HOST = 6
"""Copies of a tile's pixels, in single precision, on their way to the tower."""
CANVAS, PICTURE = 4, 8
"""Bytes of a pixel of all tiles, and of the picture as it was given, while it is cut."""
WINDOWED = 2
"""Masks of patches over patches, in single precision, of a tower that attends within windows."""
REDUCTIONS = 9 * 2
"""Numbers kept for each layer, head and image token while a guide's attention is recorded, and as they are sent."""
BETWEEN = 3
"""Copies of hidden rows on their way from one context to the next."""
LAID_OUT = 13 * 1288**2
"""Bytes that a tower for pictures of any size takes while it is loaded, when a worker holds less of what it will hold:
llama.cpp lays out one of 1288 x 1288."""
TEXT = 128
"""Rows of a prompt beside its pictures and its question."""
_CELL = {"f16": 2.0, "q8_0": 34 / 32}
_REPACKED = {
    "x86": {2: 8, 12: 8, 20: 8, 39: 8},
    "arm": {2: 4, 8: 4, 12: 8, 13: 8, 14: 8, 20: 4, 39: 4},
}
"""ggml types that ``repack.cpp`` puts into another order on CPUs with AVX2, and with dot products, and the number that
rows must be a multiple of: Q4_0, Q4_K, IQ4_NL and MXFP4; on ARM, Q8_0, Q5_K and Q6_K too."""


Cuts = Callable[[int, int], Sequence[tuple[int, int]]]


@dataclass(frozen=True)
class Asked:
    """What a pair is asked: ``sizes`` of pictures (width, height), rows of ``text``, the longest answer, and the share
    of its image tokens that the model is given. ``cuts``: (image tokens that enter layer 0, layers of the model) ->
    layers before which some leave, and how many stay; each such layer begins another context.
    """

    sizes: tuple[tuple[int, int], ...] = ((1024, 768),)
    text: int = TEXT
    max_tokens: int = 256
    kept: float = 1.0
    cuts: Cuts | None = None


def asked_of(options: AskOptions) -> Asked:
    """What a question takes that is asked with ``options``."""
    from localvlm.pruning import IN_LLM

    share = options.keep if isinstance(options.keep, float) else 1.0
    inside = options.layer or options.preset or options.method in (*IN_LLM, "none")
    return Asked(max_tokens=options.max_tokens, kept=1.0 if inside else share, cuts=_cuts(options, share))


def _cuts(options: AskOptions, share: float) -> Cuts | None:
    """Where image tokens leave between the model's layers, as :class:`Asked` has it."""
    from localvlm.pruning import IN_LLM, METHODS, preset_named

    if options.preset:
        preset = preset_named(options.preset)
        return lambda n, n_layer: [(preset.layer_in(n_layer), round(preset.keep * n))]
    if options.layer:
        return lambda n, _: [(options.layer, round(share * n))]
    method = IN_LLM.get(options.method)
    if method is not None and method.trained is None:
        return partial(method.cuts, share)
    if method is not None or (options.method in METHODS and METHODS[options.method].within is not None):
        return lambda n, n_layer: [(n_layer - 1, n)]  # what was trained says where, and whether they leave
    return None


@dataclass(frozen=True)
class VlmNeed:
    """Bytes of one VLM.

    Attributes:
        weights: of the language model.
        cache: KV cells.
        buffers: of the language model's graphs.
        projector: weights of the tower and the projector.
        image: buffers of the tower, and encoded pictures.
        vocabulary: tokenizer.
        copies: those of the weights that lie beside the file's pages, repacked or on a GPU.
        gpu: how much of all that is on a GPU.
    """

    weights: int
    cache: int
    buffers: int
    projector: int
    image: int
    vocabulary: int
    copies: int = 0
    gpu: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.buffers + self.projector + self.image + self.vocabulary

    @property
    def host(self) -> int:
        """Of the machine's own memory."""
        return self.total - self.gpu


@dataclass(frozen=True)
class Need:
    """Bytes of a pair, in one worker.

    Attributes:
        low_memory: the guide is unloaded before the model is loaded.
    """

    guide: VlmNeed | None
    model: VlmNeed | None
    low_memory: bool = False

    @property
    def _each(self) -> list[VlmNeed]:
        return [vlm for vlm in (self.guide, self.model) if vlm is not None]

    def _of(self, sizes: Sequence[int]) -> int:
        return max(sizes, default=0) if self.low_memory else sum(sizes)

    @property
    def total(self) -> int:
        return PROCESS + self._of([vlm.total for vlm in self._each])

    @property
    def host(self) -> int:
        """Of the machine's own memory, without what a GPU holds."""
        return PROCESS + self._of([vlm.host for vlm in self._each])

    @property
    def gpu(self) -> int:
        return self._of([vlm.gpu for vlm in self._each])

    @property
    def resident(self) -> int:
        """The most that the worker is seen to hold: with pages of files that it would give back."""
        return PROCESS + self._of([vlm.host + vlm.copies for vlm in self._each])


def pair_need(
    pair: Pair, guide: LoadOptions, model: LoadOptions, asked: Asked = Asked(), *, low_memory: bool = False
) -> Need:
    """What a pair takes, loaded as ``guide`` and ``model`` say.

    Raises:
        ModelError: a file cannot be read.
    """
    return Need(
        None if pair.guide is None else vlm_need(pair.guide, guide, asked, guides=True),
        None if pair.model is None else vlm_need(pair.model, model, asked),
        low_memory,
    )


def vlm_need(files: VlmFiles, options: LoadOptions, asked: Asked = Asked(), *, guides: bool = False) -> VlmNeed:
    """What one VLM takes. A guide sees all of its image tokens, and its attention is recorded.

    Raises:
        ModelError: a file cannot be read.
    """
    shape = VlmShape(files)
    model, mmproj = shape.headers
    tokens, image = _pictures(shape, options, asked)
    image += tokens * _width(model) * 4
    seen = tokens if guides else round(tokens * asked.kept)
    stages = _stages(seen, _layers(model), None if guides else asked)
    rows = [n + asked.text for _, n in stages]
    cells = [_cells(model, options, n, asked.max_tokens) for n in rows]
    if guides:
        heads = max(model.integer(f"{model.architecture}.attention.head_count"), 1)
        image += REDUCTIONS * _layers(model) * heads * tokens * 4
    placed = list(_placed(model, options.gpu_layers))
    weights = sum(t.n_bytes for t, _ in placed)
    on_gpu = sum(t.n_bytes for t, there in placed if there)
    copies = on_gpu + sum(t.n_bytes for t, there in placed if not there and _repacked(t))
    cache, there = _caches(model, [layers for layers, _ in stages], cells, options)
    buffers, projector = _all_buffers(model, cells, rows), sum(t.n_bytes for t in mmproj.tensors.values())
    gpu = 0 if not options.gpu_layers else on_gpu + there + buffers + projector + image
    n_tokens = model.array_lengths.get("tokenizer.ggml.tokens", 0)
    return VlmNeed(weights, cache, buffers, projector, image, TOKEN * n_tokens, copies, gpu)


# language model


def _width(model: Header) -> int:
    return model.integer(f"{model.architecture}.embedding_length")


def _layers(model: Header) -> int:
    return model.integer(f"{model.architecture}.block_count")


def _cells(model: Header, options: LoadOptions, rows: int, answer: int) -> int:
    """KV cells that :class:`localvlm.engine.llama.Context` makes for a prompt and its answer."""
    trained = model.integer(f"{model.architecture}.context_length") or DEFAULT_CTX
    most = _padded(options.n_ctx or min(trained, DEFAULT_CTX))
    window = model.integer(f"{model.architecture}.attention.sliding_window")
    if window or "rope_factors_long.weight" in model.tensors:
        return most
    return min(_padded(rows + max(answer, ROOM)), most)


def _stages(seen: int, n_layer: int, asked: Asked | None) -> list[tuple[int, int]]:
    """(layers, image tokens) of each context that a prompt goes through, in this order."""
    cuts = list(asked.cuts(seen, n_layer)) if asked is not None and asked.cuts is not None else []
    starts = [(0, seen)]
    for i, (layer, n) in enumerate(cuts):
        if n < starts[-1][1] or i == len(cuts) - 1:  # where none leave, the context before goes on
            starts.append((layer, n))
    ends = [*(layer for layer, _ in starts[1:]), n_layer]
    return [(end - first, n) for (first, n), end in zip(starts, ends, strict=True)]


def _caches(model: Header, layers: Sequence[int], cells: Sequence[int], options: LoadOptions) -> tuple[int, int]:
    """The most that the KV cells of contexts take, which are opened one after another, and how much of it on a GPU.

    Each is made with all layers, and gives those that it does not run back to the system, where that takes them
    (``native/stage.c``). The last one is opened with the model, with the fewest cells there are.
    """
    each = [_cache(model, n, options) for n in cells]
    gpu = sum(there for _, there in each)
    if len(each) == 1 or options.gpu_layers or sys.platform != "linux":
        return sum(n for n, _ in each), gpu
    opened, held, most = _cache(model, min(PADDING, cells[-1]), options)[0], 0, 0
    for i, ((n, _), run) in enumerate(zip(each, layers, strict=True)):
        most = max(most, held + n + (opened if i < len(each) - 1 else 0))
        held += n * run // _layers(model)
    return most, gpu


def _all_buffers(model: Header, cells: Sequence[int], rows: Sequence[int]) -> int:
    """Of the graphs of all contexts, of which the last alone gives logits, and the rows between two of them."""
    outputs = [1] * (len(rows) - 1) + [MAX_OUTPUTS]
    graphs = sum(_buffers(model, *each) for each in zip(cells, rows, outputs, strict=True))
    return graphs + BETWEEN * max(rows[:-1], default=0) * _width(model) * 4


def _padded(cells: int) -> int:
    return -(-cells // PADDING) * PADDING


def _placed(model: Header, gpu_layers: int) -> Iterator[tuple[TensorInfo, bool]]:
    """Each tensor, and whether it is on a GPU: of ``gpu_layers`` the first one is the output, then the last layers."""
    first = _first_on_gpu(model, gpu_layers)
    for name, tensor in model.tensors.items():
        part = name.split(".")
        at = int(part[1]) if part[0] == "blk" and part[1].isdigit() else _layers(model)
        yield tensor, part[0] != "token_embd" and at >= first


def _first_on_gpu(model: Header, gpu_layers: int) -> int:
    layers = _layers(model)
    return max(layers + 1 - gpu_layers, 0) if gpu_layers >= 0 else 0


def _repacked(tensor: TensorInfo) -> bool:
    """Whether llama.cpp keeps a matrix in another order; those of which rows are looked up stay as they are."""
    arm = platform.machine().lower() in ("arm64", "aarch64")
    rows = _REPACKED["arm" if arm else "x86"].get(tensor.type)
    return rows is not None and len(tensor.shape) > 1 and tensor.shape[1] % rows == 0 and "embd" not in tensor.name


def _cache(model: Header, cells: int, options: LoadOptions) -> tuple[int, int]:
    """Bytes of the KV cells of all layers, and of those on a GPU."""
    arch, layers = model.architecture, _layers(model)
    heads = max(model.integer(f"{arch}.attention.head_count"), 1)
    each = model.integers(f"{arch}.attention.head_count_kv")
    if len(each) != layers:
        each = (model.integer(f"{arch}.attention.head_count_kv", heads),) * layers
    key = model.integer(f"{arch}.attention.key_length", _width(model) // heads)
    channels = key + model.integer(f"{arch}.attention.value_length", key)
    cell = _CELL[options.kv_type] * channels
    first = _first_on_gpu(model, options.gpu_layers) if options.gpu_layers else layers
    return round(cells * cell * sum(each)), round(cells * cell * sum(each[first:]))


def _buffers(model: Header, cells: int, rows: int, outputs: int) -> int:
    """What the ``rows`` of a prompt touch in the widest step of a batch: the gated feed-forward part, three of its
    width beside four rows, and the mask; or the logits. And what rows are converted to before they meet weights.
    """
    arch, width = model.architecture, _width(model)
    inner = max(model.integers(f"{arch}.feed_forward_length") or (model.integer(f"{arch}.feed_forward_length"),))
    used = model.integer(f"{arch}.expert_used_count")
    inner = max(inner, used * model.integer(f"{arch}.expert_feed_forward_length"))
    rows, n_tokens = min(MICRO_BATCH, cells, rows), model.array_lengths.get("tokenizer.ggml.tokens", 0)
    mask = rows * cells * 2
    feed_forward = rows * (3 * inner + 4 * width) * 4 + mask
    logits = min(outputs, rows) * (n_tokens + width) * 4 + rows * width * 4 + mask
    return max(feed_forward, logits) + rows * inner * 2


# vision tower


def _pictures(shape: VlmShape, options: LoadOptions, asked: Asked) -> tuple[int, int]:
    """Image tokens of all pictures, and the bytes it takes to encode them."""
    if not asked.sizes:
        return 0, 0
    mmproj, family = shape.headers[1], shape.family(options.image_tokens)
    views = [shape.view(width, height, options.image_tokens) for width, height in asked.sizes]
    side = family.tower.image_size // max(family.tower.patch, 1)
    square = side**2, side**2 // max(family.tower.merge, 1) ** 2
    tiles = [tile for view in views for tile in ((square,) if view is None else view.tiles)]
    tokens = sum(square[1] if view is None else view.tokens for view in views)
    width = mmproj.integer("clip.vision.embedding_length")
    patches = max((n for n, _ in tiles), default=0)
    kept = min(sum(n for n, _ in tiles) * width * 4, LIMIT)
    pixels = patches * family.tower.patch**2
    cut = CANVAS * pixels * len(tiles) + PICTURE * max(w * h for w, h in asked.sizes)
    n_bytes = _tower(mmproj, patches, pixels) + kept + HOST * pixels * 12 + cut
    return tokens, max(n_bytes, LAID_OUT) if shape.any_size else n_bytes


def _tower(mmproj: Header, patches: int, pixels: int) -> int:
    """Buffers of one pass: the feed-forward part, before and after its nonlinearity, and what it is converted to."""
    width, inner = (mmproj.integer(f"clip.vision.{key}_length") for key in ("embedding", "feed_forward"))
    gated = any(".ffn_gate." in name for name in mmproj.tensors)
    step = 3 * inner + 4 * width if gated else 2 * inner
    windows = WINDOWED * patches**2 * 4 if "clip.vision.n_wa_pattern" in mmproj.values else 0
    return patches * (step * 4 + inner * 2) + pixels * 12 + windows


def table(need: Need) -> str:
    """The parts of a need, in one line."""
    parts = []
    for role, vlm in (("guide", need.guide), ("model", need.model)):
        if vlm is not None:
            names = (f.name for f in fields(vlm) if f.name not in ("copies", "gpu"))
            sizes = ", ".join(f"{name} {told(getattr(vlm, name))}" for name in names)
            parts.append(f"{role} {told(vlm.total)}: {sizes}" + (f"; {told(vlm.gpu)} of it on the GPU" * bool(vlm.gpu)))
    return "; ".join(parts)
