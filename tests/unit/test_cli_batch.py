"""Answers out: many pictures to one file of lines, schemas, the clipboard, completion in shells."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import PIL.Image
import pytest

from localvlm.engine.api import SamplingOptions
from localvlm.engine.fake import FakeVlm
from localvlm.errors import DownloadError, EngineCrashed, NotEnoughMemory, StorageError, UsageError
from localvlm.images import load
from localvlm.json_lines import JsonLines
from localvlm.schema import schema_of
from tests.unit.cli_help import MODEL_SAYS

QUESTION = "What colour is it?"


@pytest.fixture
def photos(cli, monkeypatch):
    """A folder of four pictures, to stand in."""
    monkeypatch.chdir(cli.folder)
    for i in range(4):
        PIL.Image.new("RGB", (8, 8), (i, 0, 0)).save(f"{i}.jpg")
    return ["0.jpg", "1.jpg", "2.jpg", "3.jpg"]


def batch(cli, *args, out="out.jsonl"):
    return cli("ask", *cli.pair, "--jsonl", out, *args, QUESTION)


def lines(out="out.jsonl") -> list[dict]:
    return [json.loads(line) for line in Path(out).read_text().splitlines()]


# ---- many pictures


def test_each_picture_has_a_line(cli, photos):
    run = batch(cli, "*.jpg", "0.jpg")
    assert (run.code, run.out) == (0, "")
    assert run.err == "4 of 4 pictures have answers in 'out.jsonl'\n"
    assert [line["image"] for line in lines()] == photos
    alone = json.loads(cli("ask", *cli.pair, "--json", "0.jpg", QUESTION).out)
    assert list(lines()[0]) == ["image", "question", *alone]
    assert {(line["question"], line["answer"]) for line in lines()} == {(QUESTION, MODEL_SAYS)}
    assert len(cli.engine.loaded) == 2  # of the last call; one engine for all pictures


def test_pictures_that_are_there_are_skipped(cli, photos, monkeypatch):
    assert batch(cli, *photos[:2]).code == 0
    before = Path("out.jsonl").read_bytes()
    encoded = []
    encode = FakeVlm.encode
    monkeypatch.setattr(FakeVlm, "encode", lambda self, image, **k: encoded.append(image) or encode(self, image, **k))
    run = batch(cli, *photos)
    assert "4 of 4 pictures have answers in 'out.jsonl', 2 of them from before" in run.err
    assert Path("out.jsonl").read_bytes().startswith(before)
    assert [line["image"] for line in lines()] == photos
    assert len(encoded) == 4  # two pictures, by guide and model
    encoded.clear()
    assert batch(cli, *photos).code == 0
    assert encoded == []
    assert cli("ask", *cli.pair, "--jsonl", "out.jsonl", "0.jpg", "Another question?").code == 0
    assert len(lines()) == 5


def test_new_pictures_by_an_old_name_are_asked_about(cli, photos, monkeypatch):
    def said(red: int) -> bytes:
        file = io.BytesIO()
        PIL.Image.new("RGB", (8, 8), (red, 0, 0)).save(file, "PNG")
        return file.getvalue()

    shown = iter(range(9))
    monkeypatch.setattr("localvlm.clipboard.picture_of_clipboard", lambda: said(next(shown)))
    monkeypatch.setattr("localvlm.clipboard.picture_of_screen", lambda: load(said(next(shown)), "(screen)"))
    encoded = []
    encode = FakeVlm.encode
    monkeypatch.setattr(FakeVlm, "encode", lambda self, image, **k: encoded.append(image) or encode(self, image, **k))
    command = ["ask", *cli.pair, "--jsonl", "out.jsonl", "--clip", "--screen", "-", "example", "0.jpg", QUESTION]
    assert cli(*command, stdin=said(100)).code == 0
    assert len(lines()) == 5
    encoded.clear()
    run = cli(*command, stdin=said(101))
    assert "5 of 5 pictures have answers in 'out.jsonl', 2 of them from before" in run.err
    assert {int(image[0, 0, 0]) for image in encoded} == {101, 2, 3}
    assert [line["image"] for line in lines()[5:]] == ["-", "(clipboard)", "(screen)"]


def test_cut_at_any_byte_it_goes_on_and_ends_with_the_same_answers(cli, photos):
    batch(cli, *photos[:2])
    whole = Path("out.jsonl").read_bytes()
    for length in [*range(0, len(whole), 97), len(whole) - 1]:
        Path("out.jsonl").write_bytes(whole[:length])
        assert batch(cli, *photos[:2]).code == 0
        assert [(line["image"], line["answer"]) for line in lines()] == [(name, MODEL_SAYS) for name in photos[:2]]


def test_pictures_that_cannot_be_read_are_left_out_and_told(cli, photos):
    Path("1.jpg").write_text("no picture")
    run = batch(cli, *photos, "gone.jpg")
    assert run.code == 6
    assert "'1.jpg' is left out: image '1.jpg' is not an image" in run.err
    assert "2 pictures were left out" in run.err
    assert [line["image"] for line in lines()] == ["0.jpg", "2.jpg", "3.jpg"]
    PIL.Image.new("RGB", (8, 8)).save("1.jpg")
    assert batch(cli, *photos).code == 0
    assert [line["image"] for line in lines()] == ["0.jpg", "2.jpg", "3.jpg", "1.jpg"]


def test_pictures_that_cannot_be_fetched_are_left_out(cli, photos, monkeypatch):
    def fetch(url: str) -> bytes:
        if "gone" in url:
            raise DownloadError(f"{url!r} gave HTTP 404 Not Found")
        return Path("0.jpg").read_bytes()

    monkeypatch.setattr("localvlm.fetch.fetch", fetch)
    gone, there = "https://example.org/gone.jpg", "https://example.org/there.jpg"
    run = batch(cli, "--fetch", gone, there, "1.jpg")
    assert run.code == 7
    assert f"'{gone}' is left out: '{gone}' gave HTTP 404 Not Found" in run.err
    assert [line["image"] for line in lines()] == [there, "1.jpg"]


def test_pictures_that_memory_is_short_of_are_left_out(cli, photos, monkeypatch):
    PIL.Image.new("RGB", (99, 99)).save("large.jpg")
    PIL.Image.new("RGB", (99, 99)).save("large-too.jpg")
    encode = FakeVlm.encode

    def short(self, image, **options):
        if image.shape[0] == 99:
            raise NotEnoughMemory("the picture does not fit into memory")
        return encode(self, image, **options)

    monkeypatch.setattr(FakeVlm, "encode", short)
    run = batch(cli, "large.jpg", "0.jpg", "large-too.jpg", "large.jpg", "1.jpg")
    assert run.code == 5
    assert "'large.jpg' is left out: the picture does not fit" in run.err
    assert "2 pictures were left out" in run.err
    assert [line["image"] for line in lines()] == ["0.jpg", "1.jpg"]
    run = batch(cli, "large.jpg", "large-too.jpg", "2.jpg")
    assert run.code == 5  # nothing but that so far: it is not the pictures
    assert "the picture does not fit" in run.err.splitlines()[-1]
    assert [line["image"] for line in lines()] == ["0.jpg", "1.jpg"]


@pytest.mark.parametrize("usual", [True, False])
def test_a_first_picture_that_does_not_fit_is_left_out(cli, photos, monkeypatch, usual: bool):
    PIL.Image.new("RGB", (99, 99)).save("large.jpg")

    def check(pipeline, params, reporter, pictures, question, options) -> None:
        if pictures is None and usual:
            return
        if pictures is None or pictures[0].size == (99, 99):
            raise NotEnoughMemory("the pair takes too much")

    monkeypatch.setattr("localvlm.cli.batch.check_fit", check)
    run = batch(cli, "large.jpg", "0.jpg", "1.jpg")
    assert run.code == 5
    assert ("'large.jpg' is left out: the pair takes too much" in run.err) == usual
    assert [line["image"] for line in lines()] == (["0.jpg", "1.jpg"] if usual else [])


def test_crashes_of_the_engine_in_a_row_end_it(cli, photos, monkeypatch):
    crashes = iter([True, False, True, True])
    encode = FakeVlm.encode

    def crash(self, image, **options):
        if self.info.name == "guide" and next(crashes):
            raise EngineCrashed("the engine was ended by SIGSEGV")
        return encode(self, image, **options)

    monkeypatch.setattr(FakeVlm, "encode", crash)
    run = batch(cli, *photos)
    assert run.code == 4
    assert [line["image"] for line in lines()] == ["1.jpg"]
    assert "1 of 4 pictures have answers" in run.err


@pytest.mark.parametrize("content", ["[1]\n", "3\n{}\n", "not json\n", "text without a line's end", '{"a": 1}\nx'])
def test_a_file_of_something_else_is_left_alone(cli, photos, content):
    Path("out.jsonl").write_text(content)
    run = batch(cli, *photos)
    assert run.code == 2
    assert Path("out.jsonl").read_text() == content


def test_a_last_line_without_its_end_is_kept(cli, photos):
    Path("out.jsonl").write_text('{"mine": 1}')
    assert batch(cli, "0.jpg").code == 0
    assert lines()[0] == {"mine": 1}


def test_what_does_not_go_with_lines(cli, photos):
    assert batch(cli, "0.jpg", out="out.json").code == 2
    assert batch(cli, "0.jpg", "--copy").code == 2
    assert batch(cli, "0.jpg", "--explain", "a.png").code == 2
    assert batch(cli, "0.jpg", out="no/out.jsonl").code == 8


def test_one_process_holds_the_file(tmp_path):
    with JsonLines(tmp_path / "a.jsonl", "hint") as first:
        first.add({"a": 1})
        with pytest.raises(UsageError, match="another process"):
            JsonLines(tmp_path / "a.jsonl", "hint")
    with JsonLines(tmp_path / "a.jsonl", "hint") as again:
        assert again.lines == [{"a": 1}]
    with pytest.raises(StorageError):
        JsonLines(tmp_path / "none" / "a.jsonl", "hint")


def test_a_full_disk_is_told_as_one(cli, photos, monkeypatch):
    assert batch(cli, "0.jpg").code == 0
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        run = batch(cli, *photos)
    assert run.code == 8
    assert "(free some space, then run the same command again to go on)" in run.err
    assert batch(cli, *photos).code == 0
    assert {line["image"] for line in lines()} == set(photos)


# ---- schemas


def test_an_answer_by_a_schema(cli):
    said = '{"colour": "red", "n": 2}'
    cli.scripts["model"] = replace(cli.scripts["model"], answer=said)
    run = cli.ask("--json", "--schema", "colour, n int")
    assert json.loads(run.out)["data"] == {"colour": "red", "n": 2}
    assert cli.ask("--schema", "colour, n int").out == said + "\n"
    assert json.loads(cli.ask("--json", "--schema", "colour", "--max-tokens", "4").out)["data"] is None
    assert "data" not in json.loads(cli.ask("--json").out)
    assert cli.ask("--schema", "colour of it").code == 2


def test_guide_and_model_are_given_the_schema(cli, monkeypatch):
    given = []
    generate = FakeVlm.generate

    def note(self, most, sampling=SamplingOptions(), *args, **options):
        given.append((self.info.name, sampling.schema))
        return generate(self, most, sampling, *args, **options)

    monkeypatch.setattr(FakeVlm, "generate", note)
    cli.ask()
    cli.ask("--schema", "colour")
    schema = schema_of("colour")
    assert given == [("guide", ""), ("model", ""), ("guide", schema), ("model", schema)]


def test_a_calibration_of_free_answers_does_not_count_for_schemas(cli, monkeypatch):
    from localvlm import calibration

    found = calibration.Calibration(0.0, "sgl+", 0.1, 0.0, 0.1, 1.0, 100, labelled=True)
    monkeypatch.setattr(calibration, "stored", lambda *_: found)
    assert json.loads(cli.ask("--json").out)["answered_by"] == "guide"
    assert json.loads(cli.ask("--json", "--schema", "a").out)["answered_by"] == "model"
    assert json.loads(cli.ask("--json", "--schema", "a", "--exit-at", "always").out)["answered_by"] == "guide"


# ---- the clipboard


def test_an_answer_is_copied(cli, monkeypatch):
    cli.scripts["model"] = replace(cli.scripts["model"], answer="dark\x1b[31m red")
    copied = []
    monkeypatch.setattr("localvlm.clipboard.copy_text", lambda text: copied.append(text) or "copied by test")
    run = cli.ask("--copy")
    assert (run.code, run.out, copied) == (0, "dark red\n", ["dark red"])
    assert "copied by test" in run.err

    def fail(text: str) -> str:
        raise StorageError("the answer was not copied", "install something")

    monkeypatch.setattr("localvlm.clipboard.copy_text", fail)
    run = cli.ask("--copy")
    assert (run.code, run.out) == (0, "dark red\n")
    assert "not copied (install something)" in run.err


# ---- completion


def completed(*words: str) -> list[str]:
    """What bash would be told of the last word."""
    env = {**os.environ, "_LOCALVLM_COMPLETE": "bash_complete", "COMP_CWORD": str(len(words))}
    env["COMP_WORDS"] = "\n".join(["localvlm", *words])
    code = "from localvlm.cli.main import main; main()"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        (["as"], "plain,ask"),
        (["ask", "--meth"], "plain,--method"),
        (["ask", "--method", "fas"], "plain,fastv"),
        (["ask", "--pair", "dem"], "plain,demo"),
        (["ask", "pho"], "file,pho"),
        (["ask", "--explain", "x"], "file,x"),
        (["ask", "--model", "x"], "file,x"),
        (["tokens", "pho"], "file,pho"),
        (["completion", "fi"], "plain,fish"),
    ],
)
def test_words_are_completed(words, holds):
    assert holds in completed(*words)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_scripts_of_shells(cli, shell):
    run = cli("completion", shell)
    assert run.code == 0
    assert f"_LOCALVLM_COMPLETE={shell}_complete" in run.out
    if shell == "bash":
        script = run.out + "\ncomplete -p localvlm"
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        assert "_localvlm_completion localvlm" in done.stdout
