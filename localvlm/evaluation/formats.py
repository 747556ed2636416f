"""The public formats of question sets, each turned into rows. Written from what their sites document."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from localvlm.scoring import RULES, VQA_ANNOTATORS

__all__ = ["FORMATS", "Format", "Malformed", "Row"]

Entry = Mapping[str, Any]


class Malformed(ValueError):
    """An entry that is not what its format promises."""

    def __init__(self, number: int, what: str) -> None:
        super().__init__(f"entry {number} {what}")


@dataclass(frozen=True)
class Row:
    """One question as a format gives it; ``images`` are relative to a folder, ``id`` may be empty."""

    id: str
    images: tuple[str, ...]
    text: str
    answers: tuple[str, ...]
    kind: str = ""
    rule: str = "exact"


@dataclass(frozen=True)
class Format:
    """One way to write questions down.

    Attributes:
        knows: whether a file's content is of this format.
        rows: (content, content of the file of answers) -> rows; raises Malformed.
        apart: whether the answers are in a file of their own.
    """

    name: str
    knows: Callable[[Any], bool]
    rows: Callable[[Any, Any], Iterator[Row]]
    apart: bool = False


def _text(entry: Any, key: str, number: int, default: str | None = None) -> str:
    """The text or whole number under ``key``."""
    value = entry.get(key, default) if isinstance(entry, dict) else None
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise Malformed(number, f"has no text under {key!r}")
    return value


def _texts(entry: Any, key: str, number: int) -> tuple[str, ...]:
    """The text, or list of texts, under ``key``; numbers become text, and so do {"answer": text} objects."""
    value = entry.get(key) if isinstance(entry, dict) else None
    found = []
    for item in value if isinstance(value, list) else [value]:
        inner = item.get("answer") if isinstance(item, dict) else item
        if isinstance(inner, bool) or not isinstance(inner, str | int | float):
            raise Malformed(number, f"has no text under {key!r}")
        found.append(str(inner))
    return tuple(found)


def _has(content: Any, *keys: str) -> bool:
    """Whether a list begins with an object that has all the keys."""
    return isinstance(content, list) and bool(content) and isinstance(content[0], dict) and set(keys) <= set(content[0])


def _by_annotators(answers: Sequence[str]) -> str:
    """The rule for a list of answers: those of as many people as VQA's needs, else other words for the same."""
    return "vqa" if len(answers) > VQA_ANNOTATORS else "exact"


# ours


def _own(content: Any, _: Any) -> Iterator[Row]:
    """``image`` (a name or a list), ``question``, ``answer`` or ``answers``; maybe ``id``, ``type``, ``score``."""
    for number, entry in enumerate(content, 1):
        key = "answers" if isinstance(entry, dict) and "answers" in entry else "answer"
        answers = _texts(entry, key, number)
        rule = _text(entry, "score", number, _by_annotators(answers))
        if rule not in RULES:
            raise Malformed(number, f"wants the score {rule!r}, which is none of {', '.join(RULES)}")
        yield Row(
            _text(entry, "id", number, ""),
            _texts(entry, "image", number),
            _text(entry, "question", number),
            answers,
            _text(entry, "type", number, ""),
            rule,
        )


# https://github.com/haotian-liu/LLaVA, docs/Evaluation.md; POPE as https://github.com/AoiDragon/POPE


def _pope(content: Any, _: Any) -> Iterator[Row]:
    for number, entry in enumerate(content, 1):
        label = _text(entry, "label", number).lower()
        if label not in ("yes", "no"):
            raise Malformed(number, f"has the label {label!r}, which is neither 'yes' nor 'no'")
        yield Row(
            _text(entry, "question_id", number, ""),
            (_text(entry, "image", number),),
            _text(entry, "text", number),
            (label,),
            _text(entry, "category", number, ""),
            "yes-no",
        )


def _llava(content: Any, answers: Any) -> Iterator[Row]:
    """Questions as LLaVA's scripts take them; answers under the same ``question_id``, or in the file of a public set,
    whose rule is then the score. Where that names pictures, they must be the same: LLaVA numbers POPE's three files
    through, and they have been published with other questions under the same numbers.
    """
    by_id = _answers_by_id(answers)
    for number, entry in enumerate(content, 1):
        key = _text(entry, "question_id", number)
        if key not in by_id:
            raise Malformed(number, f"has the question_id {key!r}, which the file of answers has not")
        found, image = by_id[key], _text(entry, "image", number)
        if any(PurePath(name).name != PurePath(image).name for name in found.images):
            raise Malformed(number, f"has the question_id {key!r}, which is of another picture in the file of answers")
        kind = _text(entry, "category", number, "")
        yield Row(key, (image,), _text(entry, "text", number), found.answers, kind, found.rule)


def _answers_by_id(content: Any) -> dict[str, Row]:
    """Rows whose answers are those of a question_id."""
    known = next((f for f in (VQAV2_ANSWERS, GQA, DOCVQA, POPE) if f.knows(content)), None)
    rows = _plain_answers(content, None) if known is None else known.rows(content, None)
    found: dict[str, Row] = {}
    for number, row in enumerate(rows, 1):
        if found.setdefault(row.id, row).answers != row.answers:
            raise Malformed(number, f"of the file of answers has the question_id {row.id!r} of another one")
    return found


def _plain_answers(content: Any, _: Any) -> Iterator[Row]:
    """``question_id`` with ``answer``, ``answers``, ``label`` or, as in LLaVA's own, ``text``."""
    for number, entry in enumerate(content if isinstance(content, list) else [content], 1):
        keys = [k for k in ("answers", "answer", "label", "text") if isinstance(entry, dict) and k in entry]
        answers = _texts(entry, keys[0] if keys else "answer", number)
        yield Row(_text(entry, "question_id", number), (), "", answers, "", _by_annotators(answers))


# https://visualqa.org/download.html


def _vqav2(content: Any, answers: Any) -> Iterator[Row]:
    if not VQAV2_ANSWERS.knows(answers):
        raise Malformed(1, "of the file of answers is not under 'annotations'")
    by_id = {row.id: row for row in VQAV2_ANSWERS.rows(answers, None)}
    split = content.get("data_subtype") or answers.get("data_subtype") or "val2014"
    for number, entry in enumerate(content["questions"], 1):
        key, image = _text(entry, "question_id", number), _text(entry, "image_id", number)
        if key not in by_id:
            raise Malformed(number, f"has the question_id {key!r}, which the file of answers has not")
        name = f"COCO_{split}_{image:0>12}.jpg"
        yield Row(key, (name,), _text(entry, "question", number), by_id[key].answers, by_id[key].kind, "vqa")


def _vqav2_answers(content: Any, _: Any) -> Iterator[Row]:
    for number, entry in enumerate(content["annotations"], 1):
        answers = _texts(entry, "answers", number)
        yield Row(_text(entry, "question_id", number), (), "", answers, _text(entry, "answer_type", number, ""), "vqa")


# https://textvqa.org/dataset


def _textvqa(content: Any, _: Any) -> Iterator[Row]:
    for number, entry in enumerate(content["data"], 1):
        image = f"{_text(entry, 'image_id', number)}.jpg"
        question = _text(entry, "question", number)
        yield Row(
            _text(entry, "question_id", number, ""), (image,), question, _texts(entry, "answers", number), "", "vqa"
        )


# https://cs.stanford.edu/people/dorarad/gqa/download.html


def _gqa(content: Any, _: Any) -> Iterator[Row]:
    for number, (key, entry) in enumerate(content.items(), 1):
        kinds = entry.get("types") if isinstance(entry, dict) else None
        kind = _text(kinds, "structural", number, "") if isinstance(kinds, dict) else ""
        image = f"{_text(entry, 'imageId', number)}.jpg"
        yield Row(key, (image,), _text(entry, "question", number), _texts(entry, "answer", number), kind)


def _is_gqa(content: Any) -> bool:
    first = next(iter(content.values()), None) if isinstance(content, dict) else None
    return _has([first], "imageId", "question", "answer")


# https://rrc.cvc.uab.es/?ch=17&com=tasks


def _docvqa(content: Any, _: Any) -> Iterator[Row]:
    for number, entry in enumerate(content["data"], 1):
        kinds = entry.get("question_types") if isinstance(entry, dict) else None
        kind = kinds[0] if isinstance(kinds, list) and kinds and isinstance(kinds[0], str) else ""
        yield Row(
            _text(entry, "questionId", number),
            (_text(entry, "image", number),),
            _text(entry, "question", number),
            _texts(entry, "answers", number),
            kind,
            "anls",
        )


# https://github.com/vis-nlp/ChartQA


def _chartqa(content: Any, _: Any) -> Iterator[Row]:
    for number, entry in enumerate(content, 1):
        answers = _texts(entry, "label", number)
        yield Row("", (_text(entry, "imgname", number),), _text(entry, "query", number), answers, "", "relaxed")


def _list_of(*keys: str) -> Callable[[Any], bool]:
    return lambda content: _has(content, *keys)


def _under_key(name: str, *keys: str) -> Callable[[Any], bool]:
    return lambda content: isinstance(content, dict) and _has(content.get(name), *keys)


OWN = Format("JSONL", _list_of("image", "question"), _own)
POPE = Format("POPE", _list_of("image", "text", "label"), _pope)
LLAVA = Format("LLaVA", _list_of("question_id", "image", "text"), _llava, apart=True)
VQAV2 = Format("VQAv2", _under_key("questions", "question_id", "image_id", "question"), _vqav2, apart=True)
VQAV2_ANSWERS = Format("VQAv2 annotations", _under_key("annotations", "question_id", "answers"), _vqav2_answers)
TEXTVQA = Format("TextVQA", _under_key("data", "image_id", "question", "answers"), _textvqa)
DOCVQA = Format("DocVQA", _under_key("data", "questionId", "question", "image", "answers"), _docvqa)
GQA = Format("GQA", _is_gqa, _gqa)
CHARTQA = Format("ChartQA", _list_of("imgname", "query", "label"), _chartqa)

FORMATS = (OWN, POPE, LLAVA, VQAV2, TEXTVQA, DOCVQA, GQA, CHARTQA)
"""In the order in which a file is held against them."""
