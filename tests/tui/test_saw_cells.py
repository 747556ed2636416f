"""Pixels as cells: each half block, dot and shade against the pixels it stands for, for pictures of any size."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.color import Color, ColorSystem

from localvlm.tui.picture import (
    Colours,
    Drawing,
    Inks,
    View,
    bounded,
    braille,
    dithered_256,
    fit,
    half_blocks,
    shades,
    shrunk,
)

LIGHT = Inks((243, 244, 246), (27, 31, 38))


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def colour(found: Color | None) -> tuple[int, ...] | None:
    return None if found is None else tuple(found.get_truecolor())


def pixels_of(strips) -> list[list[tuple[int, ...] | None]]:
    """What a terminal draws: two rows of colours for each row of cells, None where it leaves the background."""
    rows = []
    for strip in strips:
        upper, lower = [], []
        for segment in strip:
            above, below = colour(segment.style.color), colour(segment.style.bgcolor)
            for character in segment.text:
                assert character in "▀ "
                upper.append(below if character == " " else above)
                lower.append(below)
        assert len(upper) == strip.cell_length
        rows += [upper, lower]
    return rows


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 1), (7, 5), (8, 5), (44, 80)])
def test_half_blocks_have_the_pixels(height: int, width: int) -> None:
    pixels = noise(height, width)
    pixels[: height // 2] //= 128  # runs of equal pixels
    found = pixels_of(half_blocks(pixels))
    assert found[:height] == [[tuple(p) for p in row] for row in pixels.tolist()]
    assert found[height:] == [[None] * width] * (height % 2), "nothing is drawn below an odd last row"


def test_equal_cells_are_one_segment() -> None:
    strip = half_blocks(np.full((2, 60, 3), 9, np.uint8))[0]
    assert len(list(strip)) == 1
    assert strip.text == " " * 60


@given(st.integers(0, 2**32 - 1), st.integers(1, 30), st.integers(1, 30))
@settings(max_examples=30, deadline=None)
def test_braille_has_the_dots(seed: int, height: int, width: int) -> None:
    lit = np.random.default_rng(seed).random((height, width)) < 0.3
    found = np.zeros((-(-height // 4) * 4, -(-width // 2) * 2), bool)
    places = [(0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1), (3, 0), (3, 1)]  # of bits 0..7, as Unicode numbers dots
    for y, strip in enumerate(braille(lit)):
        for x, character in enumerate(strip.text):
            code = 0 if character == " " else ord(character) - 0x2800
            for bit, (row, column) in enumerate(places):
                found[4 * y + row, 2 * x + column] = bool(code >> bit & 1)
    assert np.array_equal(found[:height, :width], lit)
    assert found.sum() == lit.sum()


def test_shades_rise_with_the_value() -> None:
    assert [s.text for s in shades(np.array([[0, 0.19, 0.2, 0.5, 0.79, 0.8, 1]], np.float32))] == ["  ░▒▓██"]


def test_256_colours_are_written_as_they_are_and_stay_near() -> None:
    ramp = np.linspace(0, 255, 64)[None, :, None].repeat(40, axis=0).repeat(3, axis=2).astype(np.uint8)
    ramp[..., 1] //= 2
    shown = dithered_256(ramp)
    for rgb in np.unique(shown.reshape(-1, 3), axis=0).tolist():
        assert tuple(Color.from_rgb(*rgb).downgrade(ColorSystem.EIGHT_BIT).get_truecolor()) == tuple(rgb)
    areas = (40, 8, 8, 3)
    means = [
        np.asarray(p, np.float64).reshape(1, areas[0], areas[1], areas[2], 3).mean(axis=(1, 3)) for p in (ramp, shown)
    ]
    assert np.abs(means[0] - means[1]).max() < 12, "areas keep their colour"


@pytest.mark.parametrize(
    ("size", "room", "found"),
    [
        ((3, 2), (44, 44), (44, 29)),
        ((1, 65535), (44, 44), (1, 44)),
        ((65535, 1), (44, 44), (44, 1)),
        ((1, 1), (3, 9), (3, 3)),
        ((100, 100), (1, 1), (1, 1)),
    ],
)
def test_pictures_fit(size, room, found) -> None:
    assert fit(size, *room) == found


def test_small_pictures_keep_their_pixels_and_large_ones_are_averaged() -> None:
    small = noise(3, 2)
    assert np.array_equal(shrunk(small, (4, 6)), small.repeat(2, axis=0).repeat(2, axis=1))
    large = noise(8, 12)
    means = large.reshape(4, 2, 6, 2, 3).mean(axis=(1, 3))
    assert np.abs(shrunk(large, (6, 4)) - means).max() <= 1


@given(
    st.sampled_from([(1, 1), (1, 65535), (65535, 1), (1, 2), (2, 1), (3, 1000), (640, 1), (37, 53), (640, 480)]),
    st.integers(1, 90),
    st.integers(1, 40),
    st.sampled_from(list(View)),
    st.sampled_from(list(Colours)),
    st.integers(0, 12),
    st.sampled_from([Inks(), LIGHT]),
)
@settings(max_examples=80, deadline=None)
def test_any_picture_is_drawn_in_its_cells(size, columns, rows, view, colours, n_kept, inks) -> None:
    drawing = Drawing(bounded(np.full((size[1], size[0], 3), 90, np.uint8)))
    x, y = (v.ravel() / (3, 4)[i] for i, v in enumerate(np.mgrid[:3, :4]))
    boxes = np.stack([x, y, x + 1 / 3, y + 1 / 4], axis=1).astype(np.float32)
    boxes[-1, 2] = boxes[-1, 0]  # padding
    drawing.know(boxes, np.linspace(0, 1, 12, dtype=np.float32), np.arange(n_kept, dtype=np.int32))
    across, down = drawing.size(columns, rows)
    assert 1 <= across <= columns
    assert 1 <= down <= rows
    strips = drawing.strips(columns, rows, view, inks, colours)
    assert [s.cell_length for s in strips] == [across] * down
