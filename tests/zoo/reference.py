"""The part of the reference that all families share; needs torch and transformers, and only ``make_expected`` and
``fidelity --live`` import it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tests.zoo.row import Case, Int32, Reference, Row, cases, positions, staying
from tests.zoo.weights import Float32

__all__ = ["Decoder", "dropped_at_layers", "expected", "recorded_attention"]


class Decoder:
    """The language model of a Hugging Face VLM, in eager attention; ``text`` where it is not ``language_model``.

    ``window``: rows that sliding layers see, counted as the rows stand; tokens of one picture then see each other in
    both directions (``create_masks_for_vision_model`` of transformers' Gemma 3).
    """

    def __init__(self, model: Any, text: Any = None, *, window: int = 0) -> None:
        self._model, self._text = model, model.model.language_model if text is None else text
        self._window = window

    def _mask(self, ids: Int32) -> Any:
        """What is added to scores: 0 or the least float. (1, 1, n, n), or one for each kind of layer."""
        distance = np.arange(len(ids))[:, None] - np.arange(len(ids))
        seen = distance >= 0
        if not self._window:
            return _added(seen)
        image = ids == -1
        picture = np.cumsum(image & ~np.concatenate([[False], image[:-1]])) * image
        seen |= (picture[:, None] == picture) & image
        near = seen & (distance < self._window)
        return {"full_attention": _added(seen), "sliding_attention": _added(near)}

    @contextmanager
    def hidden_from(self, layer: int, stays: NDArray[np.bool_]) -> Iterator[None]:
        """Rows that do not stay (n,) are seen by no row in ``layer`` and above: to the others they are dropped."""

        def hide(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            mask = kwargs["attention_mask"].clone()
            mask[..., torch.from_numpy(~stays)] = torch.finfo(mask.dtype).min
            return args, kwargs | {"attention_mask": mask}

        handles = [m.register_forward_pre_hook(hide, with_kwargs=True) for m in self._text.layers[layer:]]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def decode(self, ids: Int32, rows: Float32, positions: Int32) -> tuple[Float32, Float32]:
        """See :meth:`tests.zoo.row.Reference.decode`."""
        text = self._text
        where = torch.from_numpy(positions.astype(np.int64))
        with torch.no_grad():
            embedded = text.embed_tokens(torch.from_numpy(np.maximum(ids, 0)).long()).clone()
            features = torch.from_numpy(rows).split(embedded.shape[1], dim=1)
            embedded[torch.from_numpy(ids < 0)] = features[0]
            deeper = {"visual_pos_masks": torch.from_numpy(ids < 0)[None], "deepstack_visual_embeds": features[1:]}
            out = text(
                inputs_embeds=embedded[None],
                attention_mask=self._mask(ids),
                position_ids=where if len(where) == 1 else where[:, None],
                output_attentions=True,
                use_cache=False,
                **(deeper if len(features) > 1 else {}),
            )
            logits = self._model.lm_head(out.last_hidden_state[0])
        return logits.numpy(), np.stack([a[0].numpy() for a in out.attentions])


def _added(seen: NDArray[np.bool_]) -> torch.Tensor:
    return torch.where(torch.from_numpy(seen), 0.0, torch.finfo(torch.float32).min)[None, None]


@contextmanager
def recorded_attention(tower: Any) -> Iterator[list[list[Float32]]]:
    """Collects the attention of a tower that does not give it: for each block the probabilities (heads, n, n) of each
    stretch that attends within itself, in row order."""
    modeling: Any = sys.modules[type(tower).__module__]
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


def _attention(name: str, found: Float32, ids: Int32, n_prompt: int) -> dict[str, Float32]:
    """What :class:`localvlm.engine.api.Attention` records: columns of the image tokens, rows put together.

    found: (n_layer, n_head, n, n) probabilities.
    """
    image, tail = np.flatnonzero(ids == -1), int(np.flatnonzero(ids < 0)[-1]) + 1
    columns = found[:, :, :, image]
    parts = {"prompt": slice(tail, n_prompt), "generated": slice(n_prompt, None)}
    out = {f"{name}/last": columns[:, :, n_prompt - 1]}
    for part, rows in parts.items():
        p = columns[:, :, rows]
        if not p.shape[2]:
            continue
        out[f"{name}/{part}"] = p.sum(axis=2)
        if name.startswith("border"):  # its tiles are small batches late in the prompt, which llama.cpp sums in F16
            continue
        out[f"{name}/{part}_weighted"] = (_selectivity(p)[..., None] * p).sum(axis=2)
        out[f"{name}/{part}_maximum"] = p.max(axis=2)
    return out


def _selectivity(p: Float32) -> Float32:
    """(1 - H(p / |p|) / ln N)^2 over the last axis of N, near 0 for a diffuse row (``LV_WEIGHTED`` in
    ``native/localvlm_tap.h``)."""
    share = p.astype(np.float64) / p.sum(axis=-1, keepdims=True, dtype=np.float64)
    entropy = -(share * np.log(np.maximum(share, 1e-300))).sum(axis=-1)
    return ((1.0 - entropy / np.log(p.shape[-1])) ** 2).astype(np.float32)


def _case(row: Row, reference: Reference, case: Case) -> dict[str, NDArray[np.generic]]:
    name, prompt = case.name, row.case_ids(case)
    out: dict[str, NDArray[np.generic]] = {f"{name}/ids": prompt, f"{name}/fed": np.array(case.fed, np.int32)}
    order = [s for s in case.segments if isinstance(s, int)]
    rows = []
    for i in order:
        image = case.images[i].pixels()
        features, tower = reference.encode(image)
        rows.append(features)
        if name == "border":  # its picture is the first case's
            continue
        out |= {f"{name}/rows{i}": features, f"{name}/tower{i}": tower}
        stock = reference.encode_stock(image)
        if not np.array_equal(stock, features):
            out[f"{name}/stock{i}"] = stock
    ids = np.concatenate([prompt, out[f"{name}/fed"]]).astype(np.int32)
    where = positions(row, case, ids)
    joined = np.concatenate(rows)
    logits, attention = reference.decode(ids, joined, where)
    out[f"{name}/logits"] = logits[len(prompt) - 1 :]
    out |= _attention(name, attention, ids, len(prompt))

    stays = staying(ids, row.kept(case))
    logits, attention = reference.decode(ids[stays], joined[stays[ids < 0]], where[:, stays])
    n_prompt = int(stays[: len(prompt)].sum())
    out[f"{name}/pruned_logits"] = logits[n_prompt - 1 :]
    compact = np.broadcast_to(np.arange(int(stays.sum()), dtype=np.int32), where[:, stays].shape)
    out[f"{name}/compact_logits"] = reference.decode(ids[stays], joined[stays[ids < 0]], compact)[0][n_prompt - 1 :]
    out |= _attention(f"{name}/pruned", attention, ids[stays], n_prompt)
    return out


def expected(row: Row) -> dict[str, NDArray[np.generic]]:
    """All expected values of a row, keyed ``case/name``.

    ids (n,) int32, -1 at image tokens, -2 at ends of rows; fed (m,) int32, may be empty; rows{i} (n, width); stock{i}
    the same as llama.cpp computes it unrepaired, if that differs; tower{i} (tower_layers, n_tokens); logits
    (1 + m, n_vocab) after the prompt and after each fed token; prompt, generated, last (n_layer, n_head, n_image), and
    prompt_weighted, prompt_maximum and so on. With pruned_ or pruned/ in front: from the kept tokens and the ends of
    their lines, at their original positions, attention columns of these tokens alone.
    The case "border" has no rows{i}, stock{i} and tower{i}, which are the first case's, and plain sums alone.
    compact_logits: the same at positions without gaps, which is wrong, to show that the bounds can tell.
    """
    reference = row.reference(row.weights())
    out: dict[str, NDArray[np.generic]] = {}
    for case in cases(row):
        out |= _case(row, reference, case)
    return {k: v.astype(np.float32) if v.dtype.kind == "f" else v for k, v in out.items()}


def dropped_at_layers(row: Row) -> dict[str, NDArray[np.float32]]:
    """``case/layer``: (1 + n_fed, n_vocab) logits after the prompt and each fed token where the tokens that are not in
    ``Case.keep`` are dropped at that layer. ``case/1,2``: where they are dropped at two, as :meth:`Row.kept` says;
    ``case/attention``: then (n_head, m) the mean attention in layer 1 of the prompt rows after the last image token to
    each of those that are there."""
    reference: Any = row.reference(row.weights())
    out: dict[str, NDArray[np.float32]] = {}
    for case in cases(row):
        prompt = row.case_ids(case)
        ids = np.concatenate([prompt, np.array(case.fed, np.int32)]).astype(np.int32)
        order = [s for s in case.segments if isinstance(s, int)]
        rows = np.concatenate([reference.encode(case.images[i].pixels())[0] for i in order])
        stays, half = staying(ids, row.kept(case)), staying(ids, row.kept(case, half_way=True))
        for layer in range(1, row.text.layers):
            with reference.decoder.hidden_from(layer, stays):
                logits = reference.decode(ids, rows, positions(row, case, ids))[0]
            out[f"{case.name}/{layer}"] = logits[len(prompt) - 1 :].astype(np.float32)
        with reference.decoder.hidden_from(1, half), reference.decoder.hidden_from(2, stays):
            logits, attention = reference.decode(ids, rows, positions(row, case, ids))
        out[f"{case.name}/1,2"] = logits[len(prompt) - 1 :].astype(np.float32)
        behind, there = int(np.flatnonzero(ids < 0)[-1]) + 1, np.flatnonzero(half & (ids == -1))
        out[f"{case.name}/attention"] = attention[1][:, behind : len(prompt), there].mean(axis=1).astype(np.float32)
    return out
