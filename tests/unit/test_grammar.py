"""Answers that follow a JSON schema: of fields, of both VLMs, along drafts, and how it is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest

from localvlm.answers import AskOptions
from localvlm.catalog import example_image, pair_named
from localvlm.engine.api import LoadOptions, SamplingOptions
from localvlm.engine.client import Engine
from localvlm.engine.grammar import Grammar
from localvlm.engine.sampling import Sampler
from localvlm.errors import ModelError, UsageError
from localvlm.images import load
from localvlm.pipeline import Pipeline
from localvlm.schema import schema_of, told
from tests import asking

SCENE = """{"type": "object", "properties": {
    "shape": {"enum": ["star", "square", "circle"]},
    "there": {"type": "boolean"},
    "where": {"type": "object", "properties": {"left": {"type": "boolean"}}, "required": ["left"]},
    "parts": {"type": "array", "items": {"enum": ["a", "b"]}, "minItems": 1, "maxItems": 3}},
    "required": ["shape", "there", "where", "parts"], "additionalProperties": false}"""


# ---- what --schema means


def test_fields_are_an_object(tmp_path):
    schema = json.loads(schema_of("name, age int,  tall float, ok bool, tags str[]"))
    assert list(schema["properties"]) == schema["required"] == ["name", "age", "tall", "ok", "tags"]
    assert [p["type"] for p in schema["properties"].values()] == ["string", "integer", "number", "boolean", "array"]
    assert schema["properties"]["tags"]["items"] == {"type": "string"}
    assert schema["additionalProperties"] is False
    (tmp_path / "my schema").write_text("\ufeff" + SCENE, encoding="utf-8")
    assert json.loads(schema_of(str(tmp_path / "my schema"))) == json.loads(schema_of(SCENE)) == json.loads(SCENE)


@pytest.mark.parametrize("text", ["", "a,", "a, a", "a date", "a: b", "no.json", "{", '{"a" 1}', "a b c", '"a"'])
def test_what_is_no_schema(text):
    with pytest.raises(UsageError) as caught:
        schema_of(text)
    assert caught.value.hint
    assert "\n" not in caught.value.message


def test_a_file_that_is_no_schema(tmp_path):
    for content in (b"[]", b"\xff\xfe", b"{" + b" " * (1 << 20) + b"}"):
        (tmp_path / "a.json").write_bytes(content)
        with pytest.raises(UsageError):
            schema_of(str(tmp_path / "a.json"))


# ---- the sampler


class Only:
    """Allows some tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.accepted = tokens, []

    def allows(self, token: int) -> bool:
        return token in self.tokens

    def masked(self, logits, least):
        return np.where(np.isin(np.arange(len(logits)), self.tokens), logits, -np.inf).astype(np.float32)

    def accept(self, token: int) -> None:
        self.accepted.append(token)


LOGITS = np.array([5.0, 1.0, 4.0, 3.75], np.float32)


def test_only_what_is_allowed_is_picked():
    for temp in (0.0, 3.0):
        rules = Only(1, 3)
        sampler = Sampler(SamplingOptions(temp=temp, seed=1), rules)
        picked = {sampler.pick(LOGITS)[0] for _ in range(60)}
        assert picked == ({3} if temp == 0 else {1, 3})
        assert set(rules.accepted) == picked
    token, logprob = Sampler(SamplingOptions(), Only(1)).pick(LOGITS)
    assert (token, logprob) == (1, pytest.approx(1 - np.log(np.exp(LOGITS.astype(float)).sum()), abs=1e-6))


def test_the_lead_is_that_among_what_is_allowed():
    assert Sampler(SamplingOptions()).lead(LOGITS) == 1.0
    assert Sampler(SamplingOptions(), Only(0, 1)).lead(LOGITS) == 1.0  # of all: no more than among the allowed
    assert Sampler(SamplingOptions(), Only(2, 3)).lead(LOGITS) == 0.25
    assert Sampler(SamplingOptions(), Only(1)).lead(LOGITS) == np.inf


# ---- the engine


def asked(vlm, schema: str, n: int = 120, draft=None, **sampling) -> tuple[str, list[int], str]:
    encoded = vlm.encode(asking.picture())
    vlm.prefill(asking.prompt(vlm, [encoded]))
    done = vlm.generate(n, SamplingOptions(schema=schema, **sampling), draft=draft)
    vlm.release(encoded)
    return done.text, done.ids.tolist(), done.finish


def follows(text: str) -> None:
    found = json.loads(text)
    assert list(found) == ["shape", "there", "where", "parts"]
    assert found["shape"] in ("star", "square", "circle")
    assert isinstance(found["there"], bool)
    assert isinstance(found["where"]["left"], bool)
    assert 1 <= len(found["parts"]) <= 3
    assert set(found["parts"]) <= {"a", "b"}


def test_answers_of_random_models_follow_the_schema_along_any_draft(vlm):
    free = asked(vlm, "", 12)
    text, ids, finish = asked(vlm, SCENE)
    assert finish == "stop"
    follows(text)
    for draft in (ids, [*ids[:5], 7, *ids[6:]], free[1], ids[::-1]):
        for _ in range(2):  # the second time sizes of batches are known
            assert asked(vlm, SCENE, draft=np.array(draft, np.int32)) == (text, ids, finish)
    for seed in range(3):
        follows(asked(vlm, SCENE, temp=1.5, seed=seed)[0])
    assert asked(vlm, "", 12) == free


class Some(Grammar):
    """A grammar that allows some tokens, and counts those that it is asked about."""

    def __init__(self, allowed: np.ndarray) -> None:
        self._all, self._allowed, self.looked = np.arange(len(allowed), dtype=np.int32), allowed, 0

    def _applied(self, tokens, logits):
        self.looked += len(tokens)
        return np.where(self._allowed[tokens], logits, -np.inf).astype(np.float32)


@pytest.mark.parametrize(("share", "quick"), [(0.9, 3), (0.01, 2), (0.0, 0)])
def test_a_mask_over_likely_tokens_says_what_one_over_all_does(share, quick):
    rng = np.random.default_rng(0)
    logits = rng.integers(0, 3000, 50_000).astype(np.float32)  # many are alike
    rules = Some(rng.random(len(logits)) < share if share else logits < 5)  # at 0, the least likely alone
    whole = np.where(rules._allowed, logits, -np.inf)
    seen = 0
    for least in (1, 2, 40):
        rules.looked = 0
        masked = rules.masked(logits, least)
        assert masked.argmax() == whole.argmax()
        worst = np.partition(masked, -least)[-least]
        assert np.array_equal(np.flatnonzero(masked >= worst), np.flatnonzero(whole >= worst))
        seen += rules.looked < len(logits)
    assert seen == quick
    assert np.array_equal(rules.masked(logits, len(logits)), whole)
    with pytest.raises(ModelError, match="cannot spell"):
        Some(np.zeros(len(logits), bool)).masked(logits, 1)


def test_a_question_tells_the_schema():
    asked = told("What is there?", schema_of("name, age int"))
    assert asked.splitlines()[0] == "What is there?"
    line = asked.splitlines()[1]
    assert json.loads(line.partition(": ")[2])["properties"] == {"name": {"type": "string"}, "age": {"type": "integer"}}
    assert "additionalProperties" not in line
    assert told("What is there?", "") == "What is there?"
    assert len(told("", SCENE).splitlines()) == 1


def test_schemas_that_cannot_be_followed(llava):
    for schema in (
        '{"type": "nonsense"}',
        '{"$ref": "https://example.org/a.json"}',
        '{"pattern": "(", "type": "string"}',
    ):
        with pytest.raises(UsageError, match="schema"):
            asked(llava, schema)
    follows(asked(llava, SCENE)[0])


def test_guide_and_model_of_a_pair_answer_by_the_schema(native):
    picture = load(example_image())
    with Engine() as engine, Pipeline(pair_named("demo"), engine, guide=LoadOptions(), model=LoadOptions()) as pipeline:
        answers = {}
        for draft in (None, False):
            options = AskOptions(schema=SCENE, draft=draft, max_tokens=120, guide_max_tokens=120)
            answers[draft] = pipeline.ask([picture], "What is there?", options)
        follows(answers[None].text)
        follows(answers[None].guide_text)
        assert answers[None].answer_ids == answers[False].answer_ids
        assert answers[None].tokens.drafted > 0
        exits = pipeline.ask([picture], "What is there?", AskOptions(schema=SCENE, exit_at=0.0, guide_max_tokens=120))
        assert exits.answered_by == "guide"
        follows(exits.text)
        cut = pipeline.ask([picture], "What is there?", AskOptions(schema=SCENE, max_tokens=4))
        assert cut.finish == "length"
