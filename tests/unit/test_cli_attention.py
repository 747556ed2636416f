"""``localvlm attention``: the file is complete or not there."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest


@pytest.fixture
def guide(cli):
    return cli.pair[:2]


def test_the_arrays_of_the_file(cli, guide):
    target = cli.folder / "out.npz"
    run = cli("attention", *guide, cli.image, "What colour is it?", "--save", target)
    assert (run.code, run.out) == (0, "red\n")
    assert str(target) in run.err
    with np.load(target, allow_pickle=False) as arrays:
        assert set(arrays) == {"prompt", "generated", "boxes", "tower", "token_ids", "generated_ids", "answer"}
        assert arrays["prompt"].shape == arrays["generated"].shape == (4, 2, 144)
        assert arrays["prompt"].dtype == arrays["tower"].dtype == arrays["boxes"].dtype == np.float32
        assert arrays["token_ids"].dtype == arrays["generated_ids"].dtype == np.int32
        assert (arrays["token_ids"] == -1).sum() == 144
        assert bytes(arrays["generated_ids"]).replace(b"\0", b"") == b"re"  # the last one is never fed back
        assert str(arrays["answer"]) == "red"
        boxes = arrays["boxes"]
        assert boxes.min() == 0
        assert tuple(boxes.max(axis=0)[2:]) == (64, 48)
    assert [p.name for p in cli.folder.iterdir() if p.name.startswith(".")] == []


def test_it_needs_a_guide_and_a_place(cli, guide):
    assert cli("attention", *guide, cli.image, "What?").code == 2
    target = cli.folder / "out.npz"
    run = cli("attention", "--pair", "nonesuch", cli.image, "What?", "--save", target)
    assert run.code == 3


def test_places_that_cannot_be_written_are_refused_before_loading(cli, guide):
    cases = {cli.folder: "directory", cli.folder / "no" / "x.npz": "does not exist"}
    if os.geteuid():
        (cli.folder / "closed").mkdir(mode=0o500)
        cases[cli.folder / "closed" / "x.npz"] = "may not be written"
    for target, words in cases.items():
        cli.engine = None
        run = cli("attention", *guide, cli.image, "What?", "--save", target)
        assert run.code == 8
        assert words in run.err
        assert cli.engine is None


def test_a_failed_write_leaves_the_old_file(cli, guide, monkeypatch):
    target = cli.folder / "out.npz"
    target.write_bytes(b"old")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.savez_compressed", full)
    run = cli("attention", *guide, cli.image, "What?", "--save", target)
    assert run.code == 8
    assert "No space left" in run.err
    assert target.read_bytes() == b"old"
    assert [p.name for p in cli.folder.iterdir() if p.name.startswith(".")] == []


def test_a_crash_leaves_no_file(cli, guide):
    cli.scripts["guide"] = replace(cli.scripts["guide"], crash_at=2)
    target = cli.folder / "out.npz"
    assert cli("attention", *guide, cli.image, "What?", "--save", target).code == 4
    assert not target.exists()
