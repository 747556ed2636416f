"""The header reader: what sound files say, and that damaged ones cost neither time nor memory nor a traceback."""

from __future__ import annotations

import contextlib
import itertools
import os
import resource
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from localvlm.engine.families import describe
from localvlm.engine.gguf_header import Header, check_pair, read_header
from localvlm.engine.plausible import read_projector
from localvlm.errors import ModelError, ModelNotFound, NotGguf, ProjectorMismatch, RoleMismatch, UnsupportedModel
from localvlm.planning.shapes import view_of
from tests import zoo
from tests.damage import Gguf
from tests.processor import thread_seconds


def write(path: Path, architecture: str = "llama", width: int = 8, **keys: int) -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.name", "tiny")
    writer.add_uint32("an.integer", 7)
    writer.add_float32("a.float", 1.5)
    writer.add_bool("a.bool", True)
    writer.add_array("some.integers", [3, 1, 2])
    writer.add_array("some.strings", ["a", "bc", "ä"])
    if architecture == "clip":
        writer.add_bool("clip.has_vision_encoder", True)
        writer.add_string("clip.projector_type", "one that is not in the table")
        sizes = {"embedding_length": 4, "block_count": 1, "attention.head_count": 2, "image_size": 28, "patch_size": 14}
        for name, value in sizes.items():
            writer.add_uint32(f"clip.vision.{name}", value)
        writer.add_tensor("mm.0.weight", np.zeros((width, 4), np.float32))
    else:
        for name, value in {"embedding_length": width, "block_count": 1, "attention.head_count": 2}.items():
            writer.add_uint32(f"{architecture}.{name}", value)
        writer.add_tensor("token_embd.weight", np.arange(5 * width, dtype=np.float32).reshape(5, width))
    for key, value in keys.items():
        writer.add_uint32(key.replace("__", "."), value)
    writer.add_tensor("half", np.ones((2, 32), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def bytes_file(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "case.gguf"
    path.write_bytes(data)
    return path


def test_values_and_tensors_are_those_that_were_written(sound: Path) -> None:
    header = read_header(sound)
    assert header.architecture == "llama"
    assert not header.is_projector
    assert header.text("general.name") == "tiny"
    assert header.text("an.integer", "no text") == "no text"
    assert (header.integer("an.integer"), header.integer("some.integers"), header.integer("none", 9)) == (7, 3, 9)
    assert header.integer("a.float", 4) == 4
    assert header.values["a.float"] == 1.5
    assert header.values["a.bool"] is True
    assert header.integers("some.integers") == (3, 1, 2)
    assert Header(sound, {"some.floats": (1.0, float("inf"))}).integers("some.floats") == ()
    assert header.array_lengths == {"some.integers": 3, "some.strings": 3}
    table = header.tensors["token_embd.weight"]
    assert (table.shape, table.n_bytes) == ((8, 5), 160)
    data = np.fromfile(sound, np.float32, 40, offset=table.offset)
    np.testing.assert_array_equal(data, np.arange(40))
    assert header.tensors["half"].n_bytes == 128


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_agrees_with_the_gguf_package(family: str, tmp_path: Path) -> None:
    model = zoo.build(family, tmp_path)
    for path in (model.model, model.mmproj):
        reader, header = gguf.GGUFReader(path), read_header(path)
        assert set(header.tensors) == {t.name for t in reader.tensors}
        for tensor in reader.tensors:
            mine = header.tensors[tensor.name]
            assert (list(mine.shape), mine.offset) == (tensor.shape.tolist(), tensor.data_offset)
            assert (mine.n_bytes, mine.type) == (tensor.n_bytes, int(tensor.tensor_type))
        scalars = {k for k, v in header.values.items() if not isinstance(v, tuple)}
        for key, value in reader.fields.items():
            if key in scalars:
                assert header.values[key] == value.contents()
    check_pair(read_header(model.model), read_header(model.mmproj))


def test_string_arrays_are_told_apart_by_their_hash(tmp_path: Path, sound: Path) -> None:
    raw = sound.read_bytes()
    assert read_header(sound).array_hashes == read_header(bytes_file(tmp_path, raw)).array_hashes
    other = bytes_file(tmp_path, raw.replace(b"bc", b"bd"))
    assert read_header(other).array_hashes["some.strings"] != read_header(sound).array_hashes["some.strings"]


def kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def refused_quickly(path: Path, match: str) -> None:
    before = kib()

    def refused() -> None:
        with pytest.raises(NotGguf, match=match):
            read_header(path)

    assert thread_seconds(refused) < 0.1
    assert kib() - before < 20_000


HEAD = b"GGUF" + struct.pack("<I", 3)
ONE_KEY = HEAD + struct.pack("<QQ", 0, 1)


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (ONE_KEY + struct.pack("<Q", 3) + b"k.k" + struct.pack("<IIQ", 9, 4, 2**63)[:16], "k.k"),
        (HEAD + struct.pack("<QQ", 2**64 - 1, 0), "number of tensors"),
        (HEAD + struct.pack("<QQ", 0, 2**64 - 1), "number of keys"),
        (ONE_KEY + struct.pack("<Q", 2**64 - 1), "length of a key"),
        (ONE_KEY + struct.pack("<Q", 1) + b"k" + struct.pack("<IQ", 8, 2**40), "length of 'k'"),
        (HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q", 2**40), "length of a tensor name"),
        (HEAD + struct.pack("<QQ", 1, 0) + struct.pack("<Q", 1) + b"t" + struct.pack("<I", 2**31), "dimensions"),
        (ONE_KEY + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 13), "unknown type 13"),
        (ONE_KEY + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1), "unknown type 9"),
        (HEAD + struct.pack("<QQ", 0, 0), "no architecture"),
        (HEAD[:4] + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (HEAD[:4] + struct.pack("<IQQ", 2**31, 0, 0), "version"),
        (b"PK\x03\x04" + bytes(40), "begins with b'PK"),
        (b"", "0 bytes"),
        (b"GGUF", "4 bytes"),
    ],
)
def test_absurd_headers_are_refused_before_they_cost_anything(tmp_path: Path, data: bytes, match: str) -> None:
    refused_quickly(bytes_file(tmp_path, data), match)


def test_43_bytes_that_ask_for_an_exabyte(tmp_path: Path) -> None:
    data = ONE_KEY + struct.pack("<Q", 3) + b"k.k" + struct.pack("<IIQ", 9, 8, 2**63)
    assert len(data[:43]) == 43
    refused_quickly(bytes_file(tmp_path, data[:43]), "cut short|k.k")
    refused_quickly(bytes_file(tmp_path, data), "k.k")


def test_many_small_arrays_are_bounded_together(tmp_path: Path) -> None:
    """Six arrays of a million empty strings each: each alone is allowed."""
    array = struct.pack("<IIQ", 9, 8, 1 << 20) + bytes(8 << 20)
    out = bytes_file(tmp_path, HEAD + struct.pack("<QQ", 0, 6))
    with out.open("ab") as f:
        for i in range(6):
            f.write(struct.pack("<Q", 2) + b"%02d" % i + array)

    def refused() -> None:
        with pytest.raises(NotGguf, match="elements"):
            read_header(out)

    assert thread_seconds(refused, tries=1) < 10


def test_a_vocabulary_of_real_size_is_read_fast(tmp_path: Path) -> None:
    strings = b"".join(struct.pack("<Q", 6) + b"%06d" % i for i in range(250_000))
    data = HEAD + struct.pack("<QQ", 0, 2)
    data += struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<IQ", 8, 5) + b"llama"
    data += struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 250_000) + strings
    path = bytes_file(tmp_path, data + bytes(64))
    assert read_header(path).array_lengths["k"] == 250_000
    assert thread_seconds(lambda: read_header(path)) < 1.0


def test_cut_short_anywhere(tmp_path: Path, sound: Path) -> None:
    """At every byte of the header, and every few of the data."""
    raw = sound.read_bytes()
    end = len(Gguf.parse(raw).head())
    for n in [*range(end), *range(end, len(raw), 7), len(raw) - 1]:
        with pytest.raises(NotGguf):
            read_header(bytes_file(tmp_path, raw[:n]))


@pytest.mark.parametrize(
    ("shape", "kind", "offset", "match"),
    [
        ([2**40, 2**40], 0, 0, "cut short"),
        ([2**63, 2], 0, 0, "cut short"),
        ([8, 5], 0, 2**63, "cut short"),
        ([8, 5], 999, 0, "unknown type 999"),
        ([8, 0], 0, 0, "'token_embd.weight'"),
        ([8, 5], 2, 0, "'token_embd.weight'"),
    ],
)
def test_impossible_tensors_are_refused_by_name(
    tmp_path: Path, sound: Path, shape: list[int], kind: int, offset: int, match: str
) -> None:
    file = Gguf.parse(sound.read_bytes())
    file.tensors[0] = (file.tensors[0][0], shape, kind, offset)
    with pytest.raises(NotGguf, match=match):
        read_header(bytes_file(tmp_path, file.bytes()))


@pytest.mark.parametrize("name", [b"a\n\x1b]0;x\x07b", b"x" * 1000, "a\u202eb\u2028".encode()])
def test_names_out_of_a_file_are_one_line_of_a_message(tmp_path: Path, sound: Path, name: bytes) -> None:
    """Found by `python -m tests.fuzz --target header --seed 1 --input 249`, of tensors and keys."""
    tensor, key = Gguf.parse(sound.read_bytes()), Gguf.parse(sound.read_bytes())
    tensor.tensors[0] = (name, [8, 5], 999, 0)
    key.values[-1] = (name, 13, b"")
    for file in (tensor, key):
        with pytest.raises(NotGguf, match="unknown type") as caught:
            read_header(bytes_file(tmp_path, file.bytes()))
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 300


@pytest.mark.parametrize("alignment", [0, 3, 2**31])
def test_impossible_alignments(tmp_path: Path, alignment: int) -> None:
    with pytest.raises(NotGguf, match="alignment"):
        read_header(write(tmp_path / "a.gguf", general__alignment=alignment))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    places = ["missing.gguf", "", "fifo", "loop", "x" * 300, "a\0b", "missing/deep.gguf"]
    for path in [*(tmp_path / p for p in places), Path("/dev/zero"), Path("/dev/null")]:
        with pytest.raises(ModelNotFound, match="model"):  # and none is waited for
            read_header(path)


def test_roles(tmp_path: Path, sound: Path) -> None:
    model, mmproj = read_header(sound), read_header(write(tmp_path / "mm.gguf", "clip"))
    check_pair(model, mmproj)
    with pytest.raises(RoleMismatch, match="swapped"):
        check_pair(mmproj, model)
    with pytest.raises(RoleMismatch, match=r"'mm\.gguf' is a projector, not"):
        check_pair(mmproj, mmproj)
    with pytest.raises(RoleMismatch, match=r"'tiny\.gguf' is a language model"):
        check_pair(model, model)
    mmproj.values["clip.has_vision_encoder"] = False
    with pytest.raises(RoleMismatch, match="audio"):
        check_pair(model, mmproj)


def test_widths_that_differ_are_both_named(tmp_path: Path, sound: Path) -> None:
    with pytest.raises(ProjectorMismatch, match=r"n_embd = 8\).*n_embd = 12\)"):
        check_pair(read_header(sound), read_header(write(tmp_path / "mm.gguf", "clip", width=12)))


def try_pair(model: Path, mmproj: Path) -> Header | None:
    """The reader and the check; anything but a ModelError escapes."""
    try:
        header = read_header(model)
        check_pair(header, read_header(mmproj))
    except (NotGguf, ModelNotFound, RoleMismatch, ProjectorMismatch, UnsupportedModel) as error:
        assert isinstance(error, ModelError)
        assert len(error.message) < 1000
        return None
    return header


def_settings = settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@def_settings
@given(data=st.binary(max_size=300), magic=st.booleans())
def test_noise_is_refused(tmp_path: Path, sound: Path, data: bytes, magic: bool) -> None:
    path = bytes_file(tmp_path, (HEAD if magic else b"") + data)
    assert try_pair(path, sound) is None


@def_settings
@given(changes=st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 255)), min_size=1, max_size=6))
def test_changed_bytes_are_read_or_refused(tmp_path: Path, sound: Path, changes: list[tuple[int, int]]) -> None:
    raw = bytearray(sound.read_bytes())
    end = len(Gguf.parse(bytes(raw)).head())
    for at, value in changes:
        raw[at % end] = value
    path = bytes_file(tmp_path, bytes(raw))
    try_pair(path, path)


@pytest.fixture(scope="module")
def zoo_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, zoo.ZooModel]:
    directory = tmp_path_factory.mktemp("zoo")
    return {family: zoo.build(family, directory) for family in zoo.FAMILIES}


def damaged(row: zoo.ZooModel, directory: Path, which: str, change) -> tuple[Path, Path]:
    """A zoo pair of which one file's pieces were changed by ``change``."""
    file = Gguf.parse((row.model if which == "model" else row.mmproj).read_bytes())
    change(file)
    path = bytes_file(directory, file.bytes())
    return (path, row.mmproj) if which == "model" else (row.model, path)


def set_key(key: str, kind: int, raw: bytes):
    def change(file: Gguf) -> None:
        assert any(k == key.encode() for k, *_ in file.values), key
        file.values = [(k, kind, raw) if k == key.encode() else (k, t, v) for k, t, v in file.values]

    return change


def set_tensor(name: str, new_name: str | None = None, shape: list[int] | None = None, kind: int = 0):
    def change(file: Gguf) -> None:
        assert any(n == name.encode() for n, *_ in file.tensors), name
        file.tensors = [
            ((new_name or name).encode(), shape or s, kind, o) if n == name.encode() else (n, s, t, o)
            for n, s, t, o in file.tensors
        ]

    return change


def same_tokens(file: Gguf) -> None:
    """The last token is spelled as the one before it."""
    at = next(i for i, (key, *_) in enumerate(file.values) if key == b"tokenizer.ggml.tokens")
    key, kind, raw = file.values[at]
    n, tokens, place = struct.unpack_from("<Q", raw, 4)[0], [], 12
    for _ in range(n):
        size = struct.unpack_from("<Q", raw, place)[0]
        tokens.append(raw[place + 8 : place + 8 + size])
        place += 8 + size
    tokens[-1] = tokens[-2]
    body = b"".join(struct.pack("<Q", len(token)) + token for token in tokens)
    file.values[at] = key, kind, raw[:12] + body


U32 = struct.Struct("<I").pack
VISION = "clip.vision."
INFINITE, NO_NUMBER = struct.pack("<IQf", 6, 1, np.inf), struct.pack("<IQ2d", 12, 2, 1.0, np.nan)
FOUR_ZEROS, MEGABYTE = struct.pack("<IQ4i", 5, 4, 0, 0, 0, 0), struct.pack("<Q", 1 << 20) + b"x" * (1 << 20)
ABORTS = [
    ("llava15", "model", set_key("llama.block_count", 4, U32(0)), "llama.block_count"),
    ("llava15", "model", set_key("llama.block_count", 4, U32(2**24)), "llama.block_count"),
    ("llava15", "model", set_key("llama.attention.head_count", 4, U32(0)), "head_count"),
    ("llava15", "model", set_key("llama.attention.head_count", 4, U32(7)), "7 heads"),
    ("llava15", "model", set_key("llama.rope.dimension_count", 4, U32(2**32 - 1)), "dimension_count"),
    ("llava15", "model", set_key("llama.attention.layer_norm_rms_epsilon", 6, struct.pack("<f", -1)), "epsilon"),
    ("llava15", "model", set_key("tokenizer.ggml.model", 8, struct.pack("<Q", 5) + b"llama"), "scores"),
    ("llava15", "mmproj", set_key(VISION + "block_count", 10, bytes(8)), "type 10"),
    ("llava15", "mmproj", set_key("clip.use_gelu", 4, U32(1)), "use_gelu"),
    ("llava15", "mmproj", set_key(VISION + "patch_size", 4, U32(0)), "patch_size"),
    ("llava15", "mmproj", set_key(VISION + "patch_size", 4, U32(15)), "v.patch_embd.weight"),
    ("llava15", "mmproj", set_key(VISION + "image_size", 4, U32(4097)), "v.position_embd.weight"),
    ("llava15", "mmproj", set_key(VISION + "image_size", 4, U32(2**31)), "image_size"),
    ("llava15", "mmproj", set_key(VISION + "embedding_length", 4, U32(128)), "tensor"),
    ("llava15", "mmproj", set_key(VISION + "attention.head_count", 4, U32(7)), "7 heads"),
    ("llava15", "mmproj", set_key(VISION + "attention.layer_norm_epsilon", 6, struct.pack("<f", np.nan)), "epsilon"),
    ("llava15", "mmproj", set_tensor("v.blk.2.attn_q.weight", "v.blk.2.attn_q.weighd"), "'v.blk.2.attn_q.weight'"),
    ("llava15", "mmproj", set_tensor("v.blk.0.attn_k.bias", "v.blk.0.attn_k.bia"), "'v.blk.0.attn_k.bias'"),
    ("llava15", "mmproj", set_tensor("v.blk.1.ln1.weight", shape=[1, 64]), "'v.blk.1.ln1.weight'"),
    ("llava15", "mmproj", set_tensor("v.position_embd.weight", shape=[37, 64]), "'v.position_embd.weight'"),
    ("llava15", "mmproj", set_tensor("mm.2.weight", "mm.9.weight"), "'mm.2.weight'"),
    ("llava15", "mmproj", set_tensor("v.blk.1.ln1.weight", kind=8), "'v.blk.1.ln1.weight' is a vector of type 8"),
    ("qwen25vl", "mmproj", set_tensor("v.blk.1.ffn_gate.weight", shape=[96, 64]), "ffn_gate"),
    ("qwen25vl", "mmproj", set_key(VISION + "n_wa_pattern", 4, U32(0)), "n_wa_pattern"),
    ("qwen25vl", "mmproj", set_key(VISION + "projection_dim", 4, U32(2**31 - 1)), "projection_dim"),
    ("qwen3vl", "mmproj", set_key(VISION + "spatial_merge_size", 4, U32(4)), "'mm.0.weight'"),
    ("qwen3vl", "mmproj", set_tensor("v.position_embd.weight", shape=[143, 64]), "not that of a square"),
    ("qwen3vl", "mmproj", set_tensor("v.patch_embd.bias", "v.patch_embd.bia"), "'v.patch_embd.bias' is missing"),
    ("qwen3vl", "mmproj", set_tensor("v.deepstack.1.fc2.weight", "v.deepstack.1.fc9.weight"), "deepstack.1.fc2"),
    ("qwen25vl", "model", set_key("qwen2vl.rope.dimension_count", 4, U32(16)), "dimension_count"),
    ("qwen25vl", "model", set_key("qwen2vl.rope.dimension_sections", 9, FOUR_ZEROS), "turns"),
    ("qwen25vl", "model", set_key("qwen2vl.rope.dimension_sections", 9, INFINITE), r"sections' is \[inf\], which"),
    (
        "granitevision",
        "mmproj",
        set_key(VISION + "feature_layer", 9, NO_NUMBER),
        r"feature_layer' is \[1.0, nan\], which",
    ),
    ("llavanext", "mmproj", set_key(VISION + "image_grid_pinpoints", 9, INFINITE), "pinpoints"),
    ("minicpmv46", "mmproj", set_key(VISION + "wa_layer_indexes", 9, NO_NUMBER), "wa_layer_indexes"),
    ("qwen25vl", "mmproj", set_tensor("v.patch_embd.weight.1", "v.patch_embd.weighs.1"), "'v.patch_embd.weight.1' is"),
    ("qwen25vl", "mmproj", set_key(VISION + "attention.head_count", 4, U32(64)), "1 numbers a head"),
    ("llava15", "mmproj", set_tensor("mm.2.bias", "mm.2.bia"), "'mm.2.bias' is missing"),
    ("llava15", "model", same_tokens, "two tokens of 'tokenizer.ggml.tokens' are"),
    ("llava15", "model", set_key("general.architecture", 8, MEGABYTE), "1048576 char"),
]


@pytest.mark.parametrize(("family", "which", "change", "match"), ABORTS, ids=[f"{a[0]}-{a[3]}" for a in ABORTS])
def test_values_that_would_end_llama_cpp_are_named(zoo_files, tmp_path, family, which, change, match: str) -> None:
    model, mmproj = damaged(zoo_files[family], tmp_path, which, change)
    with pytest.raises(ModelError, match=match):
        check_pair(read_header(model), read_header(mmproj))


SIZES = (
    "block_count",
    "image_size",
    "patch_size",
    "preproc_image_size",
    "projector.scale_factor",
    "spatial_merge_size",
)
SENSELESS = ((4, U32(0)), (4, U32(3)), (4, U32(2**31)), (5, struct.pack("<i", -5)), (6, struct.pack("<f", np.inf)),
             (9, struct.pack("<IQ2i", 5, 2, -1, 2)))  # fmt: skip


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_pictures_are_cut_by_sizes_that_make_sense_or_not_at_all(zoo_files, tmp_path: Path, family: str) -> None:
    """By commands that read headers alone, too."""
    sound = zoo_files[family].mmproj
    assert view_of(describe(read_projector(sound)), 384, 300) is not None
    for name, (kind, raw) in itertools.product(SIZES, SENSELESS):
        file, key = Gguf.parse(sound.read_bytes()), (VISION + name).encode()
        file.values = [*((k, t, v) for k, t, v in file.values if k != key), (key, kind, raw)]
        path = bytes_file(tmp_path, file.bytes())
        with contextlib.suppress(NotGguf):
            view_of(describe(read_projector(path)), 384, 300)


def test_sound_files_of_every_size_pass(tmp_path: Path) -> None:
    for row in (*zoo.FAMILIES.values(), *zoo.LARGE.values()):
        found = zoo.write(row, tmp_path)
        check_pair(read_header(found.model), read_header(found.mmproj))
