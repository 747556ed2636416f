"""Damage to bytes and texts, as seeds have it: bits, numbers, pieces that are lost, doubled, moved or another's."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from random import Random

__all__ = ["mutated", "mutated_text"]

NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 4095, 65_535, 65_536, 2**31 - 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1)
SIZES = {1: "<B", 2: "<H", 4: "<I", 8: "<Q"}


def mutated(data: bytes, r: Random, others: Sequence[bytes] = (), most: int = 1 << 20) -> bytes:
    """``data`` with one to eight changes, of at most ``most`` bytes."""
    out = bytearray(data)
    for _ in range(r.choice((1, 1, 1, 2, 3, 8))):
        _change(out, r, others)
    return bytes(out[:most])


def _change(out: bytearray, r: Random, others: Sequence[bytes]) -> None:
    how = r.randrange(8)
    at = r.randrange(len(out) + 1)
    n = min(len(out) - at, r.choice((1, 2, 4, 8, 32, 256)))
    if how == 0 and at < len(out):
        out[at] ^= 1 << r.randrange(8)
    elif how == 1:
        out[at : at + n] = r.randbytes(n)
    elif how == 2:
        size = r.choice(tuple(SIZES))
        out[at : at + size] = struct.pack(SIZES[size], r.choice(NUMBERS) % 2 ** (8 * size))
    elif how == 3:
        del out[at : at + n]
    elif how == 4:
        out[at:at] = out[at : at + n] * r.choice((1, 2, 16))
    elif how == 5:
        del out[at:]
    elif how == 6 and others:
        other = r.choice(others)
        start = r.randrange(len(other) + 1)
        out[at : at + n] = other[start : start + r.choice((n, 64))]
    else:
        out[at:at] = r.randbytes(r.choice((1, 4, 16)))


def mutated_text(pieces: Sequence[str], r: Random, most: int = 40) -> str:
    """Pieces one after the other, some cut, doubled or turned round."""
    out = []
    for _ in range(r.randrange(1, most)):
        piece = r.choice(pieces)
        how = r.randrange(8)
        if how == 0:
            piece = piece[: r.randrange(len(piece) + 1)]
        elif how == 1:
            piece = piece[::-1]
        elif how == 2:
            piece *= r.choice((2, 3, 50))
        elif how == 3:
            piece = "".join(
                chr(r.choice((r.randrange(0xA0), r.randrange(0x3000), r.randrange(0xD800)))) for _ in range(4)
            )
        out.append(piece)
    return "".join(out)
