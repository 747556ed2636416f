"""Training of the methods for the demo model: what the gates learn, and that training goes on where it was ended."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

try:
    demo = importlib.import_module("localvlm.models.demo")
except ModuleNotFoundError:  # a checkout that is not installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    demo = importlib.import_module("models.demo")

torch = pytest.importorskip("torch")


def part(name: str):
    return importlib.import_module(f"{demo.__name__}.{name}")


@pytest.fixture(scope="module")
def vlm():
    return part("frozen").shipped()


@torch.no_grad()
def alone(vlm, features, asked, layer: int):
    """One question by itself: rows of the prompt that enter ``layer``, and the most likely tokens where the answer is
    predicted, with the image's rows taken out before that layer (behind the last: never).
    """
    ahead = part("frozen").AHEAD
    text = len(ahead) + 144
    x = vlm.rows(torch.tensor(ahead), features[None], torch.tensor([[*asked.prompt, *asked.answer[:-1]]]))
    positions, entering = torch.arange(x.shape[1]), None
    for number, block in enumerate(vlm.layers):
        if number == layer:
            entering = x[0, text : text + len(asked.prompt)]
            positions = torch.cat([positions[: len(ahead)], positions[text:]])
            x = x[:, positions]
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()[None, None]
        x = block(x, vlm.turns[positions][None, :, None], mask)
    return entering, vlm.output(vlm.norm(x))[0, -len(asked.answer) :].argmax(-1)


def test_gates_learn_where_the_answer_stays_without_the_image(vlm):
    dyvte, frozen, data = part("dyvte"), part("frozen"), part("data")
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(2, 144, 192)).astype(np.float32))
    kinds = ("colour", "exist", "read"), ("count", "where")
    questions = [frozen.asked(data.TRAIN.scene(i), rng, kinds[i]) for i in range(2)]
    found = dyvte.examples(vlm, features, questions)
    each = [(features[i], a) for i, row in enumerate(questions) for a in row]
    assert found.kinds == [a.kind for _, a in each]
    for number, (seen, a) in enumerate(each):
        _, said = alone(vlm, seen, a, len(vlm.layers))
        for place, layer in enumerate(dyvte.LAYERS):
            entering, left = alone(vlm, seen, a, layer)
            want = torch.cat([entering.mean(0), entering[-1]])
            torch.testing.assert_close(found.seen[number, place], want, rtol=1e-3, atol=1e-3)
            assert found.exits[number, place] == bool((left == said).all())
    assert 0 < found.exits.float().mean() < 1


def test_training_goes_on_where_it_was_ended(tmp_path, monkeypatch):
    compress, flashsloth = part("compress"), part("flashsloth")
    pool = np.random.default_rng(0).normal(size=(1, 144, 192)).astype(np.float16)
    monkeypatch.setattr(compress.data, "features", lambda split, _: np.broadcast_to(pool, (split.count, 144, 192)))
    monkeypatch.setattr(compress, "SCENES", 2)
    monkeypatch.setattr(compress, "accuracy", lambda *_: {})
    torch.manual_seed(0)
    begun = flashsloth.FlashSloth()
    start = {name: value.clone() for name, value in begun.state_dict().items()}
    compress.fit(begun, tmp_path, 2, "flashsloth", (4,))
    torch.manual_seed(1)
    resumed = flashsloth.FlashSloth()
    compress.fit(resumed, tmp_path, 2, "flashsloth", (4,))
    after = begun.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in resumed.state_dict().items())
    assert {"queries", "down.weight", "asks.out.weight"} <= {n for n in start if not torch.equal(start[n], after[n])}
    compress.fit(resumed, tmp_path, 3, "flashsloth", (4,))
    assert torch.load(tmp_path / "flashsloth.pt", weights_only=True)["step"] == 3
    assert not torch.equal(resumed.state_dict()["queries"], after["queries"])
