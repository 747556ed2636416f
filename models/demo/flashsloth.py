"""FlashSloth for the demo model: `python -m localvlm.models.demo.flashsloth --work DIR [--steps N]`.

FlashSloth (arXiv 2412.04317). Spatial attention pooling: the tokens of a region are averaged with the weights
softmax(MLP(x)) over it, blind to the question. Embedded queries: a few learnt rows in the places of the last image
tokens, which before LAYER look at the question's hidden rows and then at the unpooled tokens. Here on the rows of the
trained projector, with tower, projector and LLM frozen. Training begins at plain means, and at queries that look
nowhere. DIR holds the features that `train --stage cache` made.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import export
from .compress import Compressor, centres, fit, regions
from .frozen import write
from .lm import EPS, HEAD, MODEL
from .tower import N_PATCHES

SIDES = (3, 4)
LAYER = 3  # 8 of 32 in the paper
QUERIES = 4  # 9 beside 81 pooled tokens in the paper


class Sap(Compressor):
    """Spatial attention pooling; the same for regions of every side."""

    def __init__(self, width: int = MODEL.width) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, EPS)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, 1, bias=False)
        nn.init.zeros_(self.down.weight)

    def pooled(self, rows: Tensor, words: Tensor, used: Tensor, side: int) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """See `Compressor`."""
        cells = regions(rows, side)
        weight = self.down(functional.gelu(self.up(self.norm(cells)), approximate="tanh")).softmax(2)
        return (weight * cells).sum(2), centres(side)


class Look(nn.Module):
    """Rows look at others: cross-attention, added to them; one that adds nothing until trained."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.norm_seen = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, seen: Tensor, used: Tensor | None = None) -> Tensor:
        """Args: x (batch, n, width), seen (batch, m, width), used (batch, m) bool, false for what is not to be seen."""
        h, s = self.norm(x), self.norm_seen(seen)
        q, k, v = (y.unflatten(-1, (-1, HEAD)).transpose(1, 2) for y in (self.q(h), self.k(s), self.v(s)))
        mask = None if used is None else used[:, None, None]
        found = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(found.transpose(1, 2).flatten(2))


class FlashSloth(Sap):
    """Pooling with embedded queries."""

    layer = LAYER

    def __init__(self, width: int = MODEL.width) -> None:
        super().__init__(width)
        self.queries = nn.Parameter(torch.randn(QUERIES, width) * 0.5)
        self.asks, self.looks = Look(width), Look(width)

    def pooled(self, rows: Tensor, words: Tensor, used: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """See `Compressor`. The last tokens of the raster are no region's centre."""
        image, places = super().pooled(rows, words, used, side)
        last = torch.arange(N_PATCHES - QUERIES, N_PATCHES)
        return torch.cat([image, self.queries.expand(len(rows), -1, -1)], 1), torch.cat([places, last])

    def again(self, hidden: Tensor, rows: Tensor, prompt: Tensor, used: Tensor) -> Tensor:
        """See `Compressor`."""
        asked = self.asks(hidden[:, -QUERIES:], prompt, used)
        return torch.cat([hidden[:, :-QUERIES], self.looks(asked, rows)], 1)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="flashsloth", description="Train FlashSloth for the demo model.")
    parser.add_argument("--work", type=Path, required=True, help="where train.py cached features")
    parser.add_argument("--out", type=Path, default=export.HERE)
    parser.add_argument("--steps", type=int, default=240)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    sloth = FlashSloth()
    fit(sloth, args.work, args.steps, "flashsloth", SIDES)
    write(args.out / "model.flashsloth.gguf", "flashsloth", sloth.state_dict())
    print(f"{time.process_time() / 60:.1f} CPU minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
