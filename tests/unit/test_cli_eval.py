"""``localvlm eval`` on the fake engine: what it prints and writes, and that it can be killed at any point."""

from __future__ import annotations

import itertools
import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest

from localvlm import scoring
from localvlm.bench.shapes import Llm, VlmShape, write_vlm
from localvlm.bench.towers import Tower
from localvlm.cli.evaluate import RULES
from localvlm.engine.fake import FakeVlm, Script
from localvlm.evaluation.plan import CHOICES

KINDS = {"colour": "red", "text": "dark red", "odd <b>&\ud800": "blue"}
GUIDE_SAYS, FULL_SAYS, PRUNED_SAYS = "red", "dark red", "red"
TOWER = Tower("clip", 1, 64, 2, 64, 28, 14)
SMALL = VlmShape("small", Llm("llama", 2, 64, 2, 2, 64, 300), TOWER, "Q8_0")
LARGE = VlmShape("large", Llm("llama", 4, 64, 2, 2, 128, 300), TOWER, "Q8_0")
SCRIPTS = {"guide": Script(answer=GUIDE_SAYS), "model": Script(answer=FULL_SAYS, pruned_answer=PRUNED_SAYS)}


def make(folder: Path, n: int = 6) -> Path:
    """``n`` questions, and model files that have a shape."""
    for name, shape in (("guide", SMALL), ("model", LARGE)):
        model, mmproj = write_vlm(folder, shape)
        model.replace(folder / f"{name}.gguf")
        mmproj.replace(folder / f"{name}-mmproj.gguf")
    rows = []
    for i in range(n):
        PIL.Image.new("RGB", (64, 48), (i, 0, 0)).save(folder / f"{i}.png")
        kind = list(KINDS)[i % len(KINDS)]
        rows.append({"image": f"{i}.png", "question": "What?", "answer": KINDS[kind], "type": kind})
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    return data


@pytest.fixture
def data(cli, tmp_path):
    cli.scripts = dict(SCRIPTS)
    return make(tmp_path)


def figures(path: Path) -> dict[str, dict]:
    return {row["name"]: row for row in json.loads(path.read_text())["rows"]}


# ---- what comes out


def test_every_method_at_every_budget(cli, data, tmp_path):
    methods = ["--methods", "sgl+,random,downscale"]
    assert cli("eval", data, *cli.pair, *methods, "--keep", ".5,.25", "--json", tmp_path / "o.json").code == 0
    rows = figures(tmp_path / "o.json")
    assert list(rows) == ["none", "blind", "guide", "sgl+ 50%", "sgl+ 25%", "random 50%", "random 25%", "downscale 50%",
                          "downscale 25%"]  # fmt: skip
    right = {name: row["accuracy"]["mean"] for name, row in rows.items()}
    assert {name: round(6 * share) for name, share in right.items()} == dict.fromkeys(rows, 2)
    by_type = {name: [row["types"][kind]["mean"] for kind in KINDS] for name, row in rows.items()}
    assert by_type["none"] == by_type["blind"] == [0, 1, 0]
    assert by_type["guide"] == by_type["sgl+ 50%"] == by_type["random 25%"] == by_type["downscale 50%"] == [1, 0, 0]
    interval = {"n": 2, "mean": 1.0, "low": pytest.approx(0.3424, abs=1e-4), "high": 1.0}
    assert rows["sgl+ 50%"]["types"]["colour"] == interval
    assert rows["sgl+ 50%"]["of_unpruned"] == 1.0
    assert rows["none"]["floor_adjusted"] is None


def test_costs_are_those_of_what_was_run(cli, data, tmp_path):
    cli("eval", data, *cli.pair, "--methods", "sgl,grid", "--keep", "0.25", "--json", tmp_path / "o.json")
    rows = figures(tmp_path / "o.json")
    cost = {name: row["cost"] for name, row in rows.items()}
    assert (cost["none"]["image"], cost["none"]["kept"], cost["blind"]["kept"]) == (144, 144, 0)
    assert (cost["sgl 25%"]["kept"], cost["sgl 25%"]["mean_kept"], cost["sgl 25%"]["share"]) == (36, 36, 0.25)
    text = len("USER: What?\nASSISTANT:") + 1
    weights = LARGE.llm.layers * (4 * 64 * 64 + 3 * 128 * 64)

    def flops(kept: int, said: str) -> int:
        rows = text + kept + len(said)
        return 2 * weights * rows + 2 * 4 * 64 * rows * (rows + 1) + 2 * 300 * 64 * (len(said) + 1)

    assert cost["none"]["model_flops"] == flops(144, FULL_SAYS)
    assert cost["grid 25%"]["flops"] == flops(36, PRUNED_SAYS)
    assert cost["grid 25%"]["guide_flops"] == 0
    assert cost["sgl 25%"]["flops"] == flops(36, PRUNED_SAYS) + cost["guide"]["guide_flops"]
    assert cost["guide"]["model_flops"] == 0 < cost["guide"]["guide_flops"]
    assert rows["grid 25%"]["flops_share"] == flops(36, PRUNED_SAYS) / flops(144, FULL_SAYS)


def test_a_guide_that_sees_less_is_counted_so(cli, data, tmp_path):
    command = ["eval", data, *cli.pair, "--methods", "sgl", "--keep", "0.25", "--guide-keep", "0.5"]
    assert cli(*command, "--json", tmp_path / "o.json").code == 0
    rows = figures(tmp_path / "o.json")
    assert {name: row["cost"]["kept"] for name, row in rows.items()} == {
        "none": 144, "blind": 0, "guide": 72, "sgl 25%": 36
    }  # fmt: skip


def test_what_is_the_same_runs_once(cli, data, monkeypatch):
    counts: Counter[tuple[str, str]] = Counter()
    step = FakeVlm.step

    def counted(vlm: FakeVlm, name: str) -> None:
        counts[vlm.info.name, name] += 1
        step(vlm, name)

    monkeypatch.setattr(FakeVlm, "step", counted)
    cli("eval", data, *cli.pair, "--methods", "sgl,sgl+,random,grid", "--keep", "0.5,0.25")
    assert counts["guide", "encode"] == counts["guide", "prefill"] == counts["model", "encode"] == 6
    assert counts["model", "prefill"] == 6 * (2 + 8)


def test_without_a_guide(cli, data, tmp_path):
    alone = cli.pair[2:]
    run = cli("eval", data, *alone, "--methods", "grid", "--keep", "0.5", "--json", tmp_path / "o.json")
    assert run.code == 0
    assert list(figures(tmp_path / "o.json")) == ["none", "blind", "grid 50%"]
    assert "guide" not in cli("eval", data, *alone, "--methods", "grid").out.split("\n\n")[1]
    assert cli("eval", data, *alone, "--methods", "sgl").code == 2


def test_a_method_that_cannot_keep_so_few_says_so(cli, data):
    run = cli("eval", data, *cli.pair, "--methods", "grid", "--keep", "0.001")
    assert re.search(r"grid +min 0.694% ", run.out)  # one token of 144


def test_downscale_says_what_it_did(cli, data, tmp_path):
    files = "--json", tmp_path / "o.json", "--html", tmp_path / "o.html"
    run = cli("eval", data, *cli.pair, "--methods", "downscale", "--keep", "0.25", *files)
    assert re.search(r"^downscale \(pooled\) +25% ", run.out, re.MULTILINE)
    assert ">downscale (pooled)</th>" in (tmp_path / "o.html").read_text()
    row = figures(tmp_path / "o.json")["downscale 25%"]
    assert (row["how"], row["reached"], row["cost"]["kept"]) == ("pooled", True, 36)


def test_yes_and_no(cli, tmp_path):
    make(tmp_path, 1)
    cli.scripts = {"guide": Script("no"), "model": Script("Yes.", pruned_answer="a cat")}
    data, labels = tmp_path / "pope.json", ["yes", "no", "yes"]
    rows = [{"question_id": i, "image": "0.png", "text": "Is it?", "label": label} for i, label in enumerate(labels)]
    data.write_text("\n".join(map(json.dumps, rows)))
    run = cli("eval", data, *cli.pair, "--methods", "grid", "--keep", ".5", "--json", tmp_path / "o.json")
    found = figures(tmp_path / "o.json")
    told = {"accuracy": 2 / 3, "precision": 2 / 3, "recall": 1.0, "f1": 0.8, "yes": 1.0, "neither": 0}
    assert found["none"]["yes_no"] == told
    assert found["grid 50%"]["yes_no"]["precision"] is None
    assert found["grid 50%"]["yes_no"]["neither"] == 3
    assert re.search(r"^none +66\.7 +66\.7 +100\.0 +80\.0 +100\.0 +0$", run.out, re.MULTILINE)
    assert re.search(r"^grid 50% +0\.0 +- +0\.0 +0\.0 +0\.0 +3$", run.out, re.MULTILINE)


def test_all_that_can_be_asked_for_is_listed(cli):
    assert list(json.loads(cli("methods", "--json").out)) == list(CHOICES)
    assert re.search(r"^downscale +- +the picture in fewer tokens", cli("methods").out, re.MULTILINE)


def test_rules_are_those_that_there_are():
    assert tuple(scoring.RULES) == RULES


# ---- the page


class Reader(HTMLParser):
    VOID = {"meta", "input", "circle", "rect", "path"}

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        assert not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        for name, value in attrs:
            for number in re.findall(r"-?\d+\.?\d*", value or "") if name in ("cx", "cy", "x", "y") else []:
                assert -10 <= float(number) <= 400
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_stands_alone_and_tells_what_the_table_does(cli, data, tmp_path):
    run = cli("eval", data, *cli.pair, "--keep", "0.5,0.25", "--html", tmp_path / "o.html")
    page = (tmp_path / "o.html").read_text()
    reader = Reader()
    reader.feed(page)
    assert not reader.open
    assert "script" not in reader.seen
    assert "link" not in reader.seen
    assert "<b>" not in page
    assert "odd <b>&? (2)" in reader.text
    assert "prefers-color-scheme: dark" in page
    boxes = re.findall(r'type="checkbox" id="(m\d+)"', page)
    assert len(boxes) == len(set(boxes)) == reader.seen.count("li") - page.split('class="notes"')[1].count("<li>")
    for box in boxes:  # what it hides is there
        assert f"#{box}:not(:checked)) .{box} {{ display: none; }}" in page
        assert re.search(rf'<g class="s c\d {box}">', page)
    for word in ("sgl+ 25%", "random", "unpruned", "blind", "data.jsonl (JSONL), 6 questions"):
        assert word in reader.text
    lines = run.out.split("All questions\n")[1].split("\n\n")[0].splitlines()[1:]
    for cell in (cell for line in lines for cell in line.split()):
        assert cell in reader.text or cell == "-"


# ---- what is refused


@pytest.mark.parametrize(
    ("args", "code", "why"),
    [
        (["--methods", "best"], 2, "'best'"),
        (["--keep", "auto"], 2, "shares"),
        (["--keep", "0.5,2"], 2, "over 0 and up to 1"),
        (["--limit", "0"], 2, "from 1 up"),
        (["--json", "1"], 2, "not the name of a .json file"),
        (["--html", "x/o.html"], 8, "does not exist"),
        (["--images", "nowhere"], 6, "--images"),
        (["--answers", "a.json"], 2, "leave out --answers"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_loaded(cli, data, args, code, why):
    cli.engine = None
    run = cli("eval", data, *cli.pair, *args)
    assert (run.code, run.out) == (code, "")
    assert why in run.err
    assert cli.engine is None


def test_a_damaged_picture_is_told_before_the_first_question(cli, data, tmp_path, monkeypatch):
    whole = (tmp_path / "5.png").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[:60])
    cli.engine = None
    run = cli("eval", data, *cli.pair, "--work", tmp_path / "work")
    assert (run.code, run.out) == (6, "")
    assert f"image '{tmp_path / '5.png'}' is a truncated" in run.err
    assert cli.engine is None
    (tmp_path / "5.png").write_bytes(whole)
    assert cli("eval", data, *cli.pair, "--work", tmp_path / "work").code == 0
    kept = (tmp_path / "work" / "answers.jsonl").read_bytes()
    (tmp_path / "5.png").write_bytes(whole[:60])
    assert cli("eval", data, *cli.pair, "--work", tmp_path / "work", "--restart").code == 6
    assert (tmp_path / "work" / "answers.jsonl").read_bytes() == kept
    (tmp_path / "5.png").write_bytes(whole)
    opened = []
    decode = PIL.Image.open
    monkeypatch.setattr(PIL.Image, "open", lambda *a, **k: opened.append(a) or decode(*a, **k))
    assert cli("eval", data, *cli.pair, "--work", tmp_path / "work").code == 0
    assert opened == []  # answered: there is nothing to check


def test_a_bar_is_for_terminals_alone(cli, data, monkeypatch):
    assert "[" not in cli("eval", data, *cli.pair, "--methods", "grid", "--keep", "0.5").err
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("localvlm.cli.output.sys.stderr.isatty", lambda: True)
    seconds = itertools.count(0, 10)  # asked for at the start and after each question
    monkeypatch.setattr("localvlm.cli.output.time", SimpleNamespace(monotonic=lambda: next(seconds)))
    shown = cli("eval", data, *cli.pair, "--methods", "grid", "--keep", "0.5", "--restart").err
    assert "[####################....] 5 of 6 questions, 10 s left" in shown
    assert shown.endswith("\r\x1b[K")
    refused = cli("eval", data, *cli.pair, "--images", "nowhere").err
    assert "\r\x1b[Kreading the pictures ...\r\x1b[Klocalvlm: image" in refused
    assert "[" not in cli("eval", data, *cli.pair, "--methods", "grid", "--keep", "0.5", "--restart", "-q").err


def test_settings_of_ask_do_not_get_in_the_way(cli, data, monkeypatch):
    monkeypatch.setenv("LOCALVLM_KEEP", "0.5")
    assert re.search(r"sgl\+ +50% ", cli("eval", data, *cli.pair).out)


# ---- going on after an end


def test_a_run_goes_on_from_what_it_had(cli, data, tmp_path):
    command = ["eval", data, *cli.pair, "--keep", "0.5", "--work", tmp_path / "work", "--json", tmp_path / "o.json"]
    assert cli(*command, "--no-timings").code == 0
    whole = (tmp_path / "o.json").read_bytes()
    assert b'"ms"' not in whole
    journal = tmp_path / "work" / "answers.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    journal.write_bytes(b"".join(lines[:4]) + lines[4][:50])
    run = cli(*command, "--no-timings")
    assert "3 of 6 questions were answered before" in run.err
    assert (tmp_path / "o.json").read_bytes() == whole
    assert cli(*command).code == 0
    assert not cli.engine.loaded
    assert b'"ms"' in (tmp_path / "o.json").read_bytes()


def test_methods_that_come_later_are_run_alone(cli, data, tmp_path):
    command = ["eval", data, *cli.pair, "--no-timings", "--json", tmp_path / "o.json"]
    work = ["--work", tmp_path / "work"]
    assert cli(*command, *work, "--methods", "grid", "--keep", "0.5").code == 0
    assert cli(*command, *work, "--methods", "random,grid", "--keep", "0.5,0.25").code == 0
    lines = [json.loads(line) for line in (tmp_path / "work" / "answers.jsonl").read_text().splitlines()[1:]]
    assert [sorted(line["results"]) for line in lines] == (
        6 * [["blind", "grid 50%", "none"]] + 6 * [["grid 25%", "random 25%", "random 50%"]]
    )
    added = (tmp_path / "o.json").read_bytes()
    assert cli(*command, "--methods", "random,grid", "--keep", "0.5,0.25").code == 0
    assert (tmp_path / "o.json").read_bytes() == added


@pytest.mark.parametrize(
    ("args", "change", "what"),
    [
        (["--max-tokens", "3"], None, "options"),
        (["--guide-keep", "0.5"], None, "options"),
        (["--limit", "2"], None, "pictures, questions"),
        ([], "model.gguf", "model"),
        ([], "model.quecc.gguf", "trained"),
        ([], "0.png", "pictures"),
    ],
)
def test_answers_of_other_inputs_are_not_taken_up(cli, data, tmp_path, args, change, what):
    command = ["eval", data, *cli.pair, "--keep", "0.5", "--work", tmp_path / "work"]
    assert cli(*command).code == 0
    if change:
        with (tmp_path / change).open("ab") as file:
            file.write(b"x")
    run = cli(*command, *args)
    assert run.code == 2
    assert f": {what} differ" in run.err
    assert "--restart" in run.err
    assert cli(*command, *args, "--restart").code == 0


def test_each_run_has_a_folder_of_its_own_unless_told(cli, data):
    assert cli("eval", data, *cli.pair).code == 0
    assert "were answered before" in cli("eval", data, *cli.pair).err
    assert "were answered before" not in cli("eval", data, *cli.pair, "--seed", "1").err


def test_scores_are_of_now(cli, data, tmp_path):
    command = ["eval", data, *cli.pair, "--methods", "grid", "--work", tmp_path / "work", "--json", tmp_path / "o.json"]
    cli(*command)
    assert figures(tmp_path / "o.json")["none"]["accuracy"]["mean"] == pytest.approx(1 / 3)
    cli(*command, "--score", "anls")
    assert not cli.engine.loaded
    assert figures(tmp_path / "o.json")["none"]["accuracy"]["mean"] == pytest.approx((0 + 1 + 0) / 3)
    data.write_text(data.read_text().replace('"blue"', '"dark red"'))
    cli(*command)
    assert figures(tmp_path / "o.json")["none"]["accuracy"]["mean"] == pytest.approx(2 / 3)


def test_an_engine_that_dies_loses_one_question(cli, data, tmp_path):
    command = ["eval", data, *cli.pair, "--methods", "grid", "--keep", "0.5", "--work", tmp_path / "work"]
    cli.scripts["model"] = Script(answer=FULL_SAYS, crash_at=60)
    run = cli(*command)
    assert run.code == 4
    assert re.search(r"\d of 6 questions are answered; the same command goes on", run.err)
    run = cli(*command, "--restart")
    assert run.code == 4
    assert re.search(r"\d of 6 questions are answered; the same command without --restart goes on", run.err)
    cli.scripts["model"] = SCRIPTS["model"]
    assert cli(*command).code == 0


CHILD = """
import sys, time
from localvlm.cli.app import App
from localvlm.cli.main import main
from localvlm.engine.fake import FakeEngine, FakeVlm, Script

left, encode = int(sys.argv.pop(1)), FakeVlm.encode

def encode_some(*args, **options):
    global left
    left -= 1
    if left < 0:
        time.sleep(3600)
    return encode(*args, **options)

FakeVlm.encode = encode_some
scripts = {"guide": Script(answer="red"), "model": Script(answer="dark red", pruned_answer="red", encode_s=0.01)}
main(sys.argv[1:], App(lambda _: FakeEngine(scripts)))
"""


def test_killed_at_random_it_tells_the_same_in_the_end(cli, tmp_path):
    data = make(tmp_path, 30)

    def start(work: str, encodes: int = 1000) -> subprocess.Popen[bytes]:
        command = ["eval", data, *cli.pair, "--keep", "0.5,0.25", "--work", tmp_path / work, "--no-timings",
                   "--json", tmp_path / f"{work}.json", "-q"]  # fmt: skip
        line = [sys.executable, "-c", CHILD, str(encodes), *map(str, command)]
        return subprocess.Popen(line, stdout=subprocess.DEVNULL)

    assert start("whole").wait() == 0
    rng = random.Random(5)
    journal = tmp_path / "cut" / "answers.jsonl"
    for _ in range(3):
        child = start("cut", 18)  # two a question: it never ends by itself, however late it is killed
        before = journal.stat().st_size if journal.exists() else 0
        while child.poll() is None and (not journal.exists() or journal.stat().st_size == before):
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.1))
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert start("cut").wait() == 0
    assert (tmp_path / "cut.json").read_bytes() == (tmp_path / "whole.json").read_bytes()
