"""What stays on disk of pictures, questions and answers, and how it goes.

Nothing but this: history (``data``: what was asked and answered in ``chat``), encoded pictures (only where
``--image-cache`` asked for them), thumbnails, what was measured of drafts while answering (numbers without text), and
the journals of ``eval``. With ``--private`` nothing is written, nor looked up.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from localvlm.config import directories
from localvlm.errors import StorageError

__all__ = ["HISTORY", "Trace", "forget", "traces"]

HISTORY = "history"


@dataclass(frozen=True)
class Trace:
    """Files of one kind: how many there are, and their bytes."""

    name: str
    folder: Path
    files: int
    n_bytes: int


def traces(*, all_of_them: bool) -> list[Trace]:
    """What there is; without ``all_of_them``, what was made of pictures alone. Encoded pictures are found by what a
    tower sees of them and cannot be told apart by name, so that all of them belong to any.
    """
    from localvlm.engine.image_cache import FOLDER
    from localvlm.history import history_file

    places = directories()
    kinds = [("encoded pictures", places.cache / FOLDER), ("thumbnails", places.cache / "thumbnails")]
    if all_of_them:
        kinds += [
            (HISTORY, history_file().parent),
            ("drafts", places.cache / "drafts"),
            ("evaluations", places.state / "eval"),
        ]
    found = [(name, folder, [path.lstat().st_size for path in _files(folder)]) for name, folder in kinds]
    return [Trace(name, folder, len(sizes), sum(sizes)) for name, folder, sizes in found]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def forget(trace: Trace) -> bool:
    """Removes a kind of files; False: another process has the history open, which is empty now.

    Raises:
        StorageError: one cannot be removed.
    """
    from localvlm.history import remove_history

    if trace.name == HISTORY and not remove_history():
        return False
    try:
        if trace.folder.is_symlink():
            trace.folder.unlink()
        elif trace.folder.exists():
            shutil.rmtree(trace.folder)
    except OSError as error:
        raise StorageError(f"'{error.filename or trace.folder}' cannot be removed: {error.strerror}") from error
    return True
