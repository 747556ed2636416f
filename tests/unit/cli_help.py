"""Runs the command line in this process on the fake engine."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass
from pathlib import Path

import PIL.Image
import pytest

from localvlm.cli.app import App
from localvlm.cli.main import main
from localvlm.engine.fake import FakeEngine, Script

GUIDE_SAYS, MODEL_SAYS = "red", "dark red"


@dataclass(frozen=True)
class Run:
    """What a command did."""

    code: int
    out: str
    err: str


class Cli:
    """Calls ``localvlm`` with arguments; ``scripts`` say how the fake guide and model behave."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self._capsys, self._monkeypatch = folder, capsys, monkeypatch
        self.scripts = {"guide": Script(answer=GUIDE_SAYS), "model": Script(answer=MODEL_SAYS)}
        self.engine: FakeEngine | None = None
        self.image = str(folder / "picture.png")
        PIL.Image.new("RGB", (64, 48), (200, 10, 10)).save(self.image)
        for name in ("guide", "guide-mmproj", "model", "model-mmproj"):
            (folder / f"{name}.gguf").write_bytes(b"GGUF")
        self.pair = ["--guide", str(folder / "guide.gguf"), "--model", str(folder / "model.gguf")]

    def __call__(self, *args: object, stdin: bytes | None = b"") -> Run:
        def engine(verbose: bool) -> FakeEngine:
            self.engine = FakeEngine(self.scripts)
            return self.engine

        self._capsys.readouterr()
        stream = None if stdin is None else io.TextIOWrapper(io.BytesIO(stdin))
        self._monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(SystemExit) as left:
            main([str(a) for a in args], App(engine))
        out, err = self._capsys.readouterr()
        assert "Traceback" not in err
        code = left.value.code
        assert isinstance(code, int)
        return Run(code, out, err)

    def ask(self, *args: object, stdin: bytes | None = b"") -> Run:
        """``localvlm ask`` with both models, the picture and a question."""
        return self("ask", *self.pair, *args, self.image, "What colour is it?", stdin=stdin)
