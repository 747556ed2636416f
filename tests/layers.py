"""Image tokens dropped at a layer: ``python -m tests.layers [FAMILY ...]``.

Prints, and leaves with 1 on a miss:

- how far logits are off those of the plain run where nothing is dropped, for each family of the zoo, each layer and
  each case (prompts longer than llama.cpp's batch are among them), after the prompt and in ``--steps`` decoded tokens:
  0 is wanted, to the last bit
- logits with rows dropped at each layer against transformers, where these rows are seen by no row from that layer on
  (committed values; ``--write`` computes them anew, which needs torch)
- the memory of the second context
- with ``--scenes N`` (default 100) the demo pair on held-out scenes, tokens chosen by the guide: for each layer and
  share kept, the accuracy, the mean retention (the share of image tokens in a layer, averaged over the layers), and
  the seconds that the large VLM takes to read the prompt
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.engine.api import Encoded, Engine, ImagePart, LoadOptions, Part, TextPart, Vlm
from tests import zoo
from tests.fidelity import Measure, compare

__all__ = ["REFERENCES", "Difference", "committed", "differences", "measure"]

REFERENCES = ("llava15", "qwen25vl")
"""Families that are compared with transformers: one position a token, and M-RoPE."""
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Staged logits against plain ones. ``largest``: absolute difference; ``rows``: of the prompt."""

    case: str
    layer: int
    rows: int
    largest: float


def parts_of(case: zoo.Case, encoded: Mapping[int, Encoded], pruned: bool) -> list[Part]:
    """A case as the engine takes it."""
    return [
        TextPart(s, special=True)
        if isinstance(s, str)
        else ImagePart(encoded[s], np.array(case.keep[s], np.int32) if pruned else None)
        for s in case.segments
    ]


def _encoded(vlm: Vlm, case: zoo.Case) -> dict[int, Encoded]:
    return {i: vlm.encode(case.images[i].pixels()) for i in case.segments if isinstance(i, int)}


def _logits(vlm: Vlm, fed: NDArray[np.int32]) -> Float32:
    """After the prompt and each token: (2 n, n_vocab) in one batch, then one by one."""
    out = [vlm.logits()[None], vlm.score(fed)] if len(fed) else [vlm.logits()[None]]
    for token in fed:
        vlm.feed(np.array([token], np.int32))
        out.append(vlm.logits()[None])
    return np.concatenate(out)


def differences(engine: Engine, model: zoo.ZooModel, steps: int) -> list[Difference]:
    """Nothing dropped: every case and layer of a family against the plain run, prompt and ``steps`` tokens."""
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, n_ctx=2048))
    found = []
    try:
        fed = np.random.RandomState(4).randint(3, vlm.info.n_vocab - 3, steps).astype(np.int32)
        for case in zoo.cases(model.row):
            parts = parts_of(case, _encoded(vlm, case), pruned=False)
            rows = vlm.prefill(parts).n_past
            plain = _logits(vlm, fed)
            for layer in range(1, vlm.info.n_layer):
                vlm.prefill(parts, layer=layer)
                off = float(np.abs(_logits(vlm, fed) - plain).max())
                found.append(Difference(case.name, layer, rows, off))
    finally:
        vlm.close()
    return found


# against transformers


def _path(name: str) -> Path:
    return zoo.EXPECTED / "layers" / f"{name}.npz"


def committed(name: str) -> dict[str, Float32]:
    """``case/layer``: (1 + n_fed, n_vocab) logits with the case's rows dropped at that layer."""
    with np.load(_path(name), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def measure(engine: Engine, model: zoo.ZooModel, want: Mapping[str, Float32]) -> list[Measure]:
    """Rows dropped at each layer, every case, against what transformers gives."""
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1))
    found = []
    try:
        for case in zoo.cases(model.row):
            parts, fed = parts_of(case, _encoded(vlm, case), pruned=True), np.array(case.fed, np.int32)
            for layer in range(1, vlm.info.n_layer):
                vlm.prefill(parts, layer=layer)
                got = [vlm.logits()]
                for token in fed:
                    vlm.feed(np.array([token], np.int32))
                    got.append(vlm.logits())
                found.append(compare(case.name, f"dropped at {layer}", np.stack(got), want[f"{case.name}/{layer}"]))
    finally:
        vlm.close()
    return found


def write(name: str) -> None:
    """Computes the committed values of a family; needs torch."""
    from tests.zoo.reference import dropped_at_layers

    _path(name).parent.mkdir(exist_ok=True)
    np.savez_compressed(_path(name), **dropped_at_layers(zoo.FAMILIES[name]))  # type: ignore[arg-type]


# memory


def _memory(model: zoo.ZooModel, n_ctx: int) -> Iterator[tuple[str, float]]:
    """MiB of this process that each step adds."""
    import psutil

    from localvlm.engine.vlm import LlamaVlm

    process, last = psutil.Process(), 0.0

    def grown() -> float:
        nonlocal last
        now = process.memory_info().rss / 2**20
        more, last = now - last, now
        return more

    vlm = LlamaVlm(model.model, model.mmproj, LoadOptions(threads=1, n_ctx=n_ctx))
    case = zoo.cases(model.row)[0]
    parts = parts_of(case, _encoded(vlm, case), pruned=True)
    vlm.prefill(parts)
    grown()
    vlm.prefill(parts, layer=1)
    yield "front", grown()
    vlm.prefill(parts, layer=2)
    yield "another layer", grown()
    vlm.close()


# the demo pair


def demo(count: int, seed: int, threads: int) -> Iterator[str]:
    """A line for each layer and share kept."""
    from localvlm import images
    from localvlm.catalog import pair_named
    from localvlm.engine.api import Message
    from localvlm.pipeline import Pipeline
    from localvlm.pruning.base import top
    from tests import scenes

    hits: dict[tuple[int, float], list[bool]] = {}
    seconds: dict[tuple[int, float], float] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        Pipeline.open(pair_named("demo"), LoadOptions(threads=threads)) as pipeline,
    ):
        rows = [r for r in scenes.make(count, seed, Path(folder)) if r["type"] != "describe"]
        model = pipeline.vlm("model")
        settings = [(0, 1.0), *((layer, keep) for layer in range(model.info.n_layer) for keep in scenes.KEEPS)]
        for row in rows:
            picture = images.load(Path(folder) / row["image"])
            look = pipeline.look([picture], row["question"], scenes.MAX_TOKENS)
            seen = model.encode(picture.rgb)
            n = seen.layout.n_tokens
            saliency = pipeline.saliency(look, "sum", [seen.layout])
            chat = model.chat([Message("user", row["question"], 1)])
            for layer, keep in settings:
                kept = top(saliency, np.arange(n, dtype=np.int32), max(1, round(keep * n)))
                parts = [p if isinstance(p, TextPart) else ImagePart(seen, kept) for p in chat]
                ms = model.prefill(parts, layer=layer).ms
                answer = model.generate(scenes.MAX_TOKENS).text
                hits.setdefault((layer, keep), []).append(scenes.normal(answer) == scenes.normal(row["answer"]))
                seconds[layer, keep] = seconds.get((layer, keep), 0.0) + ms / 1e3
            model.release(seen)
        for layer, keep in settings:
            share = (layer + (model.info.n_layer - layer) * keep) / model.info.n_layer
            right, took = 100 * np.mean(hits[layer, keep]), seconds[layer, keep] / len(rows)
            yield f"{layer:5} {keep:5.0%} {share:9.1%} {right:8.1f} {took:9.3f}"


def main() -> int:
    parser = argparse.ArgumentParser(prog="layers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(zoo.FAMILIES)}; default all")
    parser.add_argument("--steps", type=int, default=100, help="tokens decoded (default 100)")
    parser.add_argument("--scenes", type=int, default=100, help="scenes for the demo pair, 0 = none (default 100)")
    parser.add_argument("--seed", type=int, default=20261122, help="of the scenes")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--write", action="store_true", help="compute the values of transformers anew")
    args = parser.parse_args()
    names = args.families or list(zoo.FAMILIES)
    if unknown := set(names) - set(zoo.FAMILIES):
        parser.error(f"unknown family {sorted(unknown)[0]!r}; known are {', '.join(zoo.FAMILIES)}")
    if args.write:
        for name in REFERENCES:
            write(name)
        return 0
    from localvlm.engine.client import Engine as LlamaEngine

    missed = 0
    with tempfile.TemporaryDirectory() as folder, LlamaEngine() as engine:
        for name in names:
            model = zoo.build(name, Path(folder))
            found = differences(engine, model, args.steps)
            largest = max(d.largest for d in found)
            missed += largest != 0.0
            print(
                f"{name:14} layers 1..{max(d.layer for d in found)}, prompts of {min(d.rows for d in found)} to "
                f"{max(d.rows for d in found)} rows, {args.steps} tokens: largest difference {largest}",
                flush=True,
            )
            if name not in REFERENCES:
                continue
            for m in measure(engine, model, committed(name)):
                missed += not m.ok
                verdict = "ok" if m.ok else "MISS"
                print(f"{name:14} {m.case:8} {m.what:14} {m.correlation:10.7f} {m.error:8.3%}  {verdict}", flush=True)
        model = zoo.build("llava15", Path(folder))
        text, n_ctx = model.row.text, 4096
        cache = 2 * 2 * text.layers * text.kv_heads * text.head_dim * n_ctx / 2**20
        for what, grown in _memory(model, n_ctx):
            print(f"memory         {what}: {grown:.1f} MiB more (the KV cache of {n_ctx} cells takes {cache:.1f})")
    if args.scenes:
        print("layer  keep retention accuracy   seconds")
        for line in demo(args.scenes, args.seed, args.threads):
            print(line)
    print(f"{missed} missed" if missed else "all exact, or within bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
