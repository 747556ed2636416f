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

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import ImagePart, LoadOptions, Message, TextPart
from localvlm.errors import UsageError
from localvlm.pipeline import AskOptions, Pipeline
from localvlm.pruning import Inputs
from localvlm.pruning.dyvte import Gate
from localvlm.pruning.flashsloth import FLASHSLOTH
from localvlm.pruning.in_llm import Cut, Seen
from localvlm.pruning.quecc import QUECC
from localvlm.speaker import altered
from localvlm.stepwise import prefill_in_steps

torch = pytest.importorskip("torch")
WIDTH, GRID, WORDS = 192, (12, 12), 7
EXAMPLE = images.load(Path(demo.__file__).with_name("example.png"))


def trained(name: str):
    return importlib.import_module(f"{demo.__name__}.{name}")


def filled(module, seed: int = 0):
    """With random weights, so that nothing that training begins with is taken for granted."""
    generator = torch.Generator().manual_seed(seed)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=generator) / p.shape[-1] ** 0.5 + (p.ndim == 1)
    return module.eval()


def module_of(method, seed: int = 0):
    """The PyTorch module of a method."""
    found = trained(method.name)
    return filled(found.Quecc() if method is QUECC else found.FlashSloth(), seed)


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


@pytest.mark.parametrize(("method", "side"), [(QUECC, 2), (QUECC, 3), (QUECC, 4), (FLASHSLOTH, 3), (FLASHSLOTH, 4)])
def test_rows_are_those_of_the_module_that_was_trained(method, side):
    made = module_of(method, side)
    weights = arrays(made)
    assert {name: array.shape for name, array in weights.items()} == method.shapes(WIDTH)
    given = inputs(weights, side)
    want, places = reference(made, given, side)
    kept = method.average(given, given.n // side**2)
    np.testing.assert_allclose(kept.rows, want, rtol=1e-4, atol=1e-4)
    assert list(kept.index) == places == sorted(set(places))
    assert list(method.select(given, given.n // side**2)) == places


def test_queries_become_those_of_the_module_that_was_trained():
    made, rng = module_of(FLASHSLOTH), np.random.default_rng(0)
    features, rows, text = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (144, 20, 8))
    within = FLASHSLOTH.within(features, arrays(made))
    assert within.cuts(1.0, 20, 12) == (Cut(made.layer, 20),)
    ahead = torch.nn.functional.pad(torch.from_numpy(text)[None], (0, 0, 0, 5), value=9.0)
    used = torch.arange(13)[None] < 8
    with torch.no_grad():
        want = made.again(torch.from_numpy(rows)[None], torch.from_numpy(features)[None], ahead, used)[0].numpy()
    kept = within.select(Seen(made.layer, np.zeros((3, 20), np.float32), rows, text), 20)
    np.testing.assert_allclose(kept.rows, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(kept.rows[:16], rows[:16])
    assert not np.allclose(kept.rows[16:], rows[16:], atol=0.1)
    assert kept.index.tolist() == list(range(20))


@pytest.mark.parametrize("method", [QUECC, FLASHSLOTH], ids=lambda m: m.name)
def test_pictures_are_cut_into_regions_one_by_one(method):
    weights = arrays(module_of(method))
    both = inputs(weights, grids=[GRID, GRID])
    joint = method.average(both, 32)
    for i in range(2):
        part = slice(144 * i, 144 * (i + 1))
        one = method.average(replace(inputs(weights), text=both.text, features=both.features[part]), 16)
        np.testing.assert_allclose(joint.rows[16 * i : 16 * (i + 1)], one.rows[:16], rtol=1e-5, atol=1e-5)
        assert list(joint.index[16 * i : 16 * (i + 1)]) == list(one.index[:16] + 144 * i)
    if method is FLASHSLOTH:
        assert list(joint.index[32:]) == [284, 285, 286, 287]
        np.testing.assert_array_equal(joint.rows[32:], weights["queries"])


def test_the_share_asked_for_is_a_bound():
    given = inputs(arrays(module_of(QUECC)))
    kept = {k: len(QUECC.average(given, k).index) for k in (144, 36, 35, 16, 15, 9, 2)}
    assert kept == {144: 36, 36: 36, 35: 16, 16: 16, 15: 9, 9: 9, 2: 9}, "9 is the fewest there is"
    assert [round(144 * share) for share in QUECC.shares] == [36, 16, 9]


def test_regions_that_reach_beyond_the_raster_repeat_its_edge():
    given = inputs(arrays(module_of(QUECC)), grids=[(3, 5)])
    raster = given.features.reshape(3, 5, WIDTH)
    wider = np.concatenate([raster, raster[:, -1:]], axis=1)
    whole = replace(given, features=np.concatenate([wider, wider[-1:]]).reshape(24, WIDTH), n=24, grids=((4, 6),),
                    counts=(24,), candidates=np.arange(24, dtype=np.int32))  # fmt: skip
    kept = QUECC.average(given, 3)
    np.testing.assert_array_equal(kept.rows, QUECC.average(whole, 6).rows)
    assert kept.index.tolist() == [0, 2, 4, 10, 12, 14]


def test_regions_on_padding_are_left_out():
    given = inputs(arrays(module_of(QUECC)))
    shown = replace(given, candidates=np.arange(48, dtype=np.int32))
    assert list(QUECC.select(shown, 36)) == [i for i in QUECC.select(given, 36) if i < 48]


def test_queries_stand_on_the_picture_and_never_on_a_region():
    weights = arrays(module_of(FLASHSLOTH))
    shown = replace(inputs(weights), candidates=np.arange(60, dtype=np.int32))
    kept = FLASHSLOTH.average(shown, 16)
    assert kept.index.tolist() == [13, 16, 19, 22, 49, 52, 55, 56, 57, 58, 59], "58 is a centre"
    np.testing.assert_array_equal(kept.rows[-4:], weights["queries"])


@pytest.mark.slow
@pytest.mark.parametrize(("method", "counts"), [(QUECC, [2500, 1156, 625]), (FLASHSLOTH, [1158, 629])])
def test_a_picture_of_ten_thousand_tokens(method, counts):
    given = inputs(arrays(module_of(method)), grids=[(100, 100)])
    assert [len(method.select(given, round(10_000 * share))) for share in method.shares] == counts


def test_a_picture_of_twelve_tokens():
    for method, count in ((QUECC, 4), (FLASHSLOTH, 6)):
        kept = method.average(inputs(arrays(module_of(method)), grids=[(3, 4)]), 3)
        assert len(kept.index) == len(kept.rows) == len(set(kept.index.tolist())) == count


def test_tokens_that_form_no_raster_are_refused():
    given = replace(inputs(arrays(module_of(FLASHSLOTH))), grids=(None,))
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


@pytest.fixture(scope="module")
def pipeline():
    with Pipeline.open(pair_named("demo"), LoadOptions(threads=1)) as opened:
        yield opened


@pytest.mark.parametrize(
    ("name", "keep", "count"),
    [("quecc", 0.35, 36), ("quecc", 0.2, 16), ("quecc", 0.09, 9), ("flashsloth", 0.2, 20), ("flashsloth", 0.09, 13)],
)
def test_the_demo_model_answers_from_rows_of_regions(pipeline, name, keep, count):
    answer = pipeline.ask([EXAMPLE], "What does the card say?", AskOptions(name, keep))
    assert answer.text == "42"
    assert len(answer.kept_indices) == answer.tokens.kept == count


def test_queries_have_a_layer_of_their_own(pipeline):
    with pytest.raises(UsageError, match="method 'flashsloth' says at which layers"):
        pipeline.ask([EXAMPLE], "What does the card say?", AskOptions("flashsloth", 0.2, layer=2))


def test_rows_of_regions_are_made_for_one_question(pipeline):
    with pipeline.session([EXAMPLE]) as session:
        assert session.ask("What does the card say?", AskOptions("flashsloth", 0.2)).text == "42"
        with pytest.raises(UsageError, match="averages tokens"):
            session.ask("Where is the star?", AskOptions("flashsloth", 0.2))


def test_queries_look_within_llama_cpp_as_they_do_in_pytorch(pipeline):
    """What they look at, and so what they become, is the same but for the rounding of Q8_0."""
    compress, frozen, text = trained("compress"), trained("frozen"), trained("text")
    made, question, became = module_of(FLASHSLOTH), "What is below the moon?", []
    weights, model = arrays(made), pipeline.vlm("model")
    encoded = model.encode(EXAMPLE.rgb)
    features = model.features(encoded)
    kept = FLASHSLOTH.average(replace(inputs(weights), features=features), 16)
    within = FLASHSLOTH.within(features, weights)

    def seen(*args):
        became.append(within.select(*args))
        return became[0]

    with altered(model, [encoded], [kept]) as (shown,):
        chat = model.chat([Message("user", question, 1)])
        parts = [part if isinstance(part, TextPart) else ImagePart(shown, kept.index) for part in chat]
        stepped = prefill_in_steps(model, parts, replace(within, select=seen), None)
    model.release(encoded)
    assert stepped.steps == ((0, 20),)

    def again(*args):
        became.append(type(made).again(made, *args)[0].numpy())
        return torch.from_numpy(became[1])[None]

    vlm, ids = frozen.shipped(), torch.tensor([text.ids(question + "\nASSISTANT:")])
    vlm.project, made.again = lambda rows: rows, again
    words = torch.tensor([text.ids(question)])
    batch = compress.Batch(torch.from_numpy(features)[None], words, ids, torch.tensor([ids.shape[1]]), ids, [""])
    with torch.no_grad():
        compress.run(vlm, made, batch, 3)
    native, want = became[0].rows, became[1]
    assert np.abs(native - want).max() < 0.05 * np.abs(want).max()
    assert np.corrcoef(native[16:].ravel(), want[16:].ravel())[0, 1] > 0.999


def test_a_pair_without_weights_is_refused_before_it_answers():
    with (
        Pipeline.open(pair_named("demo-tiles"), LoadOptions(threads=1)) as tiles,
        pytest.raises(UsageError, match=r"method 'quecc' needs weights trained for 'tiles-model\.gguf'"),
    ):
        tiles.ask([EXAMPLE], "What is below the moon?", AskOptions("quecc"))
