"""The cache on disk that huggingface_hub, llama.cpp and localvlm share: what lies in it, checked and removed."""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from localvlm.errors import StorageError, UsageError

__all__ = [
    "DIGEST",
    "PIECE",
    "CachedFile",
    "Removal",
    "cache_folder",
    "cached_files",
    "commit_of",
    "digest_of",
    "drop_part",
    "folder_of",
    "half_fetched",
    "hasher",
    "hub_address",
    "library_settings",
    "locked",
    "removal",
    "size_of",
]

PIECE = 1 << 18
"""Bytes that are read from a file at a time."""
_AT_ONCE_S = 0.5
"""How long a lock that is free may take."""
DIGEST = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")
"""SHA-256 of a file that the hub stores by LFS, or the SHA-1 by which git knows it."""


@dataclass(frozen=True)
class CachedFile:
    """A file in the cache.

    Attributes:
        path: in the folder of its commit, under its own name.
        digest: see DIGEST; ``""`` where the cache does not tell.
    """

    repo: str
    commit: str
    name: str
    path: Path
    size: int
    digest: str


def cache_folder() -> Path:
    """HF_HUB_CACHE, else the usual place below HF_HOME."""
    return Path(library_settings().HF_HUB_CACHE)


def library_settings() -> Any:
    """The constants of huggingface_hub, which come from the environment.

    Raises:
        UsageError: there is one that it stumbles over.
    """
    try:
        from huggingface_hub import constants
    except ValueError as error:
        raise UsageError(
            f"huggingface_hub cannot read its settings in the environment: {error}",
            "correct or unset HF_ENDPOINT and others that begin with HF_",
        ) from error
    return constants


def hub_address() -> str:
    """The address of the hub, as the environment has it.

    Raises:
        UsageError: it is none.
    """
    text = str(library_settings().ENDPOINT)
    try:
        _ = urlsplit(text).port
    except ValueError as error:
        raise UsageError(f"HF_ENDPOINT {text!r} is no address of a hub: {error}", "correct or unset it") from error
    return text


def folder_of(repo: str, cache: Path) -> Path:
    """Where the cache keeps a repository of models."""
    return cache / f"models--{repo.replace('/', '--')}"


def cached_files(cache: Path | None = None, suffix: str = ".gguf") -> list[CachedFile]:
    """The files in the cache whose names end so; of a repository's commits, those of its newest first."""
    cache = cache or cache_folder()
    found = []
    for folder in sorted(cache.glob("models--*--*")):
        repo = folder.name.removeprefix("models--").replace("--", "/", 1)
        for snapshot in sorted((folder / "snapshots").glob("*"), key=lambda at: _rank(folder, at)):
            for path in sorted(snapshot.rglob("*")):
                if path.name.lower().endswith(suffix) and path.is_file():
                    digest = path.readlink().name if path.is_symlink() else ""
                    name = path.relative_to(snapshot).as_posix()
                    known = digest if DIGEST.fullmatch(digest) else ""
                    found.append(CachedFile(repo, snapshot.name, name, path, path.stat().st_size, known))
    return found


def _rank(folder: Path, snapshot: Path) -> tuple[bool, float]:
    """The commit that "main" means first, then the newest."""
    return snapshot.name != _noted(folder, "main"), -snapshot.stat().st_mtime


def commit_of(repo: str, revision: str, cache: Path | None = None) -> str:
    """The commit that a branch or a tag meant when it was pulled; what is neither is taken for a commit."""
    return _noted(folder_of(repo, cache or cache_folder()), revision) or revision


def _noted(folder: Path, revision: str) -> str:
    refs = folder / "refs"
    if ".." in revision or not (refs / revision).is_relative_to(refs):
        return ""
    try:
        return (refs / revision).read_text(encoding="ascii", errors="replace").strip()
    except (OSError, ValueError):
        return ""


def digest_of(file: CachedFile, at: Callable[[int], None] | None = None) -> str:
    """The digest of what a file holds, of the kind that its name in the cache has; ``at`` hears the bytes read."""
    found = hasher(file.digest or "0" * 64, file.size)
    n_bytes = 0
    with file.path.open("rb", buffering=0) as source:
        while piece := source.read(PIECE):
            found.update(piece)
            n_bytes += len(piece)
            if at is not None:
                at(n_bytes)
    told: str = found.hexdigest()
    return told


@dataclass(frozen=True)
class Removal:
    """What removing files would free, in bytes, and what does it. ``parts``: of files that were not fetched whole,
    which go too; ``busy``: those that stay, as another process is fetching them.
    """

    n_bytes: int
    execute: Callable[[], None]
    parts: tuple[CachedFile, ...] = ()
    busy: tuple[CachedFile, ...] = ()


def removal(files: Sequence[CachedFile], repos: Iterable[str] = (), cache: Path | None = None) -> Removal:
    """How to remove files: content that others still use stays, and a repository without files goes.

    Where no other model file of a repository stays, its parts of files go too, and those of ``repos``: nothing else
    would remove them.
    """
    from huggingface_hub import scan_cache_dir

    named = cache or cache_folder()
    cache = named.resolve()  # as the library writes paths; links below it are what is removed
    info = scan_cache_dir(cache)
    paths = {cache / file.path.relative_to(named) for file in files}
    known = [f for r in info.repos for v in r.revisions for f in v.files if f.file_path in paths]
    if len(known) < len(paths):
        raise StorageError(f"the cache '{cache}' is damaged", "`hf cache verify` tells more; remove the folder by hand")
    plan = info.delete_files(*known)
    repos = {*repos, *(file.repo for file in files)}
    folders = {folder_of(repo, cache) for repo in repos}
    stay = {file.repo for file in cached_files(cache) if file.path not in paths}
    halves = [part for repo in sorted(repos - stay) for part in half_fetched(repo, cache)]
    busy = tuple(part for part in halves if _is_fetched(part.path))
    parts = tuple(part for part in halves if part not in busy)

    def execute() -> None:
        plan.execute()
        for part in parts:
            drop_part(part.path)
        for folder in folders:
            used = *(folder / "snapshots").rglob("*"), *(folder / "blobs").glob("*.incomplete")
            if not any(path.is_file() for path in used):
                shutil.rmtree(folder, ignore_errors=True)

    return Removal(plan.expected_freed_size + sum(part.size for part in parts), execute, parts, busy)


def half_fetched(repo: str, cache: Path | None = None) -> list[CachedFile]:
    """What there is of a repository's files that were not fetched whole."""
    cache = cache or cache_folder()
    paths = sorted((folder_of(repo, cache) / "blobs").glob("*.incomplete"))
    return [CachedFile(repo, "", path.name, path, size_of(path), "") for path in paths]


@contextmanager
def locked(blob: Path, wait_s: float | None = None) -> Iterator[None]:
    """Holds the lock that the library takes for the content ``blob`` too, so that two processes do the work once.

    Raises:
        TimeoutError: another process has it still after so many seconds; None: it is waited for.
    """
    from huggingface_hub.utils import WeakFileLock

    path = _lock_of(blob)
    path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(path, timeout=wait_s):
        yield


def drop_part(path: Path) -> None:
    """Removes the part of a file, unless another process is fetching it."""
    with suppress(TimeoutError), locked(_blob_of(path), _AT_ONCE_S):
        path.unlink(missing_ok=True)


def _is_fetched(path: Path) -> bool:
    """Whether another process is fetching the file of this part."""
    blob = _blob_of(path)
    if not _lock_of(blob).exists():
        return False
    try:
        with locked(blob, _AT_ONCE_S):
            return False
    except TimeoutError:
        return True


def _blob_of(part: Path) -> Path:
    return part.with_name(part.name.partition(".")[0])


def _lock_of(blob: Path) -> Path:
    folder = blob.parent.parent
    return folder.parent / ".locks" / folder.name / f"{blob.name}.lock"


def hasher(digest: str, size: int) -> Any:
    """What makes a digest of the kind of ``digest`` from a content of ``size`` bytes."""
    if len(digest) == 64:
        return hashlib.sha256()
    return hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)  # as git names a file


def size_of(path: Path) -> int:
    """Bytes of a file, 0 without one."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
