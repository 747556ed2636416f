"""What is fuzzed: each target makes inputs from a seed and tries them; what it must not do raises AssertionError."""

from __future__ import annotations

import io
import json
from pathlib import Path
from random import Random

import numpy as np
import PIL.Image

from localvlm.engine.api import Encoded, ImageLayout, LoadOptions, Message, TextPart
from localvlm.engine.chat import render
from localvlm.engine.gguf_header import check_pair, read_header
from localvlm.engine.wire import pack, unpack
from localvlm.errors import ImageError, LocalvlmError, ModelError
from localvlm.images import MAX_PIXELS, load
from localvlm.sanitize import Sanitizer, sanitize
from tests import zoo
from tests.damage import Gguf
from tests.fuzz.mutate import mutated, mutated_text
from tests.unit.test_chat import CHATML, HOSTILE
from tests.unit.test_sanitize import FRAGMENTS, is_safe

__all__ = ["Header", "Images", "Prompt", "Sanitize", "Wire"]


def _told(error: LocalvlmError) -> None:
    """A message is one line, and no file's text fills the screen."""
    said = str(error)
    assert len(said) < 2000, f"a message of {len(said)} characters: {said[:200]}"
    assert "\n" not in error.message, f"a message of several lines: {said[:200]!r}"


class Header:
    """GGUF headers, whose tensors' data is a hole in the file: read, and held against a sound other half."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "fuzzed.gguf"
        self._heads, self._pairs = [], []
        for name in ("llava15", "qwen25vl", "qwen3vl", "smolvlm", "gemma3"):
            model = zoo.build(name, folder)
            for path, other in ((model.model, model.mmproj), (model.mmproj, model.model)):
                raw = path.read_bytes()
                self._heads.append(Gguf.parse(raw).head())
                self._pairs.append((len(raw) - len(self._heads[-1]), read_header(other)))

    def __call__(self, r: Random) -> bytes:
        which = r.randrange(len(self._heads))
        head = mutated(self._heads[which], r, self._heads)
        size, other = self._pairs[which]
        with self._path.open("wb") as file:
            file.write(head)
            file.truncate(len(head) + size)
        try:
            header = read_header(self._path)
            check_pair(*((other, header) if header.is_projector else (header, other)))
        except ModelError as error:
            _told(error)
        return head


class Prompt:
    """Chat templates and what people write: texts come through as they are, and never as control tokens."""

    PIECES = (
        "{% for m in messages %}", "{% endfor %}", "{{ m.content }}", "{{ m['content'] }}", "{{ m.role }}",
        "{{ bos_token }}",
        "{{ eos_token }}", "{% if m.role == 'user' %}", "{% else %}", "{% endif %}", "{% if add_generation_prompt %}",
        "{% for c in m.content %}", "{{ c.text }}", "{% if c.type == 'image' %}<image>{% endif %}",
        "<|im_start|>", "\n",
        "{{ messages[0].content }}", "{{ loop.index }}", "{{ raise_exception('no') }}", "{% set x = namespace(a=0) %}",
        "{{ m.content | trim }}", "{{ m.content | upper }}", "{{ range(9) | list }}", "{# a #}", "{{ x.__class__ }}",
        "{{ m.content.split('x') | join }}", "{{ ''.join(['a'] * 9) }}", "{% break %}",
        "{% macro f() %}", "{% endmacro %}",
        "{{ f() }}", "{{ m.content[::-1] }}", "{{ '%s' % m.content }}", "{{ m | tojson }}", "{%- -%}", "{{", "}}", "{%",
    )  # fmt: skip

    def __init__(self, folder: Path) -> None:
        self._templates = [CHATML, None, *(row.tokenizer.template for row in zoo.FAMILIES.values())]

    def __call__(self, r: Random) -> bytes:
        template = r.choice(self._templates)
        if r.random() < 0.7:
            template = mutated_text(self.PIECES, r, 20)
        elif template is not None and r.random() < 0.5:
            template = mutated(template.encode(), r).decode("utf-8", "replace")
        roles = ("user", "assistant") if r.random() < 0.7 else ("system", "user", "assistant")
        texts = [mutated_text((*HOSTILE, "what is it?"), r, 4) for _ in range(r.randrange(1, 5))]
        messages = [
            Message(roles[i % len(roles)], text, r.randrange(3) if roles[i % len(roles)] == "user" else 0)
            for i, text in enumerate(texts)
        ]
        try:
            parts = render(messages, template, r.choice(("llava", "qwen2.5vl", "internvl")), "<s>", "</s>")
        except ModelError as error:
            _told(error)
        else:
            said = [p.text for p in parts if isinstance(p, TextPart) and not p.special]
            assert said == [m.text for m in messages if m.text], f"texts came back as {said!r}"
            pictures = [p for p in parts if isinstance(p, int)]
            assert pictures == list(range(sum(m.n_images for m in messages))), f"pictures came back as {pictures}"
        return json.dumps([template, texts]).encode("utf-8", "surrogatepass")


class Sanitize:
    """Streams of text: nothing that drives a terminal comes out, however they are cut, and all else does."""

    def __init__(self, folder: Path) -> None:
        pass

    def __call__(self, r: Random) -> bytes:
        text = mutated_text(FRAGMENTS, r)
        whole = sanitize(text)
        assert is_safe(whole), f"{whole!r} is not safe"
        assert "\x1b" not in whole
        assert sanitize(whole) == whole, "what is safe changes"
        stream, at, out = Sanitizer(), 0, []
        while at < len(text):
            end = at + r.randrange(1, 9)
            out.append(stream.feed(text[at:end]))
            at = end
        assert "".join(out) == whole, f"in pieces it is {''.join(out)!r}, and {whole!r} at once"
        return text.encode("utf-8", "surrogatepass")


class Images:
    """Picture files of every format that is read: a picture within bounds, or an ImageError."""

    FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "ICO", "AVIF")

    def __init__(self, folder: Path) -> None:
        self._files = []
        noise = PIL.Image.fromarray(np.random.RandomState(3).randint(0, 256, (24, 32, 3)).astype(np.uint8))
        for fmt in self.FORMATS:
            for mode in ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16"):
                for extra in ({}, {"save_all": True, "append_images": [noise.convert("L")]}):
                    out = io.BytesIO()
                    try:
                        noise.convert(mode if mode != "I;16" else "I").save(out, fmt, **extra)
                    except (KeyError, OSError, RuntimeError, ValueError):
                        continue  # no such mode in this format
                    self._files.append(out.getvalue())
        assert len(self._files) > 30

    def __call__(self, r: Random) -> bytes:
        data = mutated(r.choice(self._files), r, self._files)
        try:
            picture = load(data)
        except ImageError as error:
            _told(error)
        else:
            height, width, channels = picture.rgb.shape
            assert (channels, picture.rgb.dtype) == (3, np.uint8)
            assert height * width <= MAX_PIXELS
        return data


class Wire:
    """Frames between client and worker: what :func:`pack` writes, or a ValueError or EOFError, and bounded memory."""

    def __init__(self, folder: Path) -> None:
        layout = ImageLayout(2, np.zeros((2, 4), np.float32), (1, 2), 2, 1, np.zeros(2, np.int32))
        messages = (
            {"call": 1, "method": "load", "args": ["a", "b", LoadOptions()], "kwargs": {}},
            {"call": 2, "result": Encoded(3, layout, 1.5, np.ones((2, 3), np.float32))},
            {"call": 3, "result": [TextPart("x"), 0, Message("user", "y", 1)], "n": (1, 2)},
            {"call": 4, "result": np.arange(12, dtype=np.int32).reshape(3, 4)},
            {"call": 5, "error": "ModelError", "message": "m", "hint": ""},
            {"call": 6, "result": np.zeros((2, 2, 3), np.uint8), "text": "ä\x1b"},
        )
        self._frames = [b"".join(pack(message)) for message in messages]

    def __call__(self, r: Random) -> bytes:
        data = mutated(r.choice(self._frames), r, self._frames)
        at = 0

        def read(n: int) -> bytes:
            nonlocal at
            if at + n > len(data):
                raise EOFError
            at += n
            return data[at - n : at]

        try:
            message = unpack(read)
        except (ValueError, EOFError):
            pass
        else:
            assert isinstance(message, dict)
        return data
