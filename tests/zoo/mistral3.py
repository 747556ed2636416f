"""Mistral Small 3.1: Pixtral's tower, 2 x 2 patches merged into a token before the projector."""

from __future__ import annotations

from tests.zoo.pixtral import Sizes, make_row, text

__all__ = ["ROW"]

ROW = make_row(
    "mistral3", text("mistral3", 2), Sizes(hidden=64, layers=2, heads=2, ffn=96, image=140, patch=14, merge=2), seed=55
)
