"""The pipeline on real engines: the zoo's pair, and guide and model of different families."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import ImagePart, LoadOptions, Message
from localvlm.errors import ContextOverflow, UsageError
from localvlm.guidance import spread
from localvlm.images import Image
from localvlm.pipeline import STAGES, AskOptions, Pair, Pipeline, VlmFiles
from localvlm.pruning import METHODS, Inputs, budget
from localvlm.selection import on_picture
from tests import zoo

QUESTION = "What is in the corner?"


def files(model: zoo.ZooModel) -> VlmFiles:
    return VlmFiles(model.model, model.mmproj)


def picture(width: int, height: int, seed: int = 0) -> Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 7 + 1, width // 7 + 1, 3), dtype=np.uint8)
    return Image(np.ascontiguousarray(coarse.repeat(7, 0).repeat(7, 1)[:height, :width]), "noise")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("zoo")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Iterator[Pipeline]:
    guide, model = zoo.pair(folder)
    with Pipeline.open(Pair("zoo", files(guide), files(model)), LoadOptions(threads=1)) as opened:
        yield opened


def ask(pipeline: Pipeline, method: str, keep: float | None, *pictures: Image, max_tokens: int = 6, seed: int = 0):
    options = AskOptions(method, keep, max_tokens, seed=seed, tile_price=0.0)
    return pipeline.ask(pictures or (picture(84, 84),), QUESTION, options)


@pytest.mark.parametrize("keep", [0.05, 0.35, 0.64])
def test_sgl_keeps_what_the_guide_attends_to_most(pipeline: Pipeline, keep: float) -> None:
    shown = picture(300, 300, 3)
    answer = ask(pipeline, "sgl", keep, shown)
    look = pipeline.look([shown], QUESTION, 6)
    target = pipeline.vlm("model").layout(300, 300)
    total = (look.attention.prompt + look.attention.generated).sum(axis=(0, 1))
    source = look.layouts[0]
    assert source.boxes is not None
    assert target.boxes is not None
    mass = np.zeros(target.n_tokens)
    for box, score in zip(source.boxes, total, strict=True):
        for i, other in enumerate(target.boxes):
            wide = max(0.0, min(box[2], other[2]) - max(box[0], other[0]))
            high = max(0.0, min(box[3], other[3]) - max(box[1], other[1]))
            mass[i] += score * wide * high / ((box[2] - box[0]) * (box[3] - box[1]))
    k = max(1, round(keep * target.n_tokens))
    assert len(answer.kept_indices) == k
    threshold = np.sort(mass)[-k]
    assert all(mass[i] >= threshold * (1 - 1e-5) for i in answer.kept_indices)


def test_an_answer_counts_its_tokens_and_times(pipeline: Pipeline) -> None:
    answer = ask(pipeline, "sgl+", 0.35)
    n = pipeline.vlm("model").layout(84, 84).n_tokens
    assert answer.tokens.image == n
    assert answer.tokens.kept == len(answer.kept_indices) == round(0.35 * n)
    assert answer.tokens.generated == len(answer.answer_ids) == 6
    unpruned = ask(pipeline, "none", None)
    assert unpruned.tokens.prompt - answer.tokens.prompt == n - answer.tokens.kept
    assert set(answer.ms) == set(STAGES)
    assert answer.ms["total"] >= answer.ms["first_token"] > 0
    assert unpruned.ms["guide_prefill"] == 0 == unpruned.ms["guide_encode"]
    assert answer.pair == "zoo"
    assert answer.answered_by == "model"


def test_keeping_all_is_the_same_by_every_method(pipeline: Pipeline) -> None:
    want = ask(pipeline, "none", None)
    for method in ("sgl", "sgl+", "random", "grid"):
        got = ask(pipeline, method, 1.0)
        assert got.answer_ids == want.answer_ids
        assert got.kept_indices == tuple(range(want.tokens.image))


def test_the_guide_loads_only_if_it_is_needed(folder: Path) -> None:
    guide, model = zoo.pair(folder)
    missing = VlmFiles(folder / "no such guide.gguf", guide.mmproj)
    with Pipeline.open(Pair(None, missing, files(model)), LoadOptions(threads=1)) as opened:
        assert ask(opened, "grid", 0.3, max_tokens=1).tokens.kept > 0
        assert ask(opened, "sgl", None, max_tokens=1).tokens.kept > 0
    with Pipeline.open(Pair(None, None, files(model)), LoadOptions(threads=1)) as opened:
        with pytest.raises(UsageError, match="needs a guide"):
            ask(opened, "sgl+", 0.3)
        with pytest.raises(UsageError, match="no method 'best'"):
            ask(opened, "best", 0.3)


@pytest.mark.parametrize("method", ["sgl", "sgl+", "random", "grid"])
@pytest.mark.parametrize("size", [(400, 60), (60, 400)])
def test_padding_is_never_kept(pipeline: Pipeline, method: str, size: tuple[int, int]) -> None:
    boxes = pipeline.vlm("model").layout(*size).boxes
    assert boxes is not None
    shown = np.flatnonzero((boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]))
    assert 0 < len(shown) < len(boxes)
    answer = ask(pipeline, method, 0.9, picture(*size), max_tokens=1)
    assert answer.kept_indices == tuple(shown)
    few = ask(pipeline, method, 0.1, picture(*size), max_tokens=1)
    assert set(few.kept_indices) <= set(shown)


def test_pictures_compete_for_one_budget(pipeline: Pipeline) -> None:
    pictures = (picture(84, 84, 1), picture(200, 100, 2), picture(90, 90, 4))
    counts = [pipeline.vlm("model").layout(*p.size).n_tokens for p in pictures]
    answer = ask(pipeline, "sgl", 0.3, *pictures)
    assert answer.tokens.image == sum(counts)
    assert answer.tokens.kept == round(0.3 * sum(counts))
    swapped = ask(pipeline, "sgl", 0.3, *pictures[::-1])
    assert swapped.tokens.kept == answer.tokens.kept


@pytest.mark.parametrize("name", ["internvl", "smolvlm"])
def test_tiles_of_one_picture_compete_for_one_budget(folder: Path, name: str) -> None:
    """Tiles of four tokens, with no text between them or with some, which is never dropped."""
    pair = Pair(None, files(zoo.build("llava15", folder)), files(zoo.build(name, folder)))
    shown = picture(190, 100, 5)
    with Pipeline.open(pair, LoadOptions(threads=1)) as opened:
        layout = opened.vlm("model").layout(*shown.size)
        unpruned = ask(opened, "none", None, shown, max_tokens=1)
        answers = {m: ask(opened, m, 0.3, shown, max_tokens=1) for m in ("sgl", "random", "grid")}
        mass = opened.saliency(opened.look([shown], QUESTION, 1), "sum", [layout])
    assert layout.grid is None
    n, k = layout.n_tokens, round(0.3 * layout.n_tokens)
    for answer in answers.values():
        assert len(set(answer.kept_indices)) == k
        assert unpruned.tokens.prompt - answer.tokens.prompt == n - k
    assert set(answers["sgl"].kept_indices) == set(np.argsort(-mass, kind="stable")[:k])
    assert {i // 4 for i in answers["grid"].kept_indices} == set(range(n // 4))


@pytest.mark.parametrize("name", ["llava15", "llavanext", "qwen25vl"])
def test_a_guide_that_is_shown_less_attends_to_that(folder: Path, name: str) -> None:
    """Its prompt is that of a prefill with the same tokens; the others have what the most similar one got."""
    built = zoo.build(name, folder)
    shown = picture(190, 100, 5), picture(84, 84, 6)
    with Pipeline.open(Pair(None, files(built), files(built)), LoadOptions(threads=1)) as opened:
        guide = opened.vlm("guide")
        layouts = [guide.layout(*p.size) for p in shown]
        answer = opened.ask(shown, QUESTION, AskOptions("sgl+", 0.3, 2, guide_keep=0.5, exit_at=1.0, tile_price=0.0))
        look = opened.look(shown, QUESTION, 2, keep=0.5)
        encoded = [guide.encode(p.rgb) for p in shown]
        features = [guide.features(e) for e in encoded]
        kept, of = [], []
        for layout, rows in zip(layouts, features, strict=True):
            inputs = Inputs(layout.n_tokens, np.flatnonzero(on_picture(layout)).astype(np.int32), (None,),
                            (layout.n_tokens,), features=rows)  # fmt: skip
            kept.append(METHODS["divprune"].select(inputs, budget(0.5, inputs)))
            unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
            cosine = unit @ unit[kept[-1]].T
            cosine[kept[-1], np.arange(len(kept[-1]))] = 1
            of.append((kept[-1][cosine.argmax(axis=1)], cosine.max(axis=1).clip(0, 1)))
        parts = guide.chat([Message("user", QUESTION, 2)])
        guide.prefill([ImagePart(encoded[p], kept[p]) if isinstance(p, int) else p for p in parts], tap=True)
        assert guide.generate(2).text == look.answer.text
        direct = guide.attention()
    assert look.shown == tuple(map(len, kept))
    assert answer.tokens.guide == look.prompt.n_kept == sum(look.shown) < sum(n.n_tokens for n in layouts)
    at = 0
    for (nearest, cosine), layout in zip(of, layouts, strict=True):
        here = slice(at, at + layout.n_tokens)
        for seen, got in ((look.attention.prompt, direct.prompt), (look.attention.generated, direct.generated)):
            np.testing.assert_allclose(seen[..., here], got[..., here][..., nearest] * cosine, rtol=1e-3, atol=1e-6)
        at = here.stop
    assert np.count_nonzero(direct.prompt.sum(axis=(0, 1))) == sum(look.shown)


def test_random_follows_its_seed(pipeline: Pipeline) -> None:
    first, again, other = (ask(pipeline, "random", 0.3, seed=s, max_tokens=1).kept_indices for s in (1, 1, 2))
    assert first == again != other


@pytest.mark.parametrize(("guide", "model"), [("llava15", "qwen25vl"), ("qwen25vl", "llava15")])
def test_guide_and_model_of_different_families(folder: Path, guide: str, model: str) -> None:
    pair = Pair(None, files(zoo.build(guide, folder)), files(zoo.build(model, folder)))
    shown = picture(168, 112, 5)
    with Pipeline.open(pair, LoadOptions(threads=1)) as opened:
        answer = ask(opened, "sgl", 0.4, shown, max_tokens=2)
        look = opened.look([shown], QUESTION, 2)
        layout = opened.vlm("model").layout(*shown.size)
        mass = opened.saliency(look, "sum", [layout])
        total = (look.attention.prompt + look.attention.generated).sum(axis=(0, 1))
        boxes = look.layouts[0].boxes
    assert boxes is not None
    assert layout.boxes is not None
    np.testing.assert_allclose(mass, spread(total.astype(np.float32), boxes, layout.boxes), rtol=1e-5)
    assert set(answer.kept_indices) == set(np.argsort(-mass, kind="stable")[: len(answer.kept_indices)])


def test_a_question_too_long_for_the_context_is_refused_before_encoding(folder: Path) -> None:
    guide, model = zoo.pair(folder)
    with Pipeline.open(Pair(None, files(guide), files(model)), LoadOptions(n_ctx=256, threads=1)) as opened:
        stages: list[str] = []
        with pytest.raises(ContextOverflow, match="cells"):
            opened.ask([picture(84, 84)], "why " * 300, AskOptions(), on_stage=stages.append)
        assert stages == ["load"]
        assert ask(opened, "sgl", 0.3, max_tokens=2).text is not None


@pytest.mark.parametrize("name", ["llavanext", "internvl"])
def test_attention_map_of_tiles_and_pictures(folder: Path, name: str) -> None:
    """Columns are joint over tiles and pictures; the ends of rows (-2, LLaVA-NeXT) have none."""
    pair = Pair(None, files(zoo.build(name, folder)), None)
    with Pipeline.open(pair, LoadOptions(threads=1)) as opened:
        shown = picture(190, 100, 5), picture(100, 60, 6)
        arrays = opened.attention(shown, QUESTION, 3).arrays
        vlm = opened.vlm("guide")
        layouts, info = [vlm.layout(*p.size) for p in shown], vlm.info
    ids = arrays["token_ids"]
    n = sum(layout.n_tokens for layout in layouts)
    assert np.count_nonzero(ids == -1) == n
    assert bool(np.any(ids == -2)) is (name == "llavanext")
    assert arrays["prompt"].shape == arrays["generated"].shape == (info.n_layer, info.n_head, n)
    assert arrays["tower"].shape == (info.tower_layers, n)
    assert np.isfinite(arrays["tower"]).all()
    assert np.array_equal(arrays["boxes"], np.concatenate([layout.boxes for layout in layouts]))
    assert layouts[0].grid is None
    assert (arrays["prompt"].sum(axis=-1) > 0).all()


def test_attention_map_has_the_documented_arrays(pipeline: Pipeline) -> None:
    arrays = pipeline.attention([picture(100, 60)], QUESTION, 5).arrays
    info = pipeline.vlm("guide").info
    n = int(np.count_nonzero(arrays["token_ids"] == -1))
    assert arrays["prompt"].shape == arrays["generated"].shape == (info.n_layer, info.n_head, n)
    assert arrays["prompt"].dtype == arrays["generated"].dtype == np.float32
    assert arrays["tower"].shape == (info.tower_layers, n)
    assert arrays["boxes"].shape == (n, 4)
    assert arrays["boxes"].min() >= 0
    assert (arrays["boxes"].max(axis=0) <= [100, 60, 100, 60]).all()
    assert arrays["token_ids"].dtype == arrays["generated_ids"].dtype == np.int32
    assert len(arrays["generated_ids"]) <= 4
    rows = len(arrays["token_ids"]) - int(np.flatnonzero(arrays["token_ids"] < 0)[-1]) - 1
    per_head = arrays["prompt"].sum(axis=-1)
    assert (per_head <= rows + 1e-3).all()
    assert per_head.min() > 0
