"""The language-model half of a row: a small Llama, Qwen2, Qwen3 or Gemma 3 decoder, its weights and its GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.zoo.tokenizer import Tokenizer
from tests.zoo.weights import SHARP, Float32, Weights

__all__ = ["PREFIX", "TextConfig", "interleaved", "text_weights", "write_text"]

PREFIX = "model.language_model"
GEMMA, PATTERN = "gemma3", 3


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a decoder.

    Attributes:
        mrope: rotary pairs of t, y, x; empty for one position a token.
        head_size: width of a head; 0: hidden / heads.
        qk_norm: queries and keys are normalised head by head.
        deepstack: layers after which more features of a picture are added; they stand behind its embeddings.
        window: rows that the sliding layers of Gemma 3 see, two of three (published: five of six); their rotary base is
            10000.
    """

    arch: str
    vocab: int
    rope_theta: float
    eps: float
    hidden: int = 96
    layers: int = 3
    heads: int = 3
    kv_heads: int = 1
    ffn: int = 160
    qkv_bias: bool = False
    mrope: tuple[int, ...] = ()
    context: int = 1024
    head_size: int = 0
    qk_norm: bool = False
    deepstack: int = 0
    window: int = 0

    @property
    def head_dim(self) -> int:
        return self.head_size or self.hidden // self.heads

    @property
    def input_width(self) -> int:
        """Width of a picture's rows."""
        return self.hidden * (1 + self.deepstack)

    def hf(self) -> dict[str, Any]:
        """Arguments of the Hugging Face configuration."""
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.mrope:
            rope["mrope_section"] = list(self.mrope)
        if self.window:
            rope = {"full_attention": rope, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
        return {
            **(self._sliding() if self.window else {}),
            **({"head_dim": self.head_size} if self.head_size else {}),
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": self.eps,
            "max_position_embeddings": self.context,
            "rope_parameters": rope,
            "bos_token_id": None,
            "eos_token_id": None,
        }

    def _sliding(self) -> dict[str, Any]:
        kinds = ["full_attention" if i % PATTERN == PATTERN - 1 else "sliding_attention" for i in range(self.layers)]
        return {"sliding_window": self.window, "layer_types": kinds, "query_pre_attn_scalar": self.head_dim}


def text_weights(out: Weights, config: TextConfig) -> None:
    """Adds the decoder's tensors. Logits get a standard deviation of about 3, those of Gemma of 0.5."""
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    if c.arch == GEMMA:  # tied, and scaled by the root of the width; larger, every token would be followed by itself
        out.matrix(f"{PREFIX}.embed_tokens.weight", c.vocab, c.hidden, gain=0.5)
    else:
        out.normal(f"{PREFIX}.embed_tokens.weight", c.vocab, c.hidden, std=1.0)
        out.matrix("lm_head.weight", c.vocab, c.hidden, gain=3.0)
    out.norm(f"{PREFIX}.norm", c.hidden)
    for i in range(c.layers):
        layer = f"{PREFIX}.layers.{i}"
        out.norm(f"{layer}.input_layernorm", c.hidden)
        out.norm(f"{layer}.post_attention_layernorm", c.hidden)
        out.linear(f"{layer}.self_attn.q_proj", q, c.hidden, bias=c.qkv_bias, gain=SHARP)
        out.linear(f"{layer}.self_attn.k_proj", kv, c.hidden, bias=c.qkv_bias, gain=SHARP)
        out.linear(f"{layer}.self_attn.v_proj", kv, c.hidden, bias=c.qkv_bias)
        out.linear(f"{layer}.self_attn.o_proj", c.hidden, q, bias=False)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            out.normal(f"{layer}.self_attn.{name}.weight", c.head_dim, std=0.1, mean=1.3 if c.arch == GEMMA else SHARP)
        for name in ("pre", "post") if c.arch == GEMMA else ():
            out.norm(f"{layer}.{name}_feedforward_layernorm", c.hidden)
        out.linear(f"{layer}.mlp.gate_proj", c.ffn, c.hidden, bias=False)
        out.linear(f"{layer}.mlp.up_proj", c.ffn, c.hidden, bias=False)
        out.linear(f"{layer}.mlp.down_proj", c.hidden, c.ffn, bias=False)
    for name, tensor in out.tensors.items():
        if c.arch == GEMMA and name.startswith(PREFIX) and name.endswith("norm.weight"):
            tensor -= np.float32(1)  # Gemma3RMSNorm multiplies by 1 + weight


LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
GEMMA_NAMES = {
    **LAYER_NAMES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def interleaved(tensor: Float32, n_head: int) -> Float32:
    """Rows of a query or key projection from rotary halves (Hugging Face) to rotary pairs (llama.cpp's ``llama``,
    ``mistral3`` and Pixtral's tower), as ``conversion/llama.py`` permutes them. (n_head * d, ...) -> the same shape."""
    d = tensor.shape[0] // n_head
    halves = tensor.reshape(n_head, 2, d // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_text(path: Path, config: TextConfig, weights: Mapping[str, Float32], tokenizer: Tokenizer, name: str) -> None:
    """Writes the decoder, every tensor in F32."""
    from gguf import GGUFWriter, LlamaFileType

    c = config
    writer = GGUFWriter(path, c.arch)
    writer.add_name(name)
    writer.add_file_type(LlamaFileType.ALL_F32)
    writer.add_context_length(c.context)
    writer.add_embedding_length(c.hidden)
    writer.add_block_count(c.layers)
    writer.add_feed_forward_length(c.ffn)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.eps)
    writer.add_vocab_size(c.vocab)
    writer.add_rope_dimension_count(c.head_dim)
    if c.head_size:
        writer.add_key_length(c.head_dim)
        writer.add_value_length(c.head_dim)
    if c.window:
        writer.add_sliding_window(c.window)
        writer.add_sliding_window_pattern(PATTERN)
    if c.deepstack:
        writer.add_num_deepstack_layers(c.deepstack)
    if c.mrope:
        writer.add_rope_dimension_sections([*c.mrope, 0])
    tokenizer.write(writer)
    writer.add_tensor("token_embd.weight", weights[f"{PREFIX}.embed_tokens.weight"])
    shift = np.float32(c.arch == GEMMA)
    writer.add_tensor("output_norm.weight", weights[f"{PREFIX}.norm.weight"] + shift)
    if "lm_head.weight" in weights:
        writer.add_tensor("output.weight", weights["lm_head.weight"])
    for i in range(c.layers):
        for hf, ours in (GEMMA_NAMES if c.arch == GEMMA else LAYER_NAMES).items():
            for kind in ("weight", "bias"):
                tensor = weights.get(f"{PREFIX}.layers.{i}.{hf}.{kind}")
                if tensor is None:
                    continue
                if hf.endswith("norm"):
                    tensor = tensor + shift
                if c.arch in ("llama", "mistral3") and ours in ("attn_q", "attn_k"):
                    tensor = interleaved(tensor, c.heads if ours == "attn_q" else c.kv_heads)
                writer.add_tensor(f"blk.{i}.{ours}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
