"""The fake engine keeps the promises of the engine's protocol, so that what it lets pass the real one lets pass too."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from localvlm.engine.api import Engine, ImagePart, LoadOptions, Message, SamplingOptions, TextPart, Vlm
from localvlm.engine.fake import FakeEngine, Script
from localvlm.errors import ContextOverflow, EngineCrashed, Interrupted, NotGguf, UsageError

FILES = Path("model.gguf"), Path("mmproj.gguf")
PICTURE = np.zeros((30, 40, 3), np.uint8)


def loaded(script: Script = Script(), options: LoadOptions = LoadOptions()) -> tuple[FakeEngine, Vlm]:
    engine = FakeEngine(script)
    return engine, engine.load(*FILES, options)


def prompt(vlm: Vlm, text: str = "What?") -> list:
    encoded = vlm.encode(PICTURE)
    parts = vlm.chat([Message("user", text, n_images=1)])
    return [p if isinstance(p, TextPart) else ImagePart(encoded) for p in parts]


def test_it_is_an_engine():
    engine, vlm = loaded()
    assert isinstance(engine, Engine)
    assert isinstance(vlm, Vlm)


def test_attention_peaks_where_the_script_says():
    _, vlm = loaded(Script(focus=(0.0, 0.5, 0.5, 1.0)))
    vlm.prefill(prompt(vlm), tap=True)
    done = vlm.generate(16)
    seen = vlm.attention()
    layout = vlm.layout(40, 30)
    x0, y0 = layout.boxes[seen.prompt.sum(axis=(0, 1)).argmax(), :2]
    assert x0 < 20
    assert y0 >= 15
    assert seen.prompt.shape == (4, 2, layout.n_tokens)
    assert seen.rows == (len("What?\nASSISTANT:"), done.fed)
    assert (seen.last.sum(axis=-1) <= 1).all()
    np.testing.assert_allclose(seen.generated, seen.last * done.fed, rtol=1e-5)


def test_logits_and_score_predict_the_answer():
    _, vlm = loaded(Script(answer="red"))
    vlm.prefill(prompt(vlm))
    assert vlm.logits().argmax() == ord("r")
    assert bytes(vlm.score(np.frombuffer(b"red", np.uint8).astype(np.int32)).argmax(axis=1).tolist()) == b"red"
    done = vlm.generate(16, SamplingOptions())
    assert (done.text, done.finish, done.fed, len(done.logprobs)) == ("red", "stop", 2, 4)
    assert vlm.generate(2).finish == "length"


def test_context_and_load_errors():
    _, vlm = loaded(options=LoadOptions(n_ctx=150))
    with pytest.raises(ContextOverflow):
        vlm.prefill(prompt(vlm))
    with pytest.raises(NotGguf):
        loaded(Script(load_error=NotGguf("x")))


def test_a_crash_ends_the_engine_until_the_next_load():
    engine, vlm = loaded(Script(crash_at=1))
    with pytest.raises(EngineCrashed, match="encode"):
        vlm.encode(PICTURE)
    with pytest.raises(EngineCrashed, match="ended"):
        vlm.encode(PICTURE)
    assert engine.load(*FILES)


def test_cancel_from_another_thread():
    engine, vlm = loaded(Script(answer="long answer", token_s=0.05))
    vlm.prefill(prompt(vlm))

    def cancel(text: str) -> None:
        thread = threading.Thread(target=engine.cancel)
        thread.start()
        thread.join()

    done = vlm.generate(100, on_text=cancel)
    assert done.finish == "cancelled"
    assert "long answer".startswith(done.text)
    assert len(done.ids) == len(done.text) < len("long answer")
    assert vlm.generate(100).text == "long answer", "a cancel is taken once"
    engine, vlm = loaded(Script(encode_s=5))
    engine.cancel()
    with pytest.raises(Interrupted):
        vlm.encode(PICTURE)


def test_a_prompt_pauses_and_goes_on_with_what_is_kept():
    _, vlm = loaded(Script(answer="red", pruned_answer="blue"))
    parts = prompt(vlm)
    whole = vlm.prefill(parts, tap=True)
    seen = vlm.attention()
    start = vlm.pause(parts, 0, hidden=True)
    assert (len(start.image), start.attention, start.hidden.shape) == (144, None, (144, 8))
    assert bytes(start.after.tolist()) == b"What?\nASSISTANT:"
    np.testing.assert_array_equal(start.hidden, vlm.features(parts[1].image))
    with pytest.raises(UsageError, match="paused"):
        vlm.generate(4)
    rows = np.ones((2, 8), np.float32)
    kept = vlm.resume(np.array([3, 7], np.int32), rows, layer=2, attend=None, hidden=True)
    assert (kept.layer, kept.image.tolist()) == (2, [3, 7])
    np.testing.assert_array_equal(kept.hidden, rows)
    np.testing.assert_array_equal(kept.attention, seen.last[1][:, [3, 7]])
    with pytest.raises(UsageError, match="cannot go on to layer 2"):
        vlm.resume(None, layer=2)
    with pytest.raises(UsageError, match="among the 2"):
        vlm.finish(np.array([4], np.int32))
    done = vlm.finish(np.array([], np.int32))
    assert (done.n_image, done.n_kept, done.n_past) == (144, 0, whole.n_past - 144)
    assert vlm.generate(8).text == "blue"
    with pytest.raises(UsageError, match="no prompt"):
        vlm.finish(None)
    vlm.pause(parts, 1)
    assert vlm.finish(None).n_past == whole.n_past
    assert vlm.generate(8).text == "red"
