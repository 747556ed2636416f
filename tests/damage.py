"""Damaged model files against the whole engine: ``python -m tests.damage [--count 500] [--seed N]``.

Each case takes a pair of files of the zoo, damages one or both by a recipe that its seed picks, and asks a question
through the real worker, every tenth case (``--cli-every``) through the command line. Nothing but an answer or an error
of ``localvlm.errors`` may come out, within 30 s, and no process may stay behind.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import numpy as np
import PIL.Image
import psutil

from localvlm.engine.api import ImagePart, LoadOptions, Message
from localvlm.engine.client import Engine
from localvlm.errors import LocalvlmError
from tests import zoo

MEMORY = 4 << 30
"""Bytes of address space that a worker gets."""
SLOWEST = 30.0
"""Seconds after which a case counts as hung."""
FAMILIES = ("llava15", "qwen25vl")
EXIT_CODES = {0, 3, 4, 5, 9}
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_INTEGERS = {2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_EXTREMES = (0, 1, 2, 3, 7, 64, 255, 4097, 65_536, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
_FLOATS = (0.0, -1.0, 1e-45, 1e38, float("inf"), float("-inf"), float("nan"))


@dataclass
class Gguf:
    """A GGUF file in pieces that can be put together again."""

    values: list[tuple[bytes, int, bytes]] = field(default_factory=list)  # key, type, raw value
    tensors: list[tuple[bytes, list[int], int, int]] = field(default_factory=list)  # name, shape, type, offset
    data: bytes = b""

    @classmethod
    def parse(cls, raw: bytes) -> Gguf:
        out, at = cls(), 24
        n_tensors, n_values = struct.unpack_from("<QQ", raw, 8)

        def string() -> bytes:
            nonlocal at
            (n,) = struct.unpack_from("<Q", raw, at)
            at += 8 + n
            return raw[at - n : at]

        def skip(kind: int) -> None:
            nonlocal at
            if kind == 8:
                string()
            elif kind == 9:
                item, n = struct.unpack_from("<IQ", raw, at)
                at += 12
                for _ in range(n):
                    skip(item)
            else:
                at += _SIZES[kind]

        for _ in range(n_values):
            key = string()
            (kind,) = struct.unpack_from("<I", raw, at)
            at += 4
            start = at
            skip(kind)
            out.values.append((key, kind, raw[start:at]))
        for _ in range(n_tensors):
            name = string()
            (n_dims,) = struct.unpack_from("<I", raw, at)
            *shape, kind, offset = struct.unpack_from(f"<{n_dims}QIQ", raw, at + 4)
            at += 4 + 8 * n_dims + 12
            out.tensors.append((name, shape, kind, offset))
        out.data = raw[-(-at // 32) * 32 :]
        return out

    def head(self) -> bytes:
        out = [b"GGUF", struct.pack("<IQQ", 3, len(self.tensors), len(self.values))]
        for key, kind, raw in self.values:
            out.append(struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + raw)
        for name, shape, kind, offset in self.tensors:
            out.append(struct.pack("<Q", len(name)) + name)
            out.append(struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset))
        head = b"".join(out)
        return head + bytes(-len(head) % 32)

    def bytes(self) -> bytes:
        return self.head() + self.data


def flips(raw: bytes, r: Random) -> bytes:
    """Bits of the header turned over."""
    out = bytearray(raw)
    end = len(Gguf.parse(raw).head())
    for _ in range(r.choice((1, 1, 2, 4, 16))):
        out[r.randrange(end)] ^= 1 << r.randrange(8)
    return bytes(out)


def extreme_key(raw: bytes, r: Random) -> bytes:
    """One key of the metadata set to an extreme value of its own type."""
    file = Gguf.parse(raw)
    i = r.randrange(len(file.values))
    key, kind, value = file.values[i]
    if kind in _INTEGERS:
        size = _SIZES[kind]
        value = (r.choice(_EXTREMES) % 2 ** (8 * size)).to_bytes(size, "little")
    elif kind == 6:
        value = struct.pack("<f", r.choice(_FLOATS))
    elif kind == 7:
        value = bytes([r.choice((0, 1, 2, 255))])
    elif kind == 8:
        text = r.choice((b"", b"\xff\xfe", b"x" * (1 << 20), b"\0", r.randbytes(40), b"llama", b"clip", b"gemma3"))
        value = struct.pack("<Q", len(text)) + text
    elif kind == 9:
        item, n = struct.unpack_from("<IQ", value)
        body = value[12:]
        n = r.choice((0, 1, max(0, n - 1), n + 1, 2**32, 2**63))
        if r.random() < 0.5:
            item, body = 4, struct.pack("<I", r.choice(_EXTREMES) % 2**32) * 8
            n = 8
        value = struct.pack("<IQ", item, n) + body
    file.values[i] = key, kind, value
    return file.bytes()


def lost_key(raw: bytes, r: Random) -> bytes:
    """One key removed, doubled, or given another type."""
    file = Gguf.parse(raw)
    i = r.randrange(len(file.values))
    key, _, _ = file.values[i]
    how = r.randrange(3)
    if how == 0:
        del file.values[i]
    elif how == 1:
        file.values.append(file.values[i])
    else:
        kind = r.choice((4, 6, 7, 8, 10))
        file.values[i] = key, kind, bytes(_SIZES.get(kind, 8))
    return file.bytes()


def tensor_table(raw: bytes, r: Random) -> bytes:
    """One tensor of another shape, type, place or name, removed or doubled."""
    file = Gguf.parse(raw)
    i = r.randrange(len(file.tensors))
    name, shape, kind, offset = file.tensors[i]
    how = r.randrange(6)
    if how == 0:
        shape = [*shape]
        shape[r.randrange(len(shape))] = r.choice(_EXTREMES)
    elif how == 1:
        kind = r.choice((0, 1, 2, 8, 12, 14, 24, 30, 39, 99, 2**32 - 1))
    elif how == 2:
        offset = r.choice((0, 1, 31, offset + 4, len(file.data), 2**63, 2**64 - 32))
    elif how == 3:
        name = r.choice((b"", b"\xff", name[:-1], b"x" * 64, b"x" * 63, file.tensors[0][0]))
    elif how == 4:
        del file.tensors[i]
        return file.bytes()
    else:
        shape = shape[::-1] if r.random() < 0.5 else [1, *shape][:4]
    file.tensors[i] = name, shape, kind, offset
    return file.bytes()


def cut(raw: bytes, r: Random) -> bytes:
    """The end of the file is missing."""
    end = len(Gguf.parse(raw).head())
    return raw[: r.choice((r.randrange(end), r.randrange(end, len(raw)), len(raw) - 1, end, 0, 4, 24))]


def wild_weights(raw: bytes, r: Random) -> bytes:
    """Random bytes, or all ones (NaN), somewhere in the tensor data."""
    out = bytearray(raw)
    start = r.randrange(len(Gguf.parse(raw).head()), len(raw))
    n = min(len(raw) - start, r.choice((4, 4096, 1 << 20)))
    out[start : start + n] = r.choice((r.randbytes(n), b"\xff" * n, bytes(n), b"\x7f" * n))
    return bytes(out)


def garbage(raw: bytes, r: Random) -> bytes:
    """Another kind of file altogether."""
    noise = r.randbytes(r.choice((1, 23, 24, 43, 4096)))
    counts = struct.pack("<QQ", r.choice(_EXTREMES), r.choice(_EXTREMES))
    key = struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, r.randrange(13), 2**63)
    return r.choice(
        (
            b"",
            noise,
            bytes(4096),
            b"GGUF" + noise,
            b"GGUF" + struct.pack("<I", 3) + counts + noise,
            b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + key,
            b"FUGG" + raw[4:],
            b"GGUF" + struct.pack("<I", r.choice((0, 1, 2, 4, 2**31))) + raw[8:],
            b"%PDF-1.7\n" + noise,
        )
    )


RECIPES: tuple[Callable[[bytes, Random], bytes], ...] = (
    flips, flips, extreme_key, extreme_key, extreme_key, lost_key, tensor_table, tensor_table, cut, wild_weights,
    garbage,
)  # fmt: skip


def pairs(directory: Path) -> dict[str, tuple[Path, Path]]:
    """The zoo's pairs of files by name."""
    out = {}
    for family in FAMILIES:
        for half in zoo.pair(directory, family):
            out[half.row.name] = (half.model, half.mmproj)
    return out


def damage(seed: int, sound: dict[str, tuple[Path, Path]], directory: Path) -> tuple[str, Path, Path]:
    """(recipe, model, mmproj) of one case, written to ``directory``."""
    r = Random(seed)
    model, mmproj = sound[r.choice(FAMILIES)]
    if r.random() < 0.05:
        model, mmproj = (r.choice(r.choice(list(sound.values()))) for _ in range(2))
        return "swapped files", model, mmproj
    out = [directory / "model.gguf", directory / "mmproj.gguf"]
    raw = [model.read_bytes(), mmproj.read_bytes()]
    which = r.choice(((0,), (1,), (1,), (0, 1)))
    recipe = r.choice(RECIPES)
    for i in which:
        raw[i] = recipe(raw[i], r)
    for path, data in zip(out, raw, strict=True):
        path.write_bytes(data)
    return f"{recipe.__name__.replace('_', ' ')}, {'/'.join(('model', 'mmproj')[i] for i in which)}", out[0], out[1]


def ask(engine: Engine, model: Path, mmproj: Path, picture: np.ndarray) -> None:
    """What ``localvlm ask`` does with one VLM."""
    vlm = engine.load(model, mmproj, LoadOptions(threads=1, n_ctx=512))
    try:
        vlm.layout(200, 100)
        encoded = vlm.encode(picture, tower=True)
        parts = vlm.chat([Message("user", "what is it?", 1)])
        vlm.prefill([ImagePart(encoded) if isinstance(p, int) else p for p in parts], tap=True)
        vlm.generate(4)
        vlm.attention()
    finally:
        if engine.pid is not None:
            vlm.close()


@dataclass
class Outcome:
    """What came of one case; ``miss`` is empty if that is allowed."""

    what: str
    seconds: float
    miss: str = ""
    message: str = ""


class Runner:
    """Runs cases one after the other; the worker is kept as long as it lives, and replaced every few cases."""

    def __init__(self, directory: Path) -> None:
        self.sound = pairs(directory / "zoo")
        self._dir = directory
        self._picture = np.random.RandomState(5).randint(0, 256, (70, 100, 3)).astype(np.uint8)
        self._png = directory / "picture.png"
        PIL.Image.fromarray(self._picture).save(self._png)
        self.engine = Engine()
        self._n = 0
        self.message = ""

    def run(self, seed: int, through_cli: bool) -> tuple[str, Outcome]:
        recipe, model, mmproj = damage(seed, self.sound, self._dir)
        started = time.monotonic()
        what, miss = self.cli(model, mmproj) if through_cli else self.api(model, mmproj)
        seconds = time.monotonic() - started
        if not miss and seconds > SLOWEST:
            miss = f"took {seconds:.0f} s"
        self._n += 1
        if self._n % 25 == 0:
            self.close()
        return recipe, Outcome(what, seconds, miss, self.message)

    def api(self, model: Path, mmproj: Path) -> tuple[str, str]:
        hung = threading.Event()

        def stop() -> None:
            hung.set()
            if self.engine.pid is not None:
                os.kill(self.engine.pid, signal.SIGKILL)

        watchdog = threading.Timer(SLOWEST + 5, stop)
        watchdog.start()
        try:
            ask(self.engine, model, mmproj, self._picture)
        except LocalvlmError as error:
            what, self.message = type(error).__name__, str(error)
            if hung.is_set():
                return what, "hung"
            if what == "LocalvlmError" or len(str(error)) > 2000 or "Traceback" in str(error):
                return what, str(error)[:300]
            if what == "EngineCrashed":
                how = re.search(r"SIG\w+|code \d+|did not finish|vanished", error.message)
                what += f" ({how[0] if how else '?'})"
            return what, ""
        except Exception as error:  # noqa: BLE001  exactly what is looked for
            return type(error).__name__, f"{type(error).__name__}: {error}"[:300]
        finally:
            watchdog.cancel()
        return "answer", ""

    def cli(self, model: Path, mmproj: Path) -> tuple[str, str]:
        command = [sys.executable, "-m", "localvlm", "ask", str(self._png), "what is it?"]
        command += ["-m", str(model), "--mmproj", str(mmproj), "--method", "none", "--max-tokens", "4"]
        command += ["--ctx-size", "512", "--threads", "1"]
        env = {**os.environ, "LOCALVLM_HOME": str(self._dir / "home")}
        try:
            done = subprocess.run(command, capture_output=True, timeout=SLOWEST + 5, env=env, check=False)
        except subprocess.TimeoutExpired:
            return "exit: none", "hung"
        err = self.message = done.stderr.decode("utf-8", "replace")
        miss = ""
        if done.returncode not in EXIT_CODES or "Traceback" in err:
            miss = f"exit {done.returncode}: {err[-300:]}"
        return f"exit {done.returncode}", miss

    def close(self) -> None:
        self.engine.close()

    def orphans(self) -> list[str]:
        """Child processes that should not be there once the engine is closed."""
        self.close()
        return [" ".join(p.cmdline()[:3]) for p in psutil.Process().children(recursive=True)]


def cli_can_ask() -> bool:
    import click

    from localvlm.cli.main import cli

    return "ask" in cli.list_commands(click.Context(cli))


def campaign(count: int, seed: int, directory: Path, cli_every: int = 10) -> Iterator[tuple[int, str, Outcome]]:
    """Runs cases ``seed`` .. ``seed + count - 1``; the last item, of seed -1, tells of orphans."""
    os.environ["LOCALVLM_WORKER_MEMORY"] = str(MEMORY)
    with_cli = cli_can_ask()
    runner = Runner(directory)
    try:
        for case in range(seed, seed + count):
            cli = with_cli and cli_every > 0 and (case - seed) % cli_every == cli_every - 1
            recipe, outcome = runner.run(case, cli)
            yield case, recipe, outcome
        left = runner.orphans()
        yield -1, "orphan processes", Outcome(f"{len(left)}", 0.0, "; ".join(left))
    finally:
        runner.close()
        os.environ.pop("LOCALVLM_WORKER_MEMORY", None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="cases")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first case; each next one takes the next")
    parser.add_argument("--cli-every", type=int, default=10, help="every so many cases go through the command line")
    parser.add_argument("--crashes", action="store_true", help="list the seeds of cases that ended the worker")
    options = parser.parse_args()
    table: dict[str, Counter[str]] = defaultdict(Counter)
    misses, crashes, slowest, n = [], [], (0.0, -1), 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        for case, recipe, outcome in campaign(options.count, options.seed, Path(directory), options.cli_every):
            table[recipe.split(",")[0]][outcome.what] += 1
            n += case >= 0
            slowest = max(slowest, (outcome.seconds, case))
            if outcome.miss:
                misses.append((case, recipe, outcome.miss))
            if "EngineCrashed" in outcome.what or outcome.what == "exit 4":
                crashes.append((case, recipe, outcome.message))
    for recipe, counts in sorted(table.items()):
        print(f"{recipe:18}", "  ".join(f"{what} {k}" for what, k in counts.most_common()))
    took = time.monotonic() - started
    print(f"{n} cases in {took:.0f} s, slowest {slowest[0]:.1f} s (seed {slowest[1]}), {len(crashes)} ended the worker")
    if not cli_can_ask():
        print("the command line has no `ask` yet: every case ran through the engine's API")
    for case, recipe, message in crashes if options.crashes else []:
        print(f"crash: --seed {case} --count 1 ({recipe}): {message}")
    for case, recipe, miss in misses:
        print(f"MISS: --seed {case} --count 1 ({recipe}): {miss}")
    return 1 if misses else 0


if __name__ == "__main__":
    sys.exit(main())
