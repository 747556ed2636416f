"""The language models: llama.cpp's `llama` graph (RMSNorm, SwiGLU, interleaved RoPE, no biases), and the projector."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .tower import WIDTH as TOWER_WIDTH

ROPE_BASE = 1e6
HEAD = 64
EPS = 1e-5
CONTEXT = 1024


@dataclass(frozen=True)
class Size:
    """The shape of a language model."""

    layers: int
    width: int
    ff: int

    @property
    def heads(self) -> int:
        """Heads of HEAD channels."""
        return self.width // HEAD


MODEL = Size(12, 192, 512)
GUIDE = Size(2, 128, 352)


def rope_table(length: int = CONTEXT) -> Tensor:
    """The turns of every position as complex numbers, (length, HEAD / 2)."""
    rate = ROPE_BASE ** (-torch.arange(0, HEAD, 2).float() / HEAD)
    angle = torch.arange(length).float()[:, None] * rate
    return torch.polar(torch.ones_like(angle), angle)


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn neighbouring channels as pairs; x (batch, rows, heads, HEAD), turns (batch, rows, 1, HEAD / 2)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2)


class Layer(nn.Module):
    """A decoder layer; a new one adds nothing until trained."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.attn_norm, self.ffn_norm = nn.RMSNorm(size.width, EPS), nn.RMSNorm(size.width, EPS)
        self.q, self.k, self.v, self.out = (nn.Linear(size.width, size.width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(size.width, size.ff, bias=False) for _ in range(2))
        self.down = nn.Linear(size.ff, size.width, bias=False)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor) -> Tensor:
        """Rows (batch, rows, width), mask (batch, 1, rows, rows) bool, true where a row may look."""
        h = self.attn_norm(x)
        # one product instead of three: a fifth faster
        qkv = functional.linear(h, torch.cat([self.q.weight, self.k.weight, self.v.weight]))
        qk, v = qkv.unflatten(-1, (-1, HEAD)).split([2 * self.heads, self.heads], 2)
        q, k = rotate(qk, turns).transpose(1, 2).chunk(2, 1)
        seen = functional.scaled_dot_product_attention(q, k, v.transpose(1, 2), attn_mask=mask)
        x = x + self.out(seen.transpose(1, 2).flatten(2))
        gate, up = functional.linear(self.ffn_norm(x), torch.cat([self.gate.weight, self.up.weight])).chunk(2, -1)
        return x + self.down(functional.silu(gate) * up)


class Vlm(nn.Module):
    """Projector and language model; the tower is apart."""

    def __init__(self, size: Size, vocabulary: int, scale: float = 1.0) -> None:
        super().__init__()
        self.size = size
        self.embed = nn.Embedding(vocabulary, size.width)
        nn.init.normal_(self.embed.weight, std=0.7)
        self.mm0, self.mm2 = nn.Linear(TOWER_WIDTH, size.width), nn.Linear(size.width, size.width)
        with torch.no_grad():
            self.mm0.weight.mul_(2 / scale)
            self.mm2.weight.mul_(2)
        self.layers = nn.ModuleList(Layer(size) for _ in range(size.layers))
        self.norm = nn.RMSNorm(size.width, EPS)
        self.output = nn.Linear(size.width, vocabulary, bias=False)
        nn.init.normal_(self.output.weight, std=0.02)
        self.register_buffer("turns", rope_table(), persistent=False)

    def project(self, features: Tensor) -> Tensor:
        """(batch, 144, tower width) -> (batch, 144, width)."""
        return self.mm2(functional.gelu(self.mm0(features), approximate="tanh"))

    def forward(self, x: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Hidden rows, normed: x (batch, rows, width), positions (batch, rows), mask (batch, rows, rows)."""
        turns, mask = self.turns[positions].unsqueeze(2), mask.unsqueeze(1)
        for layer in self.layers:
            x = layer(x, turns, mask)
        return self.norm(x)

    def rows(self, before: Tensor, features: Tensor, after: Tensor) -> Tensor:
        """Input rows: `before` (n,) ids, the image, `after` (batch, m) ids."""
        batch = len(after)
        return torch.cat([self.embed(before).expand(batch, -1, -1), self.project(features), self.embed(after)], 1)


def grown(small: dict[str, Tensor], layers: int, size: Size) -> dict[str, Tensor]:
    """The state of a deeper model that computes the same: a layer that adds nothing after each of the old ones."""
    old = 1 + max(int(k.split(".")[1]) for k in small if k.startswith("layers."))
    fresh = Vlm(Size(layers, size.width, size.ff), len(small["embed.weight"])).state_dict()
    step = layers // old
    for key, value in small.items():
        if key.startswith("layers."):
            _, index, rest = key.split(".", 2)
            fresh[f"layers.{int(index) * step}.{rest}"] = value
        else:
            fresh[key] = value
    return fresh
