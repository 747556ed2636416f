"""The panel alone in an app, and what a question on the fake engine tells it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
from PIL import ImageDraw
from textual.app import App, ComposeResult

from localvlm.answers import Answer, AskOptions, Look
from localvlm.engine.fake import FakeEngine, Script
from localvlm.images import Image
from localvlm.pipeline import Pair, Pipeline, VlmFiles
from localvlm.tui.picture import Protocol
from localvlm.tui.themes import DARK, THEMES, role_colours
from localvlm.tui.widgets.saw_panel import SawPanel

__all__ = ["QUESTION", "TIMES", "PanelApp", "asked", "picture", "plain"]

QUESTION = "What colour is the star?"
TIMES = {"load": 12.0, "guide_encode": 912.4, "guide_prefill": 240.0, "guide_decode": 61.0, "encode": 1830.0,
         "prefill": 2600.0, "decode": 410.0, "first_token": 5700.0, "total": 6065.4}  # fmt: skip
"""Milliseconds in place of those that an answer took, so that screens are equal."""
GUIDE = Script(answer="red", grid=(9, 9), focus=(0.1, 0.1, 0.5, 0.6))
MODEL = Script(answer="dark red", grid=(12, 12))


class PanelApp(App[None]):
    """``told``: what the panel posted, in order."""

    def __init__(
        self, theme: str = DARK.name, options: AskOptions = AskOptions(), pictures: Protocol = Protocol.BLOCKS
    ) -> None:
        super().__init__()
        self.animation_level = "none"
        for own in THEMES:
            self.register_theme(own)
        self.theme = theme
        self.panel = SawPanel(options, pictures=pictures)
        self.told: list[float | str] = []

    def get_theme_variable_defaults(self) -> dict[str, str]:
        return role_colours(self.current_theme)

    def compose(self) -> ComposeResult:
        yield self.panel

    def on_saw_panel_retention_changed(self, event: SawPanel.RetentionChanged) -> None:
        self.told.append(event.keep)

    def on_saw_panel_method_changed(self, event: SawPanel.MethodChanged) -> None:
        self.told.append(event.name)


def plain(width: int = 60, height: int = 40, name: str = "plain.png", shade: int = 90) -> Image:
    return Image(np.full((height, width, 3), shade, np.uint8), name)


def picture(name: str = "scene.png") -> Image:
    """Some shapes on a light ground."""
    page = PIL.Image.new("RGB", (120, 90), (236, 232, 220))
    pen = ImageDraw.Draw(page)
    pen.ellipse((15, 12, 55, 52), fill=(200, 40, 30))
    pen.rectangle((70, 50, 110, 80), fill=(40, 90, 190))
    pen.polygon([(80, 10), (105, 40), (62, 36)], fill=(245, 190, 30))
    return Image(np.asarray(page), name)


def asked(
    pictures: Sequence[Image],
    scripts: Mapping[str, Script] | None = None,
    ms: Mapping[str, float] = TIMES,
    **options: object,
) -> tuple[Look | None, Answer]:
    """The guide's look, if there was one, and the answer, whose times are ``ms`` where it took any."""
    pair = Pair("fake", VlmFiles(Path("guide"), Path("p")), VlmFiles(Path("model"), Path("p")))
    engine = FakeEngine(scripts or {"guide": GUIDE, "model": MODEL})
    looks: list[Look] = []
    with Pipeline.open(pair, engine=engine) as pipeline, pipeline.session(pictures, history=False) as session:
        answer = session.ask(QUESTION, AskOptions(**options), on_look=looks.append)
    ran = {name: ms[name] if took else 0.0 for name, took in answer.ms.items()}
    return next(iter(looks), None), replace(answer, ms=ran)
