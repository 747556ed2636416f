"""Files from a hub: what a server of our own on this machine does to them, and what is kept of it."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from localvlm.errors import DownloadError, StorageError, UsageError
from localvlm.hub import Hub, check_name
from localvlm.hub_cache import cached_files, digest_of, removal
from tests.hub_server import Fault, HubServer

pytestmark = pytest.mark.loopback
REPO = "user/model-GGUF"
WITHOUT_SOCKS = pytest.mark.skipif(find_spec("socksio") is not None, reason="SOCKS proxies work here")
BIG = bytes(range(256)) * 8192  # 2 MiB
FILES = {"model-Q4_K_M.gguf": BIG, "mmproj-model-F16.gguf": b"projector" * 100, "README.md": b"# Model"}

PATIENCE_S = 120
"""Seconds that something may take which takes none unless the machine is busy."""


class Heard:
    """Progress that remembers."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.noted = threading.Event()
        self.bytes: dict[str, list[int]] = {}

    def begin(self, files):
        self.bytes = {file.name: [] for file in files}

    def at(self, file, n_bytes):
        self.bytes[file.name].append(n_bytes)

    def note(self, text):
        self.notes.append(text)
        self.noted.set()


@pytest.fixture
def server():
    with HubServer() as found:
        found.add(REPO, FILES)
        yield found


@pytest.fixture
def hub(server, tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", PATIENCE_S)
    return Hub(server.endpoint, tmp_path / "hub", "hf_right", offline=False, progress=Heard(), wait_s=0.001)


def pull(hub: Hub, *names: str, repo: str = REPO) -> list[Path]:
    listing = hub.listing(repo)
    return hub.pull([(listing, [file for file in listing.files if file.name in (names or FILES)])])


def visible(hub: Hub) -> list[str]:
    return sorted(path.name for path in (hub.cache).rglob("snapshots/*/*"))


def parts(hub: Hub) -> list[Path]:
    return list(hub.cache.rglob("*.incomplete"))


def test_files_lie_where_other_programs_look(server, hub):
    paths = pull(hub)
    assert [path.read_bytes() for path in paths] == list(FILES.values())
    assert hub.listing(REPO).licence == "mit"
    from huggingface_hub import hf_hub_download, scan_cache_dir

    name = "model-Q4_K_M.gguf"
    assert hf_hub_download(REPO, name, cache_dir=hub.cache, local_files_only=True) == str(paths[0])
    served = server.served
    assert hf_hub_download(REPO, name, cache_dir=hub.cache, endpoint=hub.endpoint) == str(paths[0])
    assert server.served == served
    assert not scan_cache_dir(hub.cache).warnings
    assert not parts(hub)
    assert hub.progress.bytes[name][-1] == len(BIG)


def test_what_the_library_fetched_is_not_fetched_again(server, hub):
    from huggingface_hub import hf_hub_download

    hf_hub_download(REPO, "model-Q4_K_M.gguf", cache_dir=hub.cache, endpoint=hub.endpoint)
    served = server.served
    pull(hub, "model-Q4_K_M.gguf")
    assert server.served == served


def test_the_token_goes_to_the_hub_and_not_to_storage(server, hub):
    server.add(REPO, FILES, gated=True)
    pull(hub)
    assert {seen.token for seen in server.asked("/resolve/")} == {"Bearer hf_right"}
    assert {seen.token for seen in server.asked("/content/")} == {""}


@pytest.mark.parametrize(("token", "hint"), [(False, "accept its terms"), ("hf_wrong", "accept its terms")])
def test_gated_repositories(server, hub, token, hint):
    server.add(REPO, FILES, gated=True)
    with pytest.raises(DownloadError, match="gated") as raised:
        pull(Hub(hub.endpoint, hub.cache, token, offline=False))
    assert hint in raised.value.hint
    assert "HF_TOKEN" in raised.value.hint
    assert f"{hub.endpoint}/{REPO}" in raised.value.hint


def test_what_is_not_there(server, hub):
    with pytest.raises(DownloadError, match="no repository 'user/other'") as raised:
        hub.listing("user/other")
    assert "private" in raised.value.message
    for name in ("model", "../x/y", "a/b/c", "a/..", "a b/c", "user/--x", "-/" + "x" * 300):
        with pytest.raises(UsageError, match="repository"):
            hub.listing(name)
    server.api_faults.append(Fault(status=403))
    with pytest.raises(DownloadError, match="token"):
        hub.listing(REPO)


def test_offline_asks_nothing_but_takes_what_is_there(server, hub):
    away = Hub(hub.endpoint, hub.cache, offline=True)
    with pytest.raises(DownloadError, match="offline"):
        away.listing(REPO)
    listing = hub.listing(REPO)
    hub.pull([(listing, listing.files)])
    asked = len(server.requests)
    assert away.pull([(listing, listing.files)]) == hub.pull([(listing, listing.files)])
    assert len(server.requests) == asked


@pytest.mark.parametrize("status", [429, 500, 503])
def test_failures_that_pass_are_waited_out_and_told(server, hub, status):
    server.api_faults += [Fault(status=status)]
    server.faults += [Fault(status=status, headers={"Retry-After": "0"}), Fault(status=status)]
    pull(hub)
    assert len([note for note in hub.progress.notes if str(status) in note]) == 3


def test_a_hub_that_stays_down_is_given_up(server, hub):
    server.faults += [Fault(status=503)] * 20
    with pytest.raises(DownloadError, match="503") as raised:
        pull(hub)
    assert len(server.asked("/content/")) == 6
    assert "try again" in raised.value.hint


@pytest.mark.parametrize("after", ["3600", "Fri, 31 Dec 2999 23:59:59 GMT"])
def test_a_long_wait_is_not_slept_through(server, hub, after):
    server.faults.append(Fault(status=429, headers={"Retry-After": after}))
    with pytest.raises(DownloadError, match="asks to wait"):
        pull(hub)
    assert len(server.asked("/content/")) == 1


def test_nobody_there(hub):
    dead = Hub("http://127.0.0.1:9", hub.cache, offline=False, wait_s=0.001)
    with pytest.raises(DownloadError, match="could not be reached") as raised:
        dead.listing(REPO)
    assert "HF_ENDPOINT" in raised.value.hint


@pytest.mark.parametrize("endpoint", ["foo", "", "ftp://x.y", "https://", "https://a b", "http:///x"])
def test_an_endpoint_that_is_no_address_is_refused_at_once(hub, endpoint):
    lost = Hub(endpoint, hub.cache, offline=False, progress=hub.progress)
    with pytest.raises(UsageError, match="HF_ENDPOINT"):
        lost.listing(REPO)
    assert hub.progress.notes == []


def test_an_error_that_waiting_does_not_mend_is_told_at_once(server, hub):
    server.faults.append(Fault(status=302, headers={"Location": "ftp://127.0.0.1/x"}))
    with pytest.raises(DownloadError, match="UnsupportedProtocol"):
        pull(hub, "model-Q4_K_M.gguf")
    assert hub.progress.notes == []


@pytest.mark.parametrize(
    ("name", "value", "code", "says"),
    [
        pytest.param("ALL_PROXY", "socks5://127.0.0.1:9", 7, "pip install socksio", marks=WITHOUT_SOCKS),
        ("ALL_PROXY", "http://[::1", 7, "InvalidURL"),
        ("HTTPS_PROXY", "ftp://127.0.0.1", 7, "HTTPS_PROXY"),
        ("SSL_CERT_FILE", "/nonexistent", 7, "SSL_CERT_FILE"),
        ("HF_ENDPOINT", "http://[::1", 2, "HF_ENDPOINT"),
        ("HF_ENDPOINT", "http://x:99999", 2, "HF_ENDPOINT"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", 2, "'soon'"),
    ],
)
def test_a_setting_that_cannot_be_used_is_told(tmp_path, name, value, code, says):
    with HubServer() as server:
        home = {"LOCALVLM_HOME": str(tmp_path), "HF_HOME": str(tmp_path), "HF_ENDPOINT": server.endpoint}
        command = [sys.executable, "-m", "localvlm", "pull", REPO]
        inherited = {key: text for key, text in os.environ.items() if key.lower() != "no_proxy"}
        done = subprocess.run(command, env={**inherited, **home, name: value}, capture_output=True, text=True)
        assert (done.returncode, says in done.stderr, done.stderr.count("\n")) == (code, True, 1), done.stderr
        assert server.requests == []


def test_commands_that_do_not_use_the_hub_do_not_ask_where_it_is(cli, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://x:99999")
    for command in (["paths"], ["list"]):
        assert cli(*command).code == 0
    run = cli("pull", REPO)
    assert (run.code, "HF_ENDPOINT 'http://x:99999' is no address of a hub" in run.err) == (2, True)


def test_something_that_is_no_hub(server, hub):
    class Portal:
        sha, siblings, tags = None, None, None

    import huggingface_hub

    original = huggingface_hub.HfApi.model_info
    try:
        huggingface_hub.HfApi.model_info = lambda *args, **kwargs: Portal()
        with pytest.raises(DownloadError, match="does not answer as a hub"):
            hub.listing(REPO)
    finally:
        huggingface_hub.HfApi.model_info = original


def test_a_connection_cut_again_and_again_is_gone_on_with(server, hub):
    server.faults += [Fault(cut=250_000)] * 8
    pull(hub, "model-Q4_K_M.gguf")
    asked = server.asked("/content/")
    assert len(asked) == 9  # more than RETRIES, as each brought something
    assert all(seen.range for seen in asked[1:])
    assert server.served == len(BIG)
    assert any("trying again" in note for note in hub.progress.notes)


def test_a_server_that_falls_silent_is_left(server, hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    server.faults.append(Fault(stall=PATIENCE_S))
    pull(hub, "model-Q4_K_M.gguf")
    assert any("Timeout" in note for note in hub.progress.notes)


def test_a_part_of_an_earlier_process_is_gone_on_with(server, hub):
    server.faults += [Fault(cut=1 << 20), *[Fault(status=404)]]
    with pytest.raises(DownloadError):
        pull(hub, "model-Q4_K_M.gguf")
    assert visible(hub) == []
    assert [part.stat().st_size for part in parts(hub)] == [1 << 20]
    pull(hub, "model-Q4_K_M.gguf")
    assert server.asked("/content/")[-1].range == f"bytes={1 << 20}-"
    assert server.served == len(BIG)
    assert not parts(hub)


def test_a_server_that_ignores_ranges_sends_all_again(server, hub):
    server.faults += [Fault(cut=1 << 20), Fault(ignore_range=True)]
    paths = pull(hub, "model-Q4_K_M.gguf")
    assert paths[0].read_bytes() == BIG
    assert server.served == len(BIG) + (1 << 20)


def test_a_file_that_changed_meanwhile_is_begun_anew(server, hub):
    server.faults += [Fault(cut=1 << 20), Fault(status=404)]
    with pytest.raises(DownloadError):
        pull(hub, "model-Q4_K_M.gguf")
    other = BIG[::-1]
    server.add(REPO, FILES | {"model-Q4_K_M.gguf": other})
    paths = pull(hub, "model-Q4_K_M.gguf")
    assert paths[0].read_bytes() == other
    assert not parts(hub)
    assert visible(hub) == ["model-Q4_K_M.gguf"]


@pytest.mark.parametrize("lfs", [True, False])
@pytest.mark.parametrize("before", [0, 1 << 20])
def test_a_tampered_byte_is_refused_and_removed(server, hub, lfs, before):
    server.add(REPO, FILES, lfs=lfs)
    server.faults += ([Fault(cut=before)] if before else []) + [Fault(flip=1000)]
    with pytest.raises(DownloadError, match="damaged"):
        pull(hub, "model-Q4_K_M.gguf")
    assert visible(hub) == []
    assert not parts(hub)
    assert pull(hub, "model-Q4_K_M.gguf")[0].read_bytes() == BIG


def test_a_part_that_rotted_on_disk_is_refused_and_removed(server, hub):
    server.faults += [Fault(cut=1 << 20), Fault(status=404)]
    with pytest.raises(DownloadError):
        pull(hub, "model-Q4_K_M.gguf")
    parts(hub)[0].write_bytes(b"x" * (1 << 20))
    with pytest.raises(DownloadError, match="damaged"):
        pull(hub, "model-Q4_K_M.gguf")
    assert not parts(hub)


def test_wrong_lengths(server, hub):
    server.faults.append(Fault(more=5))
    with pytest.raises(DownloadError, match="longer"):
        pull(hub, "model-Q4_K_M.gguf")
    short = hashlib.sha256(BIG).hexdigest()
    server.blobs[short] = BIG[:-5]
    with pytest.raises(DownloadError):
        pull(hub, "model-Q4_K_M.gguf")
    assert visible(hub) == []


def test_too_little_room_is_said_beforehand(server, hub, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(BIG) - 1))
    with pytest.raises(StorageError, match="GB free") as raised:
        pull(hub, "model-Q4_K_M.gguf")
    assert "HF_HUB_CACHE" in raised.value.hint
    assert server.served == 0
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=len(BIG)))
    pull(hub, "model-Q4_K_M.gguf")


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_two_models_share_comes_once(server, hub, links, monkeypatch):
    def none(*_args):
        raise OSError(1, "Operation not permitted")

    if not links:
        monkeypatch.setattr(Path, "symlink_to", none)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=len(BIG)))
    listing = hub.listing(REPO)
    shared = [file for file in listing.files if file.name == "model-Q4_K_M.gguf"]
    paths = hub.pull([(listing, shared), (listing, shared)])
    assert [path.read_bytes() for path in paths] == [BIG, BIG]
    assert server.served == len(BIG)
    twin = Hub(hub.endpoint, hub.cache, offline=False)
    twin._bring(shared[0])  # as a process does that waited for this one
    assert server.served == len(BIG)
    assert (
        len([path for path in hub.cache.rglob("*") if path.is_file() and path.stat().st_size == len(BIG)]) == 1 + links
    )


def test_a_disk_that_fills_up_keeps_the_part(server, hub, monkeypatch):
    from localvlm import hub as module

    def full(part, piece):
        if part.n_bytes >= 1 << 20:
            raise OSError(28, "No space left on device")
        add(part, piece)

    add = module._Part.add
    monkeypatch.setattr(module._Part, "add", full)
    with pytest.raises(StorageError, match="No space left"):
        pull(hub, "model-Q4_K_M.gguf")
    kept = parts(hub)[0].stat().st_size
    assert kept >= 1 << 20
    monkeypatch.setattr(module._Part, "add", add)
    pull(hub, "model-Q4_K_M.gguf")
    assert server.asked("/content/")[-1].range == f"bytes={kept}-"


def test_two_at_once_do_the_work_once(server, hub):
    begun, free = threading.Event(), threading.Event()

    def pace(served: int) -> None:
        begun.set()
        free.wait(PATIENCE_S)

    server.pace = pace
    heard = Heard()
    twin = Hub(hub.endpoint, hub.cache, "hf_right", offline=False, progress=heard)
    first = threading.Thread(target=pull, args=(hub, "model-Q4_K_M.gguf"))
    first.start()
    assert begun.wait(PATIENCE_S)
    second = threading.Thread(target=pull, args=(twin, "model-Q4_K_M.gguf"))
    second.start()
    assert heard.noted.wait(PATIENCE_S)
    free.set()
    first.join(PATIENCE_S)
    second.join(PATIENCE_S)
    assert "another process" in heard.notes[0]
    assert server.served == len(BIG)
    assert visible(hub) == visible(twin) == ["model-Q4_K_M.gguf"]


@contextmanager
def half_way(server: HubServer, hub: Hub):
    """While a thread has fetched half of the model."""
    begun, free = threading.Event(), threading.Event()

    def pace(served: int) -> None:
        if served >= 1 << 20 and not begun.is_set():
            begun.set()
            free.wait(PATIENCE_S)

    server.pace = pace
    fetched: list[Path] = []
    thread = threading.Thread(target=lambda: fetched.extend(pull(hub, "model-Q4_K_M.gguf")))
    thread.start()
    assert begun.wait(PATIENCE_S)
    try:
        yield fetched
    finally:
        free.set()
        thread.join(PATIENCE_S)


def test_what_is_being_fetched_is_not_stale(server, hub):
    other = Hub(hub.endpoint, hub.cache, "hf_right", offline=False)
    with half_way(server, hub) as fetched:
        server.add(REPO, {"README.md": b"# No model any more"})
        pull(other, "README.md")
        assert len(parts(hub)) == 1
    assert [path.read_bytes() for path in fetched] == [BIG]
    assert not hub.progress.notes


def test_what_is_being_fetched_is_not_removed(server, hub):
    pull(hub, "README.md")
    with half_way(server, hub) as fetched:
        plan = removal([], [REPO], hub.cache)
        assert (len(plan.parts), len(plan.busy), plan.n_bytes) == (0, 1, 0)
        plan.execute()
        later = removal([], [REPO], hub.cache)
    assert [path.read_bytes() for path in fetched] == [BIG]
    later.execute()
    assert fetched[0].exists()


def test_parts_of_two_revisions_that_are_pulled_together_stay(server, hub):
    old = hub.listing(REPO)
    server.add(REPO, FILES | {"model-Q4_K_M.gguf": BIG[::-1]})
    new = hub.listing(REPO)
    blobs = hub.cache / "models--user--model-GGUF" / "blobs"
    blobs.mkdir(parents=True)
    named = {file.digest for listing in (old, new) for file in listing.files if file.name.startswith("model")}
    for digest in (*named, "0" * 64):
        (blobs / f"{digest}.incomplete").write_bytes(b"x")
    hub.pull([(listing, [file for file in listing.files if file.name == "README.md"]) for listing in (old, new)])
    assert {path.stem for path in parts(hub)} == named


BAD = ["../x.gguf", "/etc/x.gguf", "a/../../x.gguf", "a\0.gguf", "a\\..\\x.gguf", "x" * 300 + ".gguf", "a//b.gguf", "",
       "a\x1b[2J.gguf", "./x.gguf", "a/" * 600 + "x.gguf", "a\u202eb.gguf"]  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_names_that_lead_elsewhere_are_refused(server, hub, name):
    with pytest.raises(DownloadError, match="refused") as raised:
        check_name(name)
    assert raised.value.message.isprintable()
    if name:
        server.add(REPO, {name: b"x"})
        listing = hub.listing(REPO)
        with pytest.raises(DownloadError, match="refused"):
            hub.pull([(listing, listing.files)])
    assert not hub.cache.exists()


def test_digests_and_commits_that_are_none_are_refused(server, hub):
    server.repos[REPO].commit = "../../x"
    with pytest.raises(DownloadError, match="does not answer as a hub"):
        hub.listing(REPO)


def test_a_token_that_cannot_be_sent(hub):
    with pytest.raises(DownloadError, match="token holds characters") as raised:
        Hub(hub.endpoint, hub.cache, "hf_\N{ZERO WIDTH SPACE}abc", offline=False).listing(REPO)
    assert "HF_TOKEN" in raised.value.hint


def test_what_lies_in_the_cache(server, hub):
    assert cached_files(hub.cache) == []
    pull(hub)
    found = cached_files(hub.cache)
    assert [(f.repo, f.name, f.size) for f in found] == [
        (REPO, "mmproj-model-F16.gguf", 900),
        (REPO, "model-Q4_K_M.gguf", len(BIG)),
    ]
    assert [digest_of(f) == f.digest for f in found] == [True, True]
    with found[1].path.open("r+b") as file:
        file.write(b"!")
    assert digest_of(found[1]) != found[1].digest


def test_the_commit_that_main_means_comes_first(server, hub):
    pull(hub)
    server.add(REPO, FILES | {"model-Q4_K_M.gguf": b"new"})
    pull(hub)
    found = cached_files(hub.cache)
    assert [f.size for f in found if f.name.startswith("model")] == [3, len(BIG)]


@pytest.mark.parametrize("way", ["link", "relative"])
def test_removal_works_where_the_cache_is_reached_by_a_link(server, hub, way, tmp_path, monkeypatch):
    pull(hub)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(hub.cache)
    there = tmp_path / "link" if way == "link" else Path("link")
    plan = removal([f for f in cached_files(there) if f.name.startswith("model")], cache=there)
    assert plan.n_bytes == len(BIG)
    plan.execute()
    assert [f.name for f in cached_files(hub.cache)] == ["mmproj-model-F16.gguf"]
    removal(cached_files(there), cache=there).execute()
    assert cached_files(hub.cache) == []


def test_removal_frees_what_it_says_and_keeps_what_others_use(server, hub):
    pull(hub)
    server.add(REPO, FILES | {"README.md": b"changed"})  # a commit with the same models
    pull(hub, "model-Q4_K_M.gguf")
    models = [f for f in cached_files(hub.cache) if f.name.startswith("model")]
    assert len(models) == 2
    assert removal(models[:1], cache=hub.cache).n_bytes == 0
    both = removal(models, cache=hub.cache)
    assert both.n_bytes == len(BIG)
    both.execute()
    assert [f.name for f in cached_files(hub.cache)] == ["mmproj-model-F16.gguf"]
    server.faults += [Fault(cut=1 << 20), Fault(status=404)]
    with pytest.raises(DownloadError):
        pull(hub, "model-Q4_K_M.gguf")
    rest = removal(cached_files(hub.cache), cache=hub.cache)
    assert [(part.repo, part.size) for part in rest.parts] == [(REPO, 1 << 20)]
    assert rest.n_bytes == 900 + (1 << 20)
    rest.execute()
    assert cached_files(hub.cache) == []
    assert [path.name for path in hub.cache.rglob("*README.md")] == ["README.md"]  # not ours
