"""The language-model half of a row: a small Llama, Qwen2 or Qwen3 decoder, its weights and its GGUF file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zoo.tokenizer import Tokenizer
from tests.zoo.weights import SHARP, Float32, Weights

__all__ = ["TextConfig", "text_weights", "write_text"]

PREFIX = "model.language_model"


@dataclass(frozen=True)
class TextConfig:
    """Sizes of a decoder.

    Attributes:
        mrope: rotary pairs of t, y, x; empty for one position a token.
        head_size: width of a head; 0: hidden / heads.
        qk_norm: queries and keys are normalised head by head.
        deepstack: layers after which more features of a picture are added; they stand behind its embeddings.
    """

    arch: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    rope_theta: float
    eps: float
    qkv_bias: bool = False
    mrope: tuple[int, ...] = ()
    context: int = 1024
    head_size: int = 0
    qk_norm: bool = False
    deepstack: int = 0

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
        return {
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


def text_weights(out: Weights, config: TextConfig) -> None:
    """Adds the decoder's tensors. Logits get a standard deviation of about 3."""
    c, q, kv = config, config.heads * config.head_dim, config.kv_heads * config.head_dim
    out.normal(f"{PREFIX}.embed_tokens.weight", c.vocab, c.hidden, std=1.0)
    out.norm(f"{PREFIX}.norm", c.hidden)
    out.matrix("lm_head.weight", c.vocab, c.hidden, gain=3.0)
    for i in range(c.layers):
        layer = f"{PREFIX}.layers.{i}"
        out.norm(f"{layer}.input_layernorm", c.hidden)
        out.norm(f"{layer}.post_attention_layernorm", c.hidden)
        out.linear(f"{layer}.self_attn.q_proj", q, c.hidden, bias=c.qkv_bias, gain=SHARP)
        out.linear(f"{layer}.self_attn.k_proj", kv, c.hidden, bias=c.qkv_bias, gain=SHARP)
        out.linear(f"{layer}.self_attn.v_proj", kv, c.hidden, bias=c.qkv_bias)
        out.linear(f"{layer}.self_attn.o_proj", c.hidden, q, bias=False)
        for name in ("q_norm", "k_norm") if c.qk_norm else ():
            out.normal(f"{layer}.self_attn.{name}.weight", c.head_dim, std=0.1, mean=SHARP)
        out.linear(f"{layer}.mlp.gate_proj", c.ffn, c.hidden, bias=False)
        out.linear(f"{layer}.mlp.up_proj", c.ffn, c.hidden, bias=False)
        out.linear(f"{layer}.mlp.down_proj", c.hidden, c.ffn, bias=False)


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


def _interleaved(tensor: Float32, n_head: int) -> Float32:
    """Rows of a query or key projection from rotary halves (Hugging Face) to rotary pairs (llama.cpp's ``llama``),
    as ``conversion/llama.py`` permutes them. (n_head * d, ...) -> the same shape."""
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
    if c.deepstack:
        writer.add_num_deepstack_layers(c.deepstack)
    if c.mrope:
        writer.add_rope_dimension_sections([*c.mrope, 0])
    tokenizer.write(writer)
    writer.add_tensor("token_embd.weight", weights[f"{PREFIX}.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights[f"{PREFIX}.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for i in range(c.layers):
        for hf, ours in LAYER_NAMES.items():
            for kind in ("weight", "bias"):
                tensor = weights.get(f"{PREFIX}.layers.{i}.{hf}.{kind}")
                if tensor is None:
                    continue
                if c.arch == "llama" and ours in ("attn_q", "attn_k"):
                    tensor = _interleaved(tensor, c.heads if ours == "attn_q" else c.kv_heads)
                writer.add_tensor(f"blk.{i}.{ours}.{kind}", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
