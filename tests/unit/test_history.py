"""The history keeps what it is given, finds it, and leaves nothing of what is removed."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import numpy as np
import pytest

from localvlm.answers import Answer, TokenCounts
from localvlm.early_exit import Score
from localvlm.errors import StorageError, UsageError
from localvlm.history import STATUSES, History, StoredImage, StoredTurn, history_file, remove_history
from localvlm.images import Image

HOSTILE = (
    "nul\0, \x1b]0;title\x07, \x1b[2J",
    "lone \ud800 and \udfff, and a pair written as two: \ud83d\ude00",
    "\U0001f600 e\u0301 \u202e",
    "line\r\nline\rline\x85\u2028end\n\n",
    "",
    "x" * (1 << 20),
)
QUERIES = ('"', "'", "a OR b", "*", "NEAR(", "-x", "%", "_", "\\", "x:y", "\0", "\ud800", ")" * 500, "zq " * 5000, "^a")


@pytest.fixture
def history(tmp_path):
    with History.open(tmp_path / "data" / "history.db") as opened:
        yield opened


def image(name: str = "cat.png", path: str | None = "/pictures/cat.png", content: bytes = b"\1" * 32) -> StoredImage:
    return StoredImage(name, None if path is None else Path(path), content, 64, 48)


def turn(question: str = "What is it?", answer: str = "A cat.", **more) -> StoredTurn:
    return StoredTurn(question, answer, "model", **more)


def titles(history: History, query: str = "") -> list[str]:
    return [found.title for found in history.conversations(query)]


# ---- what is kept


def test_a_turn_comes_back_as_it_was(history):
    kept = StoredTurn(
        "Where?",
        "there",
        "guide",
        "interrupted",
        "here",
        (image(), StoredImage("doc.pdf#3", Path("/d/doc.pdf"), b"\2" * 32, 9, 8, page=3), image("(clipboard)", None)),
        "demo",
        "sgl+",
        "auto",
        TokenCounts(144, 51, 80, 7, 3, 2, 51.0, 64),
        Score(0.9, 0.8),
        0.85,
        {"total": 1234.5, "first_token": 1000.25},
        1_700_000_000.125,
    )
    conversation = history.begin("Pets", "demo", "Be brief.")
    history.add(conversation, kept)
    assert history.turns(conversation) == [kept]
    found = history.conversation(conversation)
    assert (found.title, found.pair, found.system, found.turns, found.images) == ("Pets", "demo", "Be brief.", 1, 3)


@pytest.mark.parametrize("text", HOSTILE, ids=["escapes", "surrogates", "unicode", "lines", "nothing", "megabyte"])
def test_text_is_kept_letter_for_letter(history, text):
    conversation = history.begin(text, text, text)
    kept = turn(text, text, guide_text=text, pair=text, images=(image(text, "/" + text.replace("\0", "")),))
    history.add(conversation, kept)
    assert history.turns(conversation) == [kept]
    found = history.conversation(conversation)
    assert (found.title, found.pair, found.system) == (text, text, text)
    history.rename(conversation, "other")
    history.rename(conversation, text)
    assert titles(history) == [text]
    paired = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")  # which JSON cannot tell apart
    assert json.loads(history.as_json(conversation))["turns"][0]["answer"] == paired


def test_what_an_answer_tells_is_kept():
    score = Score(np.float32(0.5), np.float32(0.25))
    counts = TokenCounts(144, np.int64(51), 80, 7)
    answer = Answer(
        "dark red", (1, 2), (0, 5), "model", counts, {"total": 12.5}, "sgl+", 0.35, "demo", guide_text="red"
    )
    picture = Image(np.zeros((4, 6, 3), np.uint8), "black.png")
    kept = StoredTurn.of("Which?", answer, [StoredImage.of(picture, Path("black.png"))])
    assert (kept.answer, kept.guide_text, kept.keep, kept.tokens, kept.status) == (
        "dark red",
        "red",
        0.35,
        counts,
        "done",
    )
    assert kept.images[0] == StoredImage("black.png", Path("black.png").absolute(), picture.content, 6, 4)
    with History.open() as history:
        conversation = history.begin("t")
        history.add(conversation, StoredTurn.of("Which?", answer, ()))
        history.add(conversation, turn(score=score))
        assert [t.score for t in history.turns(conversation)] == [None, Score(0.5, 0.25)]
        assert history.turns(conversation)[0].tokens == TokenCounts(144, 51, 80, 7)


def test_a_status_is_one_of_three():
    for status in STATUSES:
        assert turn(status=status).status == status
    with pytest.raises(ValueError, match="'over' is none of done"):
        turn(status="over")


def test_the_newest_comes_first(history):
    first, second = history.begin("first"), history.begin("second")
    assert titles(history) == ["second", "first"]
    history.add(first, turn())
    assert titles(history) == ["first", "second"]
    assert [found.title for found in history.conversations(limit=1)] == ["first"]
    assert history.conversations()[0].updated >= history.conversations()[0].created
    assert second not in [found.id for found in history.conversations(limit=1)]
    assert (history.count(), history.count("first")) == (2, 1)


# ---- search


def test_every_word_is_found_wherever_it_is(history):
    pets, streets = history.begin("Pets"), history.begin("Straßen in Zürich")
    history.add(pets, turn("What animal?", "A grey kitten"))
    history.add(pets, turn("And its name?", "It wears \u540d\u524d\u672d", images=(image("IMG_0042.jpg"),)))
    history.add(streets, turn("Which sign?", "STOP, 100 %"))
    assert titles(history, "pets kitten name") == ["Pets"]
    assert titles(history, "KITTEN grey") == ["Pets"]
    assert titles(history, "itte") == ["Pets"]
    assert titles(history, "\u524d") == ["Pets"]
    assert titles(history, "img_0042") == ["Pets"]
    assert titles(history, "STRASSEN zu\u0308rich") == ["Straßen in Zürich"]
    assert titles(history, "\uff33\uff34\uff2f\uff30") == ["Straßen in Zürich"]
    assert titles(history, "100 %") == ["Straßen in Zürich"]
    assert titles(history, "kitten stop") == []
    assert titles(history, "  ") == ["Straßen in Zürich", "Pets"]
    history.rename(pets, "Felidae")
    assert (titles(history, "pets"), titles(history, "felid")) == ([], ["Felidae"])


@pytest.mark.parametrize("query", QUERIES, ids=[ascii(query)[:12] for query in QUERIES])
def test_no_query_means_more_than_its_letters(history, query):
    history.add(history.begin("plain"), turn("question", "answer"))
    assert titles(history, query) == (["plain"] if not query.strip("\0 ") else [])
    history.add(history.begin("other"), turn("question", f"has {query} in it"))
    if query.strip("\0 "):
        assert titles(history, query) == ["other"]
    assert history.count(query) == len(titles(history, query))


# ---- what is not there


def test_a_conversation_that_is_not_there_is_told(history, tmp_path):
    for call in (
        lambda: history.add(7, turn()),
        lambda: history.turns(7),
        lambda: history.conversation(7),
        lambda: history.rename(7, "x"),
        lambda: history.remove(7, 1),
        lambda: history.export(7, tmp_path),
        lambda: history.as_json(7),
    ):
        with pytest.raises(UsageError, match="no conversation 7 in the history"):
            call()
    history.delete(7)


def test_ids_are_never_given_again(history):
    first = history.begin("first")
    history.delete(first)
    assert history.begin("second") > first
    history.clear()
    assert history.begin("third") > first + 1


def test_a_turn_is_taken_back_and_no_other(history):
    conversation, other = history.begin("t"), history.begin("other")
    one, two, three = turn("one"), turn("two", images=(image(),)), turn("three")
    first, second, third = (history.add(conversation, each) for each in (one, two, three))
    apart = history.add(other, turn("apart"))
    assert [kept.id for kept in history.turns(conversation)] == [first, second, third]
    assert history.remove(conversation, second)
    assert (history.turns(conversation), history.conversation(conversation).images) == ([one, three], 0)
    assert history.remove(conversation, second)
    assert history.remove(conversation, apart)
    assert (len(history.turns(conversation)), len(history.turns(other))) == (2, 1)


def test_a_title_that_is_a_question_goes_with_it(history):
    conversation, first = history.begin_with(turn("sign-of-one, and more"), "sign-of-one")
    titled = {"sign-of-one, and more": "sign-of-one", "two": "two"}.__getitem__
    second = history.add(conversation, turn("two"))
    assert history.remove(conversation, first, titled)
    assert titles(history) == titles(history, "two") == ["two"]
    assert not history.remove(conversation, second, titled)
    assert titles(history) == []
    assert not left(history.path.parent, ["sign-of-one"])
    conversation, first = history.begin_with(turn("two"), "two")
    history.rename(conversation, "by hand")
    assert history.remove(conversation, first, titled)
    assert titles(history) == ["by hand"]


def test_a_conversation_begins_with_its_first_turn_or_not_at_all(history):
    asked = turn("what?", images=(image(),))
    conversation, added = history.begin_with(asked, "what?", "demo", "Be brief.")
    found = history.conversation(conversation)
    assert (found.title, found.pair, found.system, found.turns, found.images) == ("what?", "demo", "Be brief.", 1, 1)
    assert [(kept, kept.id) for kept in history.turns(conversation)] == [(asked, added)]
    history._connection.execute("CREATE TRIGGER full BEFORE INSERT ON image BEGIN SELECT RAISE(ABORT, 'full'); END")
    with pytest.raises(StorageError):
        history.begin_with(asked, "a sign")
    assert titles(history) == ["what?"]


def test_what_tells_of_a_picture_is_found_and_removed(history):
    names = ("by pixels", "by path", "neither")
    shown = (image("a", "/elsewhere", b"\7" * 32), image("b", "/pictures/dog.png"), image())
    for name, picture in zip(names, shown, strict=True):
        conversation = history.begin(name)
        history.add(conversation, turn(images=(picture,)))
        history.add(conversation, turn("And?"))
    wanted = {"sha256": b"\7" * 32, "path": Path("/pictures/dog.png")}
    assert [found.title for found in history.with_image(**wanted)] == ["by path", "by pixels"]
    assert history.with_image() == []
    assert history.forget_image(**wanted) == 2
    assert titles(history) == ["neither"]
    assert history.forget_image(**wanted) == 0


def test_a_picture_is_found_however_its_path_is_written(history, tmp_path, monkeypatch):
    (tmp_path / "far" / "deep").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "far" / "deep")
    monkeypatch.chdir(tmp_path / "work")
    shown = Image(np.zeros((4, 6, 3), np.uint8), "photo.png")
    kept = {"up": "../photo.png", "behind": "../link/../photo.png", "linked": "../link/photo.png"}
    for title, written in kept.items():
        history.begin_with(turn(images=(StoredImage.of(shown, Path(written)),)), title)
    history.begin_with(turn(images=(image(path=f"{tmp_path}/elsewhere/../photo.png"),)), "old")
    for path, expected in (
        ("photo.png", ["old", "up"]),
        ("far/photo.png", ["behind"]),
        ("link/../photo.png", ["behind", "old", "up"]),
        ("far/deep/photo.png", ["linked"]),
        ("link/photo.png", ["linked"]),
        ("work/../far/../photo.png", ["old", "up"]),
        ("other/photo.png", []),
        ("hoto.png", []),
    ):
        found = history.with_image(path=tmp_path / path)
        assert sorted(one.title for one in found) == expected, path
    assert [turn.images[0].path for turn in history.turns(2)] == [tmp_path / "far" / "photo.png"]
    assert history.forget_image(path=Path("../photo.png")) == 2


# ---- nothing is left


def left(folder: Path, signs: list[str]) -> list[str]:
    data = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    return [sign for sign in signs if sign.encode() in data]


def test_of_what_is_removed_no_byte_stays(history):
    """Rows that grow move to other pages, where SQLite's own overwriting does not follow them."""
    choose = random.Random(3)
    alive: dict[int, list[str]] = {}
    gone: list[str] = []
    names = (f"canary-{number:05d}" for number in range(10**5))
    history._connection.execute("PRAGMA synchronous = OFF")
    sweep, history._sweep = history._sweep, lambda: None
    for _ in range(600):
        act, sign = choose.random(), next(names)
        if act < 0.4 or not alive:
            alive[history.begin(sign)] = [sign]
            continue
        conversation = choose.choice(list(alive))
        if act < 0.6:
            history.add(
                conversation, turn(sign, f"{sign} " * choose.choice([1, 9, 900]), images=(image(sign, f"/{sign}"),))
            )
            alive[conversation].append(sign)
        elif act < 0.85:
            history.rename(conversation, sign + "." * choose.choice([0, 10, 100, 800]))
            gone.append(alive[conversation][0])
            alive[conversation][0] = sign
        else:
            history.delete(conversation)
            gone += alive.pop(conversation)
    folder = history.path.parent
    assert left(folder, gone)
    history._sweep = sweep
    conversation = history.begin("the last")
    history.delete(conversation)
    assert left(folder, gone) == []
    kept = [sign for signs in alive.values() for sign in signs]
    assert left(folder, kept) == kept
    history.clear()
    assert left(folder, kept) == []
    assert history._connection.execute("PRAGMA freelist_count").fetchone()[0] == 0, "the file was not written anew"


def test_each_way_to_remove_sweeps(history):
    ways = {
        "delete": history.delete,
        "clear": lambda _: history.clear(),
        "remove": lambda conversation: history.remove(conversation, history.turns(conversation)[-1].id),
        "forget_image": lambda _: history.forget_image(b"\1" * 32),
        "rename": lambda conversation: history.rename(conversation, "other"),
    }
    for way, remove in ways.items():
        sign = f"sign-of-{way}"
        conversation = history.begin(sign if way != "remove" else "t")
        history.add(conversation, turn("q" if way == "rename" else sign, images=(image(),)))
        assert left(history.path.parent, [sign]), way
        remove(conversation)
        assert not left(history.path.parent, [sign]), way


def test_traces_that_a_reader_keeps_are_told(history, monkeypatch):
    monkeypatch.setattr("localvlm.history.store._SWEEP_MS", 1)
    conversation = history.begin("t")
    history.add(conversation, turn())
    with History.open(history.path) as other:
        other._connection.execute("BEGIN")
        other._connection.execute("SELECT * FROM turn").fetchone()
        with pytest.raises(StorageError, match="traces of it are left"):
            history.delete(conversation)
        assert history.conversations() == []
        other._connection.execute("ROLLBACK")
    history.delete(conversation)


# ---- the file


def test_only_its_owner_can_read_it(history):
    history.begin("t")
    assert history.path.parent.stat().st_mode & 0o777 == 0o700
    files = list(history.path.parent.iterdir())
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    assert len(files) == 3


def test_a_file_that_others_could_read_is_closed_to_them(tmp_path):
    (tmp_path / "history.db").touch(0o644)
    History.open(tmp_path / "history.db").close()
    assert (tmp_path / "history.db").stat().st_mode & 0o777 == 0o600


def test_it_lies_below_the_data_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("LOCALVLM_HOME", str(tmp_path))
    assert history_file() == tmp_path / "data" / "history" / "history.db"
    with History.open() as history:
        assert history.path == history_file()
    assert [path.name for path in history_file().parent.iterdir()] == ["history.db"]


@pytest.mark.parametrize("name", ["a?b#c%20d.db", "ä \u540d.db", "\udce4.db", "it's.db"])
def test_a_path_means_no_more_than_its_letters(tmp_path, name):
    with History.open(tmp_path / name) as history:
        history.begin("t")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_many_threads_call_one_history(history):
    conversation = history.begin("t")
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for i in range(20):
                history.add(conversation, turn(f"{number}-{i}"))
                history.conversations("9-9")
        except BaseException as error:  # noqa: BLE001 - told below
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert len({kept.question for kept in history.turns(conversation)}) == 80


def test_a_closed_history_says_so(history):
    history.close()
    history.close()
    with pytest.raises(StorageError, match="was closed"):
        history.conversations()


ODD = (1e18, -1.0, float("inf"), "soon", b"\0", 253402300800, 1 << 62)


@pytest.mark.parametrize("column", ["conversation.created", "conversation.updated", "turn.created"])
@pytest.mark.parametrize("value", ODD, ids=ascii)
def test_times_that_no_calendar_has_are_told(history, column, value):
    conversation, _ = history.begin_with(turn(), "t")
    table, name = column.split(".")
    history._connection.execute(f"UPDATE {table} SET {name} = ?", (value,))
    with pytest.raises(StorageError, match="is damaged: a row holds what it cannot"):
        history.turns(conversation) if table == "turn" else history.conversations()


def test_other_odd_values_are_told(history):
    conversation, _ = history.begin_with(turn(score=Score(0.5, 0.5), tokens=TokenCounts(9, None, 9, 1)), "t")
    (kept,) = history._connection.execute("SELECT details FROM turn").fetchone()
    details = json.loads(kept)
    odd = [{**details, name: value} for name in details for value in ([], {"image": "x"}, {"total": None}, True)]
    odd = [each for each in odd if each["keep"] is not True and each["threshold"] is not True]
    odd += [{**details, "ms": {"total": value}} for value in ("1", None, 10**400, float("nan"), float("inf"))]
    odd += [{**details, "tokens": {**details["tokens"], "image": value}} for value in (None, "9", [])]
    odd += [{**details, "score": {**details["score"], "confidence": 10**400}}]
    for text in (*map(json.dumps, odd), "[" * 100_000, "7", "{}", ""):
        history._connection.execute("UPDATE turn SET details = ?", (text,))
        with pytest.raises(StorageError, match="is damaged: a row holds what it cannot"):
            history.turns(conversation)
    history._connection.execute("UPDATE turn SET details = ?", (kept,))
    for column, value in (("method", b"x"), ("answered_by", b"x"), ("question", "text"), ("status", "over")):
        (before,) = history._connection.execute(f"SELECT {column} FROM turn").fetchone()
        history._connection.execute(f"UPDATE turn SET {column} = ?", (value,))
        with pytest.raises(StorageError, match="is damaged: a row holds what it cannot"):
            history.turns(conversation)
        history._connection.execute(f"UPDATE turn SET {column} = ?", (before,))
    assert len(history.turns(conversation)) == 1


# ---- the file goes


def test_a_history_that_was_removed_begins_anew(history):
    conversation = history.begin("old")
    for path in history.path.parent.iterdir():
        path.unlink()
    with pytest.raises(UsageError, match="no conversation"):
        history.add(conversation, turn())
    history.add(history.begin("new"), turn())
    with History.open(history.path) as other:
        assert titles(other) == ["new"]


def test_removing_takes_the_file_where_no_one_has_it_open(tmp_path):
    path = tmp_path / "history.db"
    assert remove_history(path)
    History.open(path).close()
    (tmp_path / "history.db-wal").write_bytes(b"")
    assert remove_history(path)
    assert list(tmp_path.iterdir()) == []


def test_removing_empties_a_file_that_others_have_open(history):
    conversation = history.begin("sign-of-it")
    assert not remove_history(history.path)
    assert not left(history.path.parent, ["sign-of-it"])
    with pytest.raises(UsageError):
        history.add(conversation, turn())
    history.begin("goes on")


@pytest.mark.parametrize("content", [b"no database at all" * 99, b"SQLite format 3\0" + b"\xff" * 5000])
def test_removing_takes_a_damaged_file(tmp_path, content):
    (tmp_path / "history.db").write_bytes(content)
    assert remove_history(tmp_path / "history.db")
    assert list(tmp_path.iterdir()) == []
