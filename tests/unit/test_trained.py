"""The trained methods: what runs in numpy is what was trained in PyTorch, and the demo pair's weights are there."""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

try:
    demo = importlib.import_module("localvlm.models.demo")
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    demo = importlib.import_module("models.demo")

from localvlm.errors import UsageError
from localvlm.pruning import Inputs
from localvlm.pruning.dyvte import Gate
from localvlm.pruning.flashsloth import FLASHSLOTH
from localvlm.pruning.quecc import QUECC

torch = pytest.importorskip("torch")
WIDTH, GRID, WORDS = 192, (12, 12), 7


def trained(name: str):
    return importlib.import_module(f"{demo.__name__}.{name}")


def filled(module, seed: int = 0):
    """With random weights, so that nothing that training begins with is taken for granted."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 + (p.ndim == 1)
    return module.eval()


def inputs(weights, seed: int = 0, grids=(GRID,)) -> Inputs:
    rng, counts = np.random.default_rng(seed), [rows * columns for rows, columns in grids]
    n = sum(counts)
    return Inputs(
        n=n,
        candidates=np.arange(n, dtype=np.int32),
        grids=tuple(grids),
        counts=tuple(counts),
        features=rng.normal(size=(n, WIDTH)).astype(np.float32),
        text=rng.normal(size=(WORDS, WIDTH)).astype(np.float32),
        weights=weights,
    )


def arrays(module):
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def reference(module, given: Inputs, side: int) -> tuple[np.ndarray, list[int]]:
    words = torch.from_numpy(given.text)[None]
    ahead = torch.nn.functional.pad(words, (0, 0, 0, 3), value=9.0)  # padding is not looked at
    used = torch.arange(WORDS + 3)[None] < WORDS
    with torch.no_grad():
        rows, places = module.pooled(torch.from_numpy(given.features)[None], ahead, used, side)
    return rows[0].numpy(), places.tolist()


@pytest.mark.parametrize("side", [2, 3, 4])
@pytest.mark.parametrize(("method", "module"), [(QUECC, ("quecc", "Quecc")), (FLASHSLOTH, ("flashsloth", "Sap"))])
def test_rows_of_regions_are_those_of_the_module_that_was_trained(method, module, side):
    made = filled(getattr(trained(module[0]), module[1])(), side)
    weights = arrays(made)
    assert {name: array.shape for name, array in weights.items()} == method.shapes(WIDTH)
    given = inputs(weights, side)
    want, places = reference(made, given, side)
    kept = method.average(given, given.n // side**2)
    np.testing.assert_allclose(kept.rows, want, rtol=1e-4, atol=1e-4)
    assert list(kept.index) == places == sorted(places)
    assert list(method.select(given, given.n // side**2)) == places


@pytest.mark.parametrize("method", [QUECC, FLASHSLOTH], ids=lambda m: m.name)
def test_pictures_are_cut_into_regions_one_by_one(method):
    module = trained(method.name)
    made = filled(module.Quecc() if method is QUECC else module.Sap())
    both = inputs(arrays(made), grids=[GRID, GRID])
    joint = method.average(both, 72)
    for i in range(2):
        part = slice(144 * i, 144 * (i + 1))
        one = method.average(replace(inputs(arrays(made)), text=both.text, features=both.features[part]), 36)
        np.testing.assert_allclose(joint.rows[36 * i : 36 * (i + 1)], one.rows, rtol=1e-5, atol=1e-5)
        assert list(joint.index[36 * i : 36 * (i + 1)]) == list(one.index + 144 * i)


def test_the_share_asked_for_is_a_bound():
    given = inputs(arrays(filled(trained("flashsloth").Sap())))
    kept = {k: len(FLASHSLOTH.average(given, k).index) for k in (144, 36, 35, 16, 15, 9, 2)}
    assert kept == {144: 36, 36: 36, 35: 16, 16: 16, 15: 9, 9: 9, 2: 9}, "9 is the fewest there is"
    assert [round(144 * share) for share in FLASHSLOTH.shares] == [36, 16, 9]


def test_regions_that_reach_beyond_the_raster_repeat_its_edge():
    given = inputs(arrays(filled(trained("flashsloth").Sap())), grids=[(3, 5)])
    raster = given.features.reshape(3, 5, WIDTH)
    wider = np.concatenate([raster, raster[:, -1:]], axis=1)
    whole = replace(given, features=np.concatenate([wider, wider[-1:]]).reshape(24, WIDTH), n=24, grids=((4, 6),),
                    counts=(24,), candidates=np.arange(24, dtype=np.int32))  # fmt: skip
    kept = FLASHSLOTH.average(given, 3)
    np.testing.assert_array_equal(kept.rows, FLASHSLOTH.average(whole, 6).rows)
    assert kept.index.tolist() == [0, 2, 4, 10, 12, 14]


def test_regions_on_padding_are_left_out():
    given = inputs(arrays(filled(trained("flashsloth").Sap())))
    shown = replace(given, candidates=np.arange(48, dtype=np.int32))
    assert list(FLASHSLOTH.select(shown, 36)) == [i for i in FLASHSLOTH.select(given, 36) if i < 48]


@pytest.mark.slow
@pytest.mark.parametrize("method", [QUECC, FLASHSLOTH], ids=lambda m: m.name)
def test_a_picture_of_ten_thousand_tokens(method):
    module = trained(method.name)
    given = inputs(arrays(filled(module.Quecc() if method is QUECC else module.Sap())), grids=[(100, 100)])
    assert [len(method.select(given, round(10_000 * share))) for share in method.shares] == [2500, 1156, 625]


def test_tokens_that_form_no_raster_are_refused():
    given = replace(inputs(arrays(filled(trained("flashsloth").Sap()))), grids=(None,))
    with pytest.raises(UsageError, match="no raster"):
        FLASHSLOTH.select(given, 36)


def test_a_gate_says_what_the_trained_one_says():
    gates = filled(trained("dyvte").Gates())
    rng, said = np.random.default_rng(0), []
    for i, (up, down) in enumerate(zip(gates.up, gates.down, strict=True)):
        gate = Gate(*(p.detach().numpy() for p in (up.weight, up.bias, down.weight, down.bias)))
        for _ in range(20):
            text = rng.normal(size=(9, WIDTH)).astype(np.float32)
            seen = torch.from_numpy(np.concatenate([text.mean(0), text[-1]]))[None, None]
            with torch.no_grad():
                stay, leave = gates(seen.repeat(1, len(gates.up), 1))[0, i]
            said.append(gate.exits(text))
            assert said[-1] == bool(leave > stay)
    assert 0 < sum(said) < len(said)
