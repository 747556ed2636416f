"""Whether a pair fits this machine's memory: said before it is loaded, and refused with the nearest thing that does."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from localvlm.cli.output import Reporter
from localvlm.errors import ModelError, NotEnoughMemory
from localvlm.room import room, told

if TYPE_CHECKING:
    from localvlm.answers import AskOptions, Pair
    from localvlm.engine.api import LoadOptions
    from localvlm.images import Image
    from localvlm.memory import Asked, Need
    from localvlm.pipeline import Pipeline

__all__ = ["check_fit"]

TIGHT = 0.85
"""Share of the memory that is free from which on a pair is said to be tight."""
FILES, BESIDE = 1.5, 1 << 30
"""Of a pair that takes no more than so many times its files, and so many bytes beside them, nothing need be told: to
look closer takes longer than it answers."""

CONTEXT, IMAGE = 2048, 256
"""Cells for pictures, and image tokens of one, that are proposed where there is no memory for more."""


def check_fit(
    pipeline: Pipeline,
    params: Mapping[str, Any],
    reporter: Reporter,
    pictures: Sequence[Image] | None = None,
    question: str = "",
    options: AskOptions | None = None,
) -> None:
    """Says what a question about pictures takes (-v, or where it is tight): of usual ones, where they are not known,
    and with nothing pruned, without ``options``.

    Raises:
        NotEnoughMemory: it cannot fit.
    """
    pair, most = pipeline.pair, params["max_memory"]
    if most == 0:
        return
    free = round(most * 1e9) if most else room()
    if not (reporter.verbose or params["gpu_layers"]) and FILES * _size(pair) + BESIDE < free:
        return
    from localvlm.memory import pair_need, table

    guide, model = pipeline.options["guide"], pipeline.options["model"]
    asked = _asked(pictures, question, options)
    try:
        need = pair_need(pair, guide, model, asked, low_memory=pipeline.low_memory)
    except (ModelError, OSError):  # told again, better, when it is loaded
        return
    gpu, unified = _gpu(pipeline) if params["gpu_layers"] else (0, False)
    taken = need.total if unified else need.host
    short = taken > free or (not unified and need.gpu > gpu)
    parts, there = f"{told(taken)} of memory", f"{told(free)} are free"
    if need.gpu and not unified:
        parts, there = f"{parts} and {told(need.gpu)} of the GPU's", f"{there}, {told(gpu)} of the GPU's"
    if not short:
        if reporter.verbose or taken > TIGHT * free:
            tight = "" if taken <= TIGHT * free else "this is tight: "
            reporter.note(f"{tight}the pair takes {parts}, and {there} ({table(need)})")
        return
    nearest = _nearest(pair, guide, model, asked, free, None if unified else gpu, low=pipeline.low_memory)
    raise NotEnoughMemory(f"the pair takes {parts}, and {there} ({table(need)})", nearest)


def _asked(pictures: Sequence[Image] | None, question: str, options: AskOptions | None) -> Asked:
    from localvlm.memory import TEXT, Asked, asked_of

    asked = Asked() if options is None else asked_of(options)
    schema = "" if options is None else options.schema
    asked = replace(asked, text=TEXT + (len(question) + len(schema)) // 3)
    return asked if pictures is None else replace(asked, sizes=tuple(picture.size for picture in pictures))


def _size(pair: Pair) -> int:
    from localvlm.engine.gguf_header import parts_of

    vlms = [files for files in (pair.guide, pair.model) if files]
    paths = {path for files in vlms for path in (*parts_of(files.model), files.mmproj)}
    return sum(path.stat().st_size for path in paths if path.is_file())


def _gpu(pipeline: Pipeline) -> tuple[int, bool]:
    """Free bytes of the GPUs, and whether these are the machine's own memory."""
    backend = getattr(pipeline.engine, "backend", None)
    if backend is None:
        return 1 << 62, False
    found = backend()
    return found.gpu_free, found.unified


def _nearest(
    pair: Pair, guide: LoadOptions, model: LoadOptions, asked: Asked, free: int, gpu: int | None, *, low: bool
) -> str:
    """What to pass so that it fits, the least change first."""
    from localvlm.memory import pair_need

    for flags, changed, in_turn in _changes(pair, guide, model, asked, low):
        need = pair_need(pair, *changed, asked, low_memory=in_turn)
        if _fits(need, free, gpu):
            return f"pass {flags}, which needs {told(need.host)}"
    return f"{_smaller(free)}; --max-memory 0 loads it all the same"


def _fits(need: Need, free: int, gpu: int | None) -> bool:
    return need.total <= free if gpu is None else need.host <= free and need.gpu <= gpu


def _changes(
    pair: Pair, guide: LoadOptions, model: LoadOptions, asked: Asked, low: bool
) -> Iterator[tuple[str, tuple[LoadOptions, LoadOptions], bool]]:
    """Flags, what they make of the options, and whether the guide is unloaded, as it is anyway if ``low``: each alone,
    then all together.
    """
    cells = -(-(asked.text + asked.max_tokens + CONTEXT) // 256) * 256
    ways: list[tuple[str, dict[str, Any]]] = []
    if pair.guide is not None and pair.model is not None and not low:
        ways.append(("--low-memory", {}))
    if model.kv_type == "f16":
        ways.append(("--kv-type q8_0", {"kv_type": "q8_0"}))
    if not model.n_ctx or model.n_ctx > cells:
        ways.append((f"--ctx-size {cells}", {"n_ctx": cells}))
    if not 0 < model.image_tokens <= IMAGE:
        ways.append((f"--image-max-tokens {IMAGE}", {"image_tokens": IMAGE}))
    together = {key: value for _, change in ways for key, value in change.items()}
    ways.append((" ".join(flag for flag, _ in ways), together))
    fewer = range(model.gpu_layers - 1, 0, -1) if model.gpu_layers else ()
    ways += [(f"-ngl {layers}", {"gpu_layers": layers}) for layers in fewer]
    if model.gpu_layers:
        ways.append(("-ngl 0", {"gpu_layers": 0}))
    for flags, change in ways:
        yield flags, (replace(guide, **change), replace(model, **change)), low or "--low-memory" in flags


def _smaller(free: int) -> str:
    """The largest other pair that fits, pulled or not; demos answer nothing that anyone would ask."""
    from localvlm.catalog import DEMOS, entries
    from localvlm.ranking import ranked

    for one in ranked((entry for entry in entries() if entry.name not in DEMOS), free):
        fits, name = one.fits(free), one.entry.name
        if fits in ("yes", "with --low-memory"):
            how = f"run `localvlm pull {name}`" if one.entry.lacking else f"pass --pair {name}"
            return how + " --low-memory" * (fits != "yes" and not one.entry.lacking)
    return "close other programs"
