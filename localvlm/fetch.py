"""A picture from the web, for those who ask for it: the one place beside ``pull`` that opens a connection."""

from __future__ import annotations

import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import Future
from http.client import HTTPException
from typing import Any

import localvlm
from localvlm.errors import DownloadError
from localvlm.images import MAX_BYTES

__all__ = ["fetch"]

SILENCE_S = 20.0
"""Seconds that a server may say nothing."""
TOTAL_S = 120.0
"""Seconds that all of it may take."""
CHUNK = 1 << 16


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To http and https alone; Python's own also goes on to ftp."""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(("http://", "https://")):
            fp.close()
            raise DownloadError(f"{req.full_url!r} leads to {newurl!r}", "give the address of the picture itself")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(url: str) -> bytes:
    """The file at an http or https address, of at most MAX_BYTES.

    Raises:
        DownloadError: it cannot be had, is too large or takes too long.
    """
    found: Future[bytes] = Future()

    def work() -> None:
        try:
            found.set_result(_fetched(url))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            found.set_exception(error)

    # In a thread: names, handshakes and headers that come byte by byte have no clock of their own.
    threading.Thread(target=work, name="fetch", daemon=True).start()
    try:
        return found.result(TOTAL_S)
    except TimeoutError:
        raise _too_slow(url) from None


def _too_slow(url: str) -> DownloadError:
    return DownloadError(f"{url!r} takes over {TOTAL_S:.0f} s", "download it with another program")


def _fetched(url: str) -> bytes:
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler, _Redirects,
        urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    started, found = time.monotonic(), bytearray()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"localvlm/{localvlm.__version__}"})  # noqa: S310
        with opener.open(request, timeout=SILENCE_S) as reply:
            length = reply.length
            while chunk := reply.read1(CHUNK):
                found += chunk
                if len(found) > MAX_BYTES:
                    raise DownloadError(f"{url!r} is over {MAX_BYTES >> 20} MiB", "download and shrink it first")
                if time.monotonic() - started > TOTAL_S:
                    raise _too_slow(url)
    except urllib.error.HTTPError as error:
        error.close()
        raise DownloadError(f"{url!r} gave HTTP {error.code} {error.reason}", "check the address") from error
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        text = getattr(reason, "strerror", None) or reason
        why = "did not answer in time" if isinstance(reason, socket.timeout) else f"cannot be fetched: {text}"
        raise DownloadError(f"{url!r} {why}", "check the address and the connection") from error
    if length is not None and len(found) < length:
        raise DownloadError(f"{url!r} was cut off after {len(found)} of {length} bytes", "try again")
    return bytes(found)
