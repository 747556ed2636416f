"""Weights of trained methods: read from the file beside the model, or refused with a sentence."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from localvlm.catalog import pair_named
from localvlm.engine.fake import FakeEngine
from localvlm.errors import NotGguf, UsageError
from localvlm.extras import read_gates, read_weights, weights_path
from localvlm.pipeline import Pipeline
from localvlm.pruning import METHODS

WIDTH, LAYERS = 32, 3
Q8, F16, F32 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.F32


def write(path: Path, method: str, arrays: dict[str, np.ndarray], kind: gguf.GGMLQuantizationType = F32) -> None:
    writer = gguf.GGUFWriter(path, "localvlm")
    writer.add_string("localvlm.method", method)
    for name, array in arrays.items():
        exact = array.ndim == 1 and kind == Q8
        raw = array if exact else gguf.quants.quantize(array, kind)
        writer.add_tensor(name, raw, raw_dtype=F32 if exact else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def gates(rng: np.random.Generator) -> dict[str, np.ndarray]:
    hidden, out = 4 * WIDTH, {}
    for layer in range(1, LAYERS):
        for name, shape in (("up.weight", (hidden, 2 * WIDTH)), ("up.bias", (hidden,)), ("down.weight", (2, hidden)),
                            ("down.bias", (2,))):  # fmt: skip
            out[f"gate.{layer}.{name}"] = rng.normal(size=shape).astype(np.float32)
    return out


@pytest.mark.parametrize(("kind", "error"), [(F32, 0), (F16, 1e-3), (Q8, 6e-3)])
def test_weights_come_back_in_their_shapes_whatever_they_are_stored_as(tmp_path, kind, error):
    want = gates(np.random.default_rng(0))
    write(tmp_path / "model.dyvte.gguf", "dyvte", want, kind)
    found = read_gates(tmp_path / "model.gguf", WIDTH, LAYERS)
    assert sorted(found) == [1, 2]
    for layer, gate in found.items():
        for name, array in zip(("up.weight", "up.bias", "down.weight", "down.bias"),
                               (gate.up, gate.up_bias, gate.down, gate.down_bias), strict=True):  # fmt: skip
            exact = want[f"gate.{layer}.{name}"]
            np.testing.assert_allclose(array, exact, atol=error * float(np.abs(exact).max()), rtol=0)
            assert array.dtype == np.float32


def test_a_layer_may_have_no_gate_but_not_half_a_gate(tmp_path):
    path, arrays = tmp_path / "model.dyvte.gguf", gates(np.random.default_rng(0))
    write(path, "dyvte", {name: array for name, array in arrays.items() if ".2." in name})
    assert list(read_gates(tmp_path / "model.gguf", WIDTH, LAYERS)) == [2]
    write(path, "dyvte", {name: array for name, array in arrays.items() if name != "gate.2.down.bias"})
    with pytest.raises(NotGguf, match=r"'gate\.2\.down\.bias' of shape \[\]"):
        read_gates(tmp_path / "model.gguf", WIDTH, LAYERS)


def test_a_model_without_weights_says_which_file_it_lacks(tmp_path):
    with pytest.raises(UsageError, match=r"needs weights trained for 'model\.gguf'.*'model\.dyvte\.gguf'"):
        read_gates(tmp_path / "model.gguf", WIDTH, LAYERS)


def test_weights_of_another_method_or_model_are_refused(tmp_path):
    write(tmp_path / "model.dyvte.gguf", "quecc", gates(np.random.default_rng(0)))
    with pytest.raises(NotGguf, match="no weights of method 'dyvte'"):
        read_gates(tmp_path / "model.gguf", WIDTH, LAYERS)
    write(tmp_path / "model.dyvte.gguf", "dyvte", gates(np.random.default_rng(0)))
    with pytest.raises(NotGguf, match=r"shape \[128, 64\], where \[256, 128\]"):
        read_gates(tmp_path / "model.gguf", 2 * WIDTH, LAYERS)
    with pytest.raises(NotGguf, match="no gate for a layer from 1 to 0"):
        read_gates(tmp_path / "model.gguf", WIDTH, 1)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "model.dyvte.gguf"
    write(path, "dyvte", gates(np.random.default_rng(0)))
    path.write_bytes(path.read_bytes()[:-64])
    with pytest.raises(NotGguf, match="cut short"):
        read_gates(tmp_path / "model.gguf", WIDTH, LAYERS)


def test_weights_of_a_type_that_cannot_be_read_are_refused(tmp_path):
    path = tmp_path / "model.x.gguf"
    writer = gguf.GGUFWriter(path, "localvlm")
    writer.add_string("localvlm.method", "x")
    writer.add_tensor("w", np.zeros((2, 32), np.int8))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(NotGguf, match="cannot be read: I8"):
        read_weights(tmp_path / "model.gguf", "x", {"w": (2, 32)})


def test_untrained_methods_need_no_weights():
    with Pipeline.open(pair_named("demo"), engine=FakeEngine()) as pipeline:
        assert pipeline.weights(METHODS["grid"]) is None
    assert weights_path(Path("a/model-Q4_K_M.gguf"), "dyvte") == Path("a/model-Q4_K_M.dyvte.gguf")
