"""The zoo's own consistency: committed values belong to today's weights, prompts and pictures. Needs no torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import zoo
from tests.fidelity import compare
from tests.zoo.row import Drawing, Grid, positions
from tests.zoo.tokenizer import MERGES, byte_symbols

CASES = [(row, case) for row in zoo.FAMILIES.values() for case in zoo.cases(row)]


@pytest.mark.parametrize("row", zoo.FAMILIES.values(), ids=lambda row: row.name)
def test_committed_values_belong_to_these_weights(row: zoo.Row) -> None:
    found = zoo.fingerprint(row.weights())
    want = zoo.committed(row.name)["fingerprint"]
    assert found.shape == want.shape, "run `python -m tests.zoo.make_expected`"
    np.testing.assert_allclose(found, want, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("row", "case"), CASES, ids=lambda x: x.name)
def test_committed_values_belong_to_these_cases(row: zoo.Row, case: zoo.Case) -> None:
    want = zoo.committed(row.name)
    assert want[f"{case.name}/ids"].tolist() == row.case_ids(case).tolist()
    assert want[f"{case.name}/fed"].tolist() == list(case.fed)
    assert max(case.fed, default=0) < row.text.vocab
    assert len(row.tokenizer.tokens) == row.text.vocab == len(set(row.tokenizer.tokens))


@pytest.mark.parametrize(("row", "case"), CASES, ids=lambda x: x.name)
def test_shapes_and_sums_of_committed_values(row: zoo.Row, case: zoo.Case) -> None:
    want, name = zoo.committed(row.name), case.name
    counts = [row.image_tokens(case, i) for i in range(len(case.images))]
    for i, n in enumerate(counts if name != "border" else ()):
        rows = sum(len(part.ids()) for part in row.spelling(case, i) if isinstance(part, Grid))  # ends of rows too
        assert want[f"{name}/rows{i}"].shape == (rows, row.text.input_width)
        assert want[f"{name}/tower{i}"].shape == (row.tower_layers, n)
    assert want[f"{name}/logits"].shape == (1 + len(case.fed), row.text.vocab)
    heads = (row.text.layers, row.text.heads)
    assert want[f"{name}/prompt"].shape == (*heads, sum(counts))
    assert want[f"{name}/pruned/prompt"].shape == (*heads, sum(len(k) for k in case.keep))
    last = want[f"{name}/last"]
    assert np.all(last >= 0)
    assert np.all(last.sum(axis=2) < 1)
    assert (f"{name}/generated" in want) is bool(case.fed)
    if case.fed:
        assert np.all(want[f"{name}/generated"].sum(axis=2) < len(case.fed))
    if name != "border":
        assert np.all(want[f"{name}/prompt_maximum"] >= last - 1e-6)


@pytest.mark.parametrize(("row", "case"), CASES, ids=lambda x: x.name)
def test_bounds_tell_wrong_positions_and_wrong_towers(row: zoo.Row, case: zoo.Case) -> None:
    want, name = zoo.committed(row.name), case.name
    assert not compare(name, "compact", want[f"{name}/compact_logits"], want[f"{name}/pruned_logits"]).ok
    if name == "border":  # its picture is the first case's
        return
    assert (f"{name}/stock0" in want) is bool(row.repairs)
    if row.repairs:
        assert not compare(name, "stock", want[f"{name}/stock0"][None], want[f"{name}/rows0"][None]).ok


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_attention_is_neither_uniform_nor_a_single_token(name: str) -> None:
    for case in zoo.cases(zoo.FAMILIES[name]):
        last = zoo.committed(name)[f"{case.name}/last"].astype(np.float64)
        share = last / last.sum(axis=2, keepdims=True)
        entropy = -(share * np.log(np.maximum(share, 1e-30))).sum(axis=2) / np.log(share.shape[2])
        assert entropy.min() > 0.05
        assert entropy.max() < 0.98
        assert entropy.std() > 0.03


def test_files_are_small_and_the_same_each_time(tmp_path: Path) -> None:
    for path in zoo.EXPECTED.glob("*.npz"):
        assert path.stat().st_size < 500_000
    for name in zoo.FAMILIES:
        first, second = zoo.build(name, tmp_path / "a"), zoo.build(name, tmp_path / "b")
        assert first.model.read_bytes() == second.model.read_bytes()
        assert first.mmproj.read_bytes() == second.mmproj.read_bytes()
        assert first.model.stat().st_size + first.mmproj.stat().st_size < 10_000_000


def test_tokenizer_merges_lowest_rank_first_and_keeps_control_tokens_whole() -> None:
    tokenizer = zoo.FAMILIES["qwen25vl"].tokenizer
    tokens = tokenizer.tokens
    spelled = [tokens[i] for i in tokenizer.encode("<|im_start|>what is the re<|im_end|>")]
    assert spelled == ["<|im_start|>", "what", "Ġis", "Ġthe", "Ġ", "r", "e", "<|im_end|>"]
    assert len(set(byte_symbols())) == 256
    assert all(a in tokens and b in tokens for a, b in MERGES)


def test_mrope_positions_of_a_wide_picture() -> None:
    row = zoo.FAMILIES["qwen25vl"]
    case = zoo.Case("t", ("ab", 0, "c"), (Drawing(84, 56, 7, 0),), (), ((),))
    t, y, x = positions(row, case, row.case_ids(case))
    # a b <vision_start> | 2 x 3 tokens from 3 on | <vision_end> c at 3 + max(2, 3)
    assert t.tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7]
    assert y.tolist() == [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7]
    assert x.tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("row", zoo.FAMILIES.values(), ids=lambda row: row.name)
def test_transformers_still_gives_the_committed_values(row: zoo.Row) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.zoo.reference import expected

    want = zoo.committed(row.name)
    found = expected(row)
    assert set(found) == set(want) - {"fingerprint"}
    for key, value in found.items():
        np.testing.assert_allclose(value, want[key], atol=2e-3, err_msg=key)
