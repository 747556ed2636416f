"""What this installation is and lacks: each part looked at by itself, each problem with what mends it.

The self-tests run on the machine of whoever asks: the tap recomputes attention that llama.cpp has computed, and with
nothing pruned, answers are held against llama.cpp's own, token for token.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import localvlm
from localvlm.config import directories
from localvlm.errors import AttentionCheckFailed, LocalvlmError, ModelError, UsageError
from localvlm.room import room, told

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from localvlm.answers import Pair, VlmFiles
    from localvlm.catalog import Entry
    from localvlm.engine.api import Backend, LoadOptions
    from localvlm.engine.client import Engine

__all__ = ["Finding", "failed", "find_installation", "find_machine", "find_models", "find_pair", "find_speed"]

EXTRAS = {"pillow_heif": ("HEIC", "heic"), "pypdfium2": ("PDF", "pdf")}
"""Modules, what they read, and the extra that brings them."""
WANTED = ("AVX2", "FMA", "F16C", "AVX512", "DOTPROD", "MATMUL_INT8")
"""Features of a CPU that make llama.cpp faster, by its names; /proc/cpuinfo has others for some."""
_FLAGS = {"AVX512": "avx512f", "DOTPROD": "asimddp", "MATMUL_INT8": "i8mm"}
TOKENS = 16
"""Of the answers that are held against llama.cpp's."""


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        problem: what is wrong, "" if nothing.
        remedy: what mends it.
        exit_code: that of an error which this is; 0: localvlm works without.
    """

    name: str
    value: str
    problem: str = ""
    remedy: str = ""
    exit_code: int = 0


def failed(name: str, error: LocalvlmError) -> Finding:
    """What an error says, as a finding."""
    return Finding(name, "", error.message, error.hint, error.exit_code)


# installation


def find_installation(engine: Engine, gpu_layers: int) -> Iterator[Finding]:
    """Versions, the backend that was really loaded and whether it is the one asked for, and the tap."""
    from localvlm.engine.devices import check_gpu

    yield Finding("localvlm", f"{localvlm.__version__}, {_versions()}, {platform.system()} {platform.release()}")
    try:
        found = engine.backend()
    except LocalvlmError as error:
        yield failed("llama.cpp", error)
        return
    built = f"llama-cpp-python {found.llama_cpp_python}, ggml {found.ggml} {found.commit}".rstrip()
    yield Finding("llama.cpp", f"{built}, built for {', '.join(found.backends)}")
    yield _cpu(found)
    try:
        check_gpu(gpu_layers, found.devices, found.backends)
    except UsageError as error:
        yield failed("GPU", error)
    else:
        idle = [name for name in found.backends if name not in ("CPU", "BLAS")] if not found.devices else []
        free = f"; {told(found.gpu_free)} free" if found.devices else ""
        yield Finding(
            "GPU",
            ", ".join(found.devices) + free or "none",
            f"llama.cpp was built for {', '.join(idle)} and sees no GPU" if idle else "",
            "check the driver, or see docs/gpu.md" if idle else "",
        )
    yield _tap(engine)
    yield _worker(engine)


def _versions() -> str:
    found = [f"Python {platform.python_version()}"]
    for name in ("numpy", "pillow", "gguf", "huggingface-hub"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    return ", ".join(found)


def _cpu(found: Backend) -> Finding:
    """What the CPU has and llama.cpp was built without costs speed."""
    used = {part.split("=")[0].split(":")[-1].strip() for part in found.system_info.split("|") if "= 1" in part}
    has = _cpu_flags()
    lacking = [name for name in WANTED if _FLAGS.get(name, name.lower()) in has and name not in used]
    return Finding(
        "CPU",
        f"{platform.machine()}, {os.cpu_count()} threads, llama.cpp uses {' '.join(sorted(used))}",
        f"it also has {' '.join(lacking)}, which llama.cpp was not built for" if lacking else "",
        "pip install --force-reinstall --no-cache-dir --no-binary llama-cpp-python llama-cpp-python" if lacking else "",
    )


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith(("flags", "Features")) for flag in line.split(":")[1].split()}


def _tap(engine: Engine) -> Finding:
    """Loaded, and its attention held against what llama.cpp computed, on the guide that comes along."""
    from localvlm.catalog import DEMO, pair_named
    from localvlm.engine.api import LoadOptions

    try:
        files = pair_named(DEMO).guide
        assert files is not None
        _check_tap(engine, files, LoadOptions(threads=1))
    except LocalvlmError as error:
        return failed("attention tap", error)
    return Finding("attention tap", "loaded; recomputes llama.cpp's attention")


def _worker(engine: Engine) -> Finding:
    """What the process that reads model files is kept from, tried in it after the tap has loaded one."""
    try:
        found = engine.holds()
    except LocalvlmError as error:
        return failed("worker", error)
    told_by = "; ".join(
        f"{', '.join(w for w in found if found[w] == by)} ({by})" for by in dict.fromkeys(found.values())
    )
    return Finding("worker", told_by or "kept from nothing on this system")


def _check_tap(engine: Engine, files: VlmFiles, options: LoadOptions) -> None:
    """The first tapped prefill of a model checks itself.

    Raises:
        AttentionCheckFailed: the tap does not reproduce this model's attention.
    """
    from localvlm.engine.api import Message
    from localvlm.speaker import parts_of

    vlm = engine.load(files.model, files.mmproj, options)
    try:
        encoded = vlm.encode(_picture())
        prompt = vlm.prefill(parts_of(vlm, [Message("user", "What is this?", 1)], [encoded]), tap=True)
        if not vlm.attention().prompt.any():
            raise AttentionCheckFailed(f"no attention was seen to {prompt.n_image} image tokens of '{vlm.info.name}'")
    finally:
        vlm.close()


def _picture() -> NDArray[np.uint8]:
    from localvlm.catalog import example_image
    from localvlm.images import load

    return load(example_image()).rgb


# machine


def find_machine(environment: Mapping[str, str] = os.environ) -> Iterator[Finding]:
    """Memory, folders, optional readers, what the terminal shows."""
    yield Finding("memory", f"{told(room())} free for models")
    for name, folder in vars(directories()).items():
        yield _folder(f"{name} folder", folder)
    from localvlm.hub_cache import cache_folder

    try:
        yield _folder("models folder", cache_folder())
    except UsageError as error:
        yield failed("models folder", error)
    for module, (what, extra) in EXTRAS.items():
        there = importlib.util.find_spec(module) is not None
        yield Finding(f"{what} pictures", "read" if there else f"not read; pip install 'localvlm[{extra}]' adds them")
    yield Finding("pictures in the terminal", _terminal(environment))


def _folder(name: str, folder: Path) -> Finding:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    n_bytes = sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    value = f"'{folder}', {told(n_bytes)} used, {told(shutil.disk_usage(there).free)} free"
    closed = not os.access(there, os.W_OK | os.X_OK)
    return Finding(
        name,
        value,
        f"'{there}' may not be written to by you" * closed,
        "change its owner, or set LOCALVLM_HOME" * closed,
    )


def _terminal(environment: Mapping[str, str]) -> str:
    """How the chat shows pictures in it."""
    from localvlm.terminal_pictures import Protocol, protocol_of

    try:
        way = protocol_of(environment)
    except UsageError as error:
        return str(error)
    if way is not Protocol.BLOCKS:
        return {Protocol.KITTY: "kitty's protocol", Protocol.SIXEL: "sixel", Protocol.NONE: "none"}[way]
    colours = environment.get("COLORTERM", "") in ("truecolor", "24bit")
    few = "256 colours" if "256" in environment.get("TERM", "") else "few colours"
    return f"half blocks, {'true colour' if colours else few}"


# models


def find_models(entries: list[Entry]) -> Iterator[Finding]:
    """Files of the pairs that are there: whether their headers are sound, and the two of a VLM fit."""
    from localvlm.catalog import as_pair
    from localvlm.engine.gguf_header import check_pair, read_header

    for entry in entries:
        if entry.lacking:
            continue
        try:
            pair = as_pair(entry.name, entry.files)
            for files in (pair.guide, pair.model):
                if files is not None:
                    check_pair(read_header(files.model), read_header(files.mmproj))
        except ModelError as error:
            yield failed(f"pair {entry.name}", error)
        else:
            yield Finding(f"pair {entry.name}", f"{told(entry.size)}, headers are sound")


def find_pair(engine: Callable[[], Engine], pair: Pair, options: LoadOptions) -> Iterator[Finding]:
    """The self-tests of a pair; each VLM is loaded alone, and again by llama.cpp."""
    for role, files in (("guide", pair.guide), ("model", pair.model)):
        if files is None:
            continue
        try:
            with engine() as running:
                _check_tap(running, files, options)
            yield Finding(f"{role}'s attention", "recomputed as llama.cpp computes it")
        except LocalvlmError as error:
            yield failed(f"{role}'s attention", error)
        try:
            with engine() as running:
                yield _held_against(running, files, options, f"{role}'s answers")
        except LocalvlmError as error:
            yield failed(f"{role}'s answers", error)


def _held_against(engine: Engine, files: VlmFiles, options: LoadOptions, name: str) -> Finding:
    """``--method none --keep all`` with llama.cpp's own tower and tiles, beside llama.cpp's answer."""
    from localvlm.engine.api import ImagePart, Message, TextPart
    from localvlm.engine.llama import DEFAULT_CTX, thread_count
    from localvlm.engine.stock import MARKER, StockProcess

    threads = thread_count(options)
    options = replace(options, n_ctx=DEFAULT_CTX, threads=threads, gpu_layers=0, stock_tower=True, stock_tiling=True)
    vlm = engine.load(files.model, files.mmproj, options)
    image, parts = _picture(), vlm.chat([Message("user", "What is this?", 1)])
    encoded = vlm.encode(image)
    vlm.prefill([ImagePart(encoded) if isinstance(part, int) else part for part in parts])
    ours = vlm.generate(TOKENS).ids.tolist()
    vlm.close()
    engine.close()  # both together might not fit
    prompt = "".join(part.text if isinstance(part, TextPart) else MARKER for part in parts)
    try:
        with (
            tempfile.TemporaryDirectory() as folder,
            StockProcess(files.model, files.mmproj, Path(folder), DEFAULT_CTX, threads) as stock,
        ):
            theirs, margins = stock.ask(prompt, [image], TOKENS)
    except RuntimeError as error:
        raise ModelError(f"llama.cpp cannot answer by itself: {error}") from error
    if ours == theirs:
        return Finding(name, f"{len(ours)} tokens as llama.cpp's, with nothing pruned")
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    led = margins[min(at, len(margins) - 1)]
    return Finding(
        name,
        "",
        f"token {at} is not llama.cpp's, whose best logit led by {led:.4f}",
        "if it led by less than 0.01, that is rounding; else please report it with these lines",
        ModelError.exit_code,
    )


def find_speed(engine: Engine, pair: Pair, options: LoadOptions) -> Iterator[Finding]:
    """What the machine takes for layers and towers of the pair's shapes, timed for some seconds on random weights."""
    from localvlm.planning.choice import busy
    from localvlm.planning.rates import KNOTS, Rates
    from localvlm.planning.sample import Disturbed, sample
    from localvlm.planning.shapes import VlmShape

    if busy():
        yield Finding(
            "speed", "", "other programs keep this machine too busy to be timed", "ask again when they are done"
        )
        return
    for role, files in (("guide", pair.guide), ("model", pair.model)):
        if files is None:
            continue
        try:
            shape = VlmShape(files)
            rates = sample(engine, options, Rates(), *Rates().missing([shape.llm], [shape.tower]))
        except LocalvlmError as error:
            yield failed(f"{role}'s speed", error)
            continue
        except Disturbed as error:
            yield Finding(f"{role}'s speed", "", f"it could not be timed: {error}", "ask again when less else runs")
            continue
        llm, tower, side = shape.llm, shape.tower, shape.family(0).tower
        one, many = (sum(n * rates.weight(kind, rows) for kind, n in llm.blocks.items()) for rows in (1, KNOTS[-1]))
        one += sum(n * rates.weight(kind, 1) for kind, n in llm.head.items())
        beside = llm.n_layer * rates.layer + rates.step
        patches = (side.image_size // max(side.patch, 1)) ** 2
        tile = patches * sum(n * rates.patch[kind] for kind, n in tower.patch.items()) + tower.pairs(patches) * (
            rates.pair * tower.width
        )
        yield Finding(
            f"{role}'s speed",
            f"reads {KNOTS[-1] / (many + beside):.0f} tokens/s, writes {1 / (one + beside):.1f}, {tile:.2f} s a tile",
        )
