"""What is loaded before the first frame: it comes soon because little is."""

from __future__ import annotations

import pytest

from tests.tui.terminal import Terminal

CHILD = """
import sys
from pathlib import Path

from localvlm.cli.main import main
from localvlm.tui.app import ChatApp

async def begin(app):  # in place of what the first frame does not wait for
    Path(sys.argv[1]).write_text("\\n".join(sys.modules))

ChatApp._begin = begin
main(["chat", *sys.argv[2:]])
"""
HEAVY = {"PIL", "gguf", "jinja2", "llama_cpp", "markdown_it", "numpy", "pygments", "requests", "sqlite3"}
OWN = ("localvlm.engine", "localvlm.history", "localvlm.pipeline", "localvlm.pruning", "localvlm.session",
       "localvlm.tui.screens", "localvlm.tui.picture.", "localvlm.tui.widgets.answer_text",
       "localvlm.tui.widgets.message", "localvlm.tui.widgets.saw_panel", "rich.markdown")  # fmt: skip


@pytest.mark.parametrize("options", [["--pair", "demo"], []], ids=["a pair", "no pair"])
def test_little_is_loaded_before_the_first_frame(tmp_path, options):
    found = tmp_path / "modules"
    with Terminal(["-c", CHILD, str(found), *options], env={"LOCALVLM_HOME": str(tmp_path)}) as terminal:
        terminal.until(b"sk about")  # its first letter is under the cursor
        while not found.exists():
            terminal.read(0.05)
        terminal.type(b"\x11")
        assert terminal.ended() == 0
    loaded = found.read_text().split()
    assert "localvlm.tui.widgets.composer" in loaded
    assert not HEAVY & {name.partition(".")[0] for name in loaded}
    assert not [name for name in loaded if name.startswith(OWN)]
