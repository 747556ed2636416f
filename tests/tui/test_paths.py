"""Paths behind an ``@``: what is written is read back, by the chat and by localvlm.sources, whatever a name holds."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from localvlm.sources import sources
from localvlm.tui.paths import Found, candidates, filtered, listed, mention_before, mentions, quoted, written

NAMES = st.text(st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/"), min_size=1, max_size=20)


@given(NAMES, st.sampled_from(["", "look at ", "(", "line\n"]))
@example("it's a photo.png", "")
@example("'quoted'.png", "")
@example('"both\' kinds".png', "")
@example(r"back\slash.png", "")
@example(r"'\''", "")
@example("@at.png", "")
def test_a_quoted_path_is_one_mention_whatever_is_around_it(name, before):
    text = f"{before}@{quoted(name)} and more"
    found = list(mentions(text))
    assert [one.path for one in found] == [name]
    assert text[found[0].start : found[0].end] == f"@{quoted(name)}"


@pytest.mark.parametrize("name", ["a.png", "my photo.png", "it's.png", r"a\b.png", "[1].png", "'q'.png", '"q" x.png'])
def test_sources_reads_back_what_is_quoted(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path(name).write_bytes(b"x")
    (mention,) = mentions(f"@{quoted(name)}")
    (source,) = sources(mention.written)
    assert Path(source.name).samefile(name)


def test_addresses_are_no_mentions():
    assert [one.path for one in mentions("mail me@example.org or see @cat.png, @dog.png")] == ["cat.png,", "dog.png"]
    assert not list(mentions("@ alone, and a@b"))


@pytest.mark.parametrize(
    ("before", "path"),
    [
        ("@", ""),
        ("what is @ho", "ho"),
        ("@a.png and @b", "b"),
        ("@'my ph", "my ph"),
        ("@'it'\\''s", "it's"),
        ('@"my ph', "my ph"),
        ("@my\\ ph", "my ph"),
        ("@my\\", "my\\"),
        ("@'my photo.png'", None),
        ("@a.png ", None),
        ("a@b", None),
        ("nothing", None),
    ],
)
def test_the_path_that_is_being_written(before, path):
    found = mention_before(before)
    assert (found.path if found else None) == path
    assert found is None or found.end == len(before)


@pytest.fixture
def folder(tmp_path):
    for name in ("img10.jpg", "img2.JPG", "notes.txt", ".hidden.png", "my photo.png", "new\nline.png"):
        (tmp_path / name).write_bytes(b"abc")
    for name in ("imports", ".git"):
        (tmp_path / name).mkdir()
    (tmp_path / "imports" / "deep.webp").write_bytes(b"")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone")
    return tmp_path


def test_folders_come_first_and_numbers_in_their_order(folder):
    names = [one.name for one in listed(folder)]
    assert names == ["imports", "img2.JPG", "img10.jpg", "my photo.png", "new\nline.png"]
    assert {one.name for one in listed(folder, hidden=True)} - set(names) == {".git", ".hidden.png"}
    assert listed(folder)[1] == Found("img2.JPG", False, 3)
    with pytest.raises(OSError):
        listed(folder / "gone")


def test_candidates_are_pictures_then_folders_and_fit_on_a_line(folder, monkeypatch):
    assert candidates("im", folder) == ["img2.JPG", "img10.jpg", "imports/"]
    assert candidates("imports/", folder) == ["imports/deep.webp"]
    assert candidates("HOTO", folder) == ["my photo.png"], "in the middle, whatever its case"
    assert candidates(".h", folder) == [".hidden.png"]
    assert candidates("gone/", folder) == []
    assert candidates(f"{folder}/img1", Path("/")) == [f"{folder}/img10.jpg"]
    monkeypatch.setenv("HOME", str(folder))
    assert candidates("~/img1", Path("/")) == ["~/img10.jpg"]
    assert not any("\n" in one for one in candidates("", folder))


def test_a_folder_is_written_so_that_one_can_write_on():
    assert written("my photo.png") == "'my photo.png' "
    assert written("plain/") == "plain/"
    for folder in ("my folder/", "it's/"):
        text = f"@{written(folder)}"
        found = mention_before(text)
        assert found is not None
        assert found.path == folder


def test_filtering_wants_all_words_and_prefers_beginnings():
    found = [Found(name, False) for name in ("a cat.png", "cat 2.png", "cart.png")]
    assert [one.name for one in filtered(found, "CAT")] == ["cat 2.png", "a cat.png"]
    assert [one.name for one in filtered(found, "cat 2")] == ["cat 2.png"]
    assert filtered(found, "") == found
