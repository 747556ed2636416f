"""A server on loopback that speaks the Hugging Face hub's protocol, and misbehaves as told.

    with HubServer() as hub:
        hub.add("user/repo", {"model-Q4_K_M.gguf": b"..."})
        hub.faults.append(Fault(status=503))          # what the next request for content gets
        subprocess.run([..., "pull", "user/repo"], env={**os.environ, "HF_ENDPOINT": hub.endpoint})
        hub.served                                     # bytes of content sent so far

As the hub does, it redirects requests for files to content-addressed storage under another host's name.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["Fault", "HubServer", "Seen"]

PIECE = 1 << 16


@dataclass(frozen=True)
class Fault:
    """What one request meets.

    Attributes:
        status: answered instead of content, with ``headers``.
        cut: the connection ends after so many bytes.
        flip: this byte of the response comes inverted.
        ignore_range: the whole file comes whatever was asked for.
        more: so many bytes come on top.
        stall: seconds of silence before the first byte, while the server runs.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    flip: int | None = None
    ignore_range: bool = False
    more: int = 0
    stall: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A request."""

    method: str
    path: str
    host: str
    range: str
    token: str


@dataclass
class _Repo:
    files: dict[str, bytes]
    commit: str
    lfs: bool
    gated: bool
    tags: tuple[str, ...]


class HubServer(ThreadingHTTPServer):
    """See the module.

    Attributes:
        faults: what requests for content meet, in turn; none: they are answered.
        api_faults: likewise for requests for listings.
        tokens: that may read gated repositories.
        pace: called with the bytes served so far before each piece.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.faults: list[Fault] = []
        self.api_faults: list[Fault] = []
        self.tokens = {"hf_right"}
        self.requests: list[Seen] = []
        self.served = 0
        self.over = threading.Event()
        self.pace: Callable[[int], None] = lambda served: None
        self.repos: dict[str, _Repo] = {}
        self.blobs: dict[str, bytes] = {}

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.over.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients are killed in these tests."""

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Where content lies: the same server under another host's name."""
        return f"http://localhost:{self.server_port}"

    def add(
        self, repo: str, files: Mapping[str, bytes], *, lfs: bool = True, gated: bool = False, licence: str = "mit"
    ) -> None:
        """Gives a repository these files, as a new commit."""
        commit = hashlib.sha1(repr(sorted((n, hashlib.sha256(f).hexdigest()) for n, f in files.items())).encode())
        self.repos[repo] = _Repo(dict(files), commit.hexdigest(), lfs, gated, (f"license:{licence}",))
        self.blobs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}

    def asked(self, part: str) -> list[Seen]:
        """Requests whose path holds ``part``."""
        return [seen for seen in self.requests if part in seen.path]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        get = self.headers.get
        seen = Seen(self.command, path, get("Host", ""), get("Range", ""), get("Authorization", ""))
        self.server.requests.append(seen)
        for pattern, answer in (
            (r"/api/models/([^/]+/[^/]+?)(?:/(revision|tree)/[^/]+)?", self._listing),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._redirect),
            (r"/content/([0-9a-f]{64})", self._content),
        ):
            if found := re.fullmatch(pattern, path):
                answer(*found.groups())
                return
        self._send(404, {"X-Error-Code": "EntryNotFound"})

    def _send(self, status: int, headers: Mapping[str, str] = {}, body: bytes = b"") -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _repo(self, name: str) -> _Repo | None:
        found = self.server.repos.get(name)
        if found is None:
            self._send(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"})
        return found

    def _listing(self, name: str, kind: str | None) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        if self.server.api_faults and (fault := self.server.api_faults.pop(0)).status:
            self._send(fault.status, fault.headers)
            return
        shown: Any = [_entry(repo, file, content) for file, content in repo.files.items()]
        if kind == "tree":
            shown = [
                {"type": "file", "path": e["rfilename"], "size": e["size"], "oid": e["blobId"]}
                | ({"lfs": {**e["lfs"], "oid": e["lfs"]["sha256"]}} if repo.lfs else {})
                for e in shown
            ]
        else:
            gated = "manual" if repo.gated else False
            shown = {"id": name, "sha": repo.commit, "siblings": shown, "tags": repo.tags, "gated": gated}
        self._send(200, {"Content-Type": "application/json"}, json.dumps(shown).encode())

    def _redirect(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name)
        if repo is None:
            return
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo.gated and token not in self.server.tokens:
            self._send(403 if token else 401, {"X-Error-Code": "GatedRepo", "X-Error-Message": "gated"})
            return
        content = repo.files.get(file)
        if content is None:
            self._send(404, {"X-Error-Code": "EntryNotFound"})
            return
        digest = hashlib.sha256(content).hexdigest()
        linked = {"X-Linked-ETag": f'"{_entry(repo, file, content)["digest"]}"', "X-Linked-Size": str(len(content))}
        to = f"{self.server.storage}/content/{digest}"
        self._send(302, {"Location": to, "X-Repo-Commit": repo.commit, "ETag": f'"{digest}"', **linked})

    def _content(self, digest: str) -> None:
        content = self.server.blobs[digest]
        fault = self.server.faults.pop(0) if self.server.faults else Fault()
        self.server.over.wait(fault.stall)
        if fault.status:
            self._send(fault.status, fault.headers)
            return
        start = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        first = int(start[1]) if start and not fault.ignore_range else 0
        if first and first >= len(content):
            self._send(416, {"Content-Range": f"bytes */{len(content)}"})
            return
        body = bytearray(content[first:] + bytes(fault.more))
        if fault.flip is not None:
            body[fault.flip] ^= 0xFF
        self.send_response(206 if first else 200)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{digest}"')
        self.end_headers()
        end = len(body) if fault.cut is None else min(fault.cut, len(body))
        for at in range(0, end if self.command == "GET" else 0, PIECE):
            self.server.pace(self.server.served)
            piece = body[at : min(at + PIECE, end)]
            self.server.served += len(piece)  # before a client that has it all may look
            self.wfile.write(piece)
        self.close_connection = self.close_connection or end < len(body)


def _entry(repo: _Repo, name: str, content: bytes) -> dict[str, Any]:
    sha256, size = hashlib.sha256(content).hexdigest(), len(content)
    git = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
    entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git, "digest": sha256 if repo.lfs else git}
    return entry | ({"lfs": {"sha256": sha256, "size": size, "pointerSize": 130}} if repo.lfs else {})
