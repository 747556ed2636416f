"""Pulls that are killed, run twice at once, or fill a disk: ``python -m tests.pulls [--points 10]``.

A real ``localvlm pull`` in a process of its own fetches 20 MiB from a server on this machine and is sent SIGKILL when
so many bytes were served; then it is run again. The server runs no further ahead of the file on disk than a slow
network would, so that what is served twice is what the command held back, not what lay in the system's buffers.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from localvlm.catalog import models_folder
from tests.hub_server import HubServer

REPO = "user/model-GGUF"
SIZE = 20 << 20
SPARE = 1 << 20
"""Bytes that a resumed pull may be served twice."""
WAIT_S = 600
"""How long a command may take: machines are shared."""
LEAD = 1 << 18
"""How far the server runs ahead of the file, at the most."""


def contents() -> dict[str, bytes]:
    """A model of 20 MiB, which ends in bytes that no tensor uses, and its projector."""
    model = (models_folder() / "demo" / "model.gguf").read_bytes()
    projector = (models_folder() / "demo" / "model-mmproj.gguf").read_bytes()
    padding = b"".join(hashlib.sha256(i.to_bytes(4, "little")).digest() for i in range((SIZE - len(model)) // 32 + 1))
    return {"model-Q8_0.gguf": (model + padding)[:SIZE], "mmproj-model-F16.gguf": projector}


@dataclass(frozen=True)
class Killed:
    """A pull that was killed when ``at`` bytes were served, and run again.

    Attributes:
        kept: bytes of the part that the kill left.
        served: bytes of content, by both runs.
        torn: files that could be seen under their names in between, and were not whole.
    """

    at: int
    kept: int
    served: int
    torn: int
    resumed: bool
    code: int
    sound: bool

    @property
    def passed(self) -> bool:
        whole = sum(map(len, contents().values()))
        clean = self.code == 0 and self.sound and not self.torn
        return clean and self.served <= whole + SPARE and self.resumed == (self.kept > 0)


def start(server: HubServer, cache: Path, *args: str, before: Sequence[str] = ()) -> subprocess.Popen[str]:
    """``localvlm pull`` from ``server`` into ``cache``; ``before``: what is put in front of the command."""
    environment = {**os.environ, "HF_ENDPOINT": server.endpoint, "HF_HUB_CACHE": str(cache), "HF_TOKEN": "hf_right"}
    command = [*before, sys.executable, "-m", "localvlm", "pull", REPO, *args]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=environment, text=True, **streams)


def killed_at(at: int, folder: Path) -> Killed:
    """Kills a pull when ``at`` bytes were served, and runs it again."""
    with HubServer() as server:
        server.add(REPO, contents())
        process = start(server, folder)

        def pace(served: int) -> None:
            if served >= at:
                process.kill()
            while process.poll() is None and served - _on_disk(folder) > LEAD:
                time.sleep(0.001)

        server.pace = pace
        process.communicate(timeout=WAIT_S)
        kept = sum(part.stat().st_size for part in folder.rglob("*.incomplete"))
        torn = sum(path.read_bytes() != contents()[path.name] for path in folder.rglob("snapshots/*/*"))
        server.pace = lambda served: None
        first = len(server.asked("/content/"))
        again = start(server, folder)
        out, _ = again.communicate(timeout=WAIT_S)
        resumed = any(seen.range for seen in server.asked("/content/")[first:])
        path = Path(out.split("\n")[0]) if out else folder / "nothing"
        sound = path.is_file() and path.read_bytes() == contents()["model-Q8_0.gguf"]
        return Killed(at, kept, server.served, torn, resumed, again.returncode, sound)


def _on_disk(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("blobs/*"))


def two_at_once(folder: Path) -> tuple[list[int], int]:
    """Exit codes of two pulls that begin together, and the bytes served to both."""
    with HubServer() as server:
        server.add(REPO, contents())
        server.pace = lambda served: time.sleep(0.005)  # so that they meet
        both = [start(server, folder) for _ in range(2)]
        for process in both:
            process.communicate(timeout=WAIT_S)
        return [process.returncode for process in both], server.served


def disk_full(folder: Path) -> tuple[int, str, int]:
    """A pull into 10 MB: exit code, what it said, bytes served."""
    with HubServer() as server:
        server.add(REPO, contents())
        mount = f"mount -t tmpfs -o size=10m tmpfs '{folder}' && exec \"$@\""
        process = start(server, folder, before=["unshare", "-rm", "sh", "-c", mount, "sh"])
        _, err = process.communicate(timeout=WAIT_S)
        return process.returncode, err, server.served


def quota_met(folder: Path) -> tuple[int, str, int]:
    """A pull that may write 8 MiB of a file: exit code, what it said, bytes of the part that it keeps."""
    with HubServer() as server:
        server.add(REPO, contents())
        process = start(server, folder, before=["bash", "-c", 'ulimit -f 8192; exec "$@"', "bash"])
        _, err = process.communicate(timeout=WAIT_S)
        return process.returncode, err, sum(part.stat().st_size for part in folder.rglob("*.incomplete"))


def interrupted(folder: Path) -> tuple[int, str, int]:
    """A pull that is sent SIGINT in the midst: exit code, what it said, bytes of the part that it keeps."""
    with HubServer() as server:
        server.add(REPO, contents())
        process = start(server, folder)

        def pace(served: int) -> None:
            if served > SIZE // 2:
                process.send_signal(signal.SIGINT)
                process.wait(WAIT_S)

        server.pace = pace
        _, err = process.communicate(timeout=WAIT_S)
        return process.returncode, err, sum(part.stat().st_size for part in folder.rglob("*.incomplete"))


def main(args: Sequence[str] | None = None) -> int:
    """Prints a line a case; 0 if all passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=10, help="kills, evenly over the file")
    points = parser.parse_args(args).points
    whole = sum(map(len, contents().values()))
    passed = True
    for i in range(points):
        with tempfile.TemporaryDirectory() as folder:
            run = killed_at(SIZE * i // points, Path(folder))
        passed &= run.passed
        told = f"{run.kept:>10,} kept, {run.served - whole:>8,} served twice, {'ok' if run.passed else run}"
        print(f"killed at {run.at:>10,} bytes: {told}")
    with tempfile.TemporaryDirectory() as folder:
        codes, served = two_at_once(Path(folder))
    passed &= codes == [0, 0] and served == whole
    print(f"two at once: exit {codes}, {served - whole:,} bytes served twice")
    for name, run_case, want, right in (
        ("a disk of 10 MB", disk_full, "GB free", 8),
        ("a quota of 8 MiB", quota_met, "is kept", 8),
        ("interrupted", interrupted, "is kept", 130),
    ):
        with tempfile.TemporaryDirectory() as folder:
            code, err, n_bytes = run_case(Path(folder))
        passed &= code == right and want in err and "Traceback" not in err
        print(f"{name}: exit {code}, {n_bytes:,} bytes, {err.strip().splitlines()[-1]}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
