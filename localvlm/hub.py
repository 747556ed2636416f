"""Files of repositories on a Hugging Face hub, fetched into the cache that its own library and llama.cpp use too.

Of huggingface_hub come the requests, tokens, errors, locks and the layout of the cache. Its download keeps no partial
file beyond its process and compares sizes alone, so the loop that fetches a file is ours: it goes on where an earlier
one was killed, and nothing gets its final name before its digest is the one that the hub tells.
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from localvlm.errors import DownloadError, LocalvlmError, StorageError, UsageError
from localvlm.hub_cache import (
    DIGEST,
    PIECE,
    cache_folder,
    drop_part,
    folder_of,
    hasher,
    hub_address,
    library_settings,
    locked,
    size_of,
)
from localvlm.references import Reference, choose

__all__ = ["Hub", "HubFile", "Listing", "Progress"]

RETRIES = 5
"""Failures in a row, with no byte between them, after which a fetch is given up."""
MAX_WAIT_S = 60.0
"""The longest wait that a hub may ask for."""
NAME_BYTES, PATH_BYTES = 240, 1000
"""The longest part of a name and the longest name that is taken; file systems end at 255 and 4096."""
_REPO = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_ADDRESS = re.compile(r"https?://[^\s/]+(?:/\S*)?", re.IGNORECASE)
_STAYS = ("LocalProtocolError", "TooManyRedirects", "UnsupportedProtocol")
"""Errors of httpx that come again however long one waits."""
_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")


@dataclass(frozen=True)
class HubFile:
    """A file of one commit of a repository.

    Attributes:
        digest: SHA-256 of its content where the hub stores it by LFS, else git's SHA-1; names it in the cache.
        size: bytes.
    """

    repo: str
    commit: str
    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Listing:
    """What a repository holds at one commit; ``licence`` as its card says, or ``""``."""

    repo: str
    revision: str
    commit: str
    files: tuple[HubFile, ...]
    licence: str


class Progress(Protocol):
    """Hears how files come in."""

    def begin(self, files: Sequence[HubFile]) -> None:
        """These will be there in the end."""

    def at(self, file: HubFile, n_bytes: int) -> None:
        """So many bytes of ``file`` are there now."""

    def note(self, text: str) -> None:
        """What the user should know."""


class _Silent:
    def begin(self, files: Sequence[HubFile]) -> None: ...
    def at(self, file: HubFile, n_bytes: int) -> None: ...
    def note(self, text: str) -> None: ...


class _CutOff(Exception):
    """A response ended early."""


def _default_endpoint() -> str:
    return hub_address()


def _default_offline() -> bool:
    return bool(library_settings().is_offline_mode())


@dataclass(frozen=True)
class Hub:
    """A hub, and the cache for its files.

    Attributes:
        endpoint: its address; HF_ENDPOINT, else https://huggingface.co.
        cache: HF_HUB_CACHE, else the usual place below HF_HOME.
        token: None for HF_TOKEN, else the one that `hf auth login` saved.
        offline: nothing is asked of the hub; HF_HUB_OFFLINE.
        wait_s: seconds before the first repeat, doubled before each further one.
    """

    endpoint: str = field(default_factory=_default_endpoint)
    cache: Path = field(default_factory=cache_folder)
    token: str | None = None
    offline: bool = field(default_factory=_default_offline)
    progress: Progress = field(default_factory=_Silent)
    wait_s: float = 1.0

    def listing(self, repo: str, revision: str = "main") -> Listing:
        """The files of a repository.

        Raises:
            UsageError: ``repo`` cannot be the name of one, or HF_ENDPOINT no address.
            DownloadError: it does not exist, is closed to this user, or the hub cannot be reached or answers nonsense.
        """
        check_repo(repo)
        self._check_online(repo)
        from huggingface_hub import HfApi
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # it would print what servers say as they say it
        api = HfApi(endpoint=self.endpoint, token=self.token, library_name="localvlm")

        def ask() -> Any:
            return api.model_info(
                repo, revision=None if revision == "main" else revision, files_metadata=True, timeout=30
            )

        try:
            info = self._repeated(ask, repo)
            files = tuple(_hub_file(repo, info.sha, sibling) for sibling in info.siblings)
        except UnicodeEncodeError as error:  # headers are ASCII
            raise DownloadError(
                "the hub's token holds characters that no token has", "run `hf auth login`, or set HF_TOKEN, anew"
            ) from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise DownloadError(
                f"'{self.endpoint}' does not answer as a hub does ({type(error).__name__})",
                "check HF_ENDPOINT and proxies",
            ) from error
        licence = next((tag.removeprefix("license:") for tag in info.tags or () if tag.startswith("license:")), "")
        return Listing(repo, revision, info.sha, files, licence)

    def chosen(self, wanted: Reference) -> tuple[Listing, list[HubFile]]:
        """A repository's listing and, of its files, those that ``wanted`` means: the model's, then its projector.

        Raises:
            ModelError: it holds none, or does not say which.
            UsageError, DownloadError: as of :meth:`listing`.
        """
        listing = self.listing(wanted.repo, wanted.revision)
        named = {file.name: file for file in listing.files}
        names, projector = choose(wanted, sorted(named))
        return listing, [named[name] for name in (*names, projector) if name]

    def pull(self, wanted: Sequence[tuple[Listing, Sequence[HubFile]]]) -> list[Path]:
        """Fetches what the cache lacks of the files, each checked against its digest, and gives where they lie.

        Raises:
            DownloadError: a file could not be fetched whole, or is not the one that was listed; it is removed then.
            StorageError: the disk has, or got, too little room, or the cache cannot be written.
        """
        files = [file for _, chosen in wanted for file in chosen]
        for file in files:
            check_name(file.name)
        try:
            missing = [file for file in files if not self._pointer(file).exists()]
            self._drop_stale([listing for listing, _ in wanted])
            self._check_room(missing)
            self.progress.begin(list(dict.fromkeys(files)))
            for file in dict.fromkeys(files):
                if file in missing:
                    self._bring(file)
                self.progress.at(file, file.size)
            for listing, _ in wanted:
                if not _COMMIT.fullmatch(listing.revision):
                    self._refer(listing)
        except OSError as error:
            raise StorageError(
                f"'{self.cache}' cannot be written: {error.strerror or error}",
                "what was fetched is kept; free space or check permissions, then run the command again",
            ) from error
        return [self._pointer(file) for file in files]

    def _check_online(self, repo: str) -> None:
        if self.offline:
            raise DownloadError(
                f"'{repo}' is not asked for, as --offline or HF_HUB_OFFLINE is set", "unset it to reach the hub"
            )
        if not _ADDRESS.fullmatch(self.endpoint):
            raise UsageError(
                f"HF_ENDPOINT {self.endpoint!r} is not the address of a hub", "write https://..., or unset it"
            )
        _check_session()

    def _drop_stale(self, listings: Sequence[Listing]) -> None:
        """Removes parts of files that the repositories no longer have."""
        digests = {file.digest for listing in listings for file in listing.files}
        for repo in {listing.repo for listing in listings}:
            for part in (self._folder(repo) / "blobs").glob("*.incomplete"):
                if DIGEST.fullmatch(part.stem) and part.stem not in digests:
                    drop_part(part)

    def _check_room(self, files: Iterable[HubFile]) -> None:
        lacking = {self._blob(file): file for file in files if not self._blob(file).exists()}
        need = sum(max(file.size - size_of(self._part(file)), 0) for file in lacking.values())
        place = next(folder for folder in (self.cache, *self.cache.absolute().parents) if folder.exists())
        free = shutil.disk_usage(place).free
        if need > free:
            raise StorageError(
                f"{need / 1e9:.2f} GB are to be fetched and '{place}' has {free / 1e9:.2f} GB free",
                "free some, or name another folder with HF_HUB_CACHE",
            )

    def _bring(self, file: HubFile) -> None:
        """Fetches a file, unless another process does or did, and links it into its commit."""
        blob, pointer = self._blob(file), self._pointer(file)
        blob.parent.mkdir(parents=True, exist_ok=True)
        with self._locked(file):
            if not blob.exists() and not pointer.exists():
                part = self._part(file)
                self._fetch(file, part)
                part.replace(blob)
            pointer.parent.mkdir(parents=True, exist_ok=True)
            if not os.path.lexists(pointer):
                try:
                    pointer.symlink_to(os.path.relpath(blob, pointer.parent))
                except FileExistsError:
                    pass  # another program was as quick
                except OSError:  # a file system without links
                    blob.replace(pointer)

    def _refer(self, listing: Listing) -> None:
        """Lets the revision mean this commit, as the library does."""
        check_name(listing.revision)
        ref = self._folder(listing.repo) / "refs" / listing.revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        written = ref.with_name(f"{ref.name}.{os.getpid()}")
        written.write_text(listing.commit, encoding="ascii")
        written.replace(ref)

    @contextmanager
    def _locked(self, file: HubFile) -> Iterator[None]:
        """Holds the file's lock; says so where that takes long."""
        with ExitStack() as held:
            try:
                held.enter_context(locked(self._blob(file), 0.2))
            except TimeoutError:
                self.progress.note(f"another process is fetching '{file.name}'; waiting for it")
                held.enter_context(locked(self._blob(file)))
            yield

    def _fetch(self, file: HubFile, path: Path) -> None:
        """Fetches what ``path`` lacks of a file.

        Raises:
            DownloadError: it could not be had whole, or is another; ``path`` is removed then.
        """
        with _Part(path, file) as part:
            self.progress.at(file, part.n_bytes)
            if part.n_bytes < file.size:
                self._check_online(file.repo)
                self._repeated(lambda: self._stream(file, part), file.repo, lambda: part.n_bytes)
            found = part.digest()
        if found != file.digest:
            path.unlink()
            raise DownloadError(
                f"'{file.name}' came damaged: its digest is {found[:8]} and not {file.digest[:8]}; it was removed",
                "run the command again",
            )

    def _stream(self, file: HubFile, part: _Part) -> None:
        """One request, for what is not there yet."""
        from urllib.parse import quote

        from huggingface_hub import constants
        from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

        url = f"{self.endpoint}/{file.repo}/resolve/{file.commit}/{quote(file.name)}"
        headers = build_hf_headers(token=self.token, library_name="localvlm")
        headers["Accept-Encoding"] = "identity"
        if part.n_bytes:
            headers["Range"] = f"bytes={part.n_bytes}-"
        # Redirects lead to storage on other hosts; the session leaves the token out there.
        with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
            hf_raise_for_status(response)
            if part.n_bytes and not _goes_on(response, part.n_bytes):
                part.clear()
            for piece in response.iter_bytes():  # as they come: none is lost when the connection ends
                part.add(piece)
                self.progress.at(file, min(part.n_bytes, file.size))
                if part.n_bytes > file.size:
                    part.clear()
                    raise DownloadError(
                        f"'{file.name}' came longer than the {file.size} bytes that the hub told; it was removed",
                        "run the command again, or tell the owner of the mirror",
                    )
        if part.n_bytes < file.size:
            raise _CutOff(f"the connection ended after {part.n_bytes} of {file.size} bytes")

    def _repeated(self, call: Callable[[], _T], repo: str, at: Callable[[], int] = int) -> _T:
        """What ``call`` returns; failures that pass are waited out, and counted anew when ``at()`` moved."""
        from huggingface_hub.errors import HfHubHTTPError

        transport = HfHubHTTPError.__bases__[0]  # of httpx or httpx2, as the installed library has it
        failures, before = 0, at()
        while True:
            try:
                return call()
            except (transport, _CutOff) as error:
                failures, before = (1, at()) if at() > before else (failures + 1, before)
                wait = self._wait(error, failures)
                if wait is None:
                    raise self._explained(error, repo) from error
                self.progress.note(f"{_reason(error)}; trying again in {wait:.0f} s ({failures} of {RETRIES})")
            time.sleep(wait)

    def _wait(self, error: BaseException, failures: int) -> float | None:
        """Seconds until a call may be repeated; None where that is of no use."""
        status = _status(error)
        if (
            failures > RETRIES
            or type(error).__name__ in _STAYS
            or (status is not None and status not in (408, 429) and status < 500)
        ):
            return None
        asked = _retry_after(error)
        if asked is not None:
            return asked if asked <= MAX_WAIT_S else None
        return float(self.wait_s * 2 ** (failures - 1))

    def _explained(self, error: BaseException, repo: str) -> LocalvlmError:
        """A failure in the user's terms."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        status, page = _status(error), f"{self.endpoint}/{repo}"
        login = "run `hf auth login`, or set HF_TOKEN"
        if isinstance(error, GatedRepoError):
            return DownloadError(f"'{repo}' is gated", f"accept its terms at {page}, then {login}")
        if isinstance(error, RevisionNotFoundError | EntryNotFoundError):
            return DownloadError(f"'{repo}' no longer has what was asked for", f"look at {page}")
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return DownloadError(
                f"there is no repository '{repo}' at '{self.endpoint}', or it is private",
                f"check its name; for a private one, {login}",
            )
        if status in (401, 403):
            return DownloadError(
                f"the hub refuses to give '{repo}' to this token ({status})", f"{login} of one that may"
            )
        if status == 429 and (asked := _retry_after(error)) is not None:
            return DownloadError(f"the hub asks to wait {asked:.0f} s before more requests (429)", "try again later")
        if status is not None:
            return DownloadError(
                f"'{self.endpoint}' failed: {_reason(error)}", "what was fetched is kept; try again later"
            )
        return DownloadError(
            f"'{self.endpoint}' could not be reached: {_reason(error)}",
            "check the network, proxies and HF_ENDPOINT; what was fetched is kept",
        )

    def _folder(self, repo: str) -> Path:
        return folder_of(repo, self.cache)

    def _blob(self, file: HubFile) -> Path:
        return self._folder(file.repo) / "blobs" / file.digest

    def _part(self, file: HubFile) -> Path:
        return self._folder(file.repo) / "blobs" / f"{file.digest}.incomplete"

    def _pointer(self, file: HubFile) -> Path:
        return self._folder(file.repo) / "snapshots" / file.commit / file.name


def _check_session() -> None:
    """Refuses proxies and certificates of the environment that no connection can be made with.

    Raises:
        DownloadError: it cannot.
    """
    from huggingface_hub.utils import get_session

    try:
        get_session()
    except ImportError as error:  # of a package that httpx does without unless it is needed
        raise DownloadError(
            "the proxy that is set is of the kind SOCKS, for which a package is missing",
            "`pip install socksio`, or set another in ALL_PROXY and HTTPS_PROXY",
        ) from error
    except LocalvlmError:  # Ctrl-C
        raise
    except Exception as error:  # each wrong setting raises another kind
        raise DownloadError(
            f"no connection can be made with the proxies or certificates that are set: {_reason(error)}",
            "correct or unset ALL_PROXY, HTTP_PROXY, HTTPS_PROXY, SSL_CERT_FILE and SSL_CERT_DIR",
        ) from error


class _Part:
    """A file that grows, and the digest of what it holds."""

    def __init__(self, path: Path, file: HubFile) -> None:
        self._file = file
        self._out = path.open("a+b", buffering=0)
        self._begin()
        self._out.seek(0)
        while piece := self._out.read(PIECE):
            self._hash.update(piece)
            self.n_bytes += len(piece)
        if self.n_bytes > file.size:
            self.clear()

    def __enter__(self) -> _Part:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._out:
            os.fsync(self._out.fileno())  # before it gets its final name

    def _begin(self) -> None:
        self._hash, self.n_bytes = hasher(self._file.digest, self._file.size), 0

    def add(self, piece: bytes) -> None:
        rest = memoryview(piece)
        while rest:
            rest = rest[self._out.write(rest) :]
        self._hash.update(piece)
        self.n_bytes += len(piece)

    def clear(self) -> None:
        self._out.truncate(0)
        self._begin()

    def digest(self) -> str:
        found: str = self._hash.hexdigest()
        return found


def check_repo(repo: str) -> None:
    """Refuses what cannot be the name of a repository.

    Raises:
        UsageError: it cannot.
    """
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo or len(repo) > NAME_BYTES:
        raise UsageError(f"'{repo}' is not the name of a repository", "write user/repo, or user/repo:quant")


def check_name(name: str) -> None:
    """Refuses names that lead out of the cache, or that a file system may not take.

    Raises:
        DownloadError: it does.
    """
    parts = name.split("/")
    if (
        any(part in ("", ".", "..") or len(part.encode("utf-8", "replace")) > NAME_BYTES for part in parts)
        or len(name.encode("utf-8", "replace")) > PATH_BYTES
        or "\\" in name
        or not name.isprintable()
    ):
        shown = name if len(name) <= 60 else f"{name[:57]}..."
        raise DownloadError(
            f"the hub lists a file of the name {shown!r}, which is refused", "tell the repository's owner"
        )


def _hub_file(repo: str, commit: str, sibling: Any) -> HubFile:
    digest = sibling.lfs.sha256 if sibling.lfs else sibling.blob_id
    if not _COMMIT.fullmatch(commit) or not DIGEST.fullmatch(digest):
        raise ValueError(digest)
    return HubFile(repo, commit, str(sibling.rfilename), int(sibling.size), digest)


def _goes_on(response: Any, n_bytes: int) -> bool:
    """Whether a response goes on after so many bytes; servers may send the whole file instead."""
    sent = str(response.headers.get("Content-Range", ""))
    return response.status_code == 206 and sent.startswith(f"bytes {n_bytes}-")


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return int(status) if status is not None else None


def _retry_after(error: BaseException) -> float | None:
    """Seconds that the hub asks to wait."""
    from email.utils import parsedate_to_datetime

    value = getattr(getattr(error, "response", None), "headers", {}).get("Retry-After")
    if value is None:
        return None
    try:
        return float(value) if value.isdigit() else max(parsedate_to_datetime(value).timestamp() - time.time(), 0.0)
    except (TypeError, ValueError):
        return None


def _reason(error: BaseException) -> str:
    status = _status(error)
    if status is not None:
        return f"the hub answered {status}"
    words = str(error).split("\n")[0]
    return words if isinstance(error, _CutOff) else f"{type(error).__name__}{f' ({words})' if words else ''}"
