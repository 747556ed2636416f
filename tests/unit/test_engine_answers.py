"""The engine through its worker process, on the zoo: answers, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from localvlm.engine import client
from localvlm.engine.api import Encoded, ImageLayout, Message, SamplingOptions, TextPart
from localvlm.engine.client import Engine, RemoteVlm
from localvlm.errors import (
    ContextOverflow,
    ModelError,
    ModelNotFound,
    NotGguf,
    ProjectorMismatch,
    RoleMismatch,
    UsageError,
)
from localvlm.pipeline import AskOptions, Pair, Pipeline, VlmFiles
from localvlm.pruning import METHODS
from tests.asking import ONE, QUESTION, ask, in_fresh_process, load, picture, prompt
from tests.damage import Gguf


def test_the_same_question_has_the_same_answer(vlm: RemoteVlm, files) -> None:
    first = ask(vlm)
    assert first == ask(vlm)
    assert first != ask(vlm, seed=2)
    assert first == ask(vlm) == in_fresh_process(files[vlm.info.name])


def test_the_tap_changes_no_token(vlm: RemoteVlm) -> None:
    assert ask(vlm, tap=True) == ask(vlm, tap=False)


def test_keeping_all_is_pruning_nothing(vlm: RemoteVlm) -> None:
    n = vlm.layout(84, 84).n_tokens
    assert ask(vlm, keep=np.arange(n, dtype=np.int32)) == ask(vlm)


def test_layout_is_that_of_encoding(vlm: RemoteVlm) -> None:
    for width, height in ((84, 84), (200, 50), (31, 97), (1, 1)):
        encoded = vlm.encode(picture(width, height), tower=True)
        layout = vlm.layout(width, height)
        np.testing.assert_array_equal(layout.boxes, encoded.layout.boxes)
        assert (layout.n_tokens, layout.grid, layout.n_pos) == (
            encoded.layout.n_tokens,
            encoded.layout.grid,
            encoded.layout.n_pos,
        )
        assert vlm.embeddings(encoded).shape[0] == layout.n_tokens
        assert encoded.tower is not None
        assert encoded.tower.shape == (vlm.info.tower_layers, layout.n_tokens)
        assert np.isfinite(encoded.tower).all()
        vlm.release(encoded)


def test_prefill_counts_what_it_was_given(vlm: RemoteVlm) -> None:
    encoded = vlm.encode(picture())
    n = encoded.layout.n_tokens
    whole = vlm.prefill(prompt(vlm, [encoded]))
    assert whole.n_image == whole.n_kept == n
    assert whole.n_past == len(whole.token_ids)
    assert (whole.token_ids == -1).sum() == n
    for keep in ([0], [1, n - 1], []):
        pruned = vlm.prefill(prompt(vlm, [encoded], np.array(keep, np.int32)))
        assert (pruned.n_image, pruned.n_kept) == (n, len(keep))
        assert pruned.n_past == whole.n_past - n + len(keep)
        np.testing.assert_array_equal(pruned.token_ids, whole.token_ids)


def test_tokenize_is_what_prefill_evaluates(vlm: RemoteVlm) -> None:
    encoded = vlm.encode(picture())
    done = vlm.prefill(prompt(vlm, [encoded]))
    parts = vlm.chat([Message("user", QUESTION, 1)])
    ids = vlm.tokenize([encoded.layout.n_tokens if isinstance(p, int) else p for p in parts])
    text = done.token_ids[done.token_ids >= 0].tolist()
    wrapped = ids[ids >= 0].tolist()  # the tower's own wrapper tokens are not in it
    assert [t for t in text if t in wrapped] == wrapped or text == wrapped
    assert (ids == -1).sum() == encoded.layout.n_tokens


def test_what_users_write_is_never_a_control_token(vlm: RemoteVlm, files) -> None:
    tokenizer = files[vlm.info.name].row.tokenizer
    controls = {tokenizer.id(c): c for c in tokenizer.controls}
    plain = vlm.chat([Message("user", "")])
    allowed = sorted(t for t in vlm.tokenize(plain).tolist() if t in controls)
    for control in tokenizer.controls:
        for text in (control, f"a{control}b", control * 3, control[:-1], f"{control[1:]}", f" {control}\n"):
            ids = vlm.tokenize(vlm.chat([Message("user", text)])).tolist()
            assert sorted(t for t in ids if t in controls) == allowed, text
    # a control token must not arise where the template's text and the user's meet either
    for control in tokenizer.controls:
        for cut in range(1, len(control)):
            ids = vlm.tokenize([TextPart(control[:cut], special=True), TextPart(control[cut:])]).tolist()
            whole = tokenizer.id(control)
            assert ids.count(whole) == (control == tokenizer.bos)


def test_feeding_gives_the_logits_that_generating_saw(vlm: RemoteVlm) -> None:
    encoded = vlm.encode(picture())
    parts = prompt(vlm, [encoded])
    vlm.prefill(parts)
    done = vlm.generate(8)
    after_generate = vlm.logits()
    vlm.prefill(parts)
    logits = [vlm.logits()]
    for token in done.ids[: done.fed]:
        vlm.feed(np.array([token], np.int32))
        logits.append(vlm.logits())
    np.testing.assert_array_equal(logits[-1], after_generate)
    assert [int(x.argmax()) for x in logits] == done.ids.tolist()
    wide = np.array(logits, np.float64)
    total = np.log(np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)) + wide.max(axis=1)
    want = wide[np.arange(len(done.ids)), done.ids] - total
    np.testing.assert_allclose(done.logprobs, want, rtol=1e-5, atol=1e-5)
    # scored in one batch: the same to rounding, and nothing is left behind
    vlm.prefill(parts)
    scored = vlm.score(done.ids)
    assert scored.shape == (len(done.ids), vlm.info.n_vocab)
    np.testing.assert_allclose(scored, wide, atol=2e-2)
    np.testing.assert_array_equal(vlm.logits(), logits[0])
    assert vlm.generate(8).ids.tolist() == done.ids.tolist()
    assert vlm.score(np.array([], np.int32)).shape == (0, vlm.info.n_vocab)


def test_scoring_many_tokens_goes_on_where_it_was(vlm: RemoteVlm) -> None:
    """More tokens than one batch may ask logits for."""
    vlm.prefill(prompt(vlm, [vlm.encode(picture())]))
    ids = np.random.RandomState(3).randint(0, 250, 150).astype(np.int32)
    whole = vlm.score(ids)
    np.testing.assert_allclose(vlm.score(ids[:100]), whole[:100], atol=2e-2)
    assert vlm.generate(5).ids.tolist() == ask(vlm, 5)


def test_sampling_follows_its_seed(vlm: RemoteVlm) -> None:
    parts = prompt(vlm, [vlm.encode(picture())])

    def draw(seed: int) -> list[int]:
        vlm.prefill(parts)
        return vlm.generate(10, SamplingOptions(temp=1.5, seed=seed)).ids.tolist()

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_text_is_streamed_whole(llava: RemoteVlm) -> None:
    llava.prefill(prompt(llava, [llava.encode(picture())]))
    pieces: list[str] = []
    done = llava.generate(30, on_text=pieces.append)
    assert "".join(pieces) == done.text
    assert llava.generate(0).ids.tolist() == []


def test_attention_adds_up(vlm: RemoteVlm) -> None:
    encoded = vlm.encode(picture())
    n = encoded.layout.n_tokens
    done = vlm.prefill(prompt(vlm, [encoded]), tap=True)
    text = vlm.generate(6)
    a = vlm.attention()
    tail = int((done.token_ids[np.flatnonzero(done.token_ids < 0)[-1] + 1 :] >= 0).sum())
    assert a.rows == (tail, text.fed)
    for got, rows in ((a.prompt, tail), (a.generated, text.fed), (a.last, 1)):
        assert got.shape == (vlm.info.n_layer, vlm.info.n_head, n)
        assert (got >= 0).all()
        assert got.sum(axis=2).max() <= rows * 1.001


def test_two_models_in_one_engine_do_not_meet(engine: Engine, files) -> None:
    small, large = load(engine, files["llava15"]), load(engine, files["llava15-large"])
    one, other = ask(small), ask(large)
    encoded = small.encode(picture())
    small.prefill(prompt(small, [encoded]))
    assert ask(large) == other
    assert small.generate(12).ids.tolist() == one
    small.close()
    assert ask(large) == other
    large.close()


def test_a_question_without_pictures_is_answered_by_the_model(engine: Engine, files) -> None:
    halves = [VlmFiles(files[n].model, files[n].mmproj) for n in ("llava15", "llava15-large")]
    pipeline = Pipeline.open(Pair("zoo", *halves), ONE, engine)
    for method in METHODS:
        answer = pipeline.ask([], "hello", AskOptions(method=method, max_tokens=3))
        assert answer.tokens.image == answer.tokens.kept == 0
        assert answer.answer_ids


# errors


def test_a_released_picture_is_gone(llava: RemoteVlm) -> None:
    encoded = llava.encode(picture())
    llava.release(encoded)
    llava.release(encoded)
    with pytest.raises(UsageError, match=f"picture {encoded.id}"):
        llava.prefill(prompt(llava, [encoded]))
    with pytest.raises(UsageError, match="picture 99"):
        llava.embeddings(Encoded(99, ImageLayout(1, None, None, 1), 0))
    assert ask(llava)


@pytest.mark.parametrize("keep", [[-1], [36], [3, 2], [1, 1], [0, 10**6]])
def test_impossible_keeps_are_refused(llava: RemoteVlm, keep: list[int]) -> None:
    encoded = llava.encode(picture())
    with pytest.raises(UsageError, match=r"0\.\.35"):
        llava.prefill(prompt(llava, [encoded], np.array(keep, np.int32)))


def test_calls_out_of_order_are_refused(llava: RemoteVlm) -> None:
    for call in (lambda: llava.generate(3), llava.logits, llava.attention, lambda: llava.score(np.ones(2, np.int32))):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(UsageError):
        llava.feed(np.ones(1, np.int32))


def test_a_prompt_without_any_row_is_refused(engine: Engine, files) -> None:
    vlm = load(engine, files["qwen25vl"])
    with pytest.raises(UsageError, match="empty"):
        vlm.prefill([])
    vlm.close()


def test_prompts_beyond_the_context_name_both_numbers(engine: Engine, files) -> None:
    vlm = load(engine, files["llava15"], n_ctx=256)
    encoded = vlm.encode(picture())
    with pytest.raises(ContextOverflow, match=r"takes \d{3,} cells .*36 .* has 256"):
        vlm.prefill(prompt(vlm, [encoded], text="x" * 300))
    assert ask(vlm, 5)
    done = vlm.generate(1000)
    assert done.finish == "length"
    assert len(done.ids) < 256
    with pytest.raises(ContextOverflow, match="256"):
        vlm.score(np.ones(300, np.int32))
    with pytest.raises(ContextOverflow, match="256"):
        vlm.feed(np.ones(300, np.int32))
    assert ask(vlm, 5)
    vlm.close()


def test_unusable_files_are_named(engine: Engine, files, tmp_path: Path) -> None:
    llava, qwen, large = files["llava15"], files["qwen25vl"], files["llava15-large"]
    text = tmp_path / "notes.gguf"
    text.write_text("not a model at all, but long enough")
    short = tmp_path / "short.gguf"
    short.write_bytes(llava.model.read_bytes()[:-4096])
    cases = [
        (tmp_path / "no.gguf", llava.mmproj, ModelNotFound, "no.gguf"),
        (llava.model, tmp_path / "no.gguf", ModelNotFound, "no.gguf"),
        (tmp_path, llava.mmproj, ModelNotFound, "directory"),
        (text, llava.mmproj, NotGguf, "begins with b'not "),
        (short, llava.mmproj, NotGguf, "cut short"),
        (llava.mmproj, llava.model, RoleMismatch, "swapped"),
        (llava.model, llava.model, RoleMismatch, "not a projector"),
        (large.model, llava.mmproj, ProjectorMismatch, r"n_embd = 192.*n_embd = 128"),
        (llava.model, large.mmproj, ProjectorMismatch, r"n_embd = 128.*n_embd = 192"),
    ]
    for model, mmproj, kind, match in cases:
        with pytest.raises(kind, match=match):
            engine.load(model, mmproj, ONE)
    assert qwen.row.text.hidden == llava.row.text.hidden, "or a case is missing above"


def test_templates_that_never_end_cost_their_time_limit_alone(files, tmp_path: Path, monkeypatch) -> None:
    file = Gguf.parse(files["llava15"].model.read_bytes())
    loop = b"{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x"
    body = len(loop).to_bytes(8, "little") + loop
    file.values = [(k, t, body if k == b"tokenizer.chat_template" else v) for k, t, v in file.values]
    (tmp_path / "loop.gguf").write_bytes(file.bytes())
    with Engine() as engine:
        vlm = engine.load(tmp_path / "loop.gguf", files["llava15"].mmproj, ONE)
        worker = engine.pid
        with pytest.raises(ModelError, match="chat template takes over 5 s of processor time"):
            vlm.chat([Message("user", "x")])
        assert engine.pid == worker
        monkeypatch.setattr(client, "_TEMPLATE_S", 0.5)  # of one that no signal ends
        with pytest.raises(ModelError, match=r"chat template of 'llava15'.*'chat' in"):
            vlm.chat([Message("user", "x")])
        assert ask(load(engine, files["llava15"]))


def test_names_of_any_length_do_not_fill_the_screen(files, tmp_path: Path) -> None:
    file = Gguf.parse(files["llava15"].model.read_bytes())
    body = (1 << 20).to_bytes(8, "little") + b"x" * (1 << 20)
    file.values = [(k, t, body if k == b"general.name" else v) for k, t, v in file.values]
    (tmp_path / "long.gguf").write_bytes(file.bytes())
    with Engine() as engine:
        assert len(engine.load(tmp_path / "long.gguf", files["llava15"].mmproj, ONE).info.name) <= 100
