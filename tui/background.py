"""Work beside the interface: in threads that neither block it nor keep it from ending."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from textual.css.query import NoMatches
from textual.dom import NoScreen

from localvlm.errors import LocalvlmError

from .defects import defect

if TYPE_CHECKING:
    from textual.dom import DOMNode

__all__ = ["Workers", "in_thread"]

_T = TypeVar("_T")


async def in_thread(work: Callable[[], _T], known: type[Exception] = LocalvlmError) -> _T:
    """What ``work`` returns, or raises of ``known``; any other exception is one of localvlm's, which tells of a defect:
    no error of a dialog ends the chat. It runs in a daemon thread of its own, which a cancelled wait, or the end of the
    program, leaves behind: those of asyncio's pool are waited for, be it for a disk of the network that hangs.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def deliver(take: Callable[[Any], None], value: object) -> None:
        if not future.done():
            take(value)

    def run() -> None:
        try:
            result: tuple[Callable[[Any], None], object] = (future.set_result, work())
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            result = (future.set_exception, error if isinstance(error, known) else defect(error))
        try:
            loop.call_soon_threadsafe(deliver, *result)
        except RuntimeError:  # the loop ended meanwhile
            return

    threading.Thread(target=run, daemon=True).start()
    return await future


class Workers:
    """A mixin for what is closed by people while its workers run. A worker is cancelled only after the widgets are
    gone: that there is nothing left to draw on is no error then.
    """

    def run_worker(self, work: Any, *args: Any, **options: Any) -> Any:
        """As Textual's; ``work`` is a coroutine, or a partial that makes one for a worker that may be cancelled before
        it runs: Python complains of a coroutine that never did.
        """
        shown = work
        if inspect.iscoroutine(work):
            shown = _while_shown(self, lambda: work)  # type: ignore[arg-type]
        elif isinstance(work, partial) and inspect.iscoroutinefunction(work.func):
            shown = partial(_while_shown, self, work)  # type: ignore[arg-type]
        return super().run_worker(shown, *args, **options)  # type: ignore[misc]


async def _while_shown(node: DOMNode, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T | None:
    try:
        return await work()
    except (NoMatches, NoScreen):
        if node.display and node.app.is_running:
            raise
        return None
