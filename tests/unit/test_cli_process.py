"""The command line as a process: Ctrl-C, pipes, inherited standard input, start-up time."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import PIL.Image
import pytest

from localvlm.cli.interrupt import GRACE_S

FAKE = """
import json, os, sys
from localvlm.cli.app import App
from localvlm.cli.main import main
from localvlm.engine.fake import FakeEngine, FakeVlm, Script
# further
script = Script(**json.loads(sys.argv[1]))
main(sys.argv[2:], App(lambda verbose: FakeEngine(script)))
"""
SLOW = {"answer": "one two three four five " * 100, "token_s": 0.2}
PATIENT = "import localvlm.cli.interrupt as interrupt; interrupt.GRACE_S = 3600\n"
"""What waits for the grace fails by its time limit."""
DEAF = "FakeEngine.cancel = lambda self: os.write(2, b'asked to stop\\n')\n"
HANG_S = 120
"""After which a test that waits has failed."""


@pytest.fixture
def command(tmp_path):
    """Builds the command line of a question to the fake engine."""
    PIL.Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("m.gguf", "m-mmproj.gguf"):
        (tmp_path / name).touch()

    def build(script: dict, *flags: str, image: str | None = None) -> list[str]:
        pair = ["--guide", str(tmp_path / "m.gguf"), "--model", str(tmp_path / "m.gguf")]
        ask = ["ask", *pair, *flags, image or str(tmp_path / "a.png"), "What?"]
        return [sys.executable, "-c", FAKE, json.dumps(script), *ask]

    return build


def also(args: list[str], code: str) -> list[str]:
    """The command line with further code run before it."""
    return [*args[:2], args[2].replace("# further", code), *args[3:]]


def start(args: list[str], **options) -> subprocess.Popen[bytes]:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(args, **options)


def test_ctrl_c_keeps_what_was_printed_and_exits_130(command):
    with start(also(command(SLOW, "--method=none"), PATIENT)) as process:
        first = process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert (first + out).endswith(b"\n")
    assert SLOW["answer"].encode().startswith((first + out)[:-1])
    assert err == b"localvlm: interrupted\n"


def test_ctrl_c_where_the_engine_does_not_listen_still_exits_within_a_second(command):
    encodes = (
        "FakeVlm.encode = lambda *args, encode=FakeVlm.encode, **more: "
        "print('encodes', file=sys.stderr, flush=True) or encode(*args, **more)\n"
    )
    with start(also(command({"encode_s": 3600}, "--method=none"), DEAF + encodes)) as process:
        assert process.stderr.readline() == b"encodes\n"  # handlers are there by then, however slow the machine
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=HANG_S)
    assert process.returncode == 130
    assert GRACE_S < 1


def test_a_second_ctrl_c_leaves_at_once(command):
    with start(also(command(SLOW, "--method=none"), PATIENT + DEAF)) as process:
        process.stdout.read(4)
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline() == b"asked to stop\n"  # two signals that are not handled yet are one
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=HANG_S)
    assert process.returncode == 130


def test_a_reader_that_leaves_ends_the_answer_quietly(command):
    with start(command({"answer": "x" * 400, "token_s": 0.01}, "--method=none")) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=HANG_S) == 0


def test_an_inherited_pipe_that_nobody_writes_does_not_hang(command):
    read, write = os.pipe()
    try:
        run = subprocess.run(command({}), stdin=read, capture_output=True, timeout=HANG_S, check=True)
        assert run.stdout == b"red\n"
        assert b"standard input" in run.stderr
    finally:
        os.close(read)
        os.close(write)


def test_a_pipe_that_is_written_late_is_read_to_its_end(command):
    with start(command({}, "--json"), stdin=subprocess.PIPE) as process:
        process.stdin.write(b"context ")
        process.stdin.flush()
        time.sleep(1.5)
        out, err = process.communicate(b"and more", timeout=HANG_S)
    assert err == b""
    alone = subprocess.run(command({}, "--json"), stdin=subprocess.DEVNULL, capture_output=True, check=True)
    more = json.loads(out)["tokens"]["prompt"] - json.loads(alone.stdout)["tokens"]["prompt"]
    assert more == len("context and more\n\n")


def test_standard_input_of_a_file_of_nohup_and_closed(command, tmp_path):
    (tmp_path / "notes.txt").write_text("some context")
    with (tmp_path / "notes.txt").open() as notes:
        assert subprocess.run(command({}), stdin=notes, capture_output=True, check=True).stdout == b"red\n"
    with Path(os.devnull).open("wb") as write_only:  # what nohup leaves
        assert subprocess.run(command({}), stdin=write_only, capture_output=True, check=True).stdout == b"red\n"
    closed = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *command({})], capture_output=True, check=True)
    assert closed.stdout == b"red\n"


def test_closed_and_full_streams(command, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)  # with it nothing tells which write failed
    for redirection, code, out in ((">&-", 0, b""), ("2>&-", 0, b"red\n"), (">/dev/full", 8, b"")):
        if "full" in redirection and not Path("/dev/full").exists():
            continue
        shell = ["sh", "-c", f'exec "$@" {redirection}', "sh", *command({})]
        run = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        assert (run.returncode, run.stdout) == (code, out), redirection
        assert b"Traceback" not in run.stderr
        assert b"Exception" not in run.stderr
        assert (b"standard output cannot be written: No space" in run.stderr) == (code == 8)


def test_binary_on_standard_input_without_a_dash_is_refused(command, tmp_path):
    with (tmp_path / "a.png").open("rb") as image:
        run = subprocess.run(command({}), stdin=image, capture_output=True, check=False)
    assert run.returncode == 2
    assert b"`-`" in run.stderr
    with (tmp_path / "a.png").open("rb") as image:
        run = subprocess.run(command({}, image="-"), stdin=image, capture_output=True, check=False)
    assert run.stdout == b"red\n"


def test_progress_is_for_terminals(command):
    """On a terminal: a progress line that is wiped, then one line of summary; elsewhere nothing (see test_cli_ask)."""
    ours, theirs = pty.openpty()
    with start(command({"encode_s": 0.05}), stderr=theirs) as process:
        os.close(theirs)
        out = process.stdout.read()
        shown = b""
        while True:
            try:
                chunk = os.read(ours, 4096)
            except OSError:
                break
            if not chunk:
                break
            shown += chunk
    os.close(ours)
    assert out == b"red\n"
    assert b"the guide looks ..." in shown
    assert shown.decode().rpartition("\x1b[K")[2].startswith("model · 50 of 144 image tokens")


def test_an_ascii_terminal_gets_an_answer(command):
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    run = subprocess.run(
        command({"answer": "café"}), stdin=subprocess.DEVNULL, capture_output=True, env=env, check=True
    )
    assert run.stdout == b"caf?\n"


def test_help_starts_fast(tmp_path):
    """At most 8 x an empty Python; processor time, the best of several runs in turn, because machines are shared."""

    def used(*args: str) -> float:
        with subprocess.Popen([sys.executable, *args], stdout=subprocess.DEVNULL, cwd=tmp_path) as process:
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        return usage.ru_utime + usage.ru_stime

    ours, empty = [], []
    for _ in range(40):
        ours.append(used("-m", "localvlm", "--help"))
        empty.append(used("-c", ""))
        if len(ours) >= 7 and min(ours) <= 8 * min(empty):
            break
    assert min(ours) <= 8 * min(empty)


def test_help_loads_nothing_heavy():
    heavy = {"numpy", "PIL", "llama_cpp", "gguf", "jinja2", "psutil", "platformdirs", "tomllib", "json", "statistics"}
    heavy |= {"huggingface_hub", "rich"}
    code = (
        "import sys\nfrom localvlm.cli.main import main\n"
        "try: main(['ask', '--help'])\nexcept SystemExit: print(*sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not heavy & set(run.stderr.split())


@pytest.mark.parametrize(("given", "want"), [({}, "4"), ({"OPENBLAS_THREAD_TIMEOUT": "9"}, "9")])
def test_numpys_threads_rest_after_a_product(given, want):
    child = "import atexit, os; from localvlm.cli.main import main\n"
    child += "atexit.register(lambda: print(os.environ['OPENBLAS_THREAD_TIMEOUT'])); main(['--version'])"
    env = {k: v for k, v in os.environ.items() if k != "OPENBLAS_THREAD_TIMEOUT"} | given
    done = subprocess.run([sys.executable, "-c", child], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == want
