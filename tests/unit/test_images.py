"""Pictures as people see them, and hostile files; test_image_matrix.py has what goes on to the engine."""

from __future__ import annotations

import io
import os
import random
import struct
import subprocess
import sys
import zlib

import numpy as np
import PIL.Image
import PIL.PngImagePlugin
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localvlm import images
from localvlm.errors import ImageError
from localvlm.images import load
from tests.processor import thread_seconds

RNG = np.random.default_rng(7)
NOISE = PIL.Image.fromarray(RNG.integers(0, 256, (48, 64, 3), dtype=np.uint8))


def saved(picture: PIL.Image.Image, fmt: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, fmt, **options)
    return buffer.getvalue()


def message(source, **options) -> str:
    with pytest.raises(ImageError) as caught:
        load(source, **options)
    assert caught.value.hint
    return caught.value.message


# ---- I1 orientation


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_i1_eight_orientations_of_one_scene_decode_alike(fmt):
    undo = {
        2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
        3: PIL.Image.Transpose.ROTATE_180,
        4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
        5: PIL.Image.Transpose.TRANSPOSE,
        6: PIL.Image.Transpose.ROTATE_90,
        7: PIL.Image.Transpose.TRANSVERSE,
        8: PIL.Image.Transpose.ROTATE_270,
    }
    # blocks of one colour, so that JPEG's 8x8 blocks come out the same whichever way they lie
    scene = PIL.Image.fromarray(np.repeat(np.repeat(RNG.integers(0, 2, (3, 4, 3), dtype=np.uint8) * 255, 16, 0), 16, 1))
    decoded = []
    for orientation in range(1, 9):
        exif = PIL.Image.Exif()
        exif[0x0112] = orientation
        stored = scene.transpose(undo[orientation]) if orientation in undo else scene
        extra = {"lossless": True} if fmt == "WEBP" else {"subsampling": 0} if fmt == "JPEG" else {}
        decoded.append(load(saved(stored, fmt, exif=exif, **extra)).rgb)
    for one in decoded:
        np.testing.assert_array_equal(one, decoded[0])
    assert decoded[0].shape == (48, 64, 3)
    assert decoded[0].flags.c_contiguous


# ---- I2, I3 size


def png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    ihdr = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + ihdr + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_i2_huge_sizes_are_refused_before_anything_is_allocated():
    gif = b"GIF89a" + struct.pack("<HHBBB", 16384, 16384, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, 16384, 16384, 0)
    gif += b"\x02\x02\x4c\x01\x00;"
    for data in (png_header(60_000, 60_000), gif):
        assert "too large" in message(data)
        assert thread_seconds(lambda data=data: message(data)) < 0.1


def test_i3_big_jpeg_is_accepted_and_a_bigger_one_is_decoded_smaller_and_said(monkeypatch):
    monkeypatch.setattr(images, "MAX_PIXELS", 64 * 48)
    assert load(saved(NOISE, "JPEG")).notes == ()
    big = load(saved(NOISE.resize((200, 150)), "JPEG"))
    assert big.size == (50, 38)
    assert big.notes == ("200x150 pixels decoded as 50x38",)
    assert "too large" in message(saved(NOISE.resize((200, 150)), "PNG"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
def test_i3_a_24_megapixel_photo_takes_less_than_400_mb(tmp_path):
    PIL.Image.effect_noise((6000, 4000), 40).convert("RGB").save(tmp_path / "photo.jpg", quality=80)
    PIL.Image.new("RGB", (9433, 9433)).save(tmp_path / "flat.png")
    code = (
        "import re, sys; from localvlm.images import load; from localvlm.errors import ImageError\n"
        "try: print(load(sys.argv[1]).size)\n"
        "except ImageError as error: print(error.message)\n"
        "print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) >> 10)"
    )
    for name, words in (("photo.jpg", "(6000, 4000)"), ("flat.png", "too large")):
        run = subprocess.run(
            [sys.executable, "-c", code, tmp_path / name], capture_output=True, text=True, check=True, cwd=tmp_path
        )
        said, peak_mb = run.stdout.splitlines()
        assert words in said
        assert int(peak_mb) < 400


# ---- I4 metadata


def test_i4_hostile_metadata_is_ignored_or_refused_fast():
    bomb = PIL.PngImagePlugin.PngInfo()
    bomb.add_text("Comment", "x" * 50_000_000, zip=True)
    other = PIL.PngImagePlugin.PngInfo()
    other.add_itxt("Comment", "x" * 50_000_000, zip=True)
    big_exif = b"Exif\0\0MM\0*" + b"\xff" * 10_000_000
    cases = [
        saved(NOISE, "PNG", pnginfo=bomb),
        saved(NOISE, "PNG", pnginfo=other),
        saved(NOISE, "PNG", exif=big_exif),
        saved(NOISE, "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\xff" * 60_000),
        saved(NOISE, "JPEG", icc_profile=b"garbage" * 9000),
        saved(NOISE, "PNG", icc_profile=b"garbage" * 9000),
    ]
    for data in cases:

        def read(data: bytes = data) -> None:
            try:
                assert load(data).size == (64, 48)
            except ImageError as error:
                assert "truncated or damaged" in error.message

        assert thread_seconds(read) < 1


# ---- I5 modes


def test_i5_sixteen_bit_grey_is_scaled():
    values = np.array([[0, 32768, 65535]], np.uint16)
    for fmt in ("PNG", "TIFF"):
        rgb = load(saved(PIL.Image.fromarray(values), fmt)).rgb
        np.testing.assert_array_equal(rgb[0], [[0] * 3, [128] * 3, [255] * 3])


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.array([[0.0, 0.5, 1.0]], np.float32), (0, 128, 255)),
        (np.array([[0.0, 127.6, 255.0]], np.float32), (0, 128, 255)),
        (np.array([[0.0, np.nan, 255.0]], np.float32), (0, 0, 255)),
        (np.array([[-1.0, 0.0, 1.0]], np.float32), (0, 128, 255)),
        (np.array([[0, 128, 255]], np.int32), (0, 128, 255)),
        (np.array([[0, 32768, 65535]], np.int32), (0, 128, 255)),
        (np.array([[0, 1 << 24, 1 << 25]], np.int32), (0, 128, 255)),
        (np.array([[5, 5, 5]], np.int32), (5, 5, 5)),
        (np.array([[-5, -5, -5]], np.int32), (0, 0, 0)),
        (np.array([[1e6, 1e6, 1e6]], np.float32), (0, 0, 0)),
    ],
)
def test_i5_integers_and_floats_are_scaled_by_their_range(values, grey):
    picture = load(saved(PIL.Image.fromarray(values), "TIFF"))
    np.testing.assert_array_equal(picture.rgb[0, :, 0], grey)


def test_i5_transparency_is_shown_on_white_and_said():
    rgba = PIL.Image.new("RGBA", (3, 1), (255, 0, 0, 0))
    rgba.putpixel((1, 0), (255, 0, 0, 128))
    rgba.putpixel((2, 0), (255, 0, 0, 255))
    expected = [[255, 255, 255], [255, 127, 127], [255, 0, 0]]
    palette = PIL.Image.new("P", (3, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((2, 0), 1)
    for data in (saved(rgba, "PNG"), saved(rgba, "TIFF"), saved(rgba, "WEBP", lossless=True, exact=True)):
        picture = load(data)
        np.testing.assert_array_equal(picture.rgb[0], expected)
        assert picture.notes == ("transparent parts shown on white",)
    picture = load(saved(palette, "PNG", transparency=0))
    np.testing.assert_array_equal(picture.rgb[0], [[255] * 3, [255] * 3, [0, 0, 255]])
    grey = load(saved(PIL.Image.new("LA", (1, 1), (0, 0)), "PNG"))
    np.testing.assert_array_equal(grey.rgb[0], [[255] * 3])
    assert load(saved(PIL.Image.new("RGBA", (1, 1), (1, 2, 3, 255)), "PNG")).notes == ()


def test_i5_other_modes():
    for mode, colour, expected in (
        ("1", 1, (255, 255, 255)),
        ("L", 77, (77, 77, 77)),
        ("CMYK", (0, 255, 255, 0), (255, 0, 0)),
        ("LAB", (255, 128, 128), (255, 255, 255)),
    ):
        picture = load(saved(PIL.Image.new(mode, (2, 2), colour), "TIFF"))
        assert np.abs(picture.rgb[0, 0].astype(int) - expected).max() <= 1, mode
    inverted = load(saved(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert np.abs(inverted.rgb[0, 0].astype(int) - (254, 0, 0)).max() <= 2


# ---- I6 frames


@pytest.mark.parametrize("fmt", ["GIF", "PNG", "WEBP"])
def test_i6_the_first_frame_is_used_and_said(fmt):
    frames = [PIL.Image.new("RGB", (8, 8), (i * 80, 0, 0)) for i in range(4)]
    picture = load(saved(frames[1], fmt, save_all=True, append_images=frames[2:] + frames[:1]))
    assert picture.notes == ("frame 1 of 4",)
    assert np.abs(picture.rgb[0, 0].astype(int) - (80, 0, 0)).max() <= 3
    assert load(saved(frames[0], fmt)).notes == ()


def test_i6_pages_of_a_tiff():
    pages = [PIL.Image.new("L", (8, 8), i) for i in range(3)]
    assert load(saved(pages[0], "TIFF", save_all=True, append_images=pages[1:])).notes == ("page 1 of 3",)


# ---- I7 truncation


@pytest.mark.parametrize("fmt", ["JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF"])
def test_i7_truncated_files_are_refused_wherever_they_end(fmt):
    data = saved(NOISE, fmt)
    last = len(data) - (6 if fmt in ("PNG", "GIF") else 1)  # a PNG without its last checksum is whole
    for end in sorted({*np.linspace(12, last, 25).astype(int), last}):
        assert "truncated" in message(data[:end]), end


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]), st.randoms(use_true_random=False))
def test_i7_damaged_files_give_a_picture_or_one_kind_of_error(fmt, rng: random.Random):
    data = bytearray(saved(NOISE, fmt))
    for _ in range(rng.randint(1, 20)):
        data[rng.randrange(len(data))] = rng.randrange(256)
    try:
        assert load(bytes(data)).rgb.dtype == np.uint8
    except ImageError as error:
        assert "\n" not in error.message


# ---- I8 not a picture


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript"),
        (b"\xc5\xd0\xd3\xc6" + b"\0" * 60, "EPS"),
        (b"%PDF-1.7\n", "PDF"),
        (b"8BPS\0\1" + b"\0" * 60, "Photoshop"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "SVG"),
        (saved(NOISE, "TIFF"), "TIFF"),
        (b"GGUF" + b"\0" * 60, "GGUF"),
        (b"\0\0\0\x18ftypheic" + b"\0" * 60, "HEIC"),
        (b"hello", "is not an image"),
    ],
)
def test_i8_other_files_named_png_are_named_for_what_they_are(tmp_path, data, words):
    (tmp_path / "a.png").write_bytes(data)
    assert words in message(tmp_path / "a.png")


def test_i8_a_tiff_is_read_by_its_name(tmp_path):
    (tmp_path / "a.TIF").write_bytes(saved(NOISE, "TIFF"))
    assert load(tmp_path / "a.TIF").size == (64, 48)


# ---- I9 files that are no files


def test_i9_files_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    (tmp_path / "empty.png").touch()
    (tmp_path / "closed.png").touch(mode=0)
    cases = {
        tmp_path / "fifo.png": "not a regular file",
        "/dev/zero": "not a regular file",
        tmp_path: "directory",
        tmp_path / "loop.png": "loop of symbolic links",
        tmp_path / "empty.png": "empty",
        tmp_path / "missing.png": "does not exist",
        "nul\0.png": "cannot be opened",
        "x" * 300: "cannot be opened",
        "https://example.org/a.png": "offline",
    }
    if os.geteuid():
        cases[tmp_path / "closed.png"] = "may not be read"
    for source, words in cases.items():
        assert words in message(source)


def test_i9_hostile_names_are_shown_escaped(tmp_path):
    said = message(tmp_path / "a\n\x1b]0;x\x07\u202e.png")
    assert said.isprintable()
    assert r"\n\x1b]0;x\x07\u202e" in said


# ---- I10 shapes


@pytest.mark.parametrize("size", [(1, 1), (1, 65535), (65535, 1)])
def test_i10_extreme_shapes(size):
    assert load(saved(PIL.Image.new("RGB", size), "PNG")).size == size


def test_pillow_is_left_as_it_was():
    limit = PIL.Image.MAX_IMAGE_PIXELS
    message(b"hello")
    load(saved(NOISE, "PNG"))
    assert limit == PIL.Image.MAX_IMAGE_PIXELS
