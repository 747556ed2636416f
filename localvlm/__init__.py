"""Ask questions about images, offline: a small VLM's attention decides what a large VLM sees."""

from __future__ import annotations

import os
import sys

__all__ = ["__version__"]

__version__ = "0.1.0"


def _search_path(here: str, path: list[str], sys_path: list[str]) -> list[str]:
    """Where submodules of this package are looked for.

    In a checkout, ``models/`` and ``tui/`` lie beside this folder and the native library is not built in place. When
    Python finds this folder first (because it was started in the checkout) although localvlm is installed, this
    folder gives way to the installed copy. Without an installed copy, the checkout itself provides the subpackages.

    What this module imports Python has loaded by itself, so that a Ctrl-C meets no import before ``__main__`` is ready
    for it.
    """
    root, join = os.path.dirname(here), os.path.join  # noqa: PTH120
    checkout = (
        os.path.isfile(join(root, "pyproject.toml"))  # noqa: PTH113
        and os.path.isdir(join(root, "models"))  # noqa: PTH112
        and not os.path.exists(join(here, "models"))  # noqa: PTH110
    )
    if not checkout or len(path) > 1:  # installed; or an editable install, whose finder added its own folder
        return path
    for entry in sys_path:
        installed = join(os.path.abspath(entry), "localvlm")  # noqa: PTH100
        if installed != here and os.path.isfile(join(installed, "models", "__init__.py")):  # noqa: PTH113
            return [installed]
    return [*path, root]


__path__ = _search_path(os.path.dirname(os.path.abspath(__file__)), list(__path__), sys.path)  # noqa: PTH100, PTH120
