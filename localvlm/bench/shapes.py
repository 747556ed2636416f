"""VLMs of random weights with the shapes, vocabularies and quantizations of real ones: for speed, not sense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from localvlm.bench.gguf_files import Tensor, add_bytes, add_pieces, check_room, write_gguf
from localvlm.bench.towers import Tower, projector_tensors, write_projector_keys

__all__ = ["GUIDE_028B", "QUANTS", "Llm", "Quant", "VlmShape", "write_vlm", "write_vlms"]

Quant = Literal["Q4_0", "Q4_K_M", "Q8_0"]
QUANTS: tuple[Quant, ...] = ("Q4_0", "Q4_K_M", "Q8_0")


@dataclass(frozen=True)
class Llm:
    """A decoder.

    Attributes:
        arch: llama.cpp's name: "llama", "qwen2" or "qwen2vl".
        context: rows that it was trained on.
        theta: base of its rotary positions.
        tied: its output is its table of embeddings.
        tokens: "llama" for SentencePiece, or llama.cpp's name of how a byte-level vocabulary splits words.
    """

    arch: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    context: int = 4096
    theta: float = 1e4
    tied: bool = False
    tokens: str = "llama"

    @property
    def head(self) -> int:
        """Width of a head."""
        return self.width // self.heads

    @property
    def sections(self) -> tuple[int, int, int]:
        """Rotary pairs of t, y and x: a quarter and twice three eighths (2409.12191)."""
        return self.head // 8, self.head * 3 // 16, self.head * 3 // 16


@dataclass(frozen=True)
class VlmShape:
    """A decoder and its tower; ``name`` is that of its files."""

    name: str
    llm: Llm
    tower: Tower
    quant: Quant

    @property
    def files(self) -> tuple[str, str]:
        """Names of the model's and the projector's; a tower for tiles goes with the LLM of one without."""
        tiles = "-tiles" if self.tower.pinpoints else ""
        return f"{self.name}-{self.quant}.gguf", f"mmproj-{self.name}{tiles}-F16.gguf"


GUIDE_028B = VlmShape(
    "guide-0.28b", Llm("llama", 24, 896, 14, 2, 3072, 32_000), Tower("clip", 2, 256, 4, 1024, 336, 14), "Q8_0"
)
"""A guide of real size (0.28B in the LLM, 576 image tokens) behind a small tower, which the tap's cost leaves out."""

CONTROLS: dict[str, tuple[str, ...]] = {
    "smollm": (
        "<|endoftext|>", "<|im_start|>", "<end_of_utterance>", "<image>", "<fake_token_around_image>", "<global-img>",
        *(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)),
    ),
    "qwen2": (
        "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>",
        "<img>", "</img>", "<IMG_CONTEXT>",
    ),
}  # fmt: skip
"""Control tokens of byte-level vocabularies, those that write pictures and turns."""
ENDS = {"smollm": "<end_of_utterance>", "qwen2": "<|im_end|>"}
"""Those that end an answer."""
CLEAR = 3.0
"""Standard deviation of logits, so that the likeliest token leads as clearly as a trained model's."""


def _matrix_kind(llm: Llm, quant: Quant, name: str, layer: int) -> str:
    """The type of a matrix as ``llama-quant.cpp`` chooses it: Q6_K for the output and, in Q4_K_M, for values and the
    last matrix of the feed-forward in half of the layers; where rows are no multiples of 256, Q8_0 and Q5_0 in place of
    Q6_K and Q4_K.
    """
    if quant == "Q8_0":
        return quant
    n = llm.layers
    more = quant == "Q4_K_M" and (layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2)
    fine = name == "output" or (more and name in ("attn_v", "ffn_down"))
    if quant == "Q4_0" and not fine:
        return quant
    if (llm.ffn if name == "ffn_down" else llm.width) % 256:
        return "Q8_0" if fine else "Q5_0"
    return "Q6_K" if fine else "Q4_K"


def _llm_tensors(llm: Llm, quant: Quant) -> list[Tensor]:
    kind = partial(_matrix_kind, llm, quant)
    w, kv = llm.width, llm.head * llm.kv_heads
    shown = "token_embd" if llm.tied else "output"
    out = [Tensor(f"{shown}.weight", (llm.vocab, w), kind("output", 0), CLEAR * w**-0.5)]
    if not llm.tied:
        out.append(Tensor("token_embd.weight", (llm.vocab, w), kind("token_embd", 0), 1.0))
    out.append(Tensor("output_norm.weight", (w,), "F32", 0.05, 1.0))
    for i in range(llm.layers):
        block = f"blk.{i}"
        out += [Tensor(f"{block}.{norm}.weight", (w,), "F32", 0.05, 1.0) for norm in ("attn_norm", "ffn_norm")]
        for name, rows, columns in (
            ("attn_q", w, w),
            ("attn_k", kv, w),
            ("attn_v", kv, w),
            ("attn_output", w, w),
            ("ffn_gate", llm.ffn, w),
            ("ffn_up", llm.ffn, w),
            ("ffn_down", w, llm.ffn),
        ):
            out.append(Tensor(f"{block}.{name}.weight", (rows, columns), kind(name, i), columns**-0.5))
            if llm.arch != "llama" and name in ("attn_q", "attn_k", "attn_v"):
                out.append(Tensor(f"{block}.{name}.bias", (rows,), "F32", 0.1))
    return out


def _write_llm_keys(vlm: VlmShape, writer: Any) -> None:
    import gguf

    llm = vlm.llm
    writer.add_name(vlm.name)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{vlm.quant}"])
    writer.add_block_count(llm.layers)
    writer.add_context_length(llm.context)
    writer.add_embedding_length(llm.width)
    writer.add_feed_forward_length(llm.ffn)
    writer.add_head_count(llm.heads)
    writer.add_head_count_kv(llm.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5 if llm.arch == "llama" else 1e-6)
    writer.add_rope_freq_base(llm.theta)
    writer.add_vocab_size(llm.vocab)
    writer.add_rope_dimension_count(llm.head)
    if llm.arch == "qwen2vl":
        writer.add_rope_dimension_sections([*llm.sections, 0])
    if llm.tokens == "llama":
        add_bytes(writer, llm.vocab)
    else:
        add_pieces(writer, llm.vocab, llm.tokens, CONTROLS[llm.tokens], ENDS[llm.tokens])


def _parts(vlm: VlmShape) -> tuple[list[Tensor], list[Tensor]]:
    return _llm_tensors(vlm.llm, vlm.quant), projector_tensors(vlm.tower, vlm.llm.width)


def write_vlm(folder: Path, vlm: VlmShape, seed: int = 0) -> tuple[Path, Path]:
    """Writes model and projector files; the same seed writes the same bytes. Existing files are kept.

    Raises:
        StorageError: the disk has no room for them.
    """
    return write_vlms(folder, [vlm], seed)[0]


def write_vlms(folder: Path, vlms: Sequence[VlmShape], seed: int = 0) -> list[tuple[Path, Path]]:
    """The same for several: the disk is asked for all of them first."""
    wanted: list[tuple[Path, str, Any, list[Tensor]]] = []
    found = []
    for vlm in vlms:
        model, mmproj = (folder / name for name in vlm.files)
        llm, tower = _parts(vlm)
        wanted.append((model, vlm.llm.arch, partial(_write_llm_keys, vlm), llm))
        keys = partial(write_projector_keys, vlm.tower, vlm.name, vlm.llm.width)
        wanted.append((mmproj, "clip", keys, tower))
        found.append((model, mmproj))
    missing = [one for one in wanted if not one[0].exists()]
    folder.mkdir(parents=True, exist_ok=True)
    if missing:
        check_room(folder, sum(t.n_bytes for *_, tensors in missing for t in tensors))
    for path, arch, keys, tensors in missing:
        write_gguf(path, arch, keys, tensors, seed)
    return found
