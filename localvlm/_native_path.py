"""Finds the native library, however localvlm was installed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import localvlm
from localvlm.errors import UnsupportedModel

__all__ = ["native_library"]

NAME = "liblocalvlm_tap.dylib" if sys.platform == "darwin" else "liblocalvlm_tap.so"


def native_library() -> Path:
    """The tap library: ``LOCALVLM_NATIVE_LIBRARY``, else the installed one, else one built in the checkout.

    Raises:
        UnsupportedModel: there is none.
    """
    override = os.environ.get("LOCALVLM_NATIVE_LIBRARY")
    if override:
        if not Path(override).is_file():
            raise UnsupportedModel(f"LOCALVLM_NATIVE_LIBRARY={override!r} is not a file", "unset it")
        return Path(override)
    places = [Path(folder) / "_native" for folder in localvlm.__path__]
    root = Path(localvlm.__file__).absolute().parent.parent
    places += [root / "build" / "native", root / "build", root / "native" / "build"]
    for place in places:
        if (place / NAME).is_file():
            return place / NAME
    raise UnsupportedModel(
        f"the native library {NAME!r} is missing", "run `pip install .` in the checkout, or reinstall localvlm"
    )
