"""What --explain draws: each pixel from the right token, for pictures and answers of any kind."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from localvlm.engine.api import ImageLayout
from localvlm.engine.fake import FakeEngine, Script
from localvlm.explain import LARGEST, SMALLEST, draw_heat, draw_kept, explain, panels
from localvlm.images import Image
from localvlm.pipeline import Answer, AskOptions, Pair, Pipeline, VlmFiles

PAIR = Pair("fake", VlmFiles(Path("guide"), Path("p")), VlmFiles(Path("model"), Path("p")))
SCRIPTS = {"guide": Script(answer="red"), "model": Script(answer="dark red", grid=(6, 8))}
QUESTION = "What colour?"


def picture(width: int, height: int, colour: tuple[int, int, int] = (200, 30, 30)) -> Image:
    return Image(np.full((height, width, 3), colour, np.uint8), "plain")


def asked(*pictures: Image, **options: object) -> Answer:
    with Pipeline.open(PAIR, engine=FakeEngine(SCRIPTS)) as pipeline:
        return pipeline.ask(pictures, QUESTION, AskOptions(**options))


def brightness(pixels: np.ndarray) -> np.ndarray:
    """Relative luminance of sRGB: the same for all kinds of colour vision but one."""
    linear = (pixels / 255.0) ** 2.2
    return linear @ np.array([0.2126, 0.7152, 0.0722])


def raster(rows: int, columns: int, side: int) -> np.ndarray:
    y, x = (v.ravel() * side for v in np.mgrid[:rows, :columns])
    return np.stack([x, y, x + side, y + side], axis=1).astype(np.float32)


# ---- heat


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 255, 255), (200, 30, 30)])
def test_more_attention_is_brighter_whatever_the_picture(colour) -> None:
    boxes = raster(1, 10, 20)
    heat = np.asarray(
        draw_heat(PIL.Image.new("RGB", (200, 20), colour), boxes, np.linspace(0, 1, 10, dtype=np.float32))
    )
    assert (np.diff(brightness(heat[10, 10::20].astype(float))) > 0).all()


def test_the_smallest_box_is_drawn_where_boxes_overlap() -> None:
    overview, tile = [0, 0, 40, 40], [20, 20, 40, 40]
    page = PIL.Image.new("RGB", (40, 40), (128, 128, 128))
    for order in ((0, 1), (1, 0)):
        boxes = np.array([overview, tile], np.float32)[list(order)]
        heat = np.asarray(draw_heat(page, boxes, np.array([0.0, 1.0], np.float32)[list(order)])).astype(float)
        assert brightness(heat[30, 30]) > 4 * brightness(heat[10, 10])
        assert (heat[20:, 20:] == heat[30, 30]).all()


def test_padding_has_no_heat() -> None:
    page = PIL.Image.new("RGB", (40, 20), (128, 128, 128))
    boxes = np.array([[0, 0, 20, 20], [40, 0, 40, 20]], np.float32)
    alone = draw_heat(page, boxes[:1], np.ones(1, np.float32), 5.0)
    assert np.array_equal(alone, draw_heat(page, boxes, np.array([1, 5], np.float32)))
    assert np.isfinite(np.asarray(draw_heat(page, boxes, np.zeros(2, np.float32)))).all()


# ---- kept tokens


def test_kept_tokens_are_shown_outlined_and_the_rest_is_faded() -> None:
    page = PIL.Image.new("RGB", (80, 80), (0, 90, 200))
    kept = np.array([5, 6], np.int32)
    pixels = np.asarray(draw_kept(page, raster(4, 4, 20), kept))
    assert (pixels[30, 30] == (0, 90, 200)).all()
    assert (pixels[30, [20, 40, 60]] == 0).all()
    assert (pixels[[20, 40], 30] == 0).all()
    assert pixels[10, 10].min() > 225
    own = (pixels == (0, 90, 200)).all(axis=2)
    ys, xs = np.nonzero(own)
    assert (ys.min(), ys.max(), xs.min(), xs.max()) == (21, 39, 21, 59)


def test_a_kept_tile_lies_on_a_kept_overview() -> None:
    boxes = np.array([[0, 0, 40, 40], [20, 20, 30, 30], [30, 30, 40, 40], [40, 40, 40, 80]], np.float32)
    page = PIL.Image.new("RGB", (40, 40), (0, 90, 200))
    pixels = np.asarray(draw_kept(page, boxes, np.array([0, 1, 3], np.int32)))
    assert (pixels[10, 10] == (0, 90, 200)).all()
    assert (pixels[35, 35] == (0, 90, 200)).all(), "the overview shows it, if not the tile"
    assert (pixels[25, [20, 30]] == 0).all()


def test_tokens_too_small_for_lines_are_outlined_together() -> None:
    page = PIL.Image.new("RGB", (90, 90), (0, 90, 200))
    pixels = np.asarray(draw_kept(page, raster(30, 30, 3), np.arange(900, dtype=np.int32)))
    assert (pixels[1:-1, 1:-1] == (0, 90, 200)).all()


def test_nothing_kept_is_all_faded() -> None:
    pixels = np.asarray(draw_kept(PIL.Image.new("RGB", (80, 80)), raster(4, 4, 20), np.array([], np.int32)))
    assert pixels.min() > 225


# ---- panels and sheet


@pytest.mark.parametrize("size", [(1, 1), (40, 30), (400, 300), (4000, 3000), (2000, 1), (1, 2000)])
def test_pictures_of_any_size(size: tuple[int, int]) -> None:
    shown = picture(*size)
    answer = asked(shown, keep=0.25)
    [row] = panels([shown], answer)
    assert [p.caption.split(":")[0] for p in row] == ["the picture", "where the guide looks", "what the model sees"]
    assert {p.picture.size for p in row} == {row[0].picture.size}
    assert SMALLEST <= max(row[0].picture.size) <= LARGEST
    sheet = explain([shown], QUESTION, answer)
    assert sheet.width < 3.3 * LARGEST
    assert sheet.height < 2 * LARGEST


def test_several_pictures_have_a_row_each() -> None:
    pictures = [picture(300, 200), picture(60, 80, (0, 90, 200)), picture(200, 200)]
    answer = asked(*pictures, keep=0.3)
    rows = list(panels(pictures, answer))
    assert [len(row) for row in rows] == [3, 3, 3]
    kept = [int(re.findall(r"(\d+) of 48", row[2].caption)[0]) for row in rows]
    assert sum(kept) == len(answer.kept_indices) == answer.tokens.kept
    assert rows[0][0].picture.width > rows[1][0].picture.height, "all are drawn at one scale"
    assert explain(pictures, QUESTION, answer).height > sum(row[0].picture.height for row in rows)


def test_pictures_share_one_scale_of_heat() -> None:
    pictures = [picture(80, 60), picture(80, 60)]
    answer = asked(*pictures, keep=0.3)
    answer = replace(answer, saliency=np.repeat(np.array([0.1, 0.1, 2.0, 2.0], np.float32), 24))
    first, second = (brightness(np.asarray(row[1].picture).astype(float)).mean() for row in panels(pictures, answer))
    assert second > 2 * first


def test_without_a_guide_there_is_no_heat() -> None:
    shown = picture(300, 200)
    [row] = panels([shown], asked(shown, method="grid", keep=0.25))
    assert [p.caption for p in row] == ["the picture", "what the model sees: 12 of 48 tokens"]


def test_the_guides_own_answer_has_heat_on_its_own_tokens() -> None:
    shown = picture(300, 200)
    answer = asked(shown, exit_at=0.0)
    assert answer.answered_by == "guide"
    [row] = panels([shown], answer)
    assert [p.caption.split(":")[0] for p in row] == ["the picture", "where the guide looks"]
    heat = brightness(np.asarray(row[1].picture).astype(float))
    middle, right = heat.shape[0] // 2, heat.shape[1] // 2
    assert heat[:middle, right:].mean() > 2 * heat[middle:].mean(), "the script looks at the upper right"


def test_unknown_layouts_are_said() -> None:
    shown = picture(300, 200)
    answer = replace(asked(shown, method="none"), layouts=(ImageLayout(48, None, None, 48),))
    [row] = panels([shown], answer)
    assert len(row) == 1
    assert "not known" in row[0].caption
    assert explain([shown], QUESTION, answer).width > SMALLEST


@pytest.mark.parametrize("text", ["", "\0\x1b[31m\n\n\ud800", "word " * 5000, "x" * 5000, "你好 é ﷽ " * 90])
def test_any_text_is_drawn_in_a_sheet_of_bounded_size(text: str) -> None:
    shown = picture(300, 200)
    answer = replace(asked(shown), text=text, guide_text=text)
    sheet = explain([shown], text, answer)
    assert sheet.height < 2000
    assert sheet.width == explain([shown], QUESTION, asked(shown)).width


def test_a_question_without_pictures_has_a_sheet() -> None:
    assert np.asarray(explain([], QUESTION, asked())).min() < 100


# ---- the command


def test_the_command_draws_and_prints_as_before(cli) -> None:
    target = cli.folder / "out.png"
    run = cli.ask("--json", "--explain", target)
    assert run.code == 0
    assert str(target) in run.err
    plain, drawn = json.loads(cli.ask("--json").out), json.loads(run.out)
    assert plain.keys() == drawn.keys()
    with PIL.Image.open(target) as sheet:
        assert sheet.format == "PNG"
        assert sheet.width > 3 * SMALLEST
    assert [p.name for p in cli.folder.iterdir() if p.name.startswith(".")] == []


def test_places_that_cannot_be_drawn_to_are_refused_before_loading(cli) -> None:
    cases = {cli.folder: (8, "directory"), cli.folder / "no" / "x.png": (8, "does not exist")}
    cases |= {cli.folder / "x.jpg": (2, ".png"), cli.folder / "x": (2, ".png"), Path(cli.image): (2, "overwrite")}
    if os.geteuid():
        (cli.folder / "closed").mkdir(mode=0o500)
        cases[cli.folder / "closed" / "x.png"] = (8, "may not be written")
    before = Path(cli.image).read_bytes()
    for target, (code, words) in cases.items():
        cli.engine = None
        run = cli.ask("--explain", target)
        assert (run.code, run.out) == (code, "")
        assert words in run.err
        assert cli.engine is None
    assert Path(cli.image).read_bytes() == before


def test_a_failed_write_keeps_the_answer_and_the_old_file(cli, monkeypatch) -> None:
    target = cli.folder / "out.png"
    target.write_bytes(b"old")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PIL.Image.Image, "save", full)
    run = cli.ask("--explain", target)
    assert (run.code, run.out) == (8, "dark red\n")
    assert "No space left" in run.err
    assert target.read_bytes() == b"old"
    assert [p.name for p in cli.folder.iterdir() if p.name.startswith(".")] == []


def test_the_example_in_the_docs_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    text = (Path(__file__).parents[2] / "docs" / "python.md").read_text(encoding="utf-8")
    one, conversation = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    monkeypatch.chdir(tmp_path)
    exec(compile(one, "docs/python.md", "exec"), names)
    out = capsys.readouterr().out
    kept, total = map(int, re.findall(r"(\d+) of (\d+) image tokens", out)[0])
    assert kept == round(0.2 * total)
    assert "looked at most: [" in out
    assert out.rstrip().endswith("kept"), "the token looked at most is kept"
    with PIL.Image.open("answer.png") as sheet:
        assert sheet.width > 3 * SMALLEST
    exec(compile(conversation, "docs/python.md", "exec"), names)
    *turns, last = capsys.readouterr().out.splitlines()
    (ran, cells), (more, more_cells) = (map(int, re.findall(r"(\d+) of (\d+) cells", turn)[0]) for turn in turns)
    assert ran == cells
    assert more < cells < more_cells
    assert last == "1 turn left"
