"""What stays of a question and a picture: nothing that was not asked for, and nothing once it is forgotten.

A canary is asked about by a real process; then its words, the picture's name and its pixels are looked for in every
file of the home folder. No process calls the network, nor runs another program than the worker.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from localvlm.history import History, StoredImage, StoredTurn, history_file
from localvlm.images import load
from localvlm.traces import traces
from tests.tui.terminal import Terminal

ASK = "ask", "--pair", "demo", "--threads", 1, "--max-tokens", 4
WORD = "xylographic-quokka"
PIXELS = np.random.default_rng(7).integers(0, 256, (64, 64, 3)).astype(np.uint8)
AUDIT = """
import os, sys
def hook(event, args):
    if event.startswith(("socket.", "urllib.", "http.")) and event != "socket.gethostname":
        os.write(2, ("NETWORK " + event + chr(10)).encode())
        os._exit(99)
    if event in ("subprocess.Popen", "os.exec", "os.posix_spawn", "os.system") and sys.executable not in str(args):
        os.write(2, ("PROGRAM " + str(args) + chr(10)).encode())
        os._exit(98)
sys.addaudithook(hook)
"""
HOOKED = f"{AUDIT}\nfrom localvlm.engine import client\nclient._BOOT = {AUDIT!r} + client._BOOT\n"
"""In the worker, too."""


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def canary(tmp_path) -> Path:
    path = tmp_path / f"{WORD}.png"
    PIL.Image.fromarray(PIXELS).save(path)
    return path


def run(*args: object, before: str = "", prefix: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    code = f"{before}\nimport sys\nfrom localvlm.cli.main import main\nmain(sys.argv[1:])"
    command = [*prefix, sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL)


def ask(image: Path, *args: object, **how) -> subprocess.CompletedProcess[str]:
    return run(*ASK, *args, image, f"What is {WORD}?", **how)


def left(home: Path) -> list[str]:
    """Files of the home that tell of the canary: by name, by word or by the pixels of a row."""
    signs = WORD.encode(), str(Path.cwd()).encode(), PIXELS[0].tobytes(), PIXELS[:, 0].tobytes()
    files = [path for path in home.rglob("*") if path.is_file()]
    return [str(p) for p in files if WORD in p.name or any(sign in p.read_bytes() for sign in signs)]


def test_nothing_tells_of_a_question(home, canary, native):
    done = ask(canary, "--image-cache", 64)
    assert done.returncode == 0, done.stderr
    assert left(home) == []
    encoded = [trace for trace in traces(all_of_them=True) if trace.files]
    assert {trace.name for trace in encoded} >= {"encoded pictures"}
    assert run("forget", "--all", "--yes").returncode == 0
    assert [trace for trace in traces(all_of_them=True) if trace.files] == []
    assert left(home) == []


def test_private_leaves_nothing_at_all(home, canary, native):
    done = ask(canary, "--private", "--image-cache", 64)
    assert done.returncode == 0, done.stderr
    assert [path for path in home.rglob("*") if path.is_file()] == []
    assert done.stdout == ask(canary).stdout


def test_no_command_calls_the_network_or_a_program(home, canary, native, tmp_path):
    commands = [
        (*ASK, canary, "What?"),
        ("attention", "--pair", "demo", "--threads", 1, "--save", tmp_path / "a.npz", canary, "What?"),
        ("list",),
        ("show", "demo"),
        ("doctor",),
        ("paths",),
        ("recommend",),
    ]
    for command in commands:
        done = run(*command, before=HOOKED)
        assert done.returncode == 0, f"{command}: {done.stderr}"


def test_the_hook_would_have_told(tmp_path):
    assert run(before=AUDIT + "import socket\nsocket.socket()").returncode == 99
    assert run(before=AUDIT + "import subprocess\nsubprocess.run(['true'])").returncode == 98
    calls = (
        HOOKED + "client._BOOT = client._BOOT.replace('from localvlm', 'import socket; socket.socket(); from localvlm')"
    )
    assert run(*ASK, "example", "What?", before=calls).returncode == 4


@pytest.mark.skipif(shutil.which("unshare") is None, reason="no unshare")
def test_answers_are_the_same_without_a_network(home, canary, native):
    apart = ("unshare", "-rn")
    if subprocess.run([*apart, "true"], capture_output=True).returncode:
        pytest.skip("namespaces are closed here")
    assert ask(canary, prefix=apart).stdout == ask(canary).stdout != ""


def programs(calls: str) -> list[str]:
    """Those that were run, as strace has them: in two halves where another thread's call came between."""
    begun: dict[str, str] = {}
    ran = []
    for line in calls.splitlines():
        pid, call = line.split(maxsplit=1)
        if call.startswith("execve("):
            begun[pid] = call
        if call.startswith(("execve(", "<... execve resumed>")) and call.endswith("= 0"):
            ran.append(begun[pid])
    return ran


@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_no_system_call_reaches_the_network(home, canary, native, tmp_path):
    log = tmp_path / "calls"
    watched = ("strace", "-f", "-o", str(log), "-e", "trace=network,execve")
    if subprocess.run([*watched, "true"], capture_output=True).returncode:
        pytest.skip("processes may not be traced here")
    for command in (("list",), ("show", "demo"), (*ASK, canary, "What?")):
        assert run(*command, prefix=watched).returncode == 0
        calls = log.read_text()
        assert "AF_INET" not in calls
        ran = programs(calls)
        assert all("python" in line for line in ran)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("strace") is None, reason="no strace")
def test_no_system_call_of_the_chat_reaches_the_network(home, native, tmp_path):
    """A question about a picture, its answer, and out."""
    log = tmp_path / "calls"
    watched = ["strace", "-f", "-qq", "-o", str(log), "-e", "trace=network,execve"]
    if subprocess.run([*watched, "true"], capture_output=True).returncode:
        pytest.skip("processes may not be traced here")
    chat = [*watched, sys.executable, "-m", "localvlm", "chat", "--pair", "demo", "--threads", "1", "example"]
    with Terminal(["-c", f"import os; os.execvp('strace', {chat!r})"]) as terminal:
        terminal.until(b"Ask about the picture")
        terminal.type(b"What colour is the star?\r")
        terminal.until(b"yellow")
        terminal.type(b"\x11")
        assert terminal.ended() == 0
    calls = log.read_text()
    assert "AF_INET" not in calls
    ran = programs(calls)
    assert len(ran) >= 2, "the chat, and its worker"
    assert all("python" in line for line in ran)


def test_forget_asks_and_tells(cli, home):
    folder = home / "cache" / "images"
    for name in ("a", "b"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"12345")
    (home / "data" / "history").mkdir(parents=True)
    (home / "data" / "history" / "history.db").write_bytes(b"1")
    (home / "data" / "other").write_bytes(b"of another kind")
    assert (cli("forget").code, cli("forget", "x.png", "--all").code) == (2, 2)
    refused = cli("forget", "--all")
    assert (refused.code, "pass --yes" in refused.err, folder.exists()) == (2, True, True)
    (home / "data" / "history" / "history.db").unlink()
    done = cli("forget", "photo.jpg")
    assert (done.code, folder.exists(), (home / "data" / "history").exists()) == (0, False, True)
    assert "encoded pictures: 2 files" in done.err
    (home / "data" / "history" / "history.db").write_bytes(b"no database")
    assert cli("forget", "--all", "--yes").code == 0
    assert [path.name for path in (home / "data").iterdir()] == ["other"]
    assert "nothing is kept" in cli("forget", "--all", "--yes").err


def chat(canary: Path, path: Path | None = None, word: str = WORD) -> int:
    """A conversation about the canary, as `localvlm chat` keeps it."""
    shown = StoredImage.of(load(canary), path or canary)
    with History.open() as history:
        conversation = history.begin(f"About {word}", "demo", f"Speak of {word}.")
        turn = StoredTurn(f"What is {word}?", f"a {word}\n" * 300, "model", guide_text=word, images=(shown,))
        history.add(conversation, turn)
        history.add(conversation, StoredTurn(f"And {word}?", word, "guide"))
    return conversation


def other_conversation() -> None:
    with History.open() as history:
        history.add(history.begin("kept"), StoredTurn("one", "two", "model"))


def titles() -> list[str]:
    with History.open() as history:
        return [found.title for found in history.conversations()]


def test_a_picture_that_is_gone_is_found_by_a_path_written_otherwise(home, canary, cli, monkeypatch, tmp_path):
    from localvlm.sources import sources

    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    (source,) = sources(f"../{canary.name}")
    chat(canary, source.path)
    canary.unlink()
    assert "nothing is kept" in cli("forget", canary.with_name("other.png")).err
    assert cli("forget", canary, "--yes").code == 0
    assert titles() == []


def test_history_goes_with_all(home, canary, cli):
    chat(canary)
    assert left(home)
    assert cli("forget", "--all", "--yes").code == 0
    assert left(home) == []
    assert not (home / "data" / "history").exists()


def test_history_that_a_process_has_open_is_emptied(home, canary, cli):
    conversation = chat(canary)
    with History.open() as history:
        assert history.turns(conversation)
        done = cli("forget", "--all", "--yes")
        assert (done.code, left(home), history.conversations()) == (0, [], [])
        assert "emptied; the file stays while another localvlm has it open" in done.err
        history.begin("goes on")


@pytest.mark.parametrize("way", ["pixels", "copy", "path", "pattern"])
def test_conversations_about_a_picture_go_with_it(home, canary, cli, way, tmp_path):
    other_conversation()
    chat(canary, Path("/no/longer/there.png") if way == "pixels" else None)
    name = {"copy": str(tmp_path / "copy.png"), "pattern": f"{canary.parent}/{WORD}*"}.get(way, str(canary))
    if way == "copy":
        shutil.copy(canary, name)
    if way in ("copy", "path"):
        canary.unlink()
    refused = cli("forget", name)
    assert (refused.code, "pass --yes" in refused.err, len(titles())) == (2, True, 2)
    done = cli("forget", name, "--yes")
    assert (done.code, titles(), left(home)) == (0, ["kept"], [])
    assert f"About {WORD}, 2 turns" in done.err


def test_each_way_to_remove_a_conversation_leaves_nothing(home, canary):
    for remove in (
        lambda history, one: history.delete(one),
        lambda history, one: history.clear(),
        lambda history, one: history.forget_image(load(canary).content),
    ):
        conversation = chat(canary)
        assert left(home)
        with History.open() as history:
            remove(history, conversation)
            assert left(home) == []
        assert left(home) == []


def test_a_history_that_cannot_be_read_is_told_and_goes_with_all(home, canary, cli):
    chat(canary)
    history_file().write_bytes(b"no database")
    refused = cli("forget", canary)
    assert (refused.code, "is damaged" in refused.err, history_file().exists()) == (8, True, True)
    assert cli("forget", "--all", "--yes").code == 0
    assert not history_file().exists()


def test_a_linked_history_is_removed_where_it_is(home, canary, cli, tmp_path):
    chat(canary)
    (tmp_path / "disk").mkdir()
    history_file().rename(tmp_path / "disk" / "mine.db")
    history_file().symlink_to(tmp_path / "disk" / "mine.db")
    other_conversation()
    assert titles() == ["kept", f"About {WORD}"]
    assert cli("forget", "--all", "--yes").code == 0
    assert list((tmp_path / "disk").iterdir()) == []
    assert not history_file().parent.exists()


def test_a_link_in_place_of_a_folder_is_removed_and_not_followed(cli, home, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").write_bytes(b"1")
    (home / "cache").mkdir(parents=True)
    (home / "cache" / "images").symlink_to(tmp_path / "mine")
    cli("forget", "photo.jpg")
    assert (tmp_path / "mine" / "file").exists()


def test_private_eval_names_its_folder(cli, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": cli.image, "question": "What?", "answers": ["red"]}) + "\n")
    assert "--work" in cli("eval", *cli.pair, "--private", data).err
