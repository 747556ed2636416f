"""What the worker, and the decoder apart, are kept from: tried from inside."""

from __future__ import annotations

import ast
import ctypes
import io
import platform
import signal
import subprocess
import sys
import textwrap

import PIL.Image
import pytest

from localvlm import images_apart
from localvlm.catalog import pair_named
from localvlm.engine import client
from localvlm.engine.api import LoadOptions
from localvlm.engine.client import Engine
from localvlm.engine.isolation import BY_KERNEL, BY_PYTHON
from localvlm.errors import ImageError, ModelError
from tests.asking import ask, picture

FILTERED = sys.platform == "linux" and platform.machine() in ("x86_64", "aarch64")
LANDLOCK = FILTERED and ctypes.CDLL(None).syscall(444, None, 0, 1) > 0
by_kernel = pytest.mark.skipif(not FILTERED, reason="this system has no seccomp filter of ours")

TRIES = """
import ctypes, os, platform, subprocess, threading, time
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"

def refused(name, *args):
    done = getattr(libc, name)(*args)
    if done == 0 and name in ("fork", "vfork"):
        os._exit(0)
    return done == -1 and ctypes.get_errno() in (1, 38)

def refused_call(on_x86, on_arm, *args):  # those that not every C library has
    return refused("syscall", ctypes.c_long(on_x86 if x86 else on_arm), *map(ctypes.c_long, args))

def no_memory():  # of the process that started this one
    return libc.open(f"/proc/{os.getppid()}/mem".encode(), 0) < 0

def tried():
    parent = os.getppid()
    return {
        "socket": refused("socket", 2, 1, 0),
        "socket of IPv6": refused("socket", 10, 2, 0),
        "socket of a local daemon": refused("socket", 1, 1, 0),
        "fork": refused("fork"),
        "execve": refused("execve", b"/bin/true", None, None),
        "kill": refused("kill", os.getppid(), 0),
        "ptrace": refused("ptrace", 16, os.getppid(), 0, 0),
        "system": libc.system(b"true") != 0,
        "socketpair": refused("socketpair", 1, 1, 0, (ctypes.c_int * 2)()),
        "tkill": refused_call(200, 130, parent, 0),
        "tgkill": refused_call(234, 131, parent, parent, 0),
        "rt_sigqueueinfo": refused_call(129, 138, parent, 0, 0),
        "rt_tgsigqueueinfo": refused_call(297, 240, parent, parent, 0, 0),
        "pidfd_send_signal": refused_call(424, 424, -1, 0, 0, 0),
        "pidfd_getfd": refused_call(438, 438, -1, 0, 0),
        "prlimit": refused_call(302, 261, parent, 4, 0, 0),
        "fcntl, F_SETOWN": refused("fcntl", 2, 8, parent),
        "fcntl, F_SETOWN_EX": refused("fcntl", 2, 15, (ctypes.c_int * 2)(1, parent)),
    }
"""


def inside(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@by_kernel
def test_from_inside_nothing_leads_out() -> None:
    """In the main thread, in one from before and in one from after the filter."""
    out = inside(
        TRIES
        + """
from localvlm.engine.isolation import close_to_system
found, go = [], threading.Event()
before = threading.Thread(target=lambda: go.wait() and found.append(tried()))
before.start()
assert not refused("socket", 2, 1, 0)
assert close_to_system()
go.set()
after = threading.Thread(target=lambda: found.append(tried()))
after.start()
found.append(tried())
before.join(), after.join()
for one in found:
    print(len(one), [what for what in one if not one[what]])
"""
    )
    assert out == "18 []\n" * 3


@pytest.mark.skipif(not LANDLOCK, reason="this kernel has no Landlock")
def test_from_inside_no_other_process_is_got_at() -> None:
    """In a thread from after, too; files are read, written, named anew and removed as before."""
    out = inside("""
        import os, tempfile, threading
        from pathlib import Path
        from localvlm.engine.isolation import close_to_processes
        def opened():
            found = []
            for path in (*others, mine):
                try:
                    os.close(os.open(path, os.O_RDONLY))
                    found.append(path)
                except PermissionError:
                    pass
            return found
        others = [f"/proc/{os.getppid()}/{name}" for name in ("mem", "fd/1", "cwd")]
        mine = "/proc/self/mem"
        assert close_to_processes()
        found = [opened()]
        after = threading.Thread(target=lambda: found.append(opened()))
        after.start()
        after.join()
        print(found == [[mine]] * 2)
        folder = Path(tempfile.mkdtemp())
        (folder / "a").write_text("written")
        print((folder / "a").replace(folder / "b").read_text())
        (folder / "b").unlink()
        folder.rmdir()
    """)
    assert out == "True\nwritten\n"


@by_kernel
def test_what_a_process_does_to_itself_goes_on() -> None:
    """Limits and flags of files are its own, and abort() signals its own thread."""
    code = """
import fcntl, os, resource, signal, threading
from localvlm.engine.isolation import close_to_processes, close_to_system
close_to_processes()
assert close_to_system()
hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
assert resource.prlimit(os.getpid(), resource.RLIMIT_CORE) == (0, hard)
fcntl.fcntl(1, fcntl.F_SETFL, fcntl.fcntl(1, fcntl.F_GETFL))
signal.pthread_kill(threading.get_ident(), 0)
print("done", flush=True)
os.abort()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (-signal.SIGABRT, "done\n"), done.stderr


def test_python_code_is_kept_from_it_everywhere() -> None:
    out = inside("""
        import os, socket, subprocess
        from localvlm.engine.isolation import close_to_python
        close_to_python()
        for call in (socket.socket, os.fork, lambda: subprocess.run(["true"]), lambda: os.system("true"),
                     lambda: os.execv("/bin/true", ["true"])):
            try:
                call()
            except PermissionError as error:
                print("does without" in str(error))
    """)
    assert out == "True\n" * 5


def test_a_core_is_not_written() -> None:
    out = inside("""
        import resource
        from localvlm.engine.isolation import no_core_dump
        no_core_dump()
        no_core_dump()
        print(max(resource.getrlimit(resource.RLIMIT_CORE)))
    """)
    assert int(out) <= 1


def test_the_worker_says_what_it_is_kept_from_and_answers(native: None) -> None:
    files = pair_named("demo").model
    with Engine() as engine:
        assert set(engine.holds()) >= {"no network", "no other program", "no core dump"}
        assert engine.holds()["no network"] == BY_PYTHON
        vlm = engine.load(files.model, files.mmproj, LoadOptions(threads=2))
        assert ask(vlm, 3)
        if FILTERED:
            found = engine.holds()
            assert (found["no network"], found["no other program"]) == (BY_KERNEL, BY_KERNEL)
        if LANDLOCK:
            assert found["no other process"] == BY_KERNEL
        pid = engine.pid
        assert ask(engine.load(files.model, files.mmproj, LoadOptions(threads=2)), 3)
        assert engine.pid == pid


@by_kernel
@pytest.mark.parametrize("gpu_layers", [0, 5])
def test_the_worker_is_closed_before_it_opens_a_file(native: None, monkeypatch, gpu_layers: int) -> None:
    """A reader of headers that tries to get out, as one that a file had taken over would; not beside a GPU's driver.
    Other processes were given up when there was one thread.
    """
    spy = f"""
{TRIES}
threads = len(os.listdir("/proc/self/task"))
from localvlm.engine import gguf_header
from localvlm.errors import ModelError
def read_header(path):
    raise ModelError(repr((threads, refused("socket", 2, 1, 0), no_memory())))
gguf_header.read_header = read_header
"""
    boot = client._BOOT.replace("from localvlm.engine.w", f"exec({spy!r}); from localvlm.engine.w")
    monkeypatch.setattr(client, "_BOOT", boot)
    files = pair_named("demo").model
    with Engine() as engine, pytest.raises(ModelError) as caught:
        engine.load(files.model, files.mmproj, LoadOptions(gpu_layers=gpu_layers))
    threads, no_socket, no_memory = ast.literal_eval(caught.value.message)
    assert (threads, no_socket) == (1, gpu_layers == 0)
    assert no_memory or gpu_layers or not LANDLOCK


@by_kernel
def test_the_decoder_apart_is_closed(monkeypatch) -> None:
    data = io.BytesIO()
    PIL.Image.fromarray(picture(8, 8)).save(data, "PNG")
    assert images_apart.decode_apart(io.BytesIO(data.getvalue()), "a", "PNG", ("PNG",), 0).size == (8, 8)
    spy = f"""
{TRIES}
from localvlm import images_apart
def decoded(*args):
    raise images_apart.ImageError(repr((sorted(tried().values()), len(os.listdir("/proc/self/task")), no_memory())), "")
images_apart._decoded = decoded
"""
    monkeypatch.setattr(
        images_apart, "_BOOT", images_apart._BOOT.replace("from localvlm", f"exec({spy!r}); from localvlm")
    )
    with pytest.raises(ImageError) as caught:
        images_apart.decode_apart(io.BytesIO(data.getvalue()), "a", "PNG", ("PNG",), 0)
    tries, threads, no_memory = ast.literal_eval(caught.value.message)
    assert (tries, threads) == ([True] * 18, 1)
    assert no_memory or not LANDLOCK
