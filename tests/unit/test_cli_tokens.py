"""``localvlm tokens``: what pictures cost, told from headers."""

from __future__ import annotations

import json

import PIL.Image
import pytest

from localvlm.catalog import DEMOS, pair_named
from localvlm.cli.output import Reporter
from localvlm.cli.tokens import say_seen
from localvlm.engine.families.base import Tile
from localvlm.errors import DownloadError
from localvlm.images import load
from localvlm.planning.shapes import VlmShape
from tests.damage import Gguf


def test_every_installed_pair_is_told_of(cli):
    run = cli("tokens", "example", cli.image, "--json")
    assert run.code == 0
    assert cli.engine is None  # nothing is loaded
    found = json.loads(run.out)
    assert [(one["image"], one["width"], one["height"]) for one in found] == [
        ("example", 384, 384),
        (cli.image, 64, 48),
    ]
    for one in found:
        told = {(vlm["pair"], vlm["role"]): vlm for vlm in one["vlms"]}
        for name in DEMOS:
            for role in ("guide", "model"):
                view = VlmShape(getattr(pair_named(name), role)).view(one["width"], one["height"])
                vlm = told[name, role]
                assert (vlm["tokens"], vlm["tiles"]) == (view.tokens, len(view.tiles))
                assert vlm["kept"] == (None if role == "guide" else round(0.35 * view.tokens))


def test_one_pair_as_a_table(cli):
    run = cli("tokens", "--pair=demo", "--keep=0.5", "example")
    assert [line.split()[2:] for line in run.out.splitlines()] == [
        ["PAIR", "VLM", "TOKENS", "KEPT", "TILES", "SCALE"],
        ["demo", "guide", "(guide)", "144", "-", "1", "0.5"],
        ["demo", "model", "(model)", "144", "72", "1", "0.5"],
    ]
    assert run.err == ""
    auto = json.loads(cli("tokens", "--pair=demo", "--keep=auto", "example", "--json").out)
    assert [vlm["kept"] for vlm in auto[0]["vlms"]] == [None, None]


def test_what_was_done_to_a_picture_is_said(cli):
    PIL.Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(cli.image)
    run = cli("tokens", "--pair=demo", cli.image, "--json")
    assert json.loads(run.out)[0]["notes"] == ["transparent parts shown on white"]
    assert "transparent parts shown on white" in run.err


def test_of_pairs_that_are_not_here_the_catalogue_tells(cli, monkeypatch):
    monkeypatch.setattr("localvlm.hub_cache.cached_files", list)
    run = cli("tokens", "example")
    assert run.out.splitlines()[5:7] == ["", "NOT HERE       TOKENS"]
    assert any(line.startswith("llava1.5-13b") and "576" in line for line in run.out.splitlines()[7:])
    assert "NOT HERE" not in cli("tokens", "example", "--pair=demo").out


def test_verbose_answers_tell_what_is_seen(cli):
    said = []
    reporter = Reporter(verbose=1)
    reporter.note = said.append
    picture = load(cli.image)
    say_seen([picture], pair_named("demo-tiles"), {"image_max_tokens": 0, "guide_image_max_tokens": 144}, reporter)
    view = VlmShape(pair_named("demo-tiles").model).view(64, 48)
    assert said == [
        f"image {cli.image!r} to the guide: 144 image tokens, tiles 1, scale 3",
        f"image {cli.image!r} to the model: {view.tokens} image tokens, tiles {len(view.tiles)}, scale 6",
    ]
    assert "scale" not in cli.ask("-v").err  # its files tell nothing


def test_a_damaged_picture_leaves_the_others(cli):
    damaged = cli.folder / "damaged.jpg"
    damaged.write_bytes(b"no picture")
    run = cli("tokens", "--pair=demo", "example", damaged, cli.image, "--json")
    assert (run.code, [one["image"] for one in json.loads(run.out)]) == (6, ["example", cli.image])
    assert f"'{damaged}' is left out" in run.err
    assert "1 picture was left out" in run.err.splitlines()[-1]
    assert (cli("tokens", "--pair=demo", damaged).out, cli("tokens", "--pair=demo", damaged).code) == ("", 6)
    run = cli("tokens", "--pair=demo", damaged, damaged)
    assert (run.out, run.code, "none of the 2 pictures can be read" in run.err) == ("", 6, True)
    assert "--fetch" in cli("tokens", "--pair=demo", "example", "https://example.org/a.png").err


def test_so_does_one_that_cannot_be_fetched(cli, monkeypatch):
    def fetch(url):
        raise DownloadError(f"{url!r} gave HTTP 404 Not Found")

    monkeypatch.setattr("localvlm.fetch.fetch", fetch)
    run = cli("tokens", "--pair=demo", "--json", "--fetch", "https://example.org/a.png", "example")
    assert (run.code, [one["image"] for one in json.loads(run.out)]) == (7, ["example"])
    assert "HTTP 404" in run.err


def test_what_cannot_be_told(cli):
    assert cli("tokens").code == 2
    assert cli("tokens", "no.png").code == 6
    assert cli("tokens", *cli.pair, cli.image).code == 3


def test_a_damaged_projector_is_told(cli, tmp_path):
    files = pair_named("demo").model
    damaged, key = Gguf.parse(files.mmproj.read_bytes()), b"clip.vision.patch_size"
    damaged.values = [(k, t, bytes(4) if k == key else v) for k, t, v in damaged.values]
    (tmp_path / "mmproj.gguf").write_bytes(damaged.bytes())
    run = cli("tokens", cli.image, "--model", str(files.model), "--mmproj", str(tmp_path / "mmproj.gguf"))
    assert run.code == 3
    assert "'clip.vision.patch_size' is 0" in run.err


@pytest.mark.parametrize(
    ("tile", "scale"),
    [
        (Tile((), (0, 0, 80, 40), 1, 1), 1.0),
        (Tile(((20, 10),), (0, 0, 20, 10), 1, 1), 0.25),
        (Tile(((20, 20),), (0, 0, 20, 20), 1, 1, canvas=(80, 80, 0, 20)), 0.25),
        (Tile(((160, 40),), (0, 0, 40, 40), 1, 1), 1.0),
    ],
)
def test_scale_of_a_tile(tile, scale):
    assert tile.scale(80, 40) == scale
