"""Conversations through chat templates. A template is a program out of a model file: it runs sandboxed, in the worker.

Texts of the conversation go through the template as placeholders, so that what the template wrote (control tokens and
all) and what people wrote (never a control token) can be told apart afterwards.
"""

from __future__ import annotations

import contextlib
import re
import secrets
from collections.abc import Iterator, Sequence

from localvlm.engine.api import Message, TextPart
from localvlm.errors import ModelError

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
MAX_OUTPUT = 1 << 20
"""Characters; texts are not counted, they are placeholders."""
MAX_MEMORY = 1 << 28
"""Bytes that a template may take. Its time is limited by the client."""


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


def _expand(template: str, messages: Sequence[dict[str, str]], bos: str, eos: str) -> str:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(reason: str) -> None:
        raise jinja2.TemplateError(reason)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = refuse
    pieces: list[str] = []
    size = 0
    stream = environment.from_string(template).generate(
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
    texts = [m.text for m in messages]
    turns: list[dict[str, str]] = []
    n_images = 0
    after = "\n" if template is None and family == "llava" else ""  # as LLaVA-1.5 was trained
    for i, message in enumerate(messages):
        pictures = "".join(f"[{nonce}i{n_images + k}]{after}" for k in range(message.n_images))
        n_images += message.n_images
        turns.append({"role": message.role, "content": pictures + f"[{nonce}t{i}]"})
    try:
        with _little_memory():
            text = _expand(template or (VICUNA if family == "llava" else CHATML), turns, bos, eos)
    except ModelError:
        raise
    except Exception as error:  # noqa: BLE001  a template may raise anything
        raise ModelError(f"the model's chat template fails: {type(error).__name__}: {error}") from None
    parts: list[TextPart | int] = []
    seen: list[tuple[str, int]] = []
    for piece in re.split(rf"(\[{nonce}[it]\d+\])", text):
        mark = re.fullmatch(rf"\[{nonce}([it])(\d+)\]", piece)
        if mark is None:
            if piece:
                parts.append(TextPart(piece, special=True))
            continue
        number = int(mark[2])
        seen.append((mark[1], number))
        parts.append(number if mark[1] == "i" else TextPart(texts[number]))
    wanted = [("i", k) for k in range(n_images)] + [("t", i) for i in range(len(texts))]
    if sorted(seen) != sorted(wanted):
        raise ModelError("the model's chat template drops or repeats a text or a picture")
    return [p for p in parts if not (isinstance(p, TextPart) and not p.text)]
