"""Ask questions about images, offline: a small VLM's attention decides what a large VLM sees."""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["__version__"]

__version__ = "0.1.0"


def _search_path(here: Path, path: list[str], sys_path: list[str]) -> list[str]:
    """Where submodules of this package are looked for.

    In a checkout, ``models/`` and ``tui/`` lie beside this folder and the native library is not built in place. When
    Python finds this folder first (because it was started in the checkout) although localvlm is installed, this
    folder gives way to the installed copy. Without an installed copy, the checkout itself provides the subpackages.
    """
    root = here.parent
    checkout = (root / "pyproject.toml").is_file() and (root / "models").is_dir() and not (here / "models").exists()
    if not checkout or len(path) > 1:  # installed; or an editable install, whose finder added its own folder
        return path
    for entry in sys_path:
        installed = Path(entry or ".").absolute() / "localvlm"
        if installed != here and (installed / "models" / "__init__.py").is_file():
            return [str(installed)]
    return [*path, str(root)]


__path__ = _search_path(Path(__file__).absolute().parent, list(__path__), sys.path)
