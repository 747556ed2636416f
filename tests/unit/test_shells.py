"""Completion in the shells themselves, driven by keys."""

from __future__ import annotations

import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

MOST = 120
"""Seconds after which a shell has failed."""
FILES = ("photo.jpg", "my photo.png", "a,b.png", "sub/one.jpg", "cat.png")
SETUP = {
    "bash": r"""PS1=; eval "$(localvlm completion bash)"; bind 'set bell-style none'
bind 'set enable-bracketed-paste off'
bind -x '"\C-t": printf "%s\n" "$READLINE_LINE" > "$SAID"'""",
    "zsh": """PROMPT=; autoload -Uz compinit; compinit -u -d "$HOME/dump"; eval "$(localvlm completion zsh)"
tell() { print -r -- "$BUFFER" > "$SAID"; BUFFER= }; zle -N tell; bindkey '^T' tell; setopt nobeep""",
}
START = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"]}
COMPLETED = [
    ("localvlm as", "localvlm ask"),
    ("localvlm ask --metho", "localvlm ask --method"),
    ("localvlm ask --method fastv x y --explai", "localvlm ask --method fastv x y --explain"),
    ("localvlm ask --method faste", "localvlm ask --method fastervlm"),
    ("localvlm ask --method=faste", "localvlm ask --method=fastervlm"),
    ("localvlm ask --keep=0.5 --accuracy=f", "localvlm ask --keep=0.5 --accuracy=fast"),
    ("localvlm ask ph", "localvlm ask photo.jpg"),
    ("localvlm ask --explain=ph", "localvlm ask --explain=photo.jpg"),
    ("localvlm ask my", r"localvlm ask my\ photo.png"),
    (r"localvlm ask my\ photo.png 'What is: this' --explai", r"localvlm ask my\ photo.png 'What is: this' --explain"),
    ("localvlm ask sub/o", "localvlm ask sub/one.jpg"),
    ("localvlm attention ca", "localvlm attention cat.png"),
    ("localvlm ask --pair smolvlm2", "localvlm ask --pair smolvlm2-2.2b"),
    ("localvlm show demo-t", "localvlm show demo-tiles"),
    ("localvlm rm you/r", "localvlm rm you/repo-GGUF:Q8_0"),
    ("localvlm show you/repo-GGUF:Q", "localvlm show you/repo-GGUF:Q8_0"),
    ("localvlm config set method faste", "localvlm config set method fastervlm"),
    ("localvlm config set max-t", "localvlm config set max-tokens"),
]
"""What is typed, and what it is after a tabulator."""


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A folder with files, and an environment in which shells find ``localvlm`` and a model that was pulled."""
    folder = tmp_path_factory.mktemp("shell")
    program, home = folder / "bin" / "localvlm", folder / "home"
    for file in FILES:
        path = home / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\nfrom localvlm.__main__ import main\nmain()\n")
    program.chmod(0o755)
    commit = folder / "hub" / "models--you--repo-GGUF" / "snapshots" / ("0" * 40)
    commit.mkdir(parents=True)
    (commit / "repo-Q8_0.gguf").write_bytes(b"GGUF")
    env = {k: v for k, v in os.environ.items() if not k.startswith(("LOCALVLM_", "HF_", "XDG_")) or "LIBRARY" in k}
    env |= {
        "PATH": f"{program.parent}:{env['PATH']}",
        "HOME": str(home),
        "TERM": "dumb",
        "HF_HUB_CACHE": str(commit.parents[2]),
    }
    env |= {
        "LOCALVLM_HOME": str(folder / "localvlm"),
        "SAID": str(folder / "said"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    os.mkfifo(env["SAID"])
    return home, env


class Shell:
    """An interactive one on a terminal; its lines come back through a pipe."""

    def __init__(self, name: str, home: Path, env: dict[str, str]) -> None:
        self._keys, theirs = pty.openpty()
        self._process = subprocess.Popen(
            START[name], cwd=home, env=env, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
        )
        os.close(theirs)
        self._said = os.open(env["SAID"], os.O_RDWR)
        self._shown = b""
        setup = home / "setup"
        setup.write_text(f'{SETUP[name]}\necho ready > "$SAID"\n')
        self._type(f". {setup}\n")
        assert self._line() == "ready"

    def completed(self, line: str) -> str:
        """What becomes of a line at a tabulator, without blanks at its end."""
        self._type(f"{line}\t\x14")
        said = self._line().rstrip()
        self._type("\x15")
        return said

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._keys)
        os.close(self._said)

    def _type(self, keys: str) -> None:
        os.write(self._keys, keys.encode())

    def _line(self) -> str:
        out = b""
        while not out.endswith(b"\n"):
            ready, _, _ = select.select([self._said, self._keys], [], [], MOST)
            assert ready, f"{out!r}, and the terminal shows {self._shown!r}"
            if self._keys in ready:
                self._shown += os.read(self._keys, 1 << 16)
            if self._said in ready:
                out += os.read(self._said, 1 << 16)
        return out.decode().rstrip("\n")


@pytest.fixture(scope="module", params=["bash", "zsh"])
def shell(request, place) -> Iterator[Shell]:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    found = Shell(request.param, *place)
    yield found
    found.close()


@pytest.mark.parametrize(("typed", "whole"), COMPLETED)
def test_a_tabulator_completes(shell, typed, whole):
    assert shell.completed(typed) == whole


@pytest.fixture(scope="module")
def fish(place):
    """What fish offers for a line: the last word made whole, and what is said of it."""
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    home, env = place
    target = home / ".config" / "fish" / "completions" / "localvlm.fish"
    target.parent.mkdir(parents=True)
    target.write_text(
        subprocess.run(["localvlm", "completion", "fish"], env=env, capture_output=True, text=True, check=True).stdout
    )

    def offered(line: str) -> dict[str, str]:
        told = f"complete -C {shlex.quote(line)}"
        done = subprocess.run(["fish", "-c", told], cwd=home, env=env, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        parts = (found.partition("\t") for found in done.stdout.splitlines())
        return {word: about for word, _, about in parts}

    return offered


@pytest.mark.parametrize(("typed", "whole"), COMPLETED)
def test_fish_offers(fish, typed, whole):
    last = shlex.split(whole)[-1]
    assert last in fish(typed)


def test_fish_tells_all_of_a_description(fish):
    assert fish("localvlm ask --kv-")["--kv-type"] == "Type of the KV cache: f16, or q8_0 in half the memory."
    assert fish("localvlm comp")["completion"] == "Prints what completes commands, options, models and files in SHELL."


def test_fish_offers_files_with_commas(fish):
    assert "a,b.png" in fish("localvlm ask a,")


def test_a_wrong_settings_file_says_nothing_while_one_types(place, fish, monkeypatch):
    _, env = place
    settings = Path(env["LOCALVLM_HOME"]) / "config" / "config.toml"
    settings.parent.mkdir(parents=True)
    settings.write_text("keep = [")
    try:
        assert "demo" in fish("localvlm ask --pair dem")
    finally:
        settings.unlink()
