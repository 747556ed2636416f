"""Two themes of our own, and the colours of the guide and of the model in any theme.

Orange is the guide and blue the model, as in the drawings of :mod:`localvlm.heatmap` (Okabe and Ito's palette, told
apart by all common kinds of colour blindness): as text they are made lighter or darker, until they can be read.
"""

from __future__ import annotations

from collections.abc import Iterable

from textual.color import Color
from textual.theme import Theme

__all__ = ["DARK", "LIGHT", "THEMES", "contrast", "role_colours", "theme_names"]

GUIDE, MODEL = "#E69F00", "#0072B2"
"""GUIDE_BAR and MODEL_BAR of localvlm.heatmap."""
TEXT_CONTRAST = 4.5
"""Of text, by WCAG 2; of what is no text, such as the frame of what has the focus, 3."""

DARK = Theme(
    name="localvlm-dark",
    primary="#56B4E9",
    secondary="#E69F00",
    accent="#E69F00",
    warning="#F0C24B",
    error="#FF7B72",
    success="#5CCFA0",
    foreground="#E4E6EB",
    background="#14171C",
    surface="#1B1F26",
    panel="#252A33",
    dark=True,
    variables={
        "text-primary": "#8CCBF0",
        "foreground-muted": "#A3ACB9",
        "text-muted": "#A3ACB9",
        "border": "#56B4E9",
        "border-blurred": "#3A414D",
        "block-cursor-background": "#56B4E9",
        "block-cursor-foreground": "#0B0E12",
        "block-cursor-blurred-background": "#2A3340",
        "block-cursor-blurred-foreground": "#E4E6EB",
        "input-selection-background": "#2B4E6B",
        "footer-key-foreground": "#F2B33D",
        "button-color-foreground": "#101318",
        "button-focus-text-style": "bold reverse",
        "guide": "#F2B33D",
        "model": "#7CC4F0",
    },
)
LIGHT = Theme(
    name="localvlm-light",
    primary="#005A8D",
    secondary="#8A5300",
    accent="#8A5300",
    warning="#7A5200",
    error="#B3261E",
    success="#006B4A",
    foreground="#1B1F26",
    background="#F3F4F6",
    surface="#FBFBFC",
    panel="#E6E9EE",
    dark=False,
    variables={
        "foreground-muted": "#545C68",
        "text-muted": "#545C68",
        "border": "#005A8D",
        "border-blurred": "#B9C0CA",
        "block-cursor-background": "#0A5C8C",
        "block-cursor-foreground": "#FFFFFF",
        "block-cursor-blurred-background": "#D3DEE8",
        "block-cursor-blurred-foreground": "#1B1F26",
        "input-selection-background": "#BBD9EE",
        "footer-key-foreground": "#8A5300",
        "button-color-foreground": "#FFFFFF",
        "button-focus-text-style": "bold reverse",
        "guide": "#8A5300",
        "model": "#005A8D",
    },
)
THEMES = (DARK, LIGHT)


def theme_names(available: Iterable[str]) -> list[str]:
    """Themes to choose from: our own, then the others by name."""
    own = [theme.name for theme in THEMES]
    return own + sorted(set(available) - set(own))


def contrast(a: Color, b: Color) -> float:
    """How far the brightness of two opaque colours is apart, by WCAG 2: from 1, equal, to 21, black and white."""
    bright, dark = sorted((_luminance(a), _luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: Color) -> float:
    parts = [part / 255 for part in colour.rgb]
    red, green, blue = (p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def role_colours(theme: Theme) -> dict[str, str]:
    """``$guide`` and ``$model`` for a theme that has none, as an app gives them by ``get_theme_variable_defaults``:
    orange and blue, blended with the theme's foreground until they can be read on its background.
    """
    colours = theme.to_color_system().generate()
    found = {}
    for name, base in (("guide", GUIDE), ("model", MODEL)):
        if theme.ansi:
            found[name] = "ansi_yellow" if name == "guide" else "ansi_blue"
            continue
        grounds = [Color.parse(colours[ground]).rgb for ground in ("background", "surface", "panel")]
        pure, ink = Color.parse(base), Color.parse(colours["foreground"])
        steps = (pure.blend(ink, step / 20, alpha=1.0) for step in range(21))
        readable = (c for c in steps if all(contrast(c, Color(*ground)) >= TEXT_CONTRAST for ground in grounds))
        found[name] = next(readable, ink).hex6
    return found
