"""Question sets of every format, each as its site documents it, and what is said of those that are none."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from localvlm.errors import UsageError
from localvlm.evaluation.data import Question, read_dataset

TEN = ["red"] * 7 + ["dark red"] * 3


def write(folder: Path, name: str, content: object, *, lines: bool = False) -> Path:
    rows = content if lines and isinstance(content, list) else [content]
    path = folder / name
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n", encoding="utf-8")
    return path


OWN = [
    {"image": "a.png", "question": "What colour?", "answer": "red", "type": "colour"},
    {"image": ["a.png", "b.png"], "question": "Same?", "answers": ["yes", "yeah"], "id": 7},
    {"image": "c.png", "question": "What does it say?", "answers": TEN},
    {"image": "c.png", "question": "How much?", "answer": 12.5, "score": "relaxed"},
]
POPE = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000001.jpg",
        "image_id": 1,
        "text": "Is there a cat?",
        "label": "no",
    }
]
LLAVA = [{"question_id": 11, "image": "x.jpg", "text": "What is it?\nUse one word.", "category": "default"}]
VQAV2 = {
    "info": {"version": "2.0"},
    "data_subtype": "val2014",
    "questions": [{"image_id": 262148, "question": "What colour is it?", "question_id": 262148000}],
}
VQAV2_ANSWERS = {
    "annotations": [
        {
            "question_id": 262148000,
            "image_id": 262148,
            "question_type": "what color",
            "answer_type": "other",
            "multiple_choice_answer": "red",
            "answers": [{"answer": a, "answer_confidence": "yes", "answer_id": i} for i, a in enumerate(TEN, 1)],
        }
    ]
}
TEXTVQA = {
    "dataset_name": "textvqa",
    "data": [{"question": "What brand?", "question_id": 34602, "image_id": "003a8ae2ef43b901", "answers": TEN}],
}
DOCVQA = {
    "dataset_name": "docvqa",
    "data": [
        {
            "questionId": 337,
            "question": "What is the date?",
            "image": "documents/txpp0227_10.png",
            "docId": 279,
            "answers": ["1/8/93", "1993"],
            "question_types": ["handwritten", "form"],
        }
    ],
}
GQA = {
    "201307251": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "device (n161313)"}],
        "imageId": "n161313",
        "question": "Is it overcast?",
        "answer": "no",
        "fullAnswer": "No, it is clear.",
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
    }
}
CHARTQA = [{"imgname": "41699051005347.png", "query": "How many items?", "label": "14"}]


def asked(path: Path, answers: Path | None = None, **more: object) -> tuple[str, list[Question]]:
    found = read_dataset(path, answers, **more)
    return found.format, list(found.questions)


def test_our_own(tmp_path):
    name, rows = asked(write(tmp_path, "data.jsonl", OWN, lines=True))
    assert name == "JSONL"
    a, b, c = (str(tmp_path / f"{x}.png") for x in "abc")
    assert rows == [
        Question("1", (a,), "What colour?", ("red",), "colour", "exact"),
        Question("7", (a, b), "Same?", ("yes", "yeah"), "", "exact"),
        Question("3", (c,), "What does it say?", tuple(TEN), "", "vqa"),
        Question("4", (c,), "How much?", ("12.5",), "", "relaxed"),
    ]


def test_one_line_is_enough(tmp_path):
    for row in (OWN[0], POPE[0]):
        assert len(asked(write(tmp_path, "one.json", row))[1]) == 1


def test_a_list_is_read_as_lines_are(tmp_path):
    assert asked(write(tmp_path, "a.json", OWN)) == asked(write(tmp_path, "a.jsonl", OWN, lines=True))


@pytest.mark.parametrize(
    ("content", "lines", "format", "want"),
    [
        (POPE, True, "POPE", ("1", "COCO_val2014_000000000001.jpg", "Is there a cat?", ("no",), "", "yes-no")),
        (TEXTVQA, False, "TextVQA", ("34602", "003a8ae2ef43b901.jpg", "What brand?", tuple(TEN), "", "vqa")),
        (DOCVQA, False, "DocVQA",
         ("337", "documents/txpp0227_10.png", "What is the date?", ("1/8/93", "1993"), "handwritten", "anls")),
        (GQA, False, "GQA", ("201307251", "n161313.jpg", "Is it overcast?", ("no",), "verify", "exact")),
        (CHARTQA, False, "ChartQA", ("1", "41699051005347.png", "How many items?", ("14",), "", "relaxed")),
    ],
)  # fmt: skip
def test_public_formats(tmp_path, content, lines, format, want):  # noqa: A002
    id_, image, text, answers, kind, rule = want
    question = Question(id_, (str(tmp_path / image),), text, answers, kind, rule)
    assert asked(write(tmp_path, "data.json", content, lines=lines)) == (format, [question])


def test_vqav2_is_two_files(tmp_path):
    questions, answers = write(tmp_path, "q.json", VQAV2), write(tmp_path, "a.json", VQAV2_ANSWERS)
    name, rows = asked(questions, answers, images=tmp_path / "val2014")
    image = str(tmp_path / "val2014" / "COCO_val2014_000000262148.jpg")
    assert (name, rows) == (
        "VQAv2", [Question("262148000", (image,), "What colour is it?", tuple(TEN), "other", "vqa")],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("answers", "want", "rule"),
    [
        ([{"question_id": 11, "answer": "A cat"}], ("A cat",), "exact"),
        ([{"question_id": "11", "text": "A cat"}], ("A cat",), "exact"),
        ([{"question_id": 11, "answers": TEN}], tuple(TEN), "vqa"),
        ({"11": {**GQA["201307251"], "imageId": "x", "answer": "cat"}}, ("cat",), "exact"),
        ({"annotations": [{**VQAV2_ANSWERS["annotations"][0], "question_id": 11}]}, tuple(TEN), "vqa"),
        ([{**POPE[0], "question_id": 11, "image": "val2014/x.jpg"}], ("no",), "yes-no"),
    ],
)
def test_llava_questions_with_answers_from_elsewhere(tmp_path, answers, want, rule):
    questions = write(tmp_path, "q.jsonl", LLAVA, lines=True)
    name, rows = asked(questions, write(tmp_path, "a.json", answers))
    text = "What is it?\nUse one word."
    assert (name, rows) == ("LLaVA", [Question("11", (str(tmp_path / "x.jpg"),), text, want, "default", rule)])


def test_a_rule_and_a_suffix_go_for_all(tmp_path):
    rows = asked(write(tmp_path, "d.jsonl", OWN, lines=True), rule="anls", suffix="Use one word.")[1]
    assert {r.rule for r in rows} == {"anls"}
    assert all(r.text.endswith("?\nUse one word.") for r in rows)


def test_a_byte_order_mark_is_no_content(tmp_path):
    path = write(tmp_path, "d.jsonl", OWN, lines=True)
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    assert len(asked(path)[1]) == 4


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "is empty"),
        ("\n \n", "is empty"),
        ("hello", "not JSON"),
        ("{", "not JSON"),
        ("[]", "no format"),
        ("3", "no format"),
        ('{"a": 1}', "no format"),
        ('{"data": []}', "no format"),
        ('{"question": "q", "image": "i"}', "entry 1 has no text under 'answer'"),
        ('{"question": "q", "image": "i", "answers": []}', "entry 1 has no answer"),
        ('{"question": "q", "image": "i", "answer": null}', "entry 1"),
        ('{"question": "q", "image": "i", "answer": true}', "entry 1"),
        ('{"question": "q", "image": 1.5, "answer": "a", "score": "best"}', "'best'"),
        ('{"question": "q", "image": "i", "answer": "a"}\n{"image": "i"}', "entry 2"),
        ('{"question": "q", "image": "i", "answer": "a"}\n[]', "entry 2"),
        ('{"question": "q", "image": "i", "answer": "a"}\n{"image"', "line 2"),
        ('{"question_id": 1, "image": "i", "text": "t", "label": "maybe"}', "'maybe'"),
        ('{"question": "q", "image": "i", "answer": "a cat", "score": "yes-no"}', "'a cat'"),
        ('{"data": [{"image_id": 1, "question": "q", "answers": [{}]}]}', "entry 1"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_what_is_no_question_set_is_refused(tmp_path, text, why):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"data\.jsonl") as refused:
        read_dataset(path)
    assert why in refused.value.message
    assert refused.value.hint


def test_files_that_are_missing_or_too_many_are_named(tmp_path):
    own, llava = write(tmp_path, "o.jsonl", OWN[0]), write(tmp_path, "l.jsonl", LLAVA, lines=True)
    with pytest.raises(UsageError, match=r"none\.jsonl"):
        read_dataset(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match="another file") as refused:
        read_dataset(llava)
    assert "--answers" in refused.value.hint
    with pytest.raises(UsageError, match="itself"):
        read_dataset(own, own)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([{"question_id": 12, "answer": "x"}], "'11'"),
        ([{"question_id": 11, "answer": "x"}, {"question_id": 11, "answer": "y"}], "of another one"),
        ({"hello": 1}, "no text"),
        ([{**POPE[0], "question_id": 11}], "of another picture"),
        ([{"answer": "x"}], "question_id"),
        ([3], "entry 1"),
    ],
)
def test_answers_that_do_not_go_with_the_questions(tmp_path, answers, why):
    questions = write(tmp_path, "q.jsonl", LLAVA, lines=True)
    with pytest.raises(UsageError) as refused:
        read_dataset(questions, write(tmp_path, "a.json", answers))
    assert why in refused.value.message


def test_vqav2_wants_its_annotations(tmp_path):
    with pytest.raises(UsageError, match="annotations"):
        read_dataset(write(tmp_path, "q.json", VQAV2), write(tmp_path, "a.json", GQA))
