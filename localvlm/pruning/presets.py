"""The settings of SGL's paper (arXiv 2412.03324, section 4.1), scaled to a model's depth."""

from __future__ import annotations

from dataclasses import dataclass

from localvlm.errors import UsageError

__all__ = ["PRESETS", "Preset", "preset_named"]

DEPTH = 48
"""Layers of InternVL2-26B, the paper's model."""


@dataclass(frozen=True)
class Preset:
    """``layer``: of DEPTH, before which tokens are dropped; ``keep``: share of the image tokens kept from there on."""

    layer: int
    keep: float

    def layer_in(self, n_layer: int) -> int:
        """The same place in a model of ``n_layer`` layers: before its second at the earliest."""
        return min(max(1, round(self.layer * n_layer / DEPTH)), n_layer - 1)


PRESETS = {"paper-64": Preset(19, 0.40), "paper-35": Preset(9, 0.20), "paper-9": Preset(2, 0.05)}
"""By the mean retention over layers, in percent, that the paper gives."""


def preset_named(name: str) -> Preset:
    """The preset called ``name``.

    Raises:
        UsageError: there is none.
    """
    if name not in PRESETS:
        raise UsageError(f"there is no preset '{name}'", f"choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
