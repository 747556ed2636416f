"""The part of the reference that all families share; needs torch and transformers, and only ``make_expected`` and
``fidelity --live`` import it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.zoo.row import Case, Int32, Reference, Row, positions
from tests.zoo.weights import Float32

__all__ = ["Decoder", "expected", "recorded_attention"]


class Decoder:
    """The language model of a Hugging Face VLM, in eager attention."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        """See :meth:`tests.zoo.row.Reference.decode`."""
        text = self._model.model.language_model
        n = len(ids)
        mask = torch.full((n, n), torch.finfo(torch.float32).min).triu(1)[None, None]
        where = torch.from_numpy(positions.astype(np.int64))
        with torch.no_grad():
            embedded = text.embed_tokens(torch.from_numpy(np.maximum(ids, 0)).long()).clone()
            embedded[torch.from_numpy(ids < 0)] = torch.from_numpy(rows)
            out = text(
                inputs_embeds=embedded[None],
                attention_mask=mask if len(where) == 1 else {"full_attention": mask},
                position_ids=where if len(where) == 1 else where[:, None],
                output_attentions=True,
                use_cache=False,
            )
            logits = self._model.lm_head(out.last_hidden_state[0])
        return logits.numpy(), np.stack([a[0].numpy() for a in out.attentions])


@contextmanager
def recorded_attention(tower: Any) -> Iterator[list[list[Float32]]]:
    """Collects the attention of a tower that does not give it: for each block the probabilities (heads, n, n) of each
    stretch that attends within itself, in row order."""
    import transformers.models.qwen2_5_vl.modeling_qwen2_5_vl as modeling

    layers: list[list[Float32]] = []
    owners: dict[int, list[Float32]] = {}
    eager = modeling.eager_attention_forward

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        out, probabilities = eager(module, *args, **kwargs)
        if id(module) not in owners:
            owners[id(module)] = []
            layers.append(owners[id(module)])
        owners[id(module)].append(probabilities[0].numpy())
        return out, probabilities

    modeling.eager_attention_forward = recording
    try:
        yield layers
    finally:
        modeling.eager_attention_forward = eager


def _attention(name: str, found: Float32, ids: Int32, n_prompt: int) -> Mapping[str, Float32]:
    """Sums over rows, and columns of image tokens, as :class:`localvlm.engine.api.Attention` defines them."""
    image = np.flatnonzero(ids < 0)
    columns = found[:, :, :, image]
    return {
        f"{name}/prompt": columns[:, :, image[-1] + 1 : n_prompt].sum(axis=2),
        f"{name}/generated": columns[:, :, n_prompt:].sum(axis=2),
        f"{name}/last": columns[:, :, n_prompt - 1],
    }


def _case(row: Row, reference: Reference, case: Case) -> dict[str, NDArray[np.generic]]:
    name, prompt = case.name, row.case_ids(case)
    out: dict[str, NDArray[np.generic]] = {f"{name}/ids": prompt, f"{name}/fed": np.array(case.fed, np.int32)}
    order = [s for s in case.segments if isinstance(s, int)]
    rows = []
    for i in order:
        image = case.images[i].pixels()
        features, tower = reference.encode(image)
        out |= {f"{name}/image{i}": image, f"{name}/rows{i}": features, f"{name}/tower{i}": tower}
        out[f"{name}/stock{i}"] = reference.encode_stock(image)
        rows.append(features)
    ids = np.concatenate([prompt, out[f"{name}/fed"]]).astype(np.int32)
    where = positions(row, case, ids)
    joined = np.concatenate(rows)
    logits, attention = reference.decode(ids, joined, where)
    out[f"{name}/logits"] = logits[len(prompt) - 1 :]
    out |= _attention(name, attention, ids, len(prompt))

    kept_image = np.concatenate([np.isin(np.arange(len(r)), case.keep[i]) for i, r in zip(order, rows, strict=True)])
    kept = np.ones(len(ids), bool)
    kept[ids < 0] = kept_image
    logits, attention = reference.decode(ids[kept], joined[kept_image], where[:, kept])
    n_prompt = int(kept[: len(prompt)].sum())
    out[f"{name}/pruned_logits"] = logits[n_prompt - 1 :]
    out |= _attention(f"{name}/pruned", attention, ids[kept], n_prompt)
    return out


def expected(row: Row) -> dict[str, NDArray[np.generic]]:
    """All expected values of a row, keyed ``case/name``.

    ids (n,) int32; fed (m,) int32; image{i} (h, w, 3) uint8; rows{i} (n_tokens, width); stock{i} the same as llama.cpp
    computes it unrepaired; tower{i} (tower_layers, n_tokens); logits (1 + m, n_vocab) after the prompt and after each
    fed token; prompt, generated, last (n_layer, n_head, n_image). With pruned_ / pruned/ in front: from the kept
    tokens at their original positions, attention columns of the kept tokens alone.
    """
    reference = row.reference(row.weights())
    out: dict[str, NDArray[np.generic]] = {}
    for case in row.cases:
        out |= _case(row, reference, case)
    return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in out.items()}
