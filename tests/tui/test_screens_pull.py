"""The pull screen against a hub on this machine: progress, stopping, going on, and errors with their hints."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from localvlm import catalog
from localvlm.errors import DownloadError
from localvlm.hub import Hub, HubFile
from localvlm.references import Reference
from localvlm.tui.screens.pull import PullProgress, PullScreen
from tests.hub_server import PIECE, HubServer
from tests.tui.chatting import DEADLINE
from tests.tui.stage import Stage, idle, press, settled, shown

pytestmark = pytest.mark.loopback
DEMO = Path(catalog.models_folder()) / "demo"
WANTED = {"guide": Reference("u/guide", "Q8_0"), "model": Reference("u/model", "Q8_0")}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    with HubServer() as server:
        for role in ("guide", "model"):
            files = {f"{role}-Q8_0.gguf": f"{role}.gguf", f"mmproj-{role}-F16.gguf": f"{role}-mmproj.gguf"}
            server.add(f"u/{role}", {name: (DEMO / source).read_bytes() for name, source in files.items()})
        yield server


def screen(server, tmp_path, wanted=WANTED, **given):
    def hub(progress):
        return Hub(server.endpoint, tmp_path / "hub", "hf_right", offline=False, progress=progress, wait_s=0.001)

    return PullScreen("tiny", wanted, hub=hub, **given)


def pull(shown_screen, act, size=(80, 24)):
    app = Stage(shown_screen)

    async def play():
        async with app.run_test(size=size) as pilot:
            await act(pilot)
            await settled(pilot)

    asyncio.run(play())
    return app.results


async def until(pilot, condition):
    """Pauses until something is so; the test's own time limit ends it if it never is."""
    while not condition():
        await pilot.pause(0.01)


def test_a_pair_is_fetched_and_can_be_used(hub, tmp_path):
    async def act(pilot):
        await settled(pilot)
        pilot.app.screen.show_progress()
        await pilot.pause()
        text = shown(pilot.app)
        assert "Pull tiny" in text
        assert text.count("100%") == 4
        assert "all is here" in text
        assert "not run by us" in text
        await press(pilot, "enter")

    (result,) = pull(screen(hub, tmp_path, run=False), act)
    assert [path.name for path in result.paths] == [
        "guide-Q8_0.gguf", "mmproj-guide-F16.gguf", "model-Q8_0.gguf", "mmproj-model-F16.gguf"
    ]  # fmt: skip
    assert all(path.is_file() for path in result.paths)
    assert result.notes[-1] == "not run by us"


def test_esc_stops_keeps_the_part_and_r_goes_on_where_it_was(hub, tmp_path):
    held, reached = threading.Event(), threading.Event()

    def pace(served):
        if served >= 3 * PIECE and not held.is_set():
            reached.set()
            assert held.wait(DEADLINE)

    hub.pace = pace

    async def act(pilot):
        await until(pilot, lambda: reached.is_set() and pilot.app.screen._progress.total()[0] >= 3 * PIECE)
        pilot.app.screen.show_progress()
        await idle(pilot)
        assert "esc stop" in shown(pilot.app)
        await pilot.press("escape")
        await idle(pilot)
        assert not pilot.app.results, "it says what became of it first"
        text = shown(pilot.app)
        assert "stopped; 197 kB of" in text
        assert "are kept" in text
        assert "r go on" in text
        held.set()
        parts = tmp_path / "hub" / "models--u--guide" / "blobs"
        await until(pilot, lambda: [path.stat().st_size >= 3 * PIECE for path in parts.glob("*.incomplete")] == [True])
        await press(pilot, "r")
        await settled(pilot)
        assert "all is here" in shown(pilot.app)
        await press(pilot, "escape")

    assert pull(screen(hub, tmp_path), act) == [None]
    ranges = [seen.range for seen in hub.asked("/content/") if seen.range]
    assert len(ranges) == 1
    assert int(ranges[0].removeprefix("bytes=").removesuffix("-")) >= 3 * PIECE


def test_errors_come_with_their_hints(hub, tmp_path):
    hub.add("u/closed", {"model-Q8_0.gguf": b"x", "mmproj-model-F16.gguf": b"x"}, gated=True)
    hub.tokens.clear()

    def failing(wanted, *words):
        async def act(pilot):
            await settled(pilot)
            text = " ".join(shown(pilot.app).replace("\u2502", " ").split())
            for word in (*words, "r go on", "esc close"):
                assert word in text
            await press(pilot, "escape")

        assert pull(screen(hub, tmp_path, wanted), act) == [None]

    failing({"model": Reference("u/nothing")}, "there is no repository 'u/nothing'", "check its name")
    failing({"model": Reference("u/closed")}, "'u/closed' is gated", "accept its terms at")
    failing({"model": Reference("u/model", "Q2_K")}, "Q2_K")


def test_speed_is_of_what_came_now_and_not_of_what_was_there():
    now = [0.0]
    progress = PullProgress(lambda: now[0])
    one, two = (HubFile("u/r", "0" * 40, name, 1000, name * 40) for name in "ab")
    progress.begin([one, two])
    progress.at(one, 400)
    assert progress.total() == (400, 2000)
    assert progress.speed() == 0.0
    for second in (1, 2):
        now[0] = float(second)
        progress.at(one, 400 + 100 * second)
    assert progress.speed() == pytest.approx(100)
    now[0] = 4.0
    assert progress.speed() == pytest.approx(50), "nothing came for two seconds"
    progress.at(two, 900)
    assert progress.speed() == pytest.approx(50), "what was there of another file is no speed"
    progress.stop()
    with pytest.raises(Exception, match="stopped"):
        progress.at(two, 950)


def test_a_fetch_that_was_stopped_ends_before_it_is_gone_on_with():
    """Its thread may hang in a request, and holds the files: of another process it is not."""
    may, running, most = threading.Event(), [], []

    class Hanging:
        def __init__(self, progress):
            self.progress = progress

        def chosen(self, reference):
            return reference

        def pull(self, files):
            running.append(self)
            most.append(len(running))
            try:
                assert may.wait(DEADLINE)
                self.progress.note("fetching")
                raise DownloadError("the second one")
            finally:
                running.remove(self)

    async def act(pilot):
        await until(pilot, lambda: running)
        await pilot.press("escape", "r")
        await until(pilot, lambda: "waiting for the fetch that was stopped to end" in shown(pilot.app))
        may.set()
        await until(pilot, lambda: "the second one" in shown(pilot.app))

    try:
        pull(PullScreen("tiny", WANTED, hub=Hanging), act)
    finally:
        may.set()
    assert most == [1, 1]
