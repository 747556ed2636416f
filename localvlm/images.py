"""Pictures as the model should see them: upright 8-bit RGB, first frame, transparency on white, nothing in silence.

Files are hostile until decoded: formats come from an allow-list, sizes are checked before pixels are allocated, no
decoder that starts another program is reachable. HEIC and PDF, whose decoders are not Pillow's own, are decoded in a
process of their own (:mod:`localvlm.images_apart`).
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import BinaryIO

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from localvlm.errors import ImageError, LocalvlmError

__all__ = ["APART", "MAX_BYTES", "MAX_PIXELS", "MAX_SIDE", "Image", "decode", "load"]

MAX_BYTES = 512 << 20
"""Largest file read."""
MAX_PIXELS = 40_000_000
"""Most pixels decoded. Larger JPEGs are decoded at 1/2, 1/4 or 1/8 of their size; other formats are refused."""
MAX_SIDE = 65_535
"""Most pixels of a side."""

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "AVIF", "PPM")
APART = ("HEIC", "PDF")
TIFF_SUFFIXES = (".tif", ".tiff")
STRIP = 1 << 20
"""Pixels converted at a time, so that a conversion costs little memory beside the picture."""
ORIENTATION = 0x0112

_MAGIC: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG", "PNG"),
    (b"GIF8", "GIF"),
    (b"BM", "BMP"),
    *((b"P%d" % kind, "PPM") for kind in range(1, 7)),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"8BPS", "Photoshop"),
    (b"GGUF", "GGUF"),
    (b"<svg", "SVG"),
    (b"<?xml", "SVG or XML"),
    (b"\xff\x4f\xff\x51", "JPEG 2000"),
    (b"\x00\x00\x00\x0cjP", "JPEG 2000"),
)
_READABLE = {"JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "AVIF", "PPM", "HEIC"}
_pillow_globals = threading.Lock()


@dataclass(frozen=True)
class Image:
    """A decoded picture.

    Attributes:
        rgb: (height, width, 3) uint8, upright, contiguous.
        name: how the user called it.
        notes: what was done to it that the user should know, such as "frame 1 of 12".
    """

    rgb: NDArray[np.uint8]
    name: str
    notes: tuple[str, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)."""
        return self.rgb.shape[1], self.rgb.shape[0]

    @cached_property
    def content(self) -> bytes:
        """The same for pictures of the same size and pixels, and for no others."""
        return hashlib.sha256(repr(self.size).encode() + self.rgb.tobytes()).digest()


def load(
    source: str | os.PathLike[str] | bytes, name: str | None = None, page: int | None = None, *, apart: bool = False
) -> Image:
    """Reads a picture from a path, from bytes, or from standard input if ``source`` is ``"-"``.

    ``page``: of a PDF, from 1 on; None: the first. ``apart``: decoded in a process of its own, whatever it is, for
    those of unknown origin; that takes a quarter of a second longer.

    Raises:
        ImageError: it is missing, unreadable, truncated, too large or of an unknown format, or has no such page.
    """
    if isinstance(source, bytes):
        return _load(io.BytesIO(source), len(source), name or "(bytes)", page, apart)
    if source == "-":
        data = _read_stdin()
        return _load(io.BytesIO(data), len(data), name or "(standard input)", page, apart)
    path = os.fspath(source)
    with _open(path, name or path) as file:
        tiff, pdf = path.lower().endswith(TIFF_SUFFIXES), path.lower().endswith(".pdf")
        return _load(file, os.fstat(file.fileno()).st_size, name or path, page, apart, tiff=tiff, pdf=pdf)


def _load(
    file: BinaryIO, n_bytes: int, name: str, page: int | None, apart: bool, *, tiff: bool = True, pdf: bool = True
) -> Image:
    if n_bytes == 0:
        raise ImageError(f"image {name!r} is empty", "check the file")
    if n_bytes > MAX_BYTES:
        raise ImageError(f"image {name!r} is over {MAX_BYTES >> 20} MiB", "make it smaller first")
    kind = _kind(file.read(64))
    file.seek(0)
    if page is not None and kind != "PDF":
        raise ImageError(f"image {name!r} has no pages", "give it without `#`")
    if kind == "PDF" and not pdf:
        raise ImageError(f"image {name!r} is a PDF file by its content", "name it .pdf")
    formats = (*FORMATS, "TIFF") if tiff else FORMATS
    if apart or kind in APART:
        from localvlm.images_apart import decode_apart

        return decode_apart(file, name, kind, formats, page or 1)
    return decode(file, name, kind, formats)


# ---- reading -----------------------------------------------------------------------------------------------------


def _read_stdin() -> bytes:
    if sys.stdin is None or sys.stdin.isatty():
        raise ImageError("no image on standard input", "pipe one in: localvlm ask - QUESTION < picture.png")
    data = sys.stdin.buffer.read(MAX_BYTES + 1)
    if not data:
        raise ImageError("the image on standard input is empty")
    return data


def _open(path: str, name: str) -> BinaryIO:
    """Opens a regular file, and never waits for a FIFO or a device."""
    if path.startswith(("http://", "https://")):
        raise ImageError(f"image {name!r} is a URL, and localvlm stays offline", "--fetch lets it download pictures")
    if path.startswith("~") and not os.path.lexists(path):
        path = os.path.expanduser(path)  # noqa: PTH111 - pathlib's raises where there is no such user
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise ImageError(f"image {name!r} {_why(error)}", "check the path") from error
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
        raise ImageError(f"image {name!r} is {kind}", "give a picture file, or `-` to read one from standard input")
    return os.fdopen(fd, "rb")


def _why(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read by you"
    if isinstance(error, IsADirectoryError):
        return "is a directory"
    if isinstance(error, OSError) and error.errno == errno.ELOOP:
        return "is a loop of symbolic links"
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return f"cannot be opened: {reason}"


# ---- decoding ----------------------------------------------------------------------------------------------------


def decode(file: BinaryIO, name: str, kind: str, formats: tuple[str, ...]) -> Image:
    """A file of Pillow's ``formats``, in this process; ``kind``: what its first bytes say it is.

    Raises:
        ImageError: see :func:`load`.
    """
    notes: list[str] = []
    with _quiet_pillow(notes):
        try:
            with PIL.Image.open(file, formats=formats) as picture:
                _limit_size(picture, name, notes)
                _note_frames(picture, notes)
                if kind == "PNG":
                    _require_png_end(file)
                picture.load()
                rgb = _upright(picture, _to_rgb(picture, notes), notes)
        except LocalvlmError:  # of ours; or Ctrl-C, which a signal's handler raises wherever we are
            raise
        except MemoryError as error:
            raise ImageError(f"image {name!r} does not fit the memory", "make it smaller first") from error
        except Exception as error:
            raise _bad_file(name, kind, error, tiff="TIFF" in formats) from error
    return Image(np.ascontiguousarray(rgb), name, tuple(dict.fromkeys(notes)))


@contextmanager
def _quiet_pillow(notes: list[str]) -> Iterator[None]:
    """Replaces Pillow's own size limit by ours, and turns its warnings into notes."""
    with _pillow_globals, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        limit, PIL.Image.MAX_IMAGE_PIXELS = PIL.Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit
            notes += [f"decoder: {' '.join(str(w.message).split())[:200]}" for w in caught]


def _kind(head: bytes) -> str:
    """What the first bytes say the file is; "" if they say nothing."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP"[: len(head[8:12])]:
        return "WEBP"
    if head[4:8] == b"ftyp":
        brands = head[8:12] + head[16 : int.from_bytes(head[:4], "big")]
        if b"avi" in (brands[i : i + 3] for i in range(0, len(brands), 4)):
            return "AVIF"
        if head[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"):
            return "HEIC"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n") if head[:1] != b"\0" else head
    return next((kind for magic, kind in _MAGIC if start.startswith(magic)), "")


def _bad_file(name: str, kind: str, error: Exception, *, tiff: bool) -> ImageError:
    if kind == "TIFF" and not tiff:
        return ImageError(f"image {name!r} is a TIFF file by its content", "name it .tif, or convert it to PNG")
    if kind in _READABLE:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        what = "truncated" if cut else "truncated or damaged"
        return ImageError(f"image {name!r} is a {what} {kind} file", "copy or download it again")
    what = f"is a {kind} file, not an image" if kind else "is not an image"
    return ImageError(f"image {name!r} {what}", "JPEG, PNG, WebP, AVIF, HEIC, GIF, BMP, PPM, TIFF and PDF can be read")


def _limit_size(picture: PIL.Image.Image, name: str, notes: list[str]) -> None:
    """Refuses sizes that would take too much memory; a JPEG is decoded smaller instead."""
    width, height = picture.size
    if picture.format in ("JPEG", "MPO") and width * height > MAX_PIXELS:
        scale = next((s for s in (2, 4, 8) if (width // s + 1) * (height // s + 1) <= MAX_PIXELS), 8)
        picture.draft(None, (width // scale, height // scale))
        if picture.size != (width, height):
            notes.append(f"{width}x{height} pixels decoded as {picture.width}x{picture.height}")
    if picture.width * picture.height > MAX_PIXELS or max(picture.size) > MAX_SIDE:
        raise ImageError(
            f"image {name!r} is too large: {width}x{height} pixels, at most {MAX_PIXELS // 1_000_000} million",
            "make it smaller first",
        )


def _note_frames(picture: PIL.Image.Image, notes: list[str]) -> None:
    if picture.format == "MPO":  # a photo with its preview or depth map
        return
    frames = getattr(picture, "n_frames", 1)
    if frames > 1:
        word = "page" if picture.format == "TIFF" else "frame"
        notes.append(f"{word} 1 of {frames}")


def _require_png_end(file: BinaryIO) -> None:
    """Pillow accepts a PNG cut after its last row; a cut file may also lack rows, so its end must be there."""
    place = file.tell()
    file.seek(8)
    for _ in range(100_000):
        head = file.read(8)
        if len(head) < 8:
            raise EOFError("PNG file has no end")
        if head[4:] == b"IEND":
            break
        file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    file.seek(place)


# ---- conversion --------------------------------------------------------------------------------------------------


def _to_rgb(picture: PIL.Image.Image, notes: list[str]) -> NDArray[np.uint8]:
    """Any Pillow mode as (height, width, 3) uint8, a strip of rows at a time."""
    if picture.mode in ("I", "F"):  # of unknown range: all values are needed
        return np.repeat(_scaled(np.asarray(picture), notes)[:, :, None], 3, axis=2)
    convert = _converter(picture, notes)
    out = np.empty((picture.height, picture.width, 3), np.uint8)
    rows = max(1, STRIP // picture.width)
    for top in range(0, picture.height, rows):
        strip = picture.crop((0, top, picture.width, min(top + rows, picture.height)))
        out[top : top + rows] = convert(strip)
    return out


def _converter(picture: PIL.Image.Image, notes: list[str]) -> Callable[[PIL.Image.Image], NDArray[np.generic]]:
    """How strips of this picture become RGB."""
    if picture.mode.startswith("I;16"):
        return lambda strip: ((np.asarray(strip).astype(np.uint32) + 128) // 257)[:, :, None]
    if picture.mode == "LAB":
        return _lab_converter()
    if not picture.has_transparency_data:
        return lambda strip: np.asarray(strip.convert("RGB"))
    transparency = picture.info.get("transparency")

    def on_white(strip: PIL.Image.Image) -> NDArray[np.generic]:
        if transparency is not None:
            strip.info["transparency"] = transparency
        rgba = np.asarray(strip.convert("RGBA")).astype(np.uint16)
        alpha = rgba[:, :, 3:]
        if (alpha < 255).any():
            notes.append("transparent parts shown on white")
        return (rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255

    return on_white


def _scaled(values: NDArray[np.generic], notes: list[str]) -> NDArray[np.uint8]:
    """Integers or floats of unknown range as 0..255: by the range they were likely made for, else stretched."""
    floats = np.nan_to_num(values.astype(np.float32), posinf=0.0, neginf=0.0)
    low, high = float(floats.min()), float(floats.max())
    is_float = values.dtype.kind == "f"
    if low >= 0 and high <= 1 and is_float:
        scale = 255.0
    elif low >= 0 and high <= 255:
        scale = 1.0
    elif low >= 0 and high <= 65_535:
        scale = 1 / 257
    elif low == high:
        notes.append(f"all values are {low:g}, shown black")
        scale = 0.0
    else:
        notes.append(f"values {low:g} to {high:g} stretched to black and white")
        floats -= low
        scale = 255 / (high - low)
    grey: NDArray[np.uint8] = np.clip(np.rint(floats * scale), 0, 255).astype(np.uint8)
    return grey


def _lab_converter() -> Callable[[PIL.Image.Image], NDArray[np.generic]]:
    from PIL import ImageCms

    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    transform = ImageCms.buildTransform(lab, srgb, "LAB", "RGB")
    return lambda strip: np.asarray(transform.apply(strip))


def _upright(picture: PIL.Image.Image, rgb: NDArray[np.uint8], notes: list[str]) -> NDArray[np.uint8]:
    """Applies the EXIF orientation. Damaged metadata is ignored, and said."""
    try:
        orientation = picture.getexif().get(ORIENTATION, 1)
    except LocalvlmError:  # Ctrl-C
        raise
    except Exception:  # noqa: BLE001 - metadata parsers raise every kind of error
        notes.append("metadata is damaged and was ignored")
        return rgb
    if orientation in (5, 6, 7, 8):  # stored on its side: rows are columns
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    return rgb
