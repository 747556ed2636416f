"""What it saw: pictures under the guide's attention, tokens kept, who answered and why, and the time it took."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from textual import on, work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.content import Content
from textual.message import Message
from textual.widgets import Select, Static

from localvlm.answers import Answer, AskOptions, Look
from localvlm.engine.api import VlmInfo
from localvlm.images import Image
from localvlm.pruning import Keep

from ..evidence import Evidence, Marks
from ..picture import Drawing, Protocol, View, bounded
from ..rewriting import rewrite
from ..text import one_line, shown_name
from ..verdict import looked_told, seen_told, told
from .method_choice import MethodChoice
from .picture_caption import PictureCaption
from .picture_view import PictureView
from .retention_slider import RetentionSlider
from .stage_bars import StageBars

__all__ = ["SawPanel"]

SHARE = 35
"""Percent that the slider shows beside a budget of "auto" or of a number of tokens."""
AT_ONCE = 1 << 20
"""Pixels of pictures that are scaled without leaving the thread of the app: a millisecond's work."""


class SawPanel(VerticalScroll, can_focus=False):
    """The side panel. Its methods belong to the thread of the app."""

    DEFAULT_CSS = """
    SawPanel {
        width: 1fr;
        & > Static, & > StageBars { width: 1fr; height: auto; padding: 0 1; }
        & > RetentionSlider { margin-top: 1; }
        & > #saw-note { color: $text-muted; }
        & > .empty { display: none; }
        & > #saw-verdict { margin-top: 1; }
        & > StageBars { margin-top: 1; }
    }
    """

    class RetentionChanged(Message):
        """``keep``: share of the image tokens, 0.01..1, that somebody chose."""

        def __init__(self, keep: float) -> None:
            super().__init__()
            self.keep = keep

    class MethodChanged(Message):
        """``name``: of the pruning method that somebody chose."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Hidden(Message):
        """It can be seen no more."""

    def __init__(
        self,
        options: AskOptions = AskOptions(),
        *,
        methods: Sequence[str] | None = None,
        pictures: Protocol | None = None,
        id: str | None = None,  # noqa: A002
        classes: str | None = None,
    ) -> None:
        """A panel.

        Args:
            options: of the next question.
            methods: that can be chosen; None: all.
            pictures: how they reach the terminal; None: as the environment tells.
            id: of the widget.
            classes: of the widget.
        """
        super().__init__(id=id, classes=classes)
        self._options, self._methods, self._pictures = options, methods, pictures
        self._evidence = Evidence()
        self._images: tuple[Image, ...] = ()
        self._drawn: list[tuple[Image, Drawing]] = []
        """Those that have been scaled."""

    def compose(self) -> ComposeResult:
        yield PictureView(self._pictures)
        yield PictureCaption()
        yield RetentionSlider(_percent(self._options.keep))
        yield Static("", id="saw-tokens", markup=False)
        yield MethodChoice(self._options.method, self._methods)
        yield Static("", id="saw-note", markup=False)
        yield Static("", id="saw-verdict", markup=False)
        yield StageBars()

    # what the app tells

    def show_images(self, images: Sequence[Image]) -> None:
        """The pictures of the conversation, in order. What is known of the first ones stays while they are the same."""
        same = [a is b for a, b in zip(images, self._images, strict=False)]
        if all(same) and len(images) == len(self._images):
            return
        self._images = tuple(images)
        self._evidence.sizes = [image.size for image in images]
        if len(images) < self._evidence.n_asked or not all(same[: self._evidence.n_asked]):
            self.clear()
        self._scale()

    def loaded(self, guide: VlmInfo | None, model: VlmInfo | None) -> None:
        """The VLMs that answer, once they are known: the price of a tile is the model's."""
        self._evidence.loaded(guide, model)

    def set_options(self, options: AskOptions) -> None:
        """What the next question will be asked with."""
        self._options = options
        self.query_one(RetentionSlider).percent = _percent(options.keep)
        self.query_one(MethodChoice).set_quietly(options.method)
        self._mark()

    def begin(self, question: str = "") -> None:
        """A question is asked; its words matter to an "auto" budget."""
        self._evidence.begin(question)
        self.query_one(StageBars).clear()
        self._say([])
        self._mark()

    def stage(self, name: str) -> None:
        """A stage of the answer begins."""
        self.query_one(StageBars).stage(name)

    def looked(self, look: Look) -> None:
        """The guide has looked."""
        self._evidence.looked(look)
        self._say(looked_told(look, self._options.exit_at))
        self._mark()

    def answered(self, answer: Answer) -> None:
        """The answer is final."""
        self._evidence.answered(answer)
        self.query_one(StageBars).finish(answer.ms, "not needed" if answer.answered_by == "guide" else "")
        self._say(told(answer))
        self._mark()

    def failed(self, text: str) -> None:
        """There is no answer; ``text`` says why, for people."""
        self.query_one(StageBars).stop()
        self._say([one_line(text)])

    def stopped(self) -> None:
        """Somebody stopped the answer: what is known of it stays, and takes no more time."""
        self.query_one(StageBars).stop()

    def clear(self) -> None:
        """Nothing was asked."""
        self.begin()

    # what people do

    @on(RetentionSlider.Changed)
    def _retain(self, event: RetentionSlider.Changed) -> None:
        event.stop()
        self._options = replace(self._options, keep=event.percent / 100, preset=None, layer=0)
        self._mark()
        self.post_message(self.RetentionChanged(event.percent / 100))

    @on(Select.Changed)
    def _choose(self, event: Select.Changed) -> None:
        event.stop()
        if isinstance(event.value, str) and event.value != self._options.method:
            self._options = replace(self._options, method=event.value, preset=None, layer=0)
            self._mark()
            self.post_message(self.MethodChanged(event.value))

    @on(PictureCaption.Chosen)
    def _view(self, event: PictureCaption.Chosen) -> None:
        event.stop()
        self.query_one(PictureView).view = event.view

    @on(PictureView.Changed)
    def _turned(self, event: PictureView.Changed) -> None:
        event.stop()
        self._caption()

    def on_resize(self) -> None:
        self._caption()

    def on_hide(self) -> None:
        self.post_message(self.Hidden())

    # what is shown

    def _scale(self) -> None:
        images, known = self._images, {id(image): drawing for image, drawing in self._drawn}
        new = [image for image in images if id(image) not in known]
        if sum(image.size[0] * image.size[1] for image in new) <= AT_ONCE:
            self._scaled(images, known | {id(image): Drawing(bounded(image.rgb)) for image in new})
        else:
            self._scale_apart(images, known, new)

    @work(exclusive=True, group="saw-scale")
    async def _scale_apart(self, images: tuple[Image, ...], known: dict[int, Drawing], new: Sequence[Image]) -> None:
        pixels = [await asyncio.to_thread(bounded, image.rgb) for image in new]
        self._scaled(images, known | {id(image): Drawing(each) for image, each in zip(new, pixels, strict=True)})

    def _scaled(self, images: tuple[Image, ...], drawings: dict[int, Drawing]) -> None:
        if images is self._images:
            self._drawn = [(image, drawings[id(image)]) for image in images]
            self.query_one(PictureView).show([drawing for _, drawing in self._drawn])
            self._mark()

    def _mark(self) -> None:
        """Draws what is known, with the options as they are."""
        marks = self._evidence.marks(self._options)
        view = self.query_one(PictureView)
        marked = {id(image): mark for image, mark in zip(self._images, marks, strict=True)}
        changed = False
        for image, drawing in self._drawn:
            mark = marked.get(id(image), Marks())
            changed |= drawing.know(mark.boxes, mark.heat, mark.kept)
        if changed:
            view.redraw()
        kept = [len(mark.kept) for mark in marks if mark.kept is not None]
        tokens = ""
        if kept:
            seen = seen_told(sum(kept), sum(mark.total for mark in marks))
            tokens = seen if self._evidence.exact else f"would keep {seen}"
        self._write("saw-tokens", Content.styled(tokens, "bold"))
        self._write("saw-note", Content(one_line(self._evidence.note)))
        self._caption()

    def _caption(self) -> None:
        view, caption = self.query_one(PictureView), self.query_one(PictureCaption)
        if not view.drawings:
            caption.update(Content.styled("no picture yet", "$text-muted"))
            return
        image, drawing = self._drawn[view.index]
        views = [View.PICTURE] + [View.HEAT] * drawing.has_heat + [View.KEPT] * (drawing.kept is not None)
        place = f"{view.index + 1} of {len(view.drawings)}" if len(view.drawings) > 1 else ""
        caption.tell(one_line(shown_name(image.name)), place, views, view.view, coloured=not self.app.no_color)

    def _say(self, lines: Sequence[str]) -> None:
        first, *rest = lines or [""]
        styled = [Content.styled(first, "bold"), *(Content.styled(line, "$text-muted") for line in rest)]
        self._write("saw-verdict", Content("\n").join(styled))

    def _write(self, name: str, content: Content) -> None:
        line = self.query_one(f"#{name}", Static)
        line.set_class(not content.plain, "empty")
        rewrite(line, content)


def _percent(keep: Keep) -> int:
    """A share as a whole percent; of a budget that is no share, where the slider begins."""
    if keep is None:
        return 100
    return round(100 * keep) if isinstance(keep, (int, float)) else SHARE
