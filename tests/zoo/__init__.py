"""A zoo of tiny random models, one row per family: the same weights run in transformers and in llama.cpp.

Each row is a module with a ``ROW``: a configuration, seeded weights, a GGUF writer, cases, and the family's model in
transformers. ``FAMILIES`` is the table that one adds a row to. Writing the GGUF files needs numpy and gguf alone; the
values that transformers gives for the cases are committed under ``expected/`` (``make_expected.py`` makes them).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tests.zoo import (
    gemma3,
    granitevision,
    internvl,
    llava15,
    llavanext,
    minicpmv,
    mistral3,
    pixtral,
    qwen2vl,
    qwen3vl,
    qwen25vl,
    smolvlm,
)
from tests.zoo.row import Case, Row, ZooModel, cases
from tests.zoo.text import write_text

__all__ = [
    "EXPECTED",
    "FAMILIES",
    "LARGE",
    "Case",
    "Row",
    "ZooModel",
    "build",
    "cases",
    "committed",
    "fingerprint",
    "pair",
    "split",
    "write",
]

FAMILIES: dict[str, Row] = {
    row.name: row
    for row in (
        internvl.ROW,
        llava15.ROW,
        llavanext.ROW,
        granitevision.ROW,
        minicpmv.ROW,
        qwen2vl.ROW,
        qwen25vl.ROW,
        qwen3vl.ROW,
        smolvlm.ROW,
        smolvlm.IDEFICS3,
        gemma3.ROW,
        mistral3.ROW,
        pixtral.ROW,
    )
}
LARGE: dict[str, Row] = {"llava15": llava15.LARGE, "qwen25vl": qwen25vl.LARGE}
"""For each family a deeper and wider model with the same tokenizer: the large half of a pair."""
EXPECTED = Path(__file__).parent / "expected"


def write(row: Row, directory: Path) -> ZooModel:
    """Writes a row's two GGUF files into ``directory``, unless they are there."""
    model, mmproj = directory / f"{row.name}.gguf", directory / f"mmproj-{row.name}.gguf"
    if not (model.exists() and mmproj.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        weights = row.weights()
        write_text(model, row.text, weights, row.tokenizer, row.name)
        row.write_mmproj(mmproj, weights)
    return ZooModel(row, model, mmproj)


def build(name: str, directory: Path) -> ZooModel:
    """The zoo's model of one family."""
    return write(FAMILIES[name], directory)


def pair(directory: Path, family: str = "llava15") -> tuple[ZooModel, ZooModel]:
    """A guide and a model of one family: other depth, width and (LLaVA) token grid, one tokenizer."""
    return build(family, directory), write(LARGE[family], directory)


def committed(name: str) -> dict[str, NDArray[np.generic]]:
    """What transformers gives for a family's cases (``tests.zoo.reference.expected`` lists the arrays)."""
    with np.load(EXPECTED / f"{name}.npz", allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def fingerprint(weights: Mapping[str, NDArray[np.float32]]) -> NDArray[np.float64]:
    """(n_tensors, 3) sum, sum of squares and last value of each tensor, ordered by name: shows whether committed
    values belong to these weights, whatever the last bit of a platform's logarithm."""
    ordered = [weights[name].astype(np.float64) for name in sorted(weights)]
    return np.array([(t.sum(), (t**2).sum(), t.flat[-1]) for t in ordered])


def split(whole: Path, folder: Path, *, small_first_shard: bool = False) -> list[Path]:
    """The parts of a model, in order, as the gguf library writes them; the first holds metadata alone if told to."""
    from gguf import GGUFReader, GGUFWriter

    source = GGUFReader(whole)
    writer = GGUFWriter(folder / "parts-F16.gguf", "llama", split_max_tensors=12, small_first_shard=small_first_shard)
    for key, value in source.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            writer.add_key_value(key, value.contents(), value.types[0], value.types[1] if value.types[1:] else None)
    for tensor in source.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("parts-F16-*.gguf"))
