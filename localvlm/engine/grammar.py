"""What may come next in an answer that follows a JSON schema, by llama.cpp's own grammar sampler."""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.llama import Vocabulary, backend
from localvlm.errors import ModelError, UsageError

__all__ = ["Grammar"]

Float32 = NDArray[np.float32]

FIRST = 64, 2048
"""Tokens, by likelihood, that are looked at before all are."""
_CANDIDATE = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])
"""llama_token_data."""


class Grammar:
    """The state of one answer.

    Args:
        schema: JSON schema, as JSON.

    Raises:
        UsageError: llama.cpp has no grammar for it.
    """

    def __init__(self, vocabulary: Vocabulary, schema: str) -> None:
        self._lib, self._vocabulary = backend(), vocabulary
        rules = _rules(schema).encode()
        self._handle = self._lib.llama_sampler_init_grammar(vocabulary.handle, rules, b"root")
        if not self._handle:
            raise UsageError("llama.cpp cannot follow this schema", "make it simpler")
        weakref.finalize(self, self._lib.llama_sampler_free, self._handle)
        self._all = np.arange(vocabulary.size, dtype=np.int32)

    def allows(self, token: int) -> bool:
        """Whether ``token`` may come next; an end may where the answer is whole."""
        return bool(np.isfinite(self._applied(np.array([token], np.int32), np.zeros(1, np.float32))[0]))

    def masked(self, logits: Float32, least: int) -> Float32:
        """(n_vocab,) logits, -inf at what may not come next. Of what may, the ``least`` likeliest are there at least:
        llama.cpp looks at each token apart, 10 to 70 ms for 150,000, so the likely ones are looked at first.

        Raises:
            ModelError: this model's tokens cannot spell what must come.
        """
        for n in FIRST if least < FIRST[-1] else ():
            if n < len(logits):
                likely = np.flatnonzero(logits >= np.partition(logits, -n)[-n]).astype(np.int32)
                found = self._applied(likely, logits[likely])
                if np.isfinite(found).sum() >= least:
                    out = np.full_like(logits, -np.inf)
                    out[likely] = found
                    return out
        out = self._applied(self._all, logits)
        if not np.isfinite(out.max()):
            raise ModelError("the model's tokens cannot spell what the schema asks for", "use another schema or model")
        return out

    def accept(self, token: int) -> None:
        """Goes on with a token that is allowed."""
        if not self._vocabulary.ends(token):
            self._lib.llama_sampler_accept(self._handle, token)

    def _applied(self, tokens: NDArray[np.int32], logits: Float32) -> Float32:
        candidates = np.zeros(len(tokens), _CANDIDATE)
        candidates["id"], candidates["logit"] = tokens, logits
        array = self._lib.llama_token_data_array(
            data=candidates.ctypes.data_as(ctypes.POINTER(self._lib.llama_token_data)),
            size=len(candidates),
            selected=-1,
            sorted=False,
        )
        self._lib.llama_sampler_apply(self._handle, ctypes.byref(array))
        return np.asarray(candidates["logit"])


def _rules(schema: str) -> str:
    """llama.cpp's grammar (GBNF) of a JSON schema."""
    from llama_cpp.llama_grammar import json_schema_to_gbnf

    try:
        return str(json_schema_to_gbnf(schema))
    except Exception as error:  # it asserts, and looks up what need not be there
        reason = f"{type(error).__name__}: {error}"[:200]
        raise UsageError(f"the schema cannot be made a grammar: {reason}", "make it simpler") from error
