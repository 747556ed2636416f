"""GGUF files of random weights with the shapes, vocabularies and quantizations of real VLMs: for speed, not sense."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["GUIDE_028B", "LlavaShape", "write_llava"]


@dataclass(frozen=True)
class LlavaShape:
    """A LLaVA-shaped VLM.

    Attributes:
        quant: of the LLM's matrices, a name of gguf.GGMLQuantizationType: "Q8_0" or "Q4_0".
        image, patch: pixels; (image / patch)^2 image tokens.
    """

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    quant: str
    tower_layers: int
    tower_width: int
    tower_heads: int
    tower_ffn: int
    image: int = 336
    patch: int = 14


GUIDE_028B = LlavaShape("guide-0.28b", 24, 896, 14, 2, 3072, 32_000, "Q8_0", 2, 256, 4, 1024)
"""A guide of real size (0.28B in the LLM, 576 image tokens) behind a small tower, which the tap's cost leaves out."""


def _quantized(rng: np.random.Generator, rows: int, columns: int, quant: str) -> NDArray[np.uint8]:
    """Random blocks of 32 weights with a standard deviation of about 0.02: (rows, bytes)."""
    size = {"Q8_0": 34, "Q4_0": 18}[quant]
    blocks = rng.integers(0, 256, (rows, columns // 32, size), dtype=np.uint8)
    scale = np.float16(0.02 / 74 if quant == "Q8_0" else 0.02 / 4.6)
    blocks[..., :2] = np.frombuffer(scale.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def _write_tokenizer(writer: Any, vocab: int) -> None:
    """A SentencePiece vocabulary of bytes, letters and filler, enough to tokenize any text."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{i:02X}>".encode() for i in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    tokens += [f"\u2581w{i}".encode() for i in range(vocab - len(tokens))]
    kinds += [1] * (vocab - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(vocab)])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(True)


def _write_model(path: Path, s: LlavaShape, rng: np.random.Generator) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(s.name)
    writer.add_block_count(s.layers)
    writer.add_context_length(8192)
    writer.add_embedding_length(s.width)
    writer.add_feed_forward_length(s.ffn)
    writer.add_head_count(s.heads)
    writer.add_head_count_kv(s.kv_heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(s.width // s.heads)
    _write_tokenizer(writer, s.vocab)
    kind = gguf.GGMLQuantizationType[s.quant]
    kv_width = s.width // s.heads * s.kv_heads

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(name, _quantized(rng, rows, columns, s.quant), raw_dtype=kind)

    matrix("token_embd.weight", s.vocab, s.width)
    matrix("output.weight", s.vocab, s.width)
    writer.add_tensor("output_norm.weight", np.ones(s.width, np.float32))
    for i in range(s.layers):
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{norm}.weight", np.ones(s.width, np.float32))
        for name, rows, columns in (
            ("attn_q", s.width, s.width),
            ("attn_k", kv_width, s.width),
            ("attn_v", kv_width, s.width),
            ("attn_output", s.width, s.width),
            ("ffn_gate", s.ffn, s.width),
            ("ffn_up", s.ffn, s.width),
            ("ffn_down", s.width, s.ffn),
        ):
            matrix(f"blk.{i}.{name}.weight", rows, columns)
    _finish(writer)


def _write_projector(path: Path, s: LlavaShape, rng: np.random.Generator) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, "clip")
    writer.add_name(f"{s.name}-mmproj")
    writer.add_bool("clip.has_vision_encoder", True)
    writer.add_string("clip.projector_type", "mlp")
    for key, value in (
        ("image_size", s.image),
        ("patch_size", s.patch),
        ("embedding_length", s.tower_width),
        ("feed_forward_length", s.tower_ffn),
        ("projection_dim", s.width),
        ("attention.head_count", s.tower_heads),
        ("block_count", s.tower_layers),
    ):
        writer.add_uint32(f"clip.vision.{key}", value)
    writer.add_float32("clip.vision.attention.layer_norm_epsilon", 1e-5)
    writer.add_array("clip.vision.image_mean", [0.48, 0.46, 0.41])
    writer.add_array("clip.vision.image_std", [0.27, 0.26, 0.28])
    writer.add_array("clip.vision.feature_layer", [s.tower_layers])

    def matrix(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.normal(0, 0.02, shape).astype(np.float16))

    def vector(name: str, n: int, value: float) -> None:
        writer.add_tensor(name, np.full(n, value, np.float32))

    d, f = s.tower_width, s.tower_ffn
    n_patches = (s.image // s.patch) ** 2
    matrix("v.patch_embd.weight", d, 3, s.patch, s.patch)
    writer.add_tensor("v.class_embd", rng.normal(0, 0.02, d).astype(np.float32))
    writer.add_tensor("v.position_embd.weight", rng.normal(0, 0.02, (n_patches + 1, d)).astype(np.float32))
    vector("v.pre_ln.weight", d, 1)
    vector("v.pre_ln.bias", d, 0)
    for i in range(s.tower_layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            matrix(f"v.blk.{i}.{name}.weight", d, d)
            vector(f"v.blk.{i}.{name}.bias", d, 0)
        matrix(f"v.blk.{i}.ffn_up.weight", f, d)
        vector(f"v.blk.{i}.ffn_up.bias", f, 0)
        matrix(f"v.blk.{i}.ffn_down.weight", d, f)
        vector(f"v.blk.{i}.ffn_down.bias", d, 0)
        for norm in ("ln1", "ln2"):
            vector(f"v.blk.{i}.{norm}.weight", d, 1)
            vector(f"v.blk.{i}.{norm}.bias", d, 0)
    matrix("mm.0.weight", s.width, d)
    vector("mm.0.bias", s.width, 0)
    matrix("mm.2.weight", s.width, s.width)
    vector("mm.2.bias", s.width, 0)
    _finish(writer)


def _finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llava(folder: Path, shape: LlavaShape, seed: int = 0) -> tuple[Path, Path]:
    """Writes model and projector files of ``shape``; the same seed writes the same bytes. Existing files are kept."""
    model, mmproj = folder / f"{shape.name}.gguf", folder / f"{shape.name}-mmproj.gguf"
    for path, write in ((model, _write_model), (mmproj, _write_projector)):
        if not path.exists():
            part = path.with_suffix(".part")
            write(part, shape, np.random.default_rng(seed))
            part.replace(path)
    return model, mmproj
