"""Layers in two contexts: nothing changes where nothing is pruned, and what cannot be staged is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, TextPart, Vlm
from localvlm.engine.client import Engine
from localvlm.engine.gguf_header import Header
from localvlm.engine.staged import check_places
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import ContextOverflow, Interrupted, UnsupportedModel, UsageError
from localvlm.images import Image
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from tests import layers, zoo
from tests.unit.cli_help import Cli


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture
def llava(engine: Engine, folder: Path) -> Iterator[Vlm]:
    model = zoo.build("llava15", folder)
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, n_ctx=512))
    yield vlm
    vlm.close()


QUICK = ("llava15", "qwen25vl", "qwen3vl", "gemma3")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in zoo.FAMILIES])
def test_staged_logits_are_the_plain_ones(name: str, engine: Engine, folder: Path) -> None:
    """Prompts of one batch and of several, then tokens one by one and in a batch: not one bit differs."""
    found = layers.differences(engine, zoo.build(name, folder), steps=4)
    assert {d.cuts for d in found} == {(k,) for k in range(1, zoo.FAMILIES[name].text.layers)}
    assert max(d.rows for d in found) > zoo.row.BATCH
    assert [d for d in found if d.largest != 0.0] == []


@pytest.mark.parametrize("name", layers.REFERENCES)
def test_rows_dropped_at_a_layer_give_what_transformers_gives(name: str, engine: Engine, folder: Path) -> None:
    measures = layers.measure(engine, zoo.build(name, folder), layers.committed(name))
    assert len(measures) == len(zoo.cases(zoo.FAMILIES[name])) * (zoo.FAMILIES[name].text.layers + 1)
    assert [m for m in measures if not m.ok] == []


def picture(vlm: Vlm, keep: list[int] | None) -> list[TextPart | ImagePart]:
    image = np.random.RandomState(3).randint(0, 256, (84, 84, 3)).astype(np.uint8)
    kept = None if keep is None else np.array(keep, np.int32)
    return [TextPart("USER: "), ImagePart(vlm.encode(image), kept), TextPart("\nwhat is it?")]


def test_the_layer_matters_and_is_of_one_prompt_alone(llava: Vlm) -> None:
    parts = picture(llava, [1, 5, 9])
    found = []
    for layer in (0, 1, 2, 0):
        done = llava.prefill(parts, layer=layer)
        assert (done.n_image, done.n_kept) == (36, 3)
        found.append((llava.logits(), llava.generate(6).ids.tolist()))
    assert found[0][1] == found[3][1]
    assert np.array_equal(found[0][0], found[3][0])
    assert all(np.abs(found[i][0] - found[j][0]).max() > 0.01 for i in range(3) for j in range(i))


def test_attention_is_recorded_from_the_layer_on(llava: Vlm) -> None:
    parts = picture(llava, None)
    fed = np.array([83, 266], np.int32)
    found = []
    for layer in (0, 1):
        llava.prefill(parts, tap=True, layer=layer)
        llava.feed(fed)
        found.append(llava.attention())
    plain, staged = found
    assert plain.rows == staged.rows
    for name in ("prompt", "generated", "last"):
        assert np.array_equal(getattr(plain, name)[1:], getattr(staged, name)[1:])
        assert getattr(plain, name)[0].any()
        assert not getattr(staged, name)[0].any()


def test_scoring_leaves_no_trace(llava: Vlm) -> None:
    parts, fed = picture(llava, [2, 3]), np.array([83, 266, 7], np.int32)
    llava.prefill(parts, layer=1)
    first, scored = llava.generate(1).ids, llava.score(fed)
    llava.feed(fed)
    after = llava.logits()
    llava.prefill(parts, layer=1)
    assert llava.generate(1).ids.tolist() == first.tolist()
    llava.feed(fed)
    assert np.array_equal(llava.logits(), after)
    assert scored.shape == (3, llava.info.n_vocab)


def test_the_front_s_cells_bound_the_prompt_and_the_answer(llava: Vlm) -> None:
    """All rows lie in the front, so what fits pruned is refused if it does not fit whole."""
    parts = [TextPart("z" * 470), *picture(llava, [2, 3])]
    pruned = llava.prefill(parts).n_past
    assert pruned + 34 > 511 >= pruned + 1
    with pytest.raises(ContextOverflow, match="512"):
        llava.prefill(parts, layer=1)
    parts = [TextPart("z" * 420), *parts[1:]]
    pruned = llava.prefill(parts, layer=1).n_past
    room = 512 - (pruned + 34)
    assert room > 0
    fed = np.full(room, 83, np.int32)
    llava.feed(fed)
    with pytest.raises(ContextOverflow, match="512"):
        llava.feed(fed[:1])


@pytest.mark.parametrize("layer", [-1, 3, 1000])
def test_layers_out_of_range_are_refused(layer: int, llava: Vlm) -> None:
    with pytest.raises(UsageError, match=f"layer {layer} "):
        llava.prefill([TextPart("USER: ")], layer=layer)


def header(experts: int) -> Header:
    return Header(Path("m.gguf"), {"general.architecture": "qwen3vlmoe", "qwen3vlmoe.expert_count": experts})


@pytest.mark.parametrize(("on_gpu", "experts"), [(1, 0), (4, 0), (4, 8), (-1, 8), (5, 8)])
def test_what_cannot_be_staged_is_refused(on_gpu: int, experts: int) -> None:
    with pytest.raises(UnsupportedModel, match=r"m\.gguf"):
        check_places("m.gguf", 4, on_gpu, header(experts))


@pytest.mark.parametrize(("on_gpu", "experts"), [(0, 0), (0, 8), (-1, 0), (5, 0)])
def test_what_can_be_staged_is_not(on_gpu: int, experts: int) -> None:
    check_places("m.gguf", 4, on_gpu, header(experts))


def cancelled_once(vlm: LlamaVlm, token: np.ndarray) -> None:
    """Feeds a token at the second try, after a cancel stopped the first."""
    vlm.cancel()
    with pytest.raises(Interrupted):
        vlm.feed(token)
    vlm.cancel_reset()
    vlm.feed(token)


@pytest.mark.parametrize("tap", [False, True])
def test_a_cancel_before_a_graph_s_first_node_is_noticed(tap: bool, folder: Path) -> None:
    """No node of such a graph runs, no backend says so, and llama.cpp takes the same graph again for the next token."""
    found, token = zoo.build("llava15", folder), np.array([83], np.int32)
    vlm = LlamaVlm(found.model, found.mmproj, LoadOptions(threads=1))
    parts = picture(vlm, None)
    vlm.prefill(parts, tap=tap)
    vlm.feed(np.array([83, 83], np.int32))
    want = vlm.logits()
    vlm.prefill(parts, tap=tap)
    vlm.feed(token)
    cancelled_once(vlm, token)
    assert np.array_equal(vlm.logits(), want)
    vlm.close()


def test_a_cancel_leaves_nothing_behind(folder: Path) -> None:
    """The first one comes before there is a front; the others stop it in the prompt and in a token."""
    found = zoo.build("llava15", folder)
    vlm = LlamaVlm(found.model, found.mmproj, LoadOptions(threads=1))
    parts, token = picture(vlm, [2, 3, 20]), np.array([83], np.int32)
    for _ in range(2):
        vlm.cancel()
        with pytest.raises(Interrupted):
            vlm.prefill(parts, layer=1)
        vlm.cancel_reset()
    vlm.prefill(parts, layer=1)
    vlm.feed(token)
    want = vlm.logits()
    vlm.prefill(parts, layer=1)
    cancelled_once(vlm, token)
    assert np.array_equal(vlm.logits(), want)
    vlm.close()


def test_the_pipeline_drops_at_the_layer_asked_for(folder: Path) -> None:
    """Guide and model are one here. Nothing dropped, the layer changes nothing; else logits go their own way."""
    found = zoo.build("llava15", folder)
    files = VlmFiles(found.model, found.mmproj)
    picture = Image(np.random.RandomState(3).randint(0, 256, (84, 84, 3)).astype(np.uint8), "noise")
    with Pipeline.open(Pair(None, files, files), LoadOptions(threads=1)) as pipeline:

        def ask(**options: object) -> list[int]:
            settings = AskOptions(method="sgl", max_tokens=8, **options)  # type: ignore[arg-type]
            return list(pipeline.ask([picture], "what is it?", settings).answer_ids)

        assert ask(keep=None, layer=1) == ask(keep=None)
        answers = [ask(keep=0.1, layer=layer) for layer in (0, 1, 2)]
        assert len({tuple(a) for a in answers}) > 1
        with pytest.raises(UsageError, match="layer 3 of"):
            ask(layer=3)


@pytest.mark.parametrize("layer", [0, 1])
def test_compact_positions_close_the_gaps_and_nothing_else(layer: int, engine: Engine, folder: Path) -> None:
    """Unpruned they are the true ones; pruned they are not, and what is fed goes on where the prompt ends."""
    found = zoo.build("llava15", folder)
    logits = []
    for compact in (False, True):
        vlm = engine.load(found.model, found.mmproj, LoadOptions(threads=1, compact_positions=compact))
        vlm.prefill(picture(vlm, None), layer=layer)
        plain = vlm.logits()
        parts = picture(vlm, [1, 5, 9])
        longer = vlm.prefill([*parts, TextPart(" and why?")], layer=layer).token_ids
        want = vlm.logits()
        shorter = vlm.prefill(parts, layer=layer).token_ids
        pruned = vlm.logits()
        assert np.array_equal(longer[: len(shorter)], shorter)
        vlm.feed(longer[len(shorter) :])
        assert np.abs(vlm.logits() - want).max() < 0.02
        logits.append((plain, pruned))
        vlm.close()
    (plain, true), (same, compact) = logits
    assert np.array_equal(plain, same)
    assert np.abs(true - compact).max() > 0.01


def test_rows_and_columns_cannot_be_numbered_without_gaps(engine: Engine, folder: Path) -> None:
    found = zoo.build("qwen25vl", folder)
    with pytest.raises(UnsupportedModel, match="--positions true"):
        engine.load(found.model, found.mmproj, LoadOptions(threads=1, compact_positions=True))


def test_presets_on_llama_cpp(folder: Path) -> None:
    """Three layers: all of the paper's places are before the second one."""
    found = zoo.build("llava15", folder)
    files = VlmFiles(found.model, found.mmproj)
    shown = Image(np.random.RandomState(3).randint(0, 256, (84, 84, 3)).astype(np.uint8), "noise")
    with Pipeline.open(Pair(None, files, files), LoadOptions(threads=1)) as pipeline:
        by_name = pipeline.ask([shown], "what is it?", AskOptions(max_tokens=4, preset="paper-35"))
        by_hand = pipeline.ask([shown], "what is it?", AskOptions(max_tokens=4, keep=0.2, layer=1))
    assert by_name.answer_ids == by_hand.answer_ids
    assert by_name.kept_indices == by_hand.kept_indices
    assert (by_name.layer, by_name.tokens.kept, by_name.tokens.mean_kept) == (1, 7, (36 + 2 * 7) / 3)


@pytest.mark.parametrize("given", [{"keep": 0.3}, {"layer": 2}, {"keep": None}, {"preset": "paper-50"}])
def test_a_preset_with_something_else_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="preset"):
        AskOptions(**{"preset": "paper-9", **given})  # type: ignore[arg-type]


def test_the_command_line_refuses_a_layer_the_model_has_not(cli: Cli) -> None:
    assert cli.ask("--layer", 1).code == 0
    refused = cli.ask("--layer", 1000)
    assert refused.code == 2
    assert "layer 1000" in refused.err
