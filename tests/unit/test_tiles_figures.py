"""What ``python -m tests.tiles`` counts and when it fails, on fake VLMs."""

from __future__ import annotations

import json
from pathlib import Path

import PIL.Image
import pytest

from localvlm.engine.fake import FakeEngine, Script
from tests import tiles

ROWS = [{"image": f"{i}.png", "question": "What?", "answer": "red", "type": t} for i, t in enumerate(["small", "read"])]
TILED = Script(focus=(0, 0, 0.55, 0.5), grid=(4, 4), tiles=(2, 2), tile_price=40.0)


@pytest.fixture
def vlms(tmp_path: Path) -> tiles.Vlms:
    for row in ROWS:
        PIL.Image.new("RGB", (40, 30)).save(tmp_path / row["image"])
    whole = Script(focus=TILED.focus, grid=(4, 4))
    model = Script("Red.", pruned_answer="blue", focus=TILED.focus, grid=(4, 4), tiles=(2, 2), tile_price=40.0)
    scripts = {"model": model, "all tiles": TILED, "overview": whole, "demo guide": whole}
    engine = FakeEngine(scripts)
    loaded = {name: engine.load(Path(f"{name}.gguf"), Path("p.gguf")) for name in scripts}
    return tiles.Vlms(loaded.pop("model"), loaded)


def test_rows_count_answers_tokens_and_tiles(vlms: tiles.Vlms, tmp_path: Path) -> None:
    tally, cost = tiles.run(ROWS, tmp_path, vlms)
    assert tally.types == ["small", "read"]
    assert tally.percent("unpruned") == 100
    assert tally.percent("overview alone") == tally.percent("all tiles 35%") == 0
    assert (cost.mean("unpruned"), cost.mean("overview alone")) == ((80, 5), (16, 1))
    assert cost.mean("random 35%")[0] == cost.mean("all tiles 35% priced")[0] == 28
    assert cost.mean("all tiles 35% priced")[1] < cost.mean("all tiles 35%")[1]
    assert "all tiles 35% priced" in tiles.table(tally, cost)
    missed = tiles.misses(tally, cost, tiles.Two(wrong=["rule", "rule"]))
    assert sum("wanted within" in line for line in missed) == 4
    assert missed[-1] == "rule"
    json.dumps(cost.rows)


def test_two_pictures_keep_their_floor_and_the_text_between(vlms: tiles.Vlms, tmp_path: Path) -> None:
    found = tiles.two(ROWS, tmp_path, vlms)
    assert (found.whole, found.right, found.wrong) == ([True], [False], [])
