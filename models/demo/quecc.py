"""QueCC's projector for the demo model: `python -m localvlm.models.demo.quecc --work DIR [--steps N]`.

QueCC (arXiv 2411.03312): a question's embedding is added to every patch, a depthwise convolution of size and stride
`side` makes one query of each region, and the query attends to its own region. Here on the rows of the trained
projector, with tower, projector and LLM frozen; the question's embedding is the mean of its input embeddings, where the
paper takes the LLM's last hidden row of its last token. Attention starts flat and passes rows on as they are, so
training begins at the mean of each region. DIR holds the features that `train --stage cache` made.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from . import export
from .compress import SIDES, Compressor, centres, fit, regions
from .frozen import write
from .lm import EPS, MODEL


class Quecc(Compressor):
    """The convolutions are of one side each, all else is shared."""

    def __init__(self, width: int = MODEL.width, heads: int = MODEL.heads) -> None:
        super().__init__()
        self.heads = heads
        self.norm_query, self.norm_key = nn.RMSNorm(width, EPS), nn.RMSNorm(width, EPS)
        self.text, self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(5))
        self.conv = nn.ParameterDict({str(s): nn.Parameter(torch.full((width, s * s), 1 / s**2)) for s in SIDES})
        for layer in (self.v, self.out):
            nn.init.eye_(layer.weight)

    def pooled(self, rows: Tensor, words: Tensor, used: Tensor, side: int) -> tuple[Tensor, Tensor]:
        """See `Compressor`."""
        asked = (words * used[..., None]).sum(1) / used.sum(1, keepdim=True)
        cells = regions(rows, side)
        raised = cells + self.text(asked)[:, None, None]
        query = torch.einsum("brpd,dp->brd", raised, self.conv[str(side)])
        q = self.q(self.norm_query(query)).unflatten(-1, (self.heads, -1))
        k = self.k(self.norm_key(cells)).unflatten(-1, (self.heads, -1))
        v = self.v(cells).unflatten(-1, (self.heads, -1))
        weight = torch.einsum("brhd,brphd->brhp", q, k).div(q.shape[-1] ** 0.5).softmax(-1)
        seen = torch.einsum("brhp,brphd->brhd", weight, v).flatten(-2)
        return self.out(seen), centres(side)


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="quecc", description="Train QueCC's projector for the demo model.")
    parser.add_argument("--work", type=Path, required=True, help="where train.py cached features")
    parser.add_argument("--out", type=Path, default=export.HERE)
    parser.add_argument("--steps", type=int, default=450)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    quecc = Quecc()
    fit(quecc, args.work, args.steps, "quecc")
    write(args.out / "model.quecc.gguf", "quecc", quecc.state_dict())
    print(f"{time.process_time() / 60:.1f} CPU minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
