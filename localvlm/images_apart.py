"""Pictures that are decoded in a process of their own, under limits of memory and time, without network or programs.

Decoders are large programs fed with files from anywhere. One that crashes, hangs or takes all memory costs a picture,
and no more. Those of HEIC and PDF (libheif, pdfium) come as extras: ``pip install 'localvlm[heic,pdf]'``.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from localvlm.engine.isolation import close_to_processes, close_to_python, close_to_system, no_core_dump
from localvlm.engine.wire import pack, unpack
from localvlm.errors import ImageError, LocalvlmError
from localvlm.images import MAX_PIXELS, MAX_SIDE, Image, decode

__all__ = ["decode_apart"]

DPI = 200
"""Of pages; 1654 x 2339 pixels of A4."""
SECONDS = 20
"""Of processor time."""
PATIENCE = 120
"""Seconds that a busy machine may take for it."""
MEMORY = 3 << 30
"""Bytes of address space."""
_PACKAGES = {"HEIC": ("pillow_heif", "heic"), "PDF": ("pypdfium2", "pdf")}
_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from localvlm.images_apart import main; main(*sys.argv[2:])"
)


def decode_apart(file: BinaryIO, name: str, kind: str, formats: tuple[str, ...], page: int) -> Image:
    """As :func:`localvlm.images.decode`; HEIC files too and, from 1 on, pages of PDFs.

    Raises:
        ImageError: see :func:`localvlm.images.load`; or the extra is not installed.
    """
    package, extra = _PACKAGES.get(kind, ("PIL", ""))
    if find_spec(package) is None:
        raise ImageError(
            f"image {name!r} is a {kind} file, and {package} is missing", f"pip install 'localvlm[{extra}]'"
        )
    packages = [*filter(os.path.isabs, sys.path), str(Path(__file__).resolve().parents[1])]  # not where the user stands
    command = [sys.executable, "-E", "-P", "-c", _BOOT, json.dumps(packages), name, kind, ",".join(formats), str(page)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}  # each of its threads takes address space
    try:
        done = subprocess.run(
            command,
            input=file.read(),
            capture_output=True,
            timeout=PATIENCE,
            env=environment,
            check=False,
            start_new_session=True,  # a Ctrl-C in the terminal is ours to handle
        )
        reply = unpack(io.BytesIO(done.stdout).read)
    except subprocess.TimeoutExpired:
        raise ImageError(f"image {name!r} takes over {PATIENCE} s to decode", "convert it to PNG") from None
    except LocalvlmError:  # Ctrl-C, which a signal's handler raises wherever we are
        raise
    except Exception as error:  # it was ended before it said anything whole
        raise ImageError(f"image {name!r} ended its decoder", "convert it to PNG") from error
    if "error" in reply:
        raise ImageError(reply["error"], reply["hint"])
    return Image(reply["rgb"], name, tuple(reply["notes"]))


# ---- in the process apart --------------------------------------------------------------------------------------------


def main(name: str, kind: str, formats: str, page: str) -> None:
    """Decodes what stands on standard input, and writes one frame to standard output."""
    _limit()
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever libraries print
    data = sys.stdin.buffer.read()
    try:
        image = _decoded(data, name, kind, tuple(formats.split(",")), int(page))
        reply: dict[str, Any] = {"rgb": image.rgb, "notes": list(image.notes)}
    except ImageError as error:
        reply = {"error": error.message, "hint": error.hint}
    except MemoryError:
        reply = {"error": f"image {name!r} does not fit the memory", "hint": "make it smaller first"}
    for part in pack(reply):
        out.write(part)
    out.flush()


def _limit() -> None:
    import resource

    no_core_dump()
    close_to_python()
    close_to_processes()
    close_to_system()
    for kind, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CPU, SECONDS)):
        with contextlib.suppress(OSError, ValueError):  # a lower one stays
            resource.setrlimit(kind, (most, most))


def _decoded(data: bytes, name: str, kind: str, formats: tuple[str, ...], page: int) -> Image:
    if kind == "PDF":
        return _pdf(data, name, page)
    if kind == "HEIC":
        import pillow_heif

        pillow_heif.register_heif_opener()
        formats = ("HEIF",)
    return decode(io.BytesIO(data), name, kind, formats)


def _pdf(data: bytes, name: str, number: int) -> Image:
    import pypdfium2

    try:
        document = pypdfium2.PdfDocument(data)
        n_pages = len(document)
        if number > n_pages:
            count = "1 page" if n_pages == 1 else f"{n_pages} pages"
            raise ImageError(f"PDF {name!r} has {count}, and page {number} was asked for", "ask for one that it has")
        page = document[number - 1]
        width, height = page.get_size()
        if not (width > 0 and height > 0):
            raise ImageError(f"page {number} of PDF {name!r} is {width:g}x{height:g} points", "print it to a new PDF")
        scale = min(DPI / 72, (0.99 * MAX_PIXELS / (width * height)) ** 0.5, 0.99 * MAX_SIDE / max(width, height))
        rgb = page.render(scale=scale, rev_byteorder=True).to_numpy()[:, :, :3]
    except pypdfium2.PdfiumError as error:
        why = "needs a password" if "password" in str(error).lower() else "is truncated or damaged"
        raise ImageError(f"PDF {name!r} {why}", "print it to a new PDF, or convert the page to PNG") from error
    drawn = f"page {number} of {n_pages}, drawn as {rgb.shape[1]}x{rgb.shape[0]} pixels"
    return Image(np.ascontiguousarray(rgb), name, (drawn,))
