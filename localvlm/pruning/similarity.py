"""What the methods that go by features share: the cosine similarity of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["Similarity", "unit_rows"]

Float32 = NDArray[np.float32]

WHOLE = 4096
"""Most tokens whose similarities are held at once (64 MiB): one large product is faster than many rows of it."""
BLOCK = 512


def unit_rows(rows: Float32) -> Float32:
    """(n, d) rows of length one; a row of zeros stays."""
    length = np.sqrt(np.einsum("nd,nd->n", rows, rows))
    return np.asarray(rows / np.where(length > 0, length, 1)[:, None], np.float32)


class Similarity:
    """Cosines among (n, d) rows, which are scaled to length one."""

    def __init__(self, rows: Float32) -> None:
        self.rows = unit_rows(rows)
        self._whole = self.rows @ self.rows.T if len(rows) <= WHOLE else None

    def to(self, i: int) -> Float32:
        """(n,) cosine of each row to row i."""
        return np.asarray(self.rows @ self.rows[i] if self._whole is None else self._whole[i])

    def blocks(self) -> Iterator[tuple[int, Float32]]:
        """The matrix in pieces: the first row, and (rows of the piece, n) cosines."""
        for start in range(0, len(self.rows), BLOCK):
            part = slice(start, start + BLOCK)
            yield start, self.rows[part] @ self.rows.T if self._whole is None else self._whole[part]
