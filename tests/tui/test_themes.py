"""Both themes can be read: every pair of colours that the app sets against each other, by WCAG 2."""

from __future__ import annotations

import re

import pytest
from textual.color import Color
from textual.theme import BUILTIN_THEMES

from localvlm.heatmap import GUIDE_BAR, MODEL_BAR
from localvlm.tui.themes import DARK, GUIDE, LIGHT, MODEL, THEMES, contrast, role_colours, theme_names

GROUNDS = ("background", "surface", "panel")
TEXT = ("foreground", "foreground-muted", "text-muted", "text-accent", "text-primary", "text-success", "text-warning",
        "text-error", "guide", "model", "footer-key-foreground")  # fmt: skip
"""Variables that text is written in, on each of GROUNDS."""
ON = {
    "block-cursor-background": "block-cursor-foreground",
    "block-cursor-blurred-background": "block-cursor-blurred-foreground",
    "input-cursor-background": "input-cursor-foreground",
    "primary": "button-color-foreground",
    "error": "button-color-foreground",
    "success": "button-color-foreground",
    "warning": "button-color-foreground",
}
"""Backgrounds that have a text colour of their own."""
PARTS = ("border", "primary", "guide", "model", "error", "warning", "block-cursor-background")
"""What is no text and has to be seen: frames of what has the focus, bars, the row that is chosen."""


def colours(theme):
    """The colour variables that hold one opaque colour, as an app resolves them."""
    found = {**theme.to_color_system().generate(), **theme.variables}
    return {name: Color.parse(value) for name, value in found.items() if re.fullmatch("#[0-9A-Fa-f]{6}", value)}


def test_contrast_is_that_of_wcag():
    assert contrast(Color.parse("#000"), Color.parse("#fff")) == pytest.approx(21)
    assert contrast(Color.parse("#fff"), Color.parse("#767676")) == pytest.approx(4.54, abs=0.005)
    assert contrast(Color.parse("#888"), Color.parse("#888")) == 1


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
@pytest.mark.parametrize("ground", GROUNDS)
def test_text_can_be_read_on_every_ground(theme, ground):
    found = colours(theme)
    low = {name: round(contrast(found[name], found[ground]), 2) for name in TEXT}
    assert not {name: ratio for name, ratio in low.items() if ratio < 4.5}


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
def test_what_lies_on_colours_can_be_read(theme):
    found = colours(theme)
    low = {ground: round(contrast(found[ground], found[text]), 2) for ground, text in ON.items()}
    assert not {ground: ratio for ground, ratio in low.items() if ratio < 4.5}


@pytest.mark.parametrize("theme", THEMES, ids=lambda theme: theme.name)
@pytest.mark.parametrize("ground", GROUNDS)
def test_the_focus_and_other_parts_stand_out(theme, ground):
    found = colours(theme)
    low = {name: round(contrast(found[name], found[ground]), 2) for name in PARTS}
    assert not {name: ratio for name, ratio in low.items() if ratio < 3}
    assert contrast(found["border"], found["border-blurred"]) >= 3, "one sees which of two frames has the focus"


def test_guide_and_model_have_the_colours_of_the_drawn_pictures():
    assert Color.parse(GUIDE).rgb == GUIDE_BAR
    assert Color.parse(MODEL).rgb == MODEL_BAR
    for theme in THEMES:
        found = colours(theme)
        assert 0.06 < found["guide"].hsl.h < 0.14, "orange"
        assert 0.53 < found["model"].hsl.h < 0.62, "blue"


@pytest.mark.parametrize("theme", [t for t in BUILTIN_THEMES.values() if not t.ansi], ids=lambda theme: theme.name)
def test_guide_and_model_can_be_read_in_textuals_own_themes(theme):
    found = colours(theme)
    for name, value in role_colours(theme).items():
        least = min(contrast(Color.parse(value), Color(*found[ground].rgb)) for ground in GROUNDS)
        most = min(contrast(found["foreground"], Color(*found[ground].rgb)) for ground in GROUNDS)
        assert least >= min(4.5, most), f"{name} is {value}"


def test_ours_are_named_first():
    names = theme_names([*BUILTIN_THEMES, DARK.name, LIGHT.name])
    assert names[:2] == [DARK.name, LIGHT.name]
    assert sorted(names[2:]) == sorted(BUILTIN_THEMES) == names[2:]
