"""Writes docs/first-steps.md: what a new user types, in a terminal 96 columns wide, and what comes back.

python docs/make_first_steps.py [--out FILE]

Everything runs for real, in a home of its own: the last commit is installed by pip into a new environment, and commands
are those of that environment. The network is used once, by pip. The hub is a server on loopback that holds the demo
pair's files; the real one speaks the same protocol.
"""

from __future__ import annotations

import argparse
import io
import os
import pty
import re
import select
import shlex
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

import click

from localvlm.catalog import example_image
from localvlm.cli.main import cli
from tests.hub_server import HubServer

COLUMNS = 96
REPOS = {"you/drawn-guide-GGUF": "guide", "you/drawn-model-GGUF": "model"}
STEPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("What there is", ("localvlm --help", "localvlm --version")),
    ("Does it work here?", ("localvlm doctor",)),
    (
        "A first question, to the bundled pair, which knows drawn scenes only",
        (
            'localvlm ask example "What colour is the star?"',
            'localvlm ask example "What is written on the card?" -v',
            'localvlm ask example "What is written on the card?" --json',
        ),
    ),
    (
        "What did it look at?",
        (
            'localvlm ask example "What is written on the card?" --explain card.png',
            'localvlm attention example "What is written on the card?" --save card.npz',
            "localvlm tokens example --pair demo",
        ),
    ),
    ("Which models would fit?", ("localvlm recommend", "localvlm list")),
    (
        "Another pair, from a hub (here one on loopback, HF_ENDPOINT)",
        (
            "localvlm pull you/drawn-guide-GGUF",
            "localvlm pull you/drawn-model-GGUF",
            "localvlm show you/drawn-model-GGUF --verify",
            "localvlm ask photo.png 'Where is the star?' --guide you/drawn-guide-GGUF --model you/drawn-model-GGUF",
            "localvlm rm you/drawn-guide-GGUF -y",
        ),
    ),
    (
        "When something is wrong",
        (
            'localvlm ask nowhere.jpg "What is this?"',
            'localvlm ask photo.png "What is this?" --pair nothing',
            "localvlm pull you/nothing",
        ),
    ),
    (
        "Many pictures, settings, and leaving no trace",
        (
            "localvlm ask 'photo*.png' 'What colour is the star?' --jsonl answers.jsonl",
            "cat answers.jsonl",
            "localvlm config set keep 0.5",
            "localvlm config get keep",
            "localvlm forget --all -y",
        ),
    ),
    (
        "The help of each command",
        tuple(f"localvlm {name} --help" for name in sorted(cli.list_commands(click.Context(cli)))),
    ),
)
INSTALL = ("python3 -m venv .venv", ".venv/bin/pip install .", ".venv/bin/localvlm --version")
"""What a new user types in the folder of a checkout."""
_OF_PIP = re.compile(r"(Processing|Building wheels|Successfully) .*")
"""Lines of pip's that are shown."""
_BAR = re.compile(r"(\S+) .*(?:\?|B/s)\s+[-:\d]+")
"""A line of a progress bar, which is drawn again and again."""
_COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def main() -> None:
    """Runs the steps and writes the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("first-steps.md"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, HubServer() as hub:
        home = Path(name)
        for file in ("photo.png", "photo2.png"):
            shutil.copy(example_image(), home / file)
        demo = example_image().parent
        for repo, role in REPOS.items():
            files = {f"{role}-Q8_0.gguf": f"{role}.gguf", f"mmproj-{role}-F16.gguf": f"{role}-mmproj.gguf"}
            hub.add(repo, {there: (demo / here).read_bytes() for there, here in files.items()})
        environment = _environment(home, hub.endpoint)
        parts = [_HEAD]

        def typed(command: str, folder: Path) -> None:
            shown = _typed(command, folder, environment).replace(str(home), "~").replace(hub.endpoint, "http://hub")
            parts.append(f"```console\n$ {command}\n{shown}```\n")

        parts.append(_INSTALL)
        for command in INSTALL:
            typed(command, _checkout(home))
        for title, commands in STEPS:
            parts.append(f"## {title}\n")
            for command in commands:
                typed(command, home)
    args.out.write_text("\n".join(parts), encoding="utf-8")


_HEAD = f"""# First steps

Written by `{Path(__file__).name}`, which ran every command in a terminal {COLUMNS} columns wide. Exit codes other
than 0 are told below an output.
"""
_INSTALL = """## From a checkout

The first time, pip compiles llama.cpp, which takes minutes. Most of what it says is left out. What follows is typed
with `.venv/bin` on the PATH.
"""


def _checkout(home: Path) -> Path:
    """A folder with the last commit, as somebody who has just cloned it has it."""
    folder = home / "localvlm"
    if not folder.exists():
        folder.mkdir()
        root = Path(__file__).parents[1]
        files = subprocess.run(["git", "archive", "HEAD"], cwd=root, capture_output=True, check=True).stdout  # noqa: S607
        with tarfile.open(fileobj=io.BytesIO(files)) as archive:
            archive.extractall(folder, filter="data")
    return folder


def _environment(home: Path, endpoint: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "LOCALVLM_")) or k.endswith("LIBRARY")}
    return kept | {
        "HOME": str(home),
        "PATH": f"{home / 'localvlm' / '.venv' / 'bin'}:{os.environ['PATH']}",
        "PIP_CACHE_DIR": os.environ.get("PIP_CACHE_DIR", str(Path.home() / ".cache" / "pip")),
        "LOCALVLM_HOME": str(home / ".localvlm"),
        "HF_HOME": str(home / ".cache" / "huggingface"),
        "HF_ENDPOINT": endpoint,
        "NO_COLOR": "1",
        "TERM": "xterm",
        "COLUMNS": str(COLUMNS),
        "LINES": "40",
    }


def _typed(command: str, folder: Path, environment: dict[str, str]) -> str:
    """What a terminal shows of a command when it has ended: a line that is written over is the last one written."""
    words = shlex.split(command)
    ours, theirs = pty.openpty()
    with subprocess.Popen(words, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        raw = b""
        while process.poll() is None or select.select([ours], [], [], 0.1)[0]:
            try:
                if select.select([ours], [], [], 0.1)[0]:
                    raw += os.read(ours, 1 << 16)
            except OSError:  # the terminal's other side is closed
                break
    os.close(ours)
    text = _COLOURS.sub("", raw.decode("utf-8", "replace")).replace("\r\n", "\n")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]
    last = {bar[1]: i for i, line in enumerate(lines) if (bar := _BAR.fullmatch(line))}
    lines = [line for i, line in enumerate(lines) if not (bar := _BAR.fullmatch(line)) or last[bar[1]] == i]
    if "pip" in Path(words[0]).name:
        lines = [line for line in lines if _OF_PIP.match(line)]
    shown = "\n".join(lines).strip("\n") + "\n"
    code = f"(exit code {process.returncode})\n" if process.returncode else ""
    return (shown + code).lstrip("\n")


if __name__ == "__main__":
    main()
