"""A toy byte-level BPE tokenizer: 256 bytes, a few merges, a family's control tokens.

It is written to GGUF as ``gpt2`` vocabularies are, and is small enough to be told again in Python: all merges stay
inside " word" pieces, so that llama.cpp's pre-tokenizers (``gpt-2`` and ``qwen2`` alike) cannot change the result.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

__all__ = ["MERGES", "Tokenizer", "byte_symbols"]

MERGES: tuple[tuple[str, str], ...] = (
    ("t", "h"),
    ("th", "e"),
    ("i", "n"),
    ("e", "r"),
    ("a", "n"),
    ("Ġ", "the"),
    ("o", "n"),
    ("Ġ", "i"),
    ("w", "h"),
    ("Ġi", "s"),
    ("wh", "a"),
    ("wha", "t"),
    ("Ġ", "a"),
    ("Ġa", "n"),
    ("e", "d"),
    ("r", "ed"),
)
"""Lowest rank first; "Ġ" is the byte-level spelling of a space."""


def byte_symbols() -> list[str]:
    """The printable character that stands for each byte, as byte-level vocabularies spell them: printable Latin-1
    characters stand for themselves, the other bytes take 256, 257, ... in order."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    symbols, spare = [], 256
    for byte in range(256):
        if byte in plain:
            symbols.append(chr(byte))
        else:
            symbols.append(chr(spare))
            spare += 1
    return symbols


@dataclass(frozen=True)
class Tokenizer:
    """One vocabulary: bytes, ``merges``, then ``controls``.

    Attributes:
        pre: llama.cpp's name of the pre-tokenizer.
        bos, eos: control tokens; bos "" adds none to prompts.
        template: the chat template (Jinja).
    """

    pre: str
    controls: tuple[str, ...]
    bos: str
    eos: str
    template: str
    merges: tuple[tuple[str, str], ...] = MERGES

    @property
    def tokens(self) -> list[str]:
        return [*byte_symbols(), *(a + b for a, b in self.merges), *self.controls]

    def id(self, control: str) -> int:
        """Id of a control token."""
        return 256 + len(self.merges) + self.controls.index(control)

    def encode(self, text: str) -> list[int]:
        """Ids of ``text``, control tokens recognised, no BOS added."""
        pattern = "|".join(re.escape(c) for c in self.controls)
        ids: list[int] = []
        for piece in re.split(f"({pattern})", text):
            ids += [self.id(piece)] if piece in self.controls else self._plain(piece)
        return ids

    def _plain(self, text: str) -> list[int]:
        symbols = byte_symbols()
        word = [symbols[b] for b in text.encode()]
        ranks = {pair: rank for rank, pair in enumerate(self.merges)}
        while len(word) > 1:
            rank, at = min((ranks.get((word[i], word[i + 1]), len(ranks)), i) for i in range(len(word) - 1))
            if rank == len(ranks):
                break
            word[at : at + 2] = [word[at] + word[at + 1]]
        index = {token: i for i, token in enumerate(self.tokens[: 256 + len(self.merges)])}
        return [index[w] for w in word]

    def write(self, writer: Any) -> None:
        """Adds the vocabulary to a ``gguf.GGUFWriter``."""
        from gguf import TokenType

        n_plain = 256 + len(self.merges)
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(self.pre)
        writer.add_token_list(self.tokens)
        writer.add_token_types([TokenType.NORMAL] * n_plain + [TokenType.CONTROL] * len(self.controls))
        writer.add_token_merges([f"{a} {b}" for a, b in self.merges])
        writer.add_bos_token_id(self.id(self.bos or self.eos))
        writer.add_eos_token_id(self.id(self.eos))
        writer.add_add_bos_token(bool(self.bos))
        writer.add_chat_template(self.template)
