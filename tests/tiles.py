"""The tiled demo pair on held-out scenes whose tags can be read in the tiles alone: accuracy, and tiles encoded.

    python -m tests.tiles [--count 1000] [--seed 20261121] [--pair demo-tiles] [--json FILE]

The model answers each question from all tokens, from the overview, and from 35 % and 9 % of the tokens, chosen by the
guide on all tiles, by the guide on the overview (``--guide-image-max-tokens``), by the plain demo pair's guide, which
knows no tiles, and at random; each with the tiles at their price (``--tile-price auto``) and free. "by mass" is the
overview's guide with scores that grow with a token's area. Pictures are encoded once; each row is a real prefill.

Then every other question is asked with a second picture beside its own: each picture must keep its floor and the text
between must be as it is unpruned. (The pair was not trained on two pictures: accuracy there is shown, not judged.)
Leaves with 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from localvlm import images
from localvlm.catalog import pair_named
from localvlm.engine.api import Encoded, ImageLayout, ImagePart, LoadOptions, Message, TextPart, Vlm
from localvlm.engine.client import Engine
from localvlm.guidance import AGGREGATIONS, resample
from localvlm.models.demo import scenes as scene_maker
from localvlm.pipeline import AskOptions, VlmFiles
from localvlm.pruning import method_named
from localvlm.pruning.joint import FLOOR
from localvlm.selection import joint, resampled, select
from tests.scenes import MAX_TOKENS, Tally, normal

KEEPS = (0.35, 0.09)
METHOD = method_named(AskOptions().method)
GUIDES = ("all tiles", "overview", "demo guide")
Int32 = NDArray[np.int32]
Float32 = NDArray[np.float32]


@dataclass
class Cost:
    """Tokens kept and tiles encoded, per question and row of the table."""

    rows: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def mean(self, row: str) -> tuple[float, float]:
        kept, tiles = np.mean(self.rows[row], axis=0)
        return float(kept), float(tiles)


@dataclass(frozen=True)
class Vlms:
    """The model, and each guide by its name in GUIDES."""

    model: Vlm
    guides: dict[str, Vlm]


def _parts(vlm: Vlm, question: str, pictures: Sequence[ImagePart]) -> list[TextPart | ImagePart]:
    messages = [Message("user", question, len(pictures))]
    return [p if isinstance(p, TextPart) else pictures[p] for p in vlm.chat(messages)]


def look(guide: Vlm, pixels: Sequence[NDArray[np.uint8]], question: str) -> tuple[Float32, list[ImageLayout], str]:
    """The guide's scores of its own tokens, where these lie, and its answer."""
    encoded = [guide.encode(p) for p in pixels]
    guide.prefill(_parts(guide, question, [ImagePart(e) for e in encoded]), tap=True)
    said = guide.generate(MAX_TOKENS).text
    scores = AGGREGATIONS[METHOD.aggregation or "sum"](guide.attention())
    for e in encoded:
        guide.release(e)
    return scores, [e.layout for e in encoded], said


def choices(vlms: Vlms, pixels: NDArray[np.uint8], question: str, layout: ImageLayout, seed: int) -> Iterator:
    """(row, kept tokens) of the table."""
    tiles, price = layout.tiles, vlms.model.info.tile_price
    assert tiles is not None
    assert layout.boxes is not None
    yield "overview alone", np.flatnonzero(tiles == 0).astype(np.int32)
    for keep in KEEPS:
        yield f"random {keep:.0%}", select(method_named("random"), keep, [layout], None, seed)[0]
    for name, guide in vlms.guides.items():
        scores, layouts, _ = look(guide, [pixels], question)
        saliency = resampled(scores, layouts, [layout])
        for keep in KEEPS:
            yield f"{name} {keep:.0%}", select(METHOD, keep, [layout], saliency, seed)[0]
            yield f"{name} {keep:.0%} priced", select(METHOD, keep, [layout], saliency, seed, price)[0]
            if name == "overview":
                assert layouts[0].boxes is not None
                mass = resample(scores, layouts[0].boxes, layout.boxes)
                yield f"{name} {keep:.0%} by mass", select(METHOD, keep, [layout], mass, seed)[0]


def run(rows: Sequence[dict[str, str]], folder: Path, vlms: Vlms) -> tuple[Tally, Cost]:
    """Asks every question of ``rows`` (image, question, answer, type) in every setting."""
    tally, cost, model = Tally(), Cost(), vlms.model
    for number, row in enumerate(rows):
        pixels, want = images.load(folder / row["image"]).rgb, normal(row["answer"])
        seen = model.encode(pixels)
        layout = seen.layout
        assert layout.tiles is not None
        said: dict[bytes, bool] = {}
        everything = np.arange(layout.n_tokens, dtype=np.int32)
        tally.types.append(row["type"])
        for name, kept in [
            ("unpruned", everything),
            *choices(vlms, pixels, row["question"], layout, number),
        ]:
            if (key := kept.tobytes()) not in said:
                model.prefill(_parts(model, row["question"], [ImagePart(seen, kept)]))
                said[key] = normal(model.generate(MAX_TOKENS).text) == want
            tally.add(name, said[key])
            cost.rows.setdefault(name, []).append((len(kept), len(np.unique(layout.tiles[kept]))))
        model.release(seen)
        if sys.stderr.isatty() or (number + 1) % 50 == 0:
            print(f"{number + 1} of {len(rows)}", file=sys.stderr)
    return tally, cost


@dataclass
class Two:
    """What two pictures in one prompt came to."""

    right: list[bool] = field(default_factory=list)
    whole: list[bool] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Rules that did not hold."""


def two(rows: Sequence[dict[str, str]], folder: Path, vlms: Vlms) -> Two:
    """Asks each question about the second of two pictures, pruned to 35 % and unpruned."""
    out, model, guide = Two(), vlms.model, vlms.guides["all tiles"]
    for first, row in zip(rows[1::2], rows[::2], strict=False):
        shown = [images.load(folder / r["image"]).rgb for r in (first, row)]
        question, want = f"In the second picture: {row['question']}", normal(row["answer"])
        seen = [model.encode(p) for p in shown]
        layouts = [e.layout for e in seen]
        scores, guided, _ = look(guide, shown, question)
        saliency = resampled(scores, guided, layouts)
        kept = select(METHOD, KEEPS[0], layouts, saliency, 0, model.info.tile_price)
        whole = model.prefill(_parts(model, question, [ImagePart(e) for e in seen]))
        out.whole.append(normal(model.generate(MAX_TOKENS).text) == want)
        some = _encoded(model, shown, kept)
        pruned = model.prefill(_parts(model, question, [ImagePart(e, k) for e, k in zip(some, kept, strict=True)]))
        out.right.append(normal(model.generate(MAX_TOKENS).text) == want)
        if pruned.token_ids.tolist() != whole.token_ids.tolist():
            out.wrong.append("the prompt as if unpruned is another one")
        beside = whole.n_past - pruned.n_past - (whole.n_image - len(joint(layouts, kept)))
        if not 0 <= beside <= np.count_nonzero(whole.token_ids == -2):  # ends of lines that have no kept token
            out.wrong.append("something else than image tokens and ends of lines was dropped")
        if min(len(k) for k in kept) < int(FLOOR * (sum(map(len, kept)) - 2) / 2):
            out.wrong.append(f"a picture keeps {min(len(k) for k in kept)} tokens")
        for e in (*seen, *some):
            model.release(e)
    return out


def _encoded(model: Vlm, shown: Sequence[NDArray[np.uint8]], kept: Sequence[Int32]) -> list[Encoded]:
    return [model.encode(p, keep=k) for p, k in zip(shown, kept, strict=True)]


def table(tally: Tally, cost: Cost) -> str:
    kinds = sorted(set(tally.types))
    _, total = cost.mean("unpruned")
    lines = [f"{'':24s}{'all':>7s}" + "".join(f"{k:>10s}" for k in kinds) + f"{'tokens':>9s}{'tiles':>7s}{'share':>7s}"]
    for row in tally.rows:
        kept, tiles = cost.mean(row)
        cells = "".join(f"{tally.percent(row, k):10.1f}" for k in kinds)
        lines += [f"{row:24s}{tally.percent(row):7.1f}{cells}{kept:9.0f}{tiles:7.2f}{tiles / total:7.0%}"]
    return "\n".join(lines)


def misses(tally: Tally, cost: Cost, pairs: Two) -> list[str]:
    """Targets that are not reached, in words."""
    out: list[str] = []

    def want(ok: bool, text: str) -> None:
        if not ok:
            out.append(text)

    full, small = tally.percent("unpruned"), tally.percent("unpruned", "small")
    over = tally.percent("overview alone", "small")
    want(over <= small - 20, f"small tags {over:.1f} % from the overview alone, wanted 20 points below {small:.1f} %")
    for name, within in (("all tiles", 3), ("overview", 5)):
        row = f"{name} 35%"
        for label in (row, f"{row} priced"):
            found = tally.percent(label)
            want(found >= full - within, f"{label} {found:.1f} %, wanted within {within} points of {full:.1f} %")
        for keep, saved in zip(KEEPS, (0, 0.1), strict=True):
            row = f"{name} {keep:.0%}"
            lost, _ = tally.difference(row, f"{row} priced")
            want(lost <= 2, f"{row}: the price costs {lost:.1f} points, wanted at most 2")
            free, priced = cost.mean(row)[1], cost.mean(f"{row} priced")[1]
            most = (1 - saved) * free
            want(priced <= most, f"{row}: {priced:.2f} tiles encoded at their price, wanted at most {most:.2f}")
    for keep in KEEPS:
        mean, half = tally.difference(f"all tiles {keep:.0%} priced", f"random {keep:.0%}")
        want(mean > half, f"all tiles over random at {keep:.0%}: {mean:+.1f} +- {half:.1f} points, wanted above 0")
    return out + sorted(set(pairs.wrong))


def make(count: int, seed: int, folder: Path) -> list[dict[str, str]]:
    """Draws the scenes into ``folder`` and returns the rows of its data.jsonl."""
    scene_maker.main(["--tiles", "--seed", str(seed), "--count", str(count), "--out", str(folder)])
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


def open_vlms(engine: Engine, pair: str, threads: int) -> Vlms:
    """The pair, its guide bounded to an overview, and the plain demo pair's guide."""
    tiled, plain = pair_named(pair), pair_named("demo")

    def load(files: VlmFiles | None, image_tokens: int = 0) -> Vlm:
        assert files is not None
        options = LoadOptions(n_ctx=2048, threads=threads, image_tokens=image_tokens)  # two pictures take 1,440
        return engine.load(files.model, files.mmproj, options)

    guides = load(tiled.guide), load(tiled.guide, 1), load(plain.guide)
    return Vlms(load(tiled.model), dict(zip(GUIDES, guides, strict=True)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--two", type=int, default=100, help="questions that are asked with two pictures")
    parser.add_argument("--seed", type=int, default=20261121)
    parser.add_argument("--pair", default="demo-tiles")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name, Engine() as engine:
        vlms = open_vlms(engine, args.pair, args.threads)
        rows = make(args.count, args.seed, Path(name))
        tally, cost = run(rows, Path(name), vlms)
        pairs = two(rows[: 2 * args.two], Path(name), vlms)
    print(f"{args.count} held-out scenes, seed {args.seed}, exact match in %; a tile costs as much as "
          f"{vlms.model.info.tile_price:.0f} tokens")  # fmt: skip
    print(table(tally, cost))
    print(f"two pictures, a question about the second, {len(pairs.right)} times: unpruned "
          f"{100 * np.mean(pairs.whole):.1f}, 35 % {100 * np.mean(pairs.right):.1f}")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"types": tally.types, "rows": tally.rows, "cost": cost.rows}))
    missed = misses(tally, cost, pairs)
    for line in missed:
        print("MISSED", line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
