"""Image tokens dropped at a layer: ``python -m tests.layers [FAMILY ...]``.

Prints, and leaves with 1 on a miss:

- how far logits are off those of the plain run where nothing is dropped, for each family of the zoo, each layer,
  pauses before several of them, and each case (prompts longer than llama.cpp's batch are among them), after the prompt
  and in ``--steps`` decoded tokens: 0 is wanted, to the last bit
- logits with rows dropped at each layer against transformers, where these rows are seen by no row from that layer on
  (committed values; ``--write`` computes them anew, which needs torch)
- the memory that a prompt and its answer take with tokens dropped at a layer, beside the plain run's
- with ``--scenes N`` (default 140) the demo pair on held-out scenes, tokens chosen by the guide: for each layer and
  share kept, the paper's settings among them, the accuracy, the mean retention (the share of image tokens in a layer,
  averaged over the layers), LLM FLOPs from shapes, and the model's time, both as a share of the plain run's
- with ``--where N`` (default 210) compact positions against true ones, on questions of where something is

``--skip-zoo`` leaves out what needs no demo pair.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm.bench.shapes import Llm, VlmShape, write_vlm
from localvlm.bench.towers import Tower
from localvlm.engine.api import Encoded, Engine, ImagePart, LoadOptions, Part, TextPart, Vlm
from localvlm.engine.client import Engine as LlamaEngine
from localvlm.pruning import PRESETS
from tests import layer_table, zoo
from tests.fidelity import Measure, compare

__all__ = ["REFERENCES", "Difference", "anonymous", "committed", "cut_lists", "differences", "measure", "pauses"]

REFERENCES = ("llava15", "qwen25vl")
"""Families that are compared with transformers: one position a token, and M-RoPE."""
Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Difference:
    """Staged logits against plain ones. ``cuts``: layers before which the prompt waited or was pruned; ``largest``:
    absolute difference; ``rows``: of the prompt; ``scale``: the largest plain logit.
    """

    case: str
    cuts: tuple[int, ...]
    rows: int
    largest: float
    scale: float


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


def cut_lists(n_layer: int) -> list[tuple[int, ...]]:
    """Layers to wait before: before all of them, and before some."""
    return sorted({tuple(range(n_layer)), tuple(range(1, n_layer)), (0, n_layer - 1)})


def differences(engine: Engine, model: zoo.ZooModel, steps: int, gpu_layers: int = 0) -> list[Difference]:
    """Nothing dropped: every case and layer of a family against the plain run, prompt and ``steps`` tokens."""

    def prefill(vlm: Vlm, parts: Sequence[Part], cuts: Sequence[int]) -> None:
        vlm.prefill(parts, layer=cuts[0])

    return _differences(engine, model, steps, [(k,) for k in range(1, model.row.text.layers)], prefill, gpu_layers)


def pauses(engine: Engine, model: zoo.ZooModel, steps: int, gpu_layers: int = 0) -> list[Difference]:
    """As :func:`differences`, with pauses before several layers."""

    def pause(vlm: Vlm, parts: Sequence[Part], cuts: Sequence[int]) -> None:
        vlm.pause(parts, cuts[0], attend=())
        for layer in cuts[1:]:
            vlm.resume(None, layer=layer)
        vlm.finish(None)

    return _differences(engine, model, steps, cut_lists(model.row.text.layers), pause, gpu_layers)


def _differences(
    engine: Engine,
    model: zoo.ZooModel,
    steps: int,
    lists: Sequence[tuple[int, ...]],
    prefill: Callable[[Vlm, Sequence[Part], Sequence[int]], None],
    gpu_layers: int,
) -> list[Difference]:
    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, n_ctx=2048, gpu_layers=gpu_layers))
    found = []
    try:
        fed = np.random.RandomState(4).randint(3, vlm.info.n_vocab - 3, steps).astype(np.int32)
        for case in zoo.cases(model.row):
            parts = parts_of(case, _encoded(vlm, case), pruned=False)
            rows = vlm.prefill(parts).n_past
            plain = _logits(vlm, fed)
            for cuts in lists:
                prefill(vlm, parts, cuts)
                off = float(np.abs(_logits(vlm, fed) - plain).max())
                found.append(Difference(case.name, cuts, rows, off, float(np.abs(plain).max())))
    finally:
        vlm.close()
    return found


# against transformers


def _path(name: str) -> Path:
    return zoo.EXPECTED / "layers" / f"{name}.npz"


def committed(name: str) -> dict[str, Float32]:
    """See :func:`tests.zoo.reference.dropped_at_layers`."""
    with np.load(_path(name), allow_pickle=False) as arrays:
        return {key: arrays[key] for key in arrays.files}


def measure(engine: Engine, model: zoo.ZooModel, want: Mapping[str, Float32], gpu_layers: int = 0) -> list[Measure]:
    """Rows dropped at each layer and at two, every case, against what transformers gives."""

    def logits(fed: Sequence[int]) -> Float32:
        out = [vlm.logits()]
        for token in fed:
            vlm.feed(np.array([token], np.int32))
            out.append(vlm.logits())
        return np.stack(out)

    vlm = engine.load(model.model, model.mmproj, LoadOptions(threads=1, gpu_layers=gpu_layers))
    found = []
    try:
        for case in zoo.cases(model.row):
            encoded = _encoded(vlm, case)
            parts = parts_of(case, encoded, pruned=True)
            for layer in range(1, vlm.info.n_layer):
                vlm.prefill(parts, layer=layer)
                found.append(compare(case.name, f"dropped at {layer}", logits(case.fed), want[f"{case.name}/{layer}"]))
            vlm.pause(parts_of(case, encoded, pruned=False), 1)
            seen = vlm.resume(model.row.kept(case, half_way=True), layer=2, attend=None).attention
            assert seen is not None
            found.append(compare(case.name, "attention at 2", seen, want[f"{case.name}/attention"]))
            vlm.finish(model.row.kept(case))
            found.append(compare(case.name, "dropped at 1, 2", logits(case.fed), want[f"{case.name}/1,2"]))
    finally:
        vlm.close()
    return [replace(m, bounds="gpu" if gpu_layers else "f16") for m in found]


def write(name: str) -> None:
    """Computes the committed values of a family; needs torch."""
    from tests.zoo.reference import dropped_at_layers

    _path(name).parent.mkdir(exist_ok=True)
    np.savez_compressed(_path(name), **dropped_at_layers(zoo.FAMILIES[name]))  # type: ignore[arg-type]


# memory

SHAPE = VlmShape("layers", Llm("llama", 32, 512, 8, 8, 1024, 1024), Tower("clip", 2, 64, 4, 256, 336, 14), "Q8_0")
"""32 layers, 64 KiB of KV cache for each of its cells, 576 image tokens."""


MORE = 0.05
"""Share of the plain run's memory that may come on top of it, for the graphs and the buffers of other contexts."""

Schedule = Sequence[tuple[int, float]]
"""Layers, and the share of image tokens that stay from each of them on."""
THRICE: Schedule = ((2, 0.5), (6, 0.35), (15, 0.2))
"""The layers at which SparseVLM (2410.04417) prunes a model of 32."""


def anonymous(pid: int) -> float:
    """MiB of a process that no file stands behind, in memory or swapped out: weights that are mapped do not count, and
    what the system takes from a process and gives back makes no difference. On Linux.
    """
    status = Path(f"/proc/{pid}/status").read_text()
    return sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s+(\d+) kB", status))) / 1024


def memory(folder: Path, schedule: Schedule) -> float:
    """MiB of the worker after a prompt and a short answer, Python's included, the mapped weights not."""
    files = write_vlm(folder, SHAPE)
    pixels = np.random.RandomState(5).randint(0, 256, (SHAPE.tower.image, SHAPE.tower.image, 3)).astype(np.uint8)
    with LlamaEngine() as engine:
        vlm = engine.load(*files, LoadOptions(threads=1))
        seen, kept = vlm.encode(pixels), None
        parts = [TextPart("USER: "), ImagePart(seen), TextPart(" w1 w2 w3")]
        for layer, keep in schedule:
            vlm.pause(parts, layer) if kept is None else vlm.resume(kept, layer=layer)
            kept = np.arange(round(keep * seen.layout.n_tokens), dtype=np.int32)
        vlm.finish(kept) if schedule else vlm.prefill(parts)
        vlm.generate(4)
        assert engine.pid is not None
        return anonymous(engine.pid)


def memories(folder: Path, say: Callable[[str], None] = print) -> int:
    """Prints a line for each of the paper's settings and one for three cuts; how many of them take more than the plain
    run.
    """
    plain, more = memory(folder, ()), 0
    say(f"memory         plain: {plain:.1f} MiB")
    settings: dict[str, Schedule] = {n: ((p.layer_in(SHAPE.llm.layers), p.keep),) for n, p in PRESETS.items()}
    for name, schedule in (settings | {"thrice": THRICE}).items():
        taken = memory(folder, schedule)
        ok = taken <= (1 + MORE) * plain
        more += not ok
        verdict, layers = "ok" if ok else "MISS", ", ".join(str(layer) for layer, _ in schedule)
        say(
            f"memory         {name}, layer {layers}: {taken:.1f} MiB, {taken / plain:.0%} of the plain run's  {verdict}"
        )
    return more


def _zoo(names: Sequence[str], folder: Path, steps: int) -> int:
    """Prints what the zoo's families give; how much was missed."""
    missed = 0
    with LlamaEngine() as engine:
        for name in names:
            model = zoo.build(name, folder)
            for what, measured in (("one layer", differences), ("several layers", pauses)):
                found = measured(engine, model, steps)
                largest = max(d.largest for d in found)
                missed += largest != 0.0
                print(
                    f"{name:14} cut at {what}, prompts of {min(d.rows for d in found)} to "
                    f"{max(d.rows for d in found)} rows, {steps} tokens: largest difference {largest}",
                    flush=True,
                )
            if name not in REFERENCES:
                continue
            for m in measure(engine, model, committed(name)):
                missed += not m.ok
                verdict = "ok" if m.ok else "MISS"
                print(f"{name:14} {m.case:8} {m.what:14} {m.correlation:10.7f} {m.error:8.3%}  {verdict}", flush=True)
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="layers", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(zoo.FAMILIES)}; default all")
    parser.add_argument("--steps", type=int, default=100, help="tokens decoded (default 100)")
    parser.add_argument("--scenes", type=int, default=140, help="scenes for the demo pair, 0 = none (default 140)")
    parser.add_argument(
        "--where", type=int, default=210, help="questions for compact positions, 0 = none (default 210)"
    )
    parser.add_argument("--seed", type=int, default=20261122, help="of the scenes")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--skip-zoo", action="store_true", help="the demo pair alone")
    parser.add_argument("--write", action="store_true", help="compute the values of transformers anew")
    args = parser.parse_args(argv)
    names = args.families or list(zoo.FAMILIES)
    if unknown := set(names) - set(zoo.FAMILIES):
        parser.error(f"unknown family {sorted(unknown)[0]!r}; known are {', '.join(zoo.FAMILIES)}")
    if args.write:
        for name in REFERENCES:
            write(name)
        return 0
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        if not args.skip_zoo:
            missed += _zoo(names, Path(folder), args.steps)
        if sys.platform == "linux":
            missed += memories(Path(folder))
    table = layer_table.table(args.scenes, args.seed, args.threads) if args.scenes else None
    if table is not None:
        print(table, flush=True)
    compared = layer_table.positions(args.where, args.seed, args.threads) if args.where else None
    if compared is not None:
        print(compared)
    for line in layer_table.misses(table, compared):
        missed += 1
        print("MISSED", line)
    print(f"{missed} missed" if missed else "all exact, or within bounds")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
