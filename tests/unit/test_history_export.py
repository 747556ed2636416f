"""What is exported stays in its place, calls nothing and drives no terminal; pictures come along if unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from markdown_it import MarkdownIt

from localvlm.answers import TokenCounts
from localvlm.errors import StorageError
from localvlm.history import History, StoredImage, StoredTurn
from localvlm.images import Image

WHEN = 1_700_000_000.0
HOSTILE = (
    "<script>alert(1)</script>",
    "<!-- never closed",
    "![x](https://evil.example/?q=1)",
    "[x]: https://evil.example 'y'\n\n[1]",
    "[click](javascript:alert)",
    "# Not a heading\n\n## 2\n\n**You**",
    "> quoted\n\nnot quoted",
    "```\nnever closed",
    "````\n```\n<b>",
    "---\n\n===\n\ntext\n===",
    "- a\n1. b\n\n      code",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "\x1b]0;title\x07\x1b[31mred \x9b2J \u202edcba \u2028# x\r# y\0",
    "lone \ud800 \udfff",
    "a\\\nb\\",
    "*stars* _lines_ `code` ~~no~~ &amp; $x$ \\*",
)


@pytest.fixture
def history(tmp_path):
    with History.open(tmp_path / "data" / "history.db") as opened:
        yield opened


def tokens(text: str) -> list:
    """The tokens of a Markdown text that lie outside every quotation."""
    depth, found = 0, []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        depth -= token.type == "blockquote_close"
        if not depth:
            found.append(token)
        depth += token.type == "blockquote_open"
    return found


def exported(history: History, folder: Path, *turns: StoredTurn, title: str = "Title") -> str:
    conversation = history.begin(title, "demo", "Be brief.")
    for turn in turns:
        history.add(conversation, turn)
    return history.export(conversation, folder).read_text(encoding="utf-8")


def test_a_conversation_reads_well(history, tmp_path):
    counts = TokenCounts(144, 51, 80, 7)
    first = StoredTurn(
        "What is\nit?", "A **cat**.", "model", guide_text="a dog", tokens=counts, ms={"total": 1250.0}, created=WHEN
    )
    stopped = StoredTurn("And?", "", None, "failed", created=WHEN)
    text = exported(history, tmp_path / "out", first, stopped)
    assert text.startswith("# Title\n\nBegun 20")
    assert text.partition("Be brief.\n\n")[2] == (
        "## 1\n\n**You**, 2023-11-14 22:13 UTC\n\n> What is\\\n> it?\n\n"
        "**The model**, from 51 of 144 image tokens, 1.2 s\n\n> A **cat**.\n\n**The guide's draft**\n\n> a dog\n\n"
        "## 2\n\n**You**, 2023-11-14 22:13 UTC\n\n> And?\n\n**No answer**, failed\n"
    )


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_stays_where_it_is_put(history, tmp_path, text):
    plain = exported(history, tmp_path / "a", StoredTurn("q", "a", "model", guide_text="g", created=WHEN))
    turn = StoredTurn(text, text, "model", guide_text="g" + text, images=(StoredImage(text, None, b"\1" * 32, 1, 1),))
    hostile = exported(history, tmp_path / "b", turn, title=text)
    outside = [token.type for token in tokens(hostile)]
    assert outside[:3] == ["heading_open", "inline", "heading_close"]
    assert [t for t in outside if "blockquote" in t or "heading" in t or t == "html_block"] == [
        t.type for t in tokens(plain) if "blockquote" in t.type or "heading" in t.type
    ]
    assert "html" not in str([t.type for t in MarkdownIt("commonmark").parse(hostile)])
    page = MarkdownIt("commonmark").enable("table").render(hostile)
    assert not re.search(r"<(script|img|a|b)\b|<!--", page)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028]", hostile)


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_a_question_is_shown_letter_for_letter(history, tmp_path, text):
    page = MarkdownIt("commonmark").enable("table").render(exported(history, tmp_path, StoredTurn(text, "", None)))
    shown = page.rpartition("<blockquote>")[2].partition("</blockquote>")[0]
    from html import unescape

    from localvlm.sanitize import sanitize

    letters = unescape(re.sub(r"</?p>|<br />", "", shown)).replace("\xa0", " ")
    assert letters.split() == sanitize(text).split()


def test_names_of_folders_are_safe_and_none_is_written_over(history, tmp_path):
    out = tmp_path / "out"
    for title in (
        "../../etc/passwd",
        "a/b\0c",
        "",
        "x" * 500,
        "\u540d\u524d: ja?",
        "same",
        "same",
        "\x1b]0;x\x07",
        "-rf",
    ):
        exported(history, out, StoredTurn("q", "a", "model"), title=title)
    names = sorted(path.name for path in out.iterdir())
    assert len(names) == 9
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d[\w-]*", name) and len(name) < 60 for name in names), names
    assert all([path.name for path in folder.iterdir()] == ["conversation.md"] for folder in out.iterdir())
    assert any(name.endswith("-same-2") for name in names)


# ---- pictures


def picture(path: Path, seed: int = 0) -> StoredImage:
    pixels = np.random.default_rng(seed).integers(0, 256, (20, 30, 3)).astype(np.uint8)
    PIL.Image.fromarray(pixels).save(path)
    return StoredImage.of(Image(pixels, str(path)), path)


def test_pictures_come_along_if_they_are_the_same(history, tmp_path):
    there, tiff, gone, changed = (
        picture(tmp_path / n, i) for i, n in enumerate(("a[1].png", "b.tif", "c.png", "d.png"))
    )
    (tmp_path / "c.png").unlink()
    picture(tmp_path / "d.png", 99)
    clipboard = StoredImage("(clipboard)", None, b"\1" * 32, 1, 1)
    turns = [
        StoredTurn("q", "a", "model", images=(there, tiff, gone, changed, clipboard)),
        StoredTurn("q", "a", "model", images=(there,)),
    ]
    text = exported(history, tmp_path / "out", *turns)
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(p.name for p in folder.iterdir()) == ["conversation.md", "picture-1.png", "picture-2.png"]
    assert (folder / "picture-1.png").read_bytes() == (tmp_path / "a[1].png").read_bytes()
    assert StoredImage.of(Image(np.asarray(PIL.Image.open(folder / "picture-2.png")), "b"), None).sha256 == tiff.sha256
    assert text.count("![a\\[1\\].png](picture-1.png)") == 2
    assert "![b.tif](picture-2.png)" in text
    assert "*c.png is not included: the file is gone*" in text
    assert "*d.png is not included: the picture there is another one now*" in text
    assert "*(clipboard) is not included: it came from no file*" in text


def test_what_is_no_picture_any_more_is_not_copied(history, tmp_path):
    kept = picture(tmp_path / "a.png")
    (tmp_path / "a.png").write_text("secret")
    folder = StoredImage("folder", tmp_path, b"\1" * 32, 1, 1)
    device = StoredImage("zero", Path("/dev/zero"), b"\2" * 32, 1, 1)
    text = exported(history, tmp_path / "out", StoredTurn("q", "a", "model", images=(kept, folder, device)))
    assert text.count("is not included") == 3
    assert len(list((tmp_path / "out").rglob("*"))) == 2


def test_a_folder_that_cannot_be_written_is_told_and_nothing_stays(history, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot be written"):
        exported(history, tmp_path / "file")
    monkeypatch.setattr(
        Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    with pytest.raises(StorageError, match="No space left"):
        exported(history, tmp_path / "out", StoredTurn("q", "a", "model"))
    assert list((tmp_path / "out").iterdir()) == []
