"""What the engine is to the layers above it: VLMs that encode, prefill, decode and show their attention.

Two implementations: :class:`localvlm.engine.client.Engine`, which runs llama.cpp in a worker process, and
:class:`localvlm.engine.fake.FakeEngine`, which needs no model. Nothing here knows of guides, pruning or pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from localvlm.errors import UsageError

__all__ = [
    "Attention",
    "Backend",
    "Completion",
    "Encoded",
    "Engine",
    "ImageLayout",
    "ImagePart",
    "LoadOptions",
    "Message",
    "Part",
    "Paused",
    "Prefilled",
    "Reuse",
    "SamplingOptions",
    "TextPart",
    "Vlm",
    "VlmInfo",
]

Float32 = NDArray[np.float32]
Int32 = NDArray[np.int32]
RGB = NDArray[np.uint8]


@dataclass(frozen=True)
class LoadOptions:
    """How to load one VLM."""

    n_ctx: int = 0
    """KV cells; 0 = the model's training context, at most 4096."""
    threads: int = 0
    """CPU threads; 0 = physical cores."""
    gpu_layers: int = 0
    """Layers offloaded to the GPU; -1 = all."""
    stock_tower: bool = False
    """Run the vision tower as llama.cpp computes it, defects included."""
    stock_tiling: bool = False
    """Let llama.cpp cut pictures into tiles; where their tokens lie is then not known."""
    image_tokens: int = 0
    """Most tokens of a picture, for families of dynamic size; 0 = the family's own bound."""
    kv_type: str = "f16"
    """Type of the KV cache: "f16", or "q8_0" in 17/32 of the memory."""
    compact_positions: bool = False
    """Number the rows of a pruned prompt without gaps, instead of giving each the position it would have unpruned."""
    cache: str = ""
    """Folder to keep what is measured of a model, for later runs; "" = none."""
    image_cache: int = 0
    """Bytes below that folder for what towers give for pictures (``engine/image_cache.py``); 0 = nothing is kept."""
    tap: bool = True
    """Without, llama.cpp runs as it is, towers unrepaired, and what needs the tap is refused. For measuring against."""


@dataclass(frozen=True)
class VlmInfo:
    """What a loaded VLM is."""

    name: str
    architecture: str
    family: str
    """Row of the table in ``engine/families``; "unknown" has no token map."""
    n_layer: int
    n_head: int
    n_embd: int
    n_vocab: int
    n_ctx: int
    n_params: int
    mrope: bool
    """Positions are (t, y, x); otherwise one number a token."""
    chat_template: str | None
    bos: str
    """Text of the begin-of-sequence token, "" if the model has none."""
    eos: str
    tower_layers: int
    """Blocks the vision tower runs."""
    tower_cls: bool
    repairs: tuple[str, ...] = ()
    """Names of the repairs applied to llama.cpp's graphs for this model."""
    notes: tuple[str, ...] = ()
    """What its files lack, or what could not be known of them."""
    runs: str = ""
    """How it is run, for people: threads, batches, KV cache, flash attention, where its weights are."""
    vocab_hash: str = ""
    """Equal for two VLMs that share a tokenizer."""
    tile_price: float = 0.0
    """One pass of the vision tower, in tokens of prefill that take as many multiplications (``engine/price.py``)."""
    tower: str = ""
    """Equal for two VLMs of which one goes on from what the other's vision tower gave (``engine/shared_tower.py``)."""

    def check_layer(self, layer: int) -> None:
        """A model may be cut before each of its layers; before layer 0 means not at all.

        Raises:
            UsageError: there is no such layer.
        """
        if not 0 <= layer < self.n_layer:
            raise UsageError(
                f"image tokens cannot be dropped before layer {layer} of '{self.name}', whose layers are "
                f"0..{self.n_layer - 1}",
                f"give a layer from 0 to {self.n_layer - 1}",
            )


@dataclass(frozen=True)
class ImageLayout:
    """Where the image tokens of one picture lie.

    Attributes:
        n_tokens: rows the projector gives.
        boxes: (n_tokens, 4) float32 x0, y0, x1, y1 in pixels of the picture as given, clipped to it; a token wholly
            on padding has an empty box. None if the family is unknown.
        grid: (rows, columns) if the tokens form one raster, else None.
        n_pos: positions the picture takes in the prompt.
        n_tiles: passes of the vision tower that the picture takes.
        tiles: (n_tokens,) int32 which of them makes each token, 0..n_tiles-1; None: there is one.
    """

    n_tokens: int
    boxes: Float32 | None
    grid: tuple[int, int] | None
    n_pos: int
    n_tiles: int = 1
    tiles: Int32 | None = None


@dataclass(frozen=True)
class Encoded:
    """An encoded picture; its embeddings stay in the engine under ``id``.

    Attributes:
        ms: that the call took.
        tower: (n_tower_layer, n_tokens) float32 head means of CLS attention, or of attention received where there is
            no CLS, summed over the patches of each token; NaN rows for layers that were not seen, NaN columns for
            tiles that were left out. None unless asked.
        n_tiles: tiles encoded so far.
        shared: those of them that another VLM with the same vision tower had encoded, so that the projector alone ran.
    """

    id: int
    layout: ImageLayout
    ms: float
    tower: Float32 | None = None
    n_tiles: int = 1
    shared: int = 0


@dataclass(frozen=True)
class TextPart:
    """Text of a prompt. Control tokens are recognised only where ``special`` is set (templates, never users)."""

    text: str
    special: bool = False


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; its pictures stand before its text."""

    role: str
    """"system", "user" or "assistant"."""
    text: str
    n_images: int = 0


@dataclass(frozen=True)
class ImagePart:
    """A picture's place in a prompt.

    Attributes:
        keep: sorted indices of the tokens to keep, or None for all.
        again: number of a picture, counted over the prompt, that stands before this part: more of its tokens, which see
            all that came before them and have the positions of their places in it.
    """

    image: Encoded
    keep: Int32 | None = None
    again: int | None = None


Part = TextPart | ImagePart
Reuse = Literal["nothing", "batches", "rows"]
"""What a prefill need not run again of what the KV cache holds: nothing; the leading batches that it would run just so,
and then not a bit of the logits differs; or all leading rows that are the same, generated ones too, as plain llama.cpp
goes on with a conversation: the last bits may differ then, since other batches made them."""


@dataclass(frozen=True)
class Prefilled:
    """Result of a prefill.

    Attributes:
        token_ids: (n_prompt,) int32, the whole prompt as if nothing was pruned, -1 at image tokens, -2 at rows of a
            picture that show nothing; these end its lines, stay where a token of theirs does, and are not counted as
            image tokens.
        n_image: image tokens of the prompt before pruning.
        n_kept: image tokens prefilled.
        n_past: KV cells in use.
        n_run: rows that were run, those of the cache that stayed left out.
    """

    token_ids: Int32
    n_image: int
    n_kept: int
    n_past: int
    ms: float
    n_run: int = 0


@dataclass(frozen=True)
class Paused:
    """A prompt whose rows are about to enter a layer (:meth:`Vlm.pause`).

    Attributes:
        layer: that layer, 0..n_layer-1.
        token_ids: as :attr:`Prefilled.token_ids`.
        image: (m,) int32 sorted indices of the image tokens that are still there, joint over all pictures.
        after: (t,) int32 ids of the text rows after the last image token; of all rows where there is no picture.
        attention: (n_head, m) float32 mean, over the text rows asked for, of their attention in layer - 1 to each image
            token, the probability over all cells. None at layer 0, and where no row was asked for.
        hidden: (m, d) float32 hidden rows of the image tokens; at layer 0 the projected rows. None unless asked.
        text: (t, d) float32 hidden rows of ``after``; at layer 0 the input embeddings. None unless asked.
    """

    layer: int
    token_ids: Int32
    image: Int32
    after: Int32
    attention: Float32 | None = None
    hidden: Float32 | None = None
    text: Float32 | None = None

    def kept(self, keep: Int32 | None) -> Int32:
        """(k,) int32 indices of the image tokens that stay; None: all.

        Raises:
            UsageError: they are not sorted, or some are not there.
        """
        if keep is None:
            return self.image
        kept = np.asarray(keep, np.int32)
        if np.any(np.diff(kept) <= 0) or not np.isin(kept, self.image).all():
            raise UsageError(
                f"kept tokens must be sorted, without repeats and among the {len(self.image)} that are there"
            )
        return kept

    def asked(self, attend: Sequence[int] | None) -> Int32:
        """Rows of ``after`` by number, negative ones counted from the end; None: all.

        Raises:
            UsageError: there is no such row.
        """
        n = len(self.after)
        rows = np.arange(n) if attend is None else np.array(attend, np.int64).reshape(-1)
        if np.any((rows < -n) | (rows >= n)):
            raise UsageError(f"attention of rows {rows.tolist()} was asked for, and {n} are after the last image token")
        return np.unique(rows % n if n else rows).astype(np.int32)


@dataclass(frozen=True)
class SamplingOptions:
    """How to pick the next token. ``temp`` 0 is greedy."""

    temp: float = 0.0
    seed: int = 0
    top_p: float = 0.95
    top_k: int = 40
    past_end: bool = False
    """Goes on where the model ends its answer, for measuring answers of one length."""
    schema: str = ""
    """A JSON schema, as JSON, that the answer follows; "" = none. One that is cut is no whole JSON."""


@dataclass(frozen=True)
class Completion:
    """A generated answer.

    Attributes:
        ids: (n,) int32 generated tokens, end-of-generation token not included.
        logprobs: (n,) float32 natural-log probability of each under the model (temperature 1); with the end token's
            own appended when ``finish`` is "stop".
        finish: "stop" (end token), "length" or "cancelled".
        first_ms: from the call to the first token.
        fed: how many of ``ids`` were fed back (the last one never is).
        drafted: tokens of the draft that the answer had room for; 0 where it was not used.
        accepted: how many of them, from the first on, the answer took over.
    """

    text: str
    ids: Int32
    logprobs: Float32
    finish: str
    ms: float
    first_ms: float
    fed: int
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Attention:
    """Attention to the prompt's image tokens, summed over rows as recorded since the last tapped prefill.

    ``prompt``: text rows after the last image token. ``generated``: tokens fed back. ``last``: the last prompt row
    alone. Each (n_layer, n_head, n_image) float32, the probability over all cells. ``weighted`` and ``maximum`` hold
    the same three in the order prompt, generated, last, put together by selectivity-weighted sum and by maximum
    (``native/localvlm_tap.h``, enum lv_reduction); None unless asked for.
    """

    prompt: Float32
    generated: Float32
    last: Float32
    weighted: tuple[Float32, Float32, Float32] | None = None
    maximum: tuple[Float32, Float32, Float32] | None = None
    rows: tuple[int, int] = (0, 0)
    """Prompt and generated rows that were summed."""


@runtime_checkable
class Vlm(Protocol):
    """One loaded VLM with one KV cache. Not thread-safe; :meth:`Engine.cancel` alone may come from other threads."""

    @property
    def info(self) -> VlmInfo: ...

    def layout(self, width: int, height: int) -> ImageLayout:
        """Token layout of a picture of that size, without encoding it."""
        ...

    def encode(
        self, image: RGB, *, tower: bool = False, keep: Int32 | None = None, onto: Encoded | None = None
    ) -> Encoded:
        """Runs the vision tower, on the tiles that hold a token of ``keep`` alone; None: on all.

        Args:
            image: (height, width, 3) uint8 RGB, upright.
            tower: whether its attention is recorded.
            keep: indices of image tokens. No other tile's tokens can be prefilled.
            onto: the same picture, encoded in part: tiles that it lacks are added to it.

        Raises:
            UsageError: ``onto`` is a picture of another size, or was released.
            Interrupted: :meth:`Engine.cancel` was called.
        """
        ...

    def release(self, image: Encoded) -> None:
        """Forgets the embeddings of a picture."""
        ...

    def chat(self, messages: Sequence[Message]) -> list[TextPart | int]:
        """A conversation through the model's chat template, up to where the assistant answers. An int stands for the
        picture of that number, counted over all messages.

        Raises:
            ModelError: the template fails, takes too long or loses a text or a picture.
        """
        ...

    def tokenize(self, parts: Sequence[TextPart | int]) -> Int32:
        """Token ids of a prompt; an int stands for that many image tokens (-1 each). BOS included if the model
        wants one.
        """
        ...

    def prefill(
        self,
        parts: Sequence[Part],
        *,
        tap: bool = False,
        layer: int = 0,
        reuse: Reuse = "nothing",
        since: int = 0,
    ) -> Prefilled:
        """Runs the prompt into the KV cache, as far as it does not hold it already. Kept image tokens, and all text,
        get the positions they would have unpruned. With ``tap``, attention is recorded from here on, of the text in
        ``parts[since:]``. All image tokens run through the layers below ``layer``, the kept ones alone through it and
        the rest; attention is then recorded from ``layer`` on, and nothing is reused.

        Raises:
            UsageError: ``layer`` is not 0..n_layer-1, or a token is asked for whose tile was not encoded.
            UnsupportedModel: this model's layers cannot be run apart (some of them on a GPU, experts on a GPU, a layer
                that reads the KV cache of one below ``layer``).
            ContextOverflow: prompt longer than the context.
            Interrupted: :meth:`Engine.cancel` was called; nothing can be decoded before the next prefill.
            AttentionCheckFailed: first tapped prefill of this model, and the self-check fails.
        """
        ...

    def pause(
        self, parts: Sequence[Part], layer: int, *, attend: Sequence[int] | None = (-1,), hidden: bool = False
    ) -> Paused:
        """Runs the prompt through the layers below ``layer`` (0: none), and waits for :meth:`resume` or :meth:`finish`.
        Kept rows have the positions they would have unpruned. Nothing can be decoded meanwhile, nothing is reused.
        ``attend`` numbers the rows of :attr:`Paused.after` whose attention is averaged, negative ones counted from the
        end; None: all; (): none. ``hidden``: whether hidden rows are wanted.

        Raises:
            As :meth:`prefill` with a layer, and
            UsageError: ``attend`` names rows that are not there.
            UnsupportedModel: input embeddings are wanted and cannot be read.
        """
        ...

    def resume(
        self,
        keep: Int32 | None,
        rows: Float32 | None = None,
        *,
        layer: int,
        attend: Sequence[int] | None = (-1,),
        hidden: bool = False,
    ) -> Paused:
        """Goes on with the image tokens ``keep`` alone, sorted ones of :attr:`Paused.image` (None: all of them), up to
        the next ``layer``. ``rows`` (k, d) take the places of their hidden rows. For the others see :meth:`pause`.

        Raises:
            UsageError: no prompt is paused, ``layer`` is not above the one it waits before, or ``keep`` or ``rows`` do
                not fit it; it waits on.
            Interrupted: :meth:`Engine.cancel` was called; the prompt is gone.
        """
        ...

    def finish(self, keep: Int32 | None, rows: Float32 | None = None) -> Prefilled:
        """Goes on through the last layer, see :meth:`resume`; then all is as after an untapped :meth:`prefill`."""
        ...

    def generate(
        self,
        max_tokens: int,
        sampling: SamplingOptions = SamplingOptions(),
        on_text: Callable[[str], None] | None = None,
        draft: Int32 | None = None,
    ) -> Completion:
        """Decodes after the last prefill. ``on_text`` gets whole characters as they come.

        draft: the tokens of a likely answer, its end token not included. They make a greedy answer faster and never
        another one (:mod:`localvlm.engine.drafts` tells how sure that is); other sampling, the tap and models that
        cannot take tokens back leave them unused.

        Raises:
            UsageError: the draft holds tokens that the model does not have, or llama.cpp has no grammar for the schema.
            ModelError: the model's tokens cannot spell what the schema asks for.
        """
        ...

    def score(self, ids: Int32, parts: Sequence[Part] | None = None) -> Float32:
        """Feeds ``ids`` after the last prefill in one batch; returns (n, n_vocab) logits that predict each of them.
        The cache is trimmed back afterwards. With ``parts``, they are fed after that prompt, in a cache apart.
        """
        ...

    def feed(self, ids: Int32) -> None:
        """Feeds ``ids`` one by one after the last prefill, as generated tokens are (the tap counts them so)."""
        ...

    def logits(self) -> Float32:
        """(n_vocab,) float32 logits after the last evaluated row."""
        ...

    def attention(self) -> Attention:
        """What the tap recorded since the last prefill with ``tap=True``."""
        ...

    def embeddings(self, image: Encoded) -> Float32:
        """(n, width) float32 projected rows of a picture, ends of rows included, in the order of the prompt; NaN for
        tiles that were not encoded.
        """
        ...

    def features(self, image: Encoded) -> Float32:
        """(n_tokens, width) float32 projected rows of a picture's image tokens.

        Raises:
            UsageError: some tiles were not encoded.
        """
        ...

    def altered(self, image: Encoded, tokens: Int32, rows: Float32) -> Encoded:
        """Another picture that is ``image`` but for ``rows`` (n, width) in the places of its ``tokens`` (n,)."""
        ...

    def embed(self, text: str) -> Float32:
        """(n, width) float32 input embeddings of a text's tokens.

        Raises:
            UnsupportedModel: they are of a type that cannot be read.
        """
        ...

    def close(self) -> None: ...


@runtime_checkable
class Engine(Protocol):
    """Loads VLMs. A context manager: leaving it ends the worker."""

    def load(self, model: Path, mmproj: Path, options: LoadOptions = LoadOptions()) -> Vlm: ...

    def cancel(self) -> None:
        """Stops the call in progress within a second; callable from any thread or signal handler."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Engine: ...

    def __exit__(self, *exc: object) -> None: ...


@dataclass(frozen=True)
class Backend:
    """What llama.cpp really loaded."""

    llama_cpp_python: str
    ggml: str
    system_info: str
    devices: tuple[str, ...] = field(default=())
    """GPUs that layers can be put on."""
    backends: tuple[str, ...] = field(default=())
    """What it was built for, devices or not."""
    commit: str = ""
    """Of ggml, where the build knew it."""
    gpu_free: int = 0
    """Bytes of all GPUs together that are free."""
    unified: bool = False
    """A GPU has no memory of its own, but the machine's."""
