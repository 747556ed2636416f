"""Headers of real VLMs before files full of holes, and the rates of a machine that was timed with two of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

from localvlm.answers import VlmFiles
from localvlm.planning.rates import KNOTS, Rates


@dataclass(frozen=True)
class Real:
    """A published VLM. LLM: layers, width, key/value width, ffn, vocabulary; tower: the same without vocabulary."""

    name: str
    llm: tuple[int, int, int, int, int]
    head: int
    tower: tuple[int, int, int]
    projector: str
    values: dict[str, int]
    mm: tuple[tuple[int, int], ...]
    kind: str = "Q4_0"
    arch: str = "llama"

    def layer(self, kind: str) -> str:
        """By which rates of its layers are known."""
        _, width, kv, ffn, _ = self.llm
        return f"{kind} {width} {ffn} {self.head} {width // self.head} {kv // self.head}"


CLIP = {"image_size": 336, "patch_size": 14}
LLAVA7 = Real("llava-7b", (32, 4096, 4096, 11008, 32064), 128, (24, 1024, 4096), "mlp", CLIP,
              ((4096, 1024), (4096, 4096)))  # fmt: skip
GUIDE028 = Real("guide-0.28b", (24, 896, 128, 3072, 32000), 64, (2, 256, 1024), "mlp", CLIP, ((896, 256), (896, 896)))
SMOL256 = Real("smolvlm2-256m", (30, 576, 192, 1536, 49280), 64, (12, 768, 3072), "idefics3",
               {"image_size": 512, "patch_size": 16, "projector.scale_factor": 4, "preproc_image_size": 2048},
               ((576, 12288),))  # fmt: skip
SMOL22B = Real("smolvlm2-2.2b", (24, 2048, 2048, 8192, 49280), 64, (27, 1152, 4304), "idefics3",
               {"image_size": 384, "patch_size": 14, "projector.scale_factor": 3, "preproc_image_size": 1536},
               ((2048, 10368),))  # fmt: skip
_QWEN = {"image_size": 560, "patch_size": 14, "spatial_merge_size": 2, "n_wa_pattern": 8}
QWEN3B = Real("qwen2.5-vl-3b", (36, 2048, 256, 11008, 151936), 128, (32, 1280, 3420 * 3 // 2), "qwen2.5vl_merger",
              _QWEN, ((5120, 5120), (2048, 5120)), arch="qwen2vl")  # fmt: skip
QWEN7B = Real("qwen2.5-vl-7b", (28, 3584, 512, 18944, 152064), 128, (32, 1280, 3420 * 3 // 2), "qwen2.5vl_merger",
              _QWEN, ((5120, 5120), (3584, 5120)), arch="qwen2vl")  # fmt: skip


REAL = LLAVA7, GUIDE028, SMOL256, SMOL22B, QWEN3B, QWEN7B


def files_of(folder: Path, real: Real) -> VlmFiles:
    """Its two headers, each before as much nothing as its tensors take."""
    found = VlmFiles(folder / f"{real.name}.gguf", folder / f"{real.name}-mmproj.gguf")
    layers, width, kv, ffn, vocab = real.llm
    matrices = {"token_embd.weight": (vocab, width), "output.weight": (vocab, width)}
    for i in range(layers):
        for name, rows, columns in (("attn_q", width, width), ("attn_k", kv, width), ("attn_v", kv, width),
                                    ("attn_output", width, width), ("ffn_gate", ffn, width), ("ffn_up", ffn, width),
                                    ("ffn_down", width, ffn)):  # fmt: skip
            matrices[f"blk.{i}.{name}.weight"] = rows, columns
    values = {"block_count": layers, "embedding_length": width, "attention.head_count": width // real.head}
    values["attention.head_count_kv"] = kv // real.head
    _write(found.model, real.arch, {f"{real.arch}.{k}": v for k, v in values.items()}, matrices, real.kind)
    blocks, width, ffn = real.tower
    patch = real.values["patch_size"]
    matrices = {"v.patch_embd.weight": (width, 3 * patch * patch), "v.position_embd.weight": (4096, width)}
    for i in range(blocks):
        for name in ("attn_q", "attn_k", "attn_v", "attn_out"):
            matrices[f"v.blk.{i}.{name}.weight"] = width, width
        matrices |= {f"v.blk.{i}.ffn_up.weight": (ffn, width), f"v.blk.{i}.ffn_down.weight": (width, ffn)}
    matrices |= {f"mm.{i}.weight": shape for i, shape in enumerate(real.mm)}
    values = {"block_count": blocks, "embedding_length": width, **real.values}
    _write(found.mmproj, "clip", {f"clip.vision.{k}": v for k, v in values.items()}, matrices, "F16", real.projector)
    return found


def _write(path: Path, arch: str, values: dict, matrices: dict, kind: str, projector: str = "") -> None:
    writer = gguf.GGUFWriter(path, arch)
    wanted = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[wanted]
    for key, value in values.items():
        writer.add_uint32(key, value)
    if projector:
        writer.add_string("clip.projector_type", projector)
        writer.add_bool("clip.has_vision_encoder", True)
    total = 0
    for name, (rows, columns) in matrices.items():
        n_bytes = columns // block * size
        writer.add_tensor_info(name, (rows, n_bytes), np.dtype(np.uint8), rows * n_bytes, raw_dtype=wanted)
        total += -(-rows * n_bytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 32 + total)


def rates(**kinds: float) -> Rates:
    """Two cores: a 7B Q4_0 takes 0.2 s to decode a token, 0.115 s a row in small batches and 0.101 s in large ones, and
    ViT-L/14-336 in F16 3.4 s a picture. Other types are as slow as Q4_0, times what ``kinds`` says.
    """
    weights = sum(r * c for r, c in ((4096, 4096),) * 4 + ((11008, 4096),) * 3) * 32
    taken = (0.2, 0.9, 32 * 0.115, 128 * 0.105, 256 * 0.101)
    assert len(taken) == len(KNOTS)
    kinds = {"Q4_0": 1.0, **kinds}
    layers = [(real.layer(kind), k) for real in REAL for kind, k in kinds.items()]
    rows = {layer: tuple(k * t / weights for t in taken) for layer, k in layers}
    patches = 24 * (4 * 1024 * 1024 + 2 * 4096 * 1024) * 576
    return Rates(rows, {"F16": 3.0 / patches}, (2.5e-10, 1e-10), 4e-11, 2e-5, 2e-3, 5e-10)
