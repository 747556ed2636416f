"""Checkpoints from the committed GGUF files: `python -m localvlm.models.demo.restore [--tiles] --work DIR`.

Training then goes on from the weights that are shipped (Q8_0 and F16, so rounded once); the optimisers start anew.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize
from torch import Tensor

from . import export, lm, text
from .tiles import TiledTower
from .tiles_fit import TiledVlm
from .tower import Tower
from .train import LM_STEPS, save


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor of a file as float32, in PyTorch's order of axes."""
    reader = gguf.GGUFReader(path)
    return {
        t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type), np.float32)).reshape(
            tuple(int(n) for n in reversed(t.shape))
        )
        for t in reader.tensors
    }


def state_of(files: Path, stem: str, size: lm.Size) -> dict[str, Tensor]:
    """The state of `lm.Vlm` (of `TiledVlm`, where there is a row end) that `stem`.gguf was exported from."""
    llm, eyes = tensors(files / f"{stem}.gguf"), tensors(files / f"{stem}-mmproj.gguf")
    state = {ours: llm[theirs] for ours, theirs in export.llm_names(size).items()}
    state |= {ours: eyes[theirs] for ours, theirs in export.projector_names().items()}
    if export.ROW_END in eyes:
        state["row_end"] = eyes[export.ROW_END]
    return state


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="restore", description="Make checkpoints from the shipped demo pair.")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--files", type=Path, default=export.HERE, help="where the GGUF files are")
    parser.add_argument("--tiles", action="store_true", help="of the tiled pair")
    parser.add_argument("--only", nargs="+", choices=["tower", "guide", "model"], default=["tower", "guide", "model"])
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    pair = "tiles-" if args.tiles else ""
    if "tower" in args.only:
        tower = TiledTower() if args.tiles else Tower()
        eyes = tensors(args.files / f"{pair}model-mmproj.gguf")
        known = {ours: eyes[theirs] for ours, theirs in export.tower_names().items()}
        state = tower.state_dict() | {k: v.reshape(tower.state_dict()[k].shape) for k, v in known.items()}
        save(args.work / f"{pair}tower.pt", model=state, step=0, cpu_seconds=0.0)
    for which, size in (("guide", lm.GUIDE), ("model", lm.MODEL)):
        if which in args.only:
            state = state_of(args.files, pair + which, size)
            (TiledVlm if args.tiles else lm.Vlm)(size, text.tokenizer().get_vocab_size()).load_state_dict(state)
            save(args.work / f"{pair}{which}.pt", model=state, ema=state, optimisers=None, step=LM_STEPS,
                 layers=size.layers, cpu_seconds=0.0)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
