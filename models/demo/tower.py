"""The vision tower: a CLIP ViT with CLS, as llama.cpp's llava graph computes it when CLS is put right.

CLS is row 0 with position 0, patch i has position i + 1, LayerNorm before the blocks, quick GELU; the features are
the output of the last block with no LayerNorm after it, CLS dropped. The heads are for training alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import GRID, N_CHARS, N_PRESENT
from .world import COLOURS, KINDS

WIDTH, HEADS, BLOCKS, FF = 192, 3, 6, 512
PATCH_PIXELS = 16
MEAN, STD = (0.8, 0.8, 0.8), (0.25, 0.25, 0.25)
EPS = 1e-5
N_PATCHES = GRID * GRID


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH, EPS), nn.LayerNorm(WIDTH, EPS)
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = nn.Linear(WIDTH, FF), nn.Linear(FF, WIDTH)
        for layer in (self.out, self.down):
            nn.init.zeros_(layer.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, rows, WIDTH) -> the same."""
        h = self.ln1(x)
        q, k, v = (f(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = self.up(self.ln2(x))
        return x + self.down(h * torch.sigmoid(1.702 * h))


class Tower(nn.Module):
    """The tower and its training heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, WIDTH, PATCH_PIXELS, PATCH_PIXELS, bias=False)
        self.cls = nn.Parameter(torch.randn(WIDTH) * 0.02)
        self.position = nn.Parameter(torch.randn(N_PATCHES + 1, WIDTH) * 0.1)
        self.pre_ln = nn.LayerNorm(WIDTH, EPS)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.heads = nn.ModuleDict({
            "kind": nn.Linear(WIDTH, len(KINDS) + 1), "colour": nn.Linear(WIDTH, len(COLOURS)),
            "chars": nn.Linear(WIDTH, 3 * N_CHARS), "cell": nn.Linear(WIDTH, 9),
            "present": nn.Linear(WIDTH, N_PRESENT),
        })  # fmt: skip

    def rows(self, pixels: Tensor) -> Tensor:
        """(batch, 192, 192, 3) uint8 -> (batch, 1 + 144, WIDTH), CLS first."""
        x = (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN[0]) / STD[0]
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], 1) + self.position
        x = self.pre_ln(x)
        for block in self.blocks:
            x = block(x)
        return x

    def forward(self, pixels: Tensor) -> Tensor:
        """(batch, 192, 192, 3) uint8 -> the features (batch, 144, WIDTH)."""
        return self.rows(pixels)[:, 1:]


def losses(tower: Tower, rows: Tensor, things: Tensor, present: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Loss and accuracies. rows (batch, 145, WIDTH); things (batch, n, 6); present (batch, N_PRESENT).

    Only the patch that holds the centre of a thing is labelled with it; all others are ground.
    """
    patches, head = rows[:, 1:], tower.heads
    real = things[..., 0] >= 0
    image = torch.arange(len(rows)).unsqueeze(1).expand_as(real)[real]
    thing = things[real]
    kind = torch.zeros(patches.shape[:2], dtype=torch.long)
    kind[image, thing[:, 0]] = thing[:, 1] + 1
    logits = head["kind"](patches)
    each = functional.cross_entropy(logits.flatten(0, 1), kind.flatten(), reduction="none").view_as(kind)
    at = patches[image, thing[:, 0]]
    card = thing[:, 3] >= 0
    hue, place = head["colour"](at), head["cell"](at)
    cell = thing[:, 0] // GRID // 4 * 3 + thing[:, 0] % GRID // 4
    chars = head["chars"](at[card]).unflatten(-1, (3, N_CHARS))
    seen = head["present"](rows[:, 0])
    loss = (
        each[kind > 0].mean() + 4 * each[kind == 0].mean() + functional.cross_entropy(hue, thing[:, 2])
        + 2 * functional.cross_entropy(chars.flatten(0, 1), thing[card, 3:].flatten())
        + 0.3 * functional.cross_entropy(place, cell)
        + 5 * functional.binary_cross_entropy_with_logits(seen, present)
    )  # fmt: skip
    with torch.no_grad():
        found = logits.argmax(-1)
        stats = {
            "kind": (found[kind > 0] == kind[kind > 0]).float().mean().item(),
            "ground": (found[kind == 0] == 0).float().mean().item(),
            "colour": (hue.argmax(-1) == thing[:, 2]).float().mean().item(),
            "text": (chars.argmax(-1) == thing[card, 3:]).all(-1).float().mean().item(),
            "present": ((seen > 0) == (present > 0.5)).all(-1).float().mean().item(),
        }
    return loss, stats
