"""Layers for a GPU that is not there are refused aloud; none asked for, no GPU is touched."""

from __future__ import annotations

from pathlib import Path

import llama_cpp
import pytest

from localvlm.engine import tower
from localvlm.engine.api import LoadOptions, TextPart
from localvlm.engine.client import Engine
from localvlm.engine.devices import check_gpu
from localvlm.engine.fake import FakeEngine, Script
from localvlm.engine.vlm import LlamaVlm
from localvlm.errors import NotEnoughMemory, UnsupportedModel, UsageError
from tests import zoo
from tests.unit.cli_help import Cli

CARD = ("CUDA0: a card",)


@pytest.mark.parametrize("layers", [-1, 1, 99])
def test_layers_for_no_gpu_are_refused(layers: int) -> None:
    with pytest.raises(UsageError, match=rf"-ngl {layers} .* sees none \(built for: CUDA, CPU\)") as refused:
        check_gpu(layers, (), ("CUDA", "CPU"))
    assert "-ngl 0" in refused.value.hint
    assert "docs/gpu.md" in refused.value.hint
    check_gpu(layers, CARD, ("CUDA", "CPU"))
    check_gpu(0, (), ("CPU",))


def test_the_engine_asks_llama_cpp(native: None, tmp_path: Path) -> None:
    model = zoo.build("llava15", tmp_path)
    with Engine() as engine:
        told = engine.backend()
        assert "CPU" in told.backends
        for layers in (-1, 1):
            options = LoadOptions(threads=1, gpu_layers=layers)
            if told.devices:
                engine.load(model.model, model.mmproj, options).close()
                continue
            with pytest.raises(UsageError, match=r"sees none \(built for: .*CPU"):
                engine.load(model.model, model.mmproj, options)
        engine.load(model.model, model.mmproj, LoadOptions(threads=1)).close()


def test_the_command_line_leaves_with_2(cli: Cli) -> None:
    assert cli.ask().code == 0
    refused = cli.ask("-ngl", -1)
    assert (refused.code, refused.out) == (2, "")
    assert "-ngl -1" in refused.err
    assert "docs/gpu.md" in refused.err
    cli.scripts = {role: Script(gpus=CARD) for role in cli.scripts}
    assert cli.ask("-ngl", -1).code == 0


def test_the_fake_has_no_gpu_unless_the_script_says_so() -> None:
    with pytest.raises(UsageError, match="-ngl 3"):
        FakeEngine().load(Path("m.gguf"), Path("p.gguf"), LoadOptions(gpu_layers=3))
    FakeEngine(Script(gpus=CARD)).load(Path("m.gguf"), Path("p.gguf"), LoadOptions(gpu_layers=3))


def test_a_graph_without_room_is_told(native: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = zoo.build("llava15", tmp_path)
    vlm = LlamaVlm(model.model, model.mmproj, LoadOptions(threads=1))
    for code, error in ((-2, NotEnoughMemory), (-3, UnsupportedModel)):
        with monkeypatch.context() as patched:
            patched.setattr(llama_cpp, "llama_decode", lambda *_, code=code: code)
            with pytest.raises(error):
                vlm.prefill([TextPart("USER: ")])
    assert vlm.prefill([TextPart("USER: ")]).n_past
    vlm.close()


def test_a_full_gpu_is_told_from_a_bad_projector(monkeypatch: pytest.MonkeyPatch) -> None:
    told = ["cudaMalloc failed: out of memory", "clip_init: failed to load model"]
    monkeypatch.setattr(tower, "last_log_lines", lambda: told)
    assert isinstance(tower.failure("the tower failed"), NotEnoughMemory)
    told[0] = "warmup: flash attention not supported, memory usage will increase"
    assert isinstance(tower.failure("the tower failed"), UnsupportedModel)
    told.clear()
    assert "no reason" in str(tower.failure("the tower failed"))
