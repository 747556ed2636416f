"""Conversations through chat templates. A template is a program out of a model file: it runs sandboxed, in the worker.

Texts of the conversation go through the template as placeholders, so that what the template wrote (control tokens and
all) and what people wrote (never a control token) can be told apart afterwards.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import signal
import threading
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from localvlm.engine.api import Message, TextPart
from localvlm.errors import ModelError

if TYPE_CHECKING:
    import jinja2

__all__ = ["render"]

VICUNA = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ m.content + ' ' }}{% elif m.role == 'user' %}"
    "{{ 'USER: ' + m.content + ' ' }}{% else %}{{ 'ASSISTANT: ' + m.content + eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PICTURE = "<image>"
"""What templates that take lists of pictures and texts alone write for a picture (LLaVA, Idefics3, SmolVLM)."""
MAX_OUTPUT = 1 << 20
"""Characters; texts are not counted, they are placeholders."""
MAX_MEMORY = 1 << 28
"""Bytes that a template may take."""
MAX_SECONDS = 5.0
"""Of processor time that it may take: a busy machine makes none of them late."""


@contextlib.contextmanager
def _little_memory() -> Iterator[None]:
    """Bounds what this process may allocate meanwhile, where the system can."""
    try:
        import resource

        import psutil

        soft, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = psutil.Process().memory_info().vms + MAX_MEMORY
        if soft != resource.RLIM_INFINITY and soft < limit:
            limit = soft
        resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    except (ImportError, OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def _little_time() -> Iterator[None]:
    """Bounds the processor time meanwhile, in the main thread, the only one that hears signals.

    Raises:
        ModelError: it was taken.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def late(*_: object) -> None:
        raise ModelError(f"the model's chat template takes over {MAX_SECONDS:g} s of processor time")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, MAX_SECONDS, 1.0)  # again, as Jinja hides what its constants raise
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    """Once for all prompts: that takes Jinja 5 ms and more."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    return environment.from_string(template)


def _expand(template: str, messages: Sequence[dict[str, Any]], bos: str, eos: str) -> str:
    pieces: list[str] = []
    size = 0
    stream = _compiled(template).generate(
        messages=list(messages), add_generation_prompt=True, bos_token=bos, eos_token=eos, tools=None
    )
    for piece in stream:
        size += len(piece)
        if size > MAX_OUTPUT:
            raise ModelError(f"the model's chat template writes more than {MAX_OUTPUT} characters")
        pieces.append(piece)
    return "".join(pieces)


def render(messages: Sequence[Message], template: str | None, family: str, bos: str, eos: str) -> list[TextPart | int]:
    """See :meth:`localvlm.engine.api.Vlm.chat`. Without a template, Vicuna's form for LLaVA and ChatML for others."""
    nonce = secrets.token_hex(8)
    # as they were trained; InternVL's templates say so only where contents are lists
    llava = family.startswith("llava")
    after = "\n" if family == "internvl" or (template is None and llava) else ""
    template = template or (VICUNA if llava else CHATML)
    reason: ModelError | None = None
    for typed in (False, True):
        turns = _turns(messages, nonce, after, typed)
        try:
            with _little_memory(), _little_time():
                text = _expand(template, turns, bos, eos)
        except ModelError:
            raise
        except Exception as error:  # noqa: BLE001  a template may raise anything
            reason = reason or ModelError(f"the model's chat template fails: {type(error).__name__}: {error}")
            if isinstance(error, MemoryError):
                break
            continue
        if typed:
            first, *others = text.split(PICTURE)
            text = first + "".join(f"[{nonce}i{k}]{rest}" for k, rest in enumerate(others))
        parts = _parts(text, nonce, messages)
        if parts is not None:
            return parts
        reason = reason or ModelError("the model's chat template drops or repeats a text or a picture")
    assert reason is not None
    raise reason from None


def _turns(messages: Sequence[Message], nonce: str, after: str, typed: bool) -> list[dict[str, Any]]:
    """The conversation as templates take it: contents are texts, or (``typed``) lists of pictures and texts."""
    turns: list[dict[str, Any]] = []
    n_images = 0
    for i, message in enumerate(messages):
        pictures = [f"[{nonce}i{n_images + k}]{after}" for k in range(message.n_images)]
        n_images += message.n_images
        words = f"[{nonce}t{i}]"
        items = [*({"type": "image"} for _ in pictures), {"type": "text", "text": words}]
        turns.append({"role": message.role, "content": items if typed else "".join(pictures) + words})
    return turns


def _parts(text: str, nonce: str, messages: Sequence[Message]) -> list[TextPart | int] | None:
    """What a template wrote, placeholders filled in; None if one is missing or there twice."""
    n_images = sum(m.n_images for m in messages)
    wanted: dict[str, TextPart | int] = {f"[{nonce}i{k}]": k for k in range(n_images)}
    wanted |= {f"[{nonce}t{i}]": TextPart(m.text) for i, m in enumerate(messages)}
    pieces = re.split(rf"(\[{nonce}[it]\d+\])", text)
    if sorted(pieces[1::2]) != sorted(wanted):
        return None
    parts = [wanted[p] if p in wanted else TextPart(p, special=True) for p in pieces]
    return [p for p in parts if not (isinstance(p, TextPart) and not p.text)]
