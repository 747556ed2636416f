"""What all tests share: no settings of the person who runs them, and no network."""

from __future__ import annotations

import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

for _name in ("HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_TOKEN", "HUGGINGFACE_HUB_CACHE"):
    os.environ.pop(_name, None)
os.environ["HF_HOME"] = str(
    Path(tempfile.gettempdir()) / "no-models-for-tests"
)  # read when huggingface_hub is imported

# The same examples each time, however long the machine takes for one: a search for others is run by hand,
# with `pytest --hypothesis-profile=default`.
settings.register_profile(
    "repeatable",
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("repeatable")

_network_allowed = _loopback_allowed = False
_HERE = ("127.0.0.1", "localhost", b"localhost")
_INTERNET = {"AF_INET", "AF_INET6"}


def _no_network(event: str, args: tuple[object, ...]) -> None:
    if _network_allowed or event not in ("socket.connect", "socket.getaddrinfo", "socket.sendto"):
        return
    family = getattr(getattr(args[0], "family", None), "name", "AF_INET")
    address = args[0] if event == "socket.getaddrinfo" else args[1]
    here = (address[0] if isinstance(address, tuple) else address) in _HERE
    if family in _INTERNET and not (here and _loopback_allowed):
        raise PermissionError(f"a test without the network marker used {event}")


sys.addaudithook(_no_network)

# A shell ignores SIGINT in what it starts in the background, and so would all that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _alone(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path_factory) -> Iterator[None]:
    """Gives each test a home of its own; `network` tests alone reach the internet, `loopback` tests this machine."""
    global _network_allowed, _loopback_allowed
    for name in os.environ:
        if name.startswith("LOCALVLM_") and name != "LOCALVLM_NATIVE_LIBRARY":
            monkeypatch.delenv(name)
    home = tmp_path_factory.getbasetemp() / "homes" / f"{hash(request.node.nodeid):x}"
    monkeypatch.setenv("LOCALVLM_HOME", str(home))
    _network_allowed = request.node.get_closest_marker("network") is not None
    _loopback_allowed = request.node.get_closest_marker("loopback") is not None
    yield
    _network_allowed = _loopback_allowed = False


@pytest.fixture
def cli(tmp_path, capsys, monkeypatch):
    """The command line on a fake engine."""
    from tests.unit.cli_help import Cli

    return Cli(tmp_path, capsys, monkeypatch)
