"""Write the demo pair as GGUF: `python -m localvlm.models.demo.export [--tiles] --work DIR`.

The language models are Q8_0 (norms F32), the mmproj files F16 (norms, biases, CLS and position embeddings F32), all
beside this script, with `example.png`; of the tiled pair the towers are Q8_0 too. The tower is written twice, once with
each projector, as llama.cpp wants it.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from . import lm, text, tiles, tower
from .data import TOWER_SIDE
from .scenes import draw_scene
from .world import Scene, Thing

HERE = Path(__file__).parent
_LAYER = {
    "attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "out": "attn_output",
    "ffn_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down",
}  # fmt: skip
_BLOCK = {"ln1": "ln1", "ln2": "ln2", "q": "attn_q", "k": "attn_k", "v": "attn_v", "out": "attn_out",
          "up": "ffn_up", "down": "ffn_down"}  # fmt: skip
ROW_END = "v.image_newline"
EXAMPLE = Scene(
    (
        Thing("star", "yellow", 0, 80, 76, 64, -8),
        Thing("heart", "red", 2, 338, 74, 62, 6),
        Thing("card", "blue", 4, 206, 178, 48, -2, "42"),
        Thing("moon", "purple", 5, 306, 206, 64, 4),
        Thing("circle", "green", 6, 52, 308, 60, 0),
        Thing("triangle", "orange", 8, 334, 302, 64, 3),
    ),
    20,
)


def llm_names(size: lm.Size) -> dict[str, str]:
    """Our name of every tensor of a language model -> its name in the file."""
    names = {"embed.weight": "token_embd.weight", "norm.weight": "output_norm.weight", "output.weight": "output.weight"}
    for i in range(size.layers):
        names |= {f"layers.{i}.{ours}.weight": f"blk.{i}.{theirs}.weight" for ours, theirs in _LAYER.items()}
    return names


def tower_names() -> dict[str, str]:
    """Likewise of the tower."""
    names = {"cls": "v.class_embd", "position": "v.position_embd.weight", "patch_embed.weight": "v.patch_embd.weight",
             "pre_ln.weight": "v.pre_ln.weight", "pre_ln.bias": "v.pre_ln.bias"}  # fmt: skip
    for i in range(tower.BLOCKS):
        for part in ("weight", "bias"):
            names |= {f"blocks.{i}.{ours}.{part}": f"v.blk.{i}.{theirs}.{part}" for ours, theirs in _BLOCK.items()}
    return names


def projector_names() -> dict[str, str]:
    """Likewise of the projector."""
    return {f"mm{i}.{part}": f"mm.{i}.{part}" for i in (0, 2) for part in ("weight", "bias")}


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    model = json.loads(text.TOKENIZER.read_text(encoding="utf-8"))["model"]
    tokens = [t for t, _ in sorted(model["vocab"].items(), key=lambda item: item[1])]
    control = (text.BOS, text.EOS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    kinds = [gguf.TokenType.CONTROL if i in control else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in model["merges"]])
    writer.add_bos_token_id(text.BOS)
    writer.add_eos_token_id(text.EOS)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(text.CHAT_TEMPLATE)


def describe(writer: gguf.GGUFWriter, name: str, file_type: gguf.LlamaFileType) -> None:
    """What every file of ours says of itself."""
    writer.add_name(name)
    writer.add_author("The localvlm authors")
    writer.add_license("mit")
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file and close it."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_llm(path: Path, name: str, state: dict[str, Tensor], size: lm.Size) -> None:
    """The language model, Q8_0."""
    writer = gguf.GGUFWriter(path, "llama")
    describe(writer, name, gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(len(state["embed.weight"]))
    writer.add_context_length(lm.CONTEXT)
    writer.add_embedding_length(size.width)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.ff)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.heads)
    writer.add_rope_dimension_count(lm.HEAD)
    writer.add_rope_freq_base(lm.ROPE_BASE)
    writer.add_layer_norm_rms_eps(lm.EPS)
    _tokenizer(writer)
    for ours, theirs in llm_names(size).items():
        value = state[ours].float().numpy()
        if value.ndim == 1:
            writer.add_tensor(theirs, value)
        else:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(value, q8), raw_dtype=q8)
    finish(writer)


def write_mmproj(path: Path, name: str, eyes: dict[str, Tensor], state: dict[str, Tensor]) -> None:
    """The tower and a projector: F16; Q8_0 but for the patch embedding where there is a row end, for LLaVA-NeXT."""
    tiled = "row_end" in state
    kind = gguf.LlamaFileType.MOSTLY_Q8_0 if tiled else gguf.LlamaFileType.MOSTLY_F16
    writer = gguf.GGUFWriter(path, "clip")
    describe(writer, name, kind)
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_projection_dim(state["mm2.weight"].shape[0])
    writer.add_vision_image_size(TOWER_SIDE)
    writer.add_vision_patch_size(tower.PATCH_PIXELS)
    writer.add_vision_embedding_length(tower.WIDTH)
    writer.add_vision_feed_forward_length(tower.FF)
    writer.add_vision_block_count(tower.BLOCKS)
    writer.add_vision_head_count(tower.HEADS)
    writer.add_vision_attention_layernorm_eps(tower.EPS)
    writer.add_vision_image_mean(tower.MEAN)
    writer.add_vision_image_std(tower.STD)
    writer.add_array("clip.vision.feature_layer", [tower.BLOCKS])  # the output of the last block: none is left out
    writer.add_bool("clip.use_gelu", False)  # neither: quick GELU
    tensors = {theirs: eyes[ours] for ours, theirs in tower_names().items()}
    tensors |= {theirs: state[ours] for ours, theirs in projector_names().items()}
    if tiled:
        writer.add_array("clip.vision.image_grid_pinpoints", [tiles.ACROSS * TOWER_SIDE] * 2)
        writer.add_string("clip.vision.mm_patch_merge_type", "spatial_unpad")
        tensors[ROW_END] = state["row_end"]
    for theirs, tensor in tensors.items():
        value = tensor.float().numpy()
        half = value.ndim >= 2 and "position" not in theirs
        if tiled and half and value.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(theirs, gguf.quants.quantize(value, q8), raw_dtype=q8)
        else:
            writer.add_tensor(theirs, value.astype(np.float16 if half else np.float32))
    finish(writer)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="export", description="Write the demo pair as GGUF.")
    parser.add_argument("--work", type=Path, required=True, help="where train.py kept its checkpoints")
    parser.add_argument("--out", type=Path, default=HERE)
    parser.add_argument("--tiles", action="store_true", help="the tiled pair")
    args = parser.parse_args(argv)
    pair = "tiles-" if args.tiles else ""
    eyes = torch.load(args.work / f"{pair}tower.pt", weights_only=True)["model"]
    for which, size in (("guide", lm.GUIDE), ("model", lm.MODEL)):
        stem = pair + which
        found = torch.load(args.work / f"{stem}.pt", weights_only=True)
        state = lm.grown(found["ema"], size.layers, size) if found["layers"] < size.layers else found["ema"]
        name = f"localvlm demo {stem.replace('-', ' ')}"
        write_llm(args.out / f"{stem}.gguf", name, state, size)
        write_mmproj(args.out / f"{stem}-mmproj.gguf", f"{name} mmproj", eyes, state)
        print(f"{stem}: step {found['step']}, {found['cpu_seconds'] / 3600:.2f} CPU hours", file=sys.stderr)
    if not args.tiles:
        draw_scene(EXAMPLE).save(args.out / "example.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
