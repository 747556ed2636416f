"""Frames between client and worker: what goes in comes out, and nothing else does."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import struct
import typing
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from localvlm.engine import api, wire

TYPES = tuple(wire._TYPES.values())


def reader(data: bytes):
    stream = io.BytesIO(data)

    def read(n: int) -> bytes:
        if n > len(data):
            raise EOFError
        chunk = stream.read(n)
        if len(chunk) < n:
            raise EOFError
        return chunk

    return read


def round_trip(message: dict[str, Any]) -> dict[str, Any]:
    return wire.unpack(reader(b"".join(bytes(b) for b in wire.pack(message))))


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


@st.composite
def arrays(draw, dtype) -> np.ndarray:
    shape = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
    n = int(np.prod(shape)) * np.dtype(dtype).itemsize
    data = np.frombuffer(draw(st.binary(min_size=n, max_size=n)), dtype)
    return data.reshape(shape) if n else np.zeros(shape, dtype)


def values(hint: Any) -> st.SearchStrategy[Any]:
    """Any value of an API field, from its annotation alone, so that new fields are covered."""
    if hint is np.ndarray or typing.get_origin(hint) is np.ndarray:
        return arrays(typing.get_args(typing.get_args(hint)[1])[0])
    if dataclasses.is_dataclass(hint):
        return dataclass_values(hint)
    arguments = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        if arguments[-1] is Ellipsis:
            return st.lists(values(arguments[0]), max_size=3).map(tuple)
        return st.tuples(*map(values, arguments))
    if arguments:
        return st.one_of(*map(values, arguments))
    return {
        str: st.text(),
        int: st.integers(-(2**63), 2**63),
        float: st.floats(allow_nan=False),
        bool: st.booleans(),
        type(None): st.none(),
    }[hint]


def dataclass_values(kind: Any) -> st.SearchStrategy[Any]:
    hints = typing.get_type_hints(kind, vars(api))
    return st.builds(kind, **{f.name: values(hints[f.name]) for f in dataclasses.fields(kind)})


def test_every_dataclass_of_the_api_can_travel() -> None:
    here = {t for t in vars(api).values() if dataclasses.is_dataclass(t)}
    assert here - set(TYPES) == {api.Backend}, "Backend travels as a dict"


@pytest.mark.parametrize("kind", TYPES, ids=lambda t: t.__name__)
def test_round_trip(kind) -> None:
    @settings(max_examples=30, deadline=None)
    @given(dataclass_values(kind))
    def check(value) -> None:
        assert same(round_trip({"v": [value, (value,), {"k": value}]}), {"v": [value, (value,), {"k": value}]})

    check()


LEAVES = st.none() | st.booleans() | st.integers() | st.text()


@given(st.recursive(LEAVES, lambda v: st.lists(v, max_size=4) | st.tuples(v, v), max_leaves=12))
def test_plain_values(value) -> None:
    assert same(round_trip({"v": value})["v"], value)


def test_arrays_come_out_writable_contiguous_and_whatever_their_layout() -> None:
    array = np.arange(24, dtype=np.int32).reshape(4, 6).T[::2]
    out = round_trip({"v": array})["v"]
    assert same(out, np.ascontiguousarray(array))
    assert out.flags.writeable


def frame(value: Any, *arrays: bytes, n_json: int | None = None, n_arrays: int | None = None) -> bytes:
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    head = struct.pack("<II", len(text) if n_json is None else n_json, len(arrays) if n_arrays is None else n_arrays)
    return head + text + b"".join(struct.pack("<Q", len(a)) + a for a in arrays)


def test_a_prompt_of_many_pictures_goes_through():
    parts = [np.arange(3, dtype=np.int32) for _ in range(1000)]
    framed = io.BytesIO(b"".join(wire.pack({"parts": parts})))
    assert len(wire.unpack(framed.read)["parts"]) == 1000


ND = {"$nd": 0, "dtype": "float32", "shape": [2]}
HOSTILE = {
    "empty": b"",
    "half a head": b"\x01\0\0",
    "endless json": frame({}, n_json=2**32 - 1),
    "many arrays": frame({}, n_arrays=2**32 - 1),
    "endless array": frame({"a": ND}, n_arrays=1) + struct.pack("<Q", 2**63),
    "array of 8 GiB that is not there": frame({"a": ND}, n_arrays=1) + struct.pack("<Q", 2**33),
    "not json": frame(b"{"),
    "not utf-8": frame(b'"\xff"'),
    "not an object": frame([1]),
    "a number": frame(1),
    "deep": frame(b"[" * 100_000 + b"]" * 100_000),
    "deep objects": frame(b'{"a":' * 50_000 + b"1" + b"}" * 50_000),
    "huge integer": frame(b'{"a":' + b"9" * 10_000 + b"}"),
    "unknown type": frame({"a": {"$type": "Popen", "args": ["id"]}}),
    "type that is a list": frame({"a": {"$type": []}}),
    "fields that are not": frame({"a": {"$type": "TextPart", "text": "x", "shell": True}}),
    "fields missing": frame({"a": {"$type": "TextPart"}}),
    "object arrays": frame({"a": {**ND, "dtype": "object"}}, b"12345678"),
    "dtype that is a list": frame({"a": {**ND, "dtype": []}}, b"12345678"),
    "no such array": frame({"a": {**ND, "$nd": 3}}, b"12345678"),
    "array by name": frame({"a": {**ND, "$nd": "x"}}, b"12345678"),
    "no dtype": frame({"a": {"$nd": 0}}, b"12345678"),
    "wrong shape": frame({"a": {**ND, "shape": [3]}}, b"12345678"),
    "negative shape": frame({"a": {**ND, "shape": [-5]}}, b"12345678"),
    "two free sides": frame({"a": {**ND, "shape": [-1, -1]}}, b"12345678"),
    "shape that is text": frame({"a": {**ND, "shape": "x"}}, b"12345678"),
    "huge shape": frame({"a": {**ND, "shape": [2**62, 2**62]}}, b"12345678"),
    "odd bytes": frame({"a": {**ND, "shape": [-1]}}, b"1234567"),
    "tuple of nothing": frame({"a": {"$tuple": 7}}),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_frames_are_refused(name: str) -> None:
    with pytest.raises((ValueError, EOFError)):
        wire.unpack(reader(HOSTILE[name]))


@given(st.binary(max_size=200))
def test_noise_is_refused(data: bytes) -> None:
    with pytest.raises((ValueError, EOFError)):
        wire.unpack(reader(data))


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_flipped_frames_decode_or_are_refused(data) -> None:
    message = {"call": 3, "result": api.Encoded(1, api.ImageLayout(2, np.ones((2, 4), np.float32), (1, 2), 2), 1.5)}
    frame = bytearray(b"".join(bytes(b) for b in wire.pack(message)))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ValueError, EOFError):
        assert isinstance(wire.unpack(reader(bytes(frame))), dict)
