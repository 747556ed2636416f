"""Which pruning method chooses the tokens: a list that opens, with what each goes by."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text
from textual.widgets import Select

from localvlm.pruning import IN_LLM, METHODS

__all__ = ["MethodChoice"]


class MethodChoice(Select[str]):
    """One of the methods, by name."""

    DEFAULT_CSS = """
    MethodChoice {
        width: 1fr;
        border-left: blank;
        padding-right: 1;
        & > SelectCurrent Static#label { text-wrap: nowrap; text-overflow: ellipsis; }
        &:focus { border-left: outer $border; background: $foreground 10%; }
        & > SelectCurrent, &:focus > SelectCurrent { background: transparent; }
        & > SelectOverlay { max-height: 12; }
    }
    """

    def __init__(self, method: str, methods: Sequence[str] | None = None, *, id: str | None = None) -> None:  # noqa: A002
        known = {name: m.summary for name, m in METHODS.items()} | {name: m.summary for name, m in IN_LLM.items()}
        names = list(known) if methods is None else list(methods)
        names += [method] * (method not in names)
        options = [(_told(name, known[name]), name) for name in names]
        super().__init__(options, allow_blank=False, value=method, compact=True, id=id)

    def set_quietly(self, method: str) -> None:
        """Shows another method without telling that it was chosen."""
        with self.prevent(Select.Changed):
            self.value = method


def _told(name: str, summary: str) -> Text:
    """A line of the list; of the kinds of text that can be searched by typing."""
    return Text.assemble((name, "bold"), f"  {summary}")
