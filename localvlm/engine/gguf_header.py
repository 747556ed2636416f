"""A bounded reader of GGUF headers: nothing in the file can make it allocate or loop beyond fixed limits.

It tells a model from a projector, checks that the two fit and that no tensor lies beyond the end of the file, before
llama.cpp, which aborts the process on many damaged files, sees either.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import os
import re
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from localvlm.errors import ModelNotFound, NotGguf, ProjectorMismatch, RoleMismatch

__all__ = ["Header", "TensorInfo", "check_pair", "parts_of", "read_header", "read_model", "shown", "strings_of"]

MAX_KEYS = 4096
MAX_TENSORS = 65_536
MAX_KEY_BYTES = 1024
MAX_STRING = 1 << 20
MAX_ARCHITECTURE = 64
"""Bytes of the architecture's name, which begins the names of its keys; the longest known one has 19."""
MAX_ARRAY = 1 << 21
MAX_ELEMENTS = 1 << 22
"""Of all string arrays together; the largest published header (a 262k-token vocabulary) has 0.8 million."""
MAX_HEADER = 1 << 28
"""Bytes; the largest published header takes about 16 MB."""

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_FIRST = re.compile(r"(.*)-00001-of-(\d{5})\.gguf")

Value = int | float | bool | str | tuple[int | float | bool, ...]


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: shape fastest dimension first, ggml type number, absolute offset in the file, bytes."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int
    n_bytes: int


@dataclass
class Header:
    """What a GGUF header says. Arrays of strings are kept as a hash (``array_hashes``) and where they lie in the file
    (``string_places``: first byte and the one after the last) alone.
    """

    path: Path
    values: dict[str, Value] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    array_hashes: dict[str, str] = field(default_factory=dict)
    array_lengths: dict[str, int] = field(default_factory=dict)
    string_places: dict[str, tuple[int, int]] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)

    @property
    def architecture(self) -> str:
        return self.text("general.architecture")

    @property
    def is_projector(self) -> bool:
        return self.architecture == "clip"

    def text(self, key: str, default: str = "") -> str:
        value = self.values.get(key)
        return value if isinstance(value, str) else default

    def integer(self, key: str, default: int = 0) -> int:
        """The value of ``key``; the first element where it is an array."""
        value = self.values.get(key)
        if isinstance(value, tuple) and value:
            value = value[0]
        return int(value) if isinstance(value, (int, bool)) else default

    def integers(self, key: str) -> tuple[int, ...]:
        """The array of integers under ``key``; empty where it is none, or of floats, which may be infinite."""
        value = self.values.get(key)
        return tuple(int(v) for v in value if not isinstance(v, float)) if isinstance(value, tuple) else ()


def shown(text: str, most: int = 80) -> str:
    """A name out of a file as messages show it: on one line, and not all of a long one."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:most])
    return f"{line}..." if len(text) > most else line


class _Cursor:
    """Reads a mapped file and never past its end or ``MAX_HEADER``."""

    def __init__(self, data: mmap.mmap, path: Path, size: int) -> None:
        """``data``: what the file of ``size`` bytes begins with."""
        self.data, self.path, self.size, self.at = data, path, size, 0
        self.end = len(data)
        self.elements = 0

    def take(self, n: int) -> bytes:
        if n < 0 or self.at + n > self.end:
            raise NotGguf(
                f"model file '{self.path.name}' is cut short or damaged: its header wants {n} bytes at offset "
                f"{self.at} of {self.size}",
                "download it again",
            )
        chunk = self.data[self.at : self.at + n]
        self.at += n
        return chunk

    def scalar(self, fmt: str) -> int | float | bool:
        value: int | float | bool = struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]
        return value

    def count(self, what: str, limit: int) -> int:
        n = int(self.scalar("<Q"))
        if n > limit:
            raise NotGguf(
                f"model file '{self.path.name}' is damaged: {what} is {n}, more than {limit}", "download it again"
            )
        return n

    def string(self, what: str, limit: int = MAX_STRING) -> bytes:
        return self.take(self.count(f"the length of {what}", limit))

    def skip_strings(self, n: int, key: str) -> str:
        """Hash of an array of n strings. Written for speed: a vocabulary has a million of them."""
        self.elements += n
        if self.elements > MAX_ELEMENTS:
            raise NotGguf(
                f"model file '{self.path.name}' is damaged: its arrays have more than {MAX_ELEMENTS} elements",
                "download it again",
            )
        start = at = self.at
        data, last, length = self.data, self.end - 8, struct.Struct("<Q").unpack_from
        for _ in range(n):
            if at > last:
                break
            at += 8 + length(data, at)[0]
        else:
            if at <= self.end:
                self.at = at
                return hashlib.sha256(memoryview(data)[start:at]).hexdigest()
        raise NotGguf(
            f"model file '{self.path.name}' is cut short or damaged: an element of '{shown(key)}' ends beyond its "
            "header",
            "download it again",
        )


def _read_array(c: _Cursor, header: Header, key: str) -> None:
    kind = int(c.scalar("<I"))
    n = c.count(f"the length of '{shown(key)}'", MAX_ARRAY)
    header.array_lengths[key] = n
    if kind == _STRING:
        start = c.at
        header.array_hashes[key] = c.skip_strings(n, key)
        header.string_places[key] = start, c.at
        return
    fmt = _SCALARS.get(kind)
    if fmt is None:
        raise NotGguf(f"model file '{c.path.name}' is damaged: '{shown(key)}' has elements of unknown type {kind}")
    raw = c.take(n * struct.calcsize(fmt))
    header.array_hashes[key] = hashlib.sha256(raw).hexdigest()
    if n <= 4096:
        header.values[key] = struct.unpack(f"<{n}{fmt[1]}", raw)


def _read_values(c: _Cursor, header: Header, n: int) -> None:
    for _ in range(n):
        key = c.string("a key", MAX_KEY_BYTES).decode("utf-8", "replace")
        kind = header.types[key] = int(c.scalar("<I"))
        if kind == _STRING:
            header.values[key] = c.string(f"'{shown(key)}'").decode("utf-8", "replace")
        elif kind == _ARRAY:
            _read_array(c, header, key)
        elif kind in _SCALARS:
            header.values[key] = c.scalar(_SCALARS[kind])
        else:
            raise NotGguf(f"model file '{c.path.name}' is damaged: '{shown(key)}' has unknown type {kind}")


def _read_tensors(c: _Cursor, header: Header, n: int, size_of: Callable[[int], tuple[int, int] | None]) -> None:
    pending: list[tuple[str, tuple[int, ...], int, int]] = []
    for _ in range(n):
        name = c.string("a tensor name", MAX_KEY_BYTES).decode("utf-8", "replace")
        n_dims = int(c.scalar("<I"))
        if n_dims > 4:
            raise NotGguf(f"model file '{c.path.name}' is damaged: tensor '{shown(name)}' has {n_dims} dimensions")
        shape = tuple(int(c.scalar("<Q")) for _ in range(n_dims))
        pending.append((name, shape, int(c.scalar("<I")), int(c.scalar("<Q"))))
    alignment = header.integer("general.alignment", 32)
    if alignment <= 0 or alignment > 1 << 20 or alignment & (alignment - 1):
        raise NotGguf(f"model file '{c.path.name}' is damaged: its alignment is {alignment}")
    base = -(-c.at // alignment) * alignment
    for name, shape, kind, offset in pending:
        known = size_of(kind)
        if known is None:
            raise NotGguf(f"model file '{c.path.name}' is damaged: tensor '{shown(name)}' has unknown type {kind}")
        block, block_bytes = known
        elements = math.prod(shape)
        if elements == 0 or (shape and shape[0] % block):
            raise NotGguf(
                f"model file '{c.path.name}' is damaged: tensor '{shown(name)}' of type {kind} has shape {list(shape)}",
                "download it again",
            )
        n_bytes = elements // block * block_bytes
        if base + offset + n_bytes > c.size:
            raise NotGguf(
                f"model file '{c.path.name}' is cut short: tensor '{shown(name)}' ends at byte "
                f"{base + offset + n_bytes} of {c.size}",
                "download it again",
            )
        header.tensors[name] = TensorInfo(name, shape, kind, base + offset, n_bytes)


def _block_sizes() -> Callable[[int], tuple[int, int] | None]:
    from gguf.constants import GGML_QUANT_SIZES

    sizes = {int(kind): value for kind, value in GGML_QUANT_SIZES.items()}
    return sizes.get


def read_header(path: Path) -> Header:
    """Reads and checks the header of one GGUF file.

    Raises:
        ModelNotFound: no such file, or not readable.
        NotGguf: another format, an unknown version, damaged or cut short.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO must not be waited for
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else str(e)
        raise ModelNotFound(f"model file '{path}' cannot be opened: {reason}", "check the path") from None
    try:
        status = os.fstat(fd)
        if stat.S_ISDIR(status.st_mode):
            raise ModelNotFound(f"model '{path}' is a directory", "name the .gguf file inside it")
        if not stat.S_ISREG(status.st_mode):
            raise ModelNotFound(f"model '{path}' is not a regular file")
        if status.st_size < 24:
            raise NotGguf(f"model file '{path.name}' is not a GGUF file: it has {status.st_size} bytes")
        with mmap.mmap(fd, min(status.st_size, MAX_HEADER), access=mmap.ACCESS_READ) as data:
            return _parse(_Cursor(data, path, status.st_size))
    finally:
        os.close(fd)


def parts_of(model: Path) -> list[Path]:
    """All files of a model: of a split one, whose first part is named, every part."""
    found = _FIRST.fullmatch(model.name)
    if found is None:
        return [model]
    return [model.with_name(f"{found[1]}-{i:05d}-of-{found[2]}.gguf") for i in range(1, int(found[2]) + 1)]


def read_model(path: Path) -> Header:
    """The header of a model with the tensors of all its parts, to count them: offsets are of their own files.

    Raises:
        ModelNotFound, NotGguf: see :func:`read_header`.
    """
    header = read_header(path)
    for part in parts_of(path)[1:]:
        header = replace(header, tensors={**header.tensors, **read_header(part).tensors})
    return header


def _parse(c: _Cursor) -> Header:
    magic = c.take(4)
    if magic != b"GGUF":
        raise NotGguf(f"'{c.path.name}' is not a GGUF file: it begins with {magic!r}", "pass a .gguf model file")
    version = int(c.scalar("<I"))
    if version not in (2, 3):
        raise NotGguf(f"'{c.path.name}' has GGUF version {version}; 2 and 3 are supported")
    header = Header(c.path)
    n_tensors = c.count("the number of tensors", MAX_TENSORS)
    n_values = c.count("the number of keys", MAX_KEYS)
    _read_values(c, header, n_values)
    _read_tensors(c, header, n_tensors, _block_sizes())
    if not header.architecture and not header.integer("split.no"):  # of a split model the first part alone names it
        raise NotGguf(f"'{c.path.name}' names no architecture; it is damaged or not a model")
    if len(header.architecture) > MAX_ARCHITECTURE:
        raise NotGguf(f"'{c.path.name}' is damaged: its architecture's name has {len(header.architecture)} characters")
    return header


def strings_of(header: Header, key: str) -> list[bytes]:
    """The elements of an array of strings, read from the file again.

    Raises:
        KeyError: there is no such array.
        OSError: the file cannot be read any more.
    """
    start, end = header.string_places[key]
    with header.path.open("rb") as file:
        file.seek(start)
        data = file.read(end - start)
    found, at, length = [], 0, struct.Struct("<Q").unpack_from
    while at < len(data):
        first = at + 8
        at = first + length(data, at)[0]
        found.append(data[first:at])
    return found


def check_pair(model: Header, mmproj: Header) -> None:
    """Refuses files in the wrong role, a projector of another width, and values that would end llama.cpp.

    Raises:
        RoleMismatch: swapped, or two of a kind.
        ProjectorMismatch: the widths differ.
        NotGguf: damaged.
    """
    from localvlm.engine.plausible import check_model, check_projector

    if part := model.integer("split.no"):
        raise RoleMismatch(f"'{model.path.name}' is part {part + 1} of a split model", "pass its first part")
    if model.is_projector and not mmproj.is_projector:
        raise RoleMismatch(
            f"'{model.path.name}' is a projector and '{mmproj.path.name}' a language model: they are swapped",
            "exchange --model and --mmproj",
        )
    if model.is_projector:
        raise RoleMismatch(f"'{model.path.name}' is a projector, not a language model", "pass it as --mmproj")
    if not mmproj.is_projector:
        raise RoleMismatch(
            f"'{mmproj.path.name}' is a language model ('{shown(mmproj.architecture, 40)}'), not a projector",
            "pass the file whose name holds 'mmproj'",
        )
    if not mmproj.values.get("clip.has_vision_encoder", False):
        raise RoleMismatch(f"'{mmproj.path.name}' is a projector without a vision tower (audio only?)")
    width, want = _projector_width(mmproj), model.integer(f"{model.architecture}.embedding_length")
    if width and want and width % want != 0:
        raise ProjectorMismatch(
            f"mismatch between text model '{model.path.name}' (n_embd = {want}) and projector "
            f"'{mmproj.path.name}' (n_embd = {width})",
            "use the mmproj file published with the model",
        )
    check_model(model)
    check_projector(mmproj)


def _projector_width(mmproj: Header) -> int:
    """Output width of the last projector matrix where it has a known name, else ``projection_dim``; 0 if unknown."""
    for name in ("mm.2.weight", "mm.3.weight", "mm.1.weight", "mm.0.weight", "mm.model.fc.weight"):
        tensor = mmproj.tensors.get(name)
        if tensor is not None and len(tensor.shape) == 2:
            return tensor.shape[1]
    return 0
