"""FlashSloth's pooling for the demo model: `python -m localvlm.models.demo.flashsloth --work DIR [--steps N]`.

FlashSloth (arXiv 2412.04317), spatial attention pooling: the tokens of a region are averaged with the weights
softmax(MLP(x)) over it, blind to the question. Here on the rows of the trained projector, with tower, projector and LLM
frozen. Training begins at the plain mean. DIR holds the features that `train --stage cache` made.
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
from .lm import EPS, MODEL


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


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="flashsloth", description="Train FlashSloth's pooling for the demo model.")
    parser.add_argument("--work", type=Path, required=True, help="where train.py cached features")
    parser.add_argument("--out", type=Path, default=export.HERE)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    sap = Sap()
    fit(sap, args.work, args.steps, "flashsloth")
    write(args.out / "model.flashsloth.gguf", "flashsloth", sap.state_dict())
    print(f"{time.process_time() / 60:.1f} CPU minutes", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
