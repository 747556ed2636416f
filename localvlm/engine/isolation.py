"""What the worker gives up before it opens a model file: the network, other programs, other processes, core dumps.

A file that takes llama.cpp over gets a process that can calculate and no more. On Linux a seccomp filter tells the
kernel so, for all threads and for good; it needs no rights and takes well under a millisecond. Memory and open files of
other processes are files to it (``/proc/PID``), which Landlock keeps. Elsewhere, and beside a GPU's driver, which may
start helpers of its own, Python's audit hook keeps at least what runs as Python (a model's chat template) from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from dataclasses import dataclass

__all__ = [
    "BY_KERNEL",
    "BY_PYTHON",
    "close_to_processes",
    "close_to_python",
    "close_to_system",
    "holds",
    "no_core_dump",
]

BY_KERNEL, BY_PYTHON = "kept by the kernel", "kept from Python code alone"
_EVENTS = frozenset(
    (
        "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.system", "pty.spawn", "subprocess.Popen",
        "socket.__new__", "socket.bind", "socket.connect", "socket.getaddrinfo",
    )
)  # fmt: skip
_THREAD, _SHARED_HANDLERS = 0x10000, 0x800
"""CLONE_THREAD, which llama.cpp's threads are made with and no process is; CLONE_SIGHAND, which is refused alone."""
_PR_SET_NO_NEW_PRIVS = 38
_SET_FILTER, _ALL_THREADS = 1, 1
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
"""Instructions of a classic BPF program, on 32 bits: load from the call, compare with a constant, return."""
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16
"""Offsets in the kernel's ``struct seccomp_data``, little-endian; 4 bytes of an argument's 8 are looked at."""
_SET_OWNER, _SET_OWNER_EX = 8, 15
"""F_SETOWN and F_SETOWN_EX of fcntl: whom the kernel signals when a file is ready, with any signal."""


@dataclass(frozen=True)
class _Calls:
    """Numbers of system calls on one architecture.

    Attributes:
        audit: the kernel's AUDIT_ARCH of it.
        seccomp: seccomp(2) itself.
        clone: allowed for threads.
        fcntl: allowed but for signals to others.
        own: tgkill, which abort() needs, and prlimit64: allowed for this process.
        refused: those that nothing in a worker needs: socket, socketpair, execve, execveat, fork, vfork; kill, tkill,
            rt_sigqueueinfo, rt_tgsigqueueinfo, pidfd_send_signal; ptrace, process_vm_readv, process_vm_writev,
            pidfd_getfd; and io_uring_setup, through which others can be had.
        foreign: number from which on calls are another ABI's; 0: there is none.
    """

    audit: int
    seccomp: int
    clone: int
    fcntl: int
    own: tuple[int, ...]
    refused: tuple[int, ...]
    foreign: int = 0


_CLONE3 = 435
"""Refused as if the kernel had none, since its flags lie in memory: the C library then takes clone."""
_MACHINES = {
    "x86_64": _Calls(
        audit=0xC000003E,
        seccomp=317,
        clone=56,
        fcntl=72,
        own=(234, 302),
        refused=(41, 53, 59, 322, 57, 58, 62, 200, 129, 297, 424, 101, 310, 311, 438, 425),
        foreign=0x40000000,
    ),
    "aarch64": _Calls(
        audit=0xC00000B7,
        seccomp=277,
        clone=220,
        fcntl=25,
        own=(131, 261),
        refused=(198, 199, 221, 281, 129, 130, 138, 240, 424, 117, 270, 271, 438, 425),
    ),
}
_CREATE_RULESET, _RESTRICT_SELF = 444, 446
"""Landlock's system calls, the same on every architecture."""
_TELL_VERSION = 1
_EXECUTE = 1
"""LANDLOCK_ACCESS_FS_EXECUTE: a ruleset must restrict something, and no program is started anyway."""
_ABSTRACT_SOCKETS, _SIGNALS = 1, 2
"""LANDLOCK_SCOPE_ABSTRACT_UNIX_SOCKET and LANDLOCK_SCOPE_SIGNAL, of version 6 on."""


def no_core_dump() -> None:
    """A core would hold the user's picture. Of 1 byte on Linux, where 0 keeps programs behind a pipe from none."""
    with contextlib.suppress(ImportError, OSError, ValueError):  # a hard limit of 0 stays
        import resource

        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        most = 1 if sys.platform == "linux" and hard != 0 else 0
        resource.setrlimit(resource.RLIMIT_CORE, (most, most))


def close_to_python() -> None:
    """From now on Python code of this process opens no socket and starts no program."""
    sys.addaudithook(_refuse)


def _refuse(event: str, _: tuple[object, ...]) -> None:
    if event in _EVENTS:
        raise PermissionError(f"the engine's process does without {event}")


def close_to_system() -> bool:
    """From now on no thread of this process opens a socket, starts a program or a process, or reaches into another.

    Returns:
        False where the system has no way to keep that; all that was allowed is allowed then.
    """
    calls = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or sys.byteorder != "little" or sys.maxsize < 2**32 or calls is None:
        return False
    program = _program(calls)
    code = ctypes.create_string_buffer(program)
    # struct sock_fprog { unsigned short len; struct sock_filter *filter; }
    whole = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        number, nothing = ctypes.c_long(calls.seccomp), ctypes.c_ulong(0)
        if libc.prctl(ctypes.c_int(_PR_SET_NO_NEW_PRIVS), ctypes.c_ulong(1), nothing, nothing, nothing):
            return False
        return not libc.syscall(number, ctypes.c_ulong(_SET_FILTER), ctypes.c_ulong(_ALL_THREADS), whole)
    except (AttributeError, OSError):
        return False


def close_to_processes() -> bool:
    """From now on this thread, and those that it starts, get at no other process: its memory and the files it has open.
    So it is to be called before there are others; files are read and written as before.

    Who is in a domain of Landlock may trace nobody outside it, and ``/proc/PID`` asks for no less.

    Returns:
        False where the system has no Landlock; all that was allowed is allowed then.
    """
    if sys.platform != "linux":
        return False
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        create, nothing = ctypes.c_long(_CREATE_RULESET), ctypes.c_ulong(0)
        version = libc.syscall(create, None, nothing, ctypes.c_ulong(_TELL_VERSION))
        if version < 1:
            return False
        # struct landlock_ruleset_attr { __u64 handled_access_fs, handled_access_net, scoped; }: the first alone is old
        scoped = (0, _ABSTRACT_SOCKETS | _SIGNALS) if version >= 6 else ()
        attributes = struct.pack(f"={1 + len(scoped)}Q", _EXECUTE, *scoped)
        ruleset = libc.syscall(create, attributes, ctypes.c_ulong(len(attributes)), nothing)
        if ruleset < 0:
            return False
        try:
            if libc.prctl(ctypes.c_int(_PR_SET_NO_NEW_PRIVS), ctypes.c_ulong(1), nothing, nothing, nothing):
                return False
            return not libc.syscall(ctypes.c_long(_RESTRICT_SELF), ctypes.c_long(ruleset), nothing)
        finally:
            os.close(ruleset)
    except (AttributeError, OSError):
        return False


def _program(calls: _Calls) -> bytes:
    """The filter as a list of ``struct sock_filter``: what is not refused is allowed."""
    refuse, no_such = _ERRNO | errno.EPERM, _ERRNO | errno.ENOSYS
    tests = [
        *([(_AT_LEAST, calls.foreign, refuse)] if calls.foreign else []),
        (_EQUAL, _CLONE3, no_such),
        *((_EQUAL, number, refuse) for number in calls.refused),
    ]
    code = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, calls.audit), (_RETURN, 0, 0, refuse), (_LOAD, 0, 0, _NUMBER)]
    for test, value, answer in tests:
        code += [(test, 0, 1, value), (_RETURN, 0, 0, answer)]
    code += _looked_at(calls.clone, 0, [(_ANY_BIT, _THREAD)], _ALLOW, refuse)
    for number in calls.own:  # 0 means this process, or nothing
        code += _looked_at(number, 0, [(_EQUAL, 0), (_EQUAL, os.getpid())], _ALLOW, refuse)
    code += _looked_at(calls.fcntl, 1, [(_EQUAL, _SET_OWNER), (_EQUAL, _SET_OWNER_EX)], refuse, _ALLOW)
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("<HBBI", *one) for one in code)


def _looked_at(
    call: int, argument: int, tests: list[tuple[int, int]], met: int, unmet: int
) -> list[tuple[int, int, int, int]]:
    """What answers ``call`` by one of its arguments: ``met`` if any of the tests is."""
    n = len(tests)
    return [
        (_EQUAL, 0, n + 3, call),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
        *((test, n - i, 0, value) for i, (test, value) in enumerate(tests)),
        (_RETURN, 0, 0, unmet),
        (_RETURN, 0, 0, met),
    ]


def holds() -> dict[str, str]:
    """What this process is kept from, tried with calls that do no harm where they are allowed; and by whom."""
    found = {}
    for what, closed, event in (
        ("no network", _no_socket(), "socket.__new__"),
        ("no other program", _no_program(), "os.exec"),
    ):
        if by := BY_KERNEL if closed else _by_python(event):
            found[what] = by
    if _no_process():
        found["no other process"] = BY_KERNEL
    with contextlib.suppress(ImportError):
        import resource

        if 0 <= resource.getrlimit(resource.RLIMIT_CORE)[1] <= 1:
            found["no core dump"] = BY_KERNEL
        if resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY:
            found["bounded memory"] = BY_KERNEL
    return found


def _by_python(event: str) -> str:
    try:
        sys.audit(event)
    except PermissionError:
        return BY_PYTHON
    return ""


def _no_socket() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = libc.socket(2, 1, 0)  # AF_INET, SOCK_STREAM
    if fd >= 0:
        os.close(fd)
    return fd < 0 and ctypes.get_errno() == errno.EPERM


def _no_program() -> bool:
    """An execve of nothing, and a clone whose flags contradict each other."""
    libc = ctypes.CDLL(None, use_errno=True)
    started = libc.execve(b"", None, None), ctypes.get_errno()
    calls = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or calls is None:
        return False
    parted = libc.syscall(ctypes.c_long(calls.clone), ctypes.c_long(_SHARED_HANDLERS)), ctypes.get_errno()
    return started == parted == (-1, errno.EPERM)


def _no_process() -> bool:
    """Memory of the process that started this one."""
    try:
        os.close(os.open(f"/proc/{os.getppid()}/mem", os.O_RDONLY))
    except PermissionError:
        return True
    except OSError:
        pass
    return False
