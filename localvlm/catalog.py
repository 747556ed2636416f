"""Pairs by name: the bundled ones, those on the hub, those of the settings file, and what files given by hand mean."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from localvlm.config import PAIR_KEYS
from localvlm.errors import ModelError, ModelNotFound, NotGguf
from localvlm.references import Reference, choose, files_of, heads, parse, quant_of

if TYPE_CHECKING:
    from localvlm.hub_cache import CachedFile
    from localvlm.pair import Pair, VlmFiles

__all__ = [
    "DEMO",
    "DEMOS",
    "HEADROOM",
    "PROJECTOR",
    "Entry",
    "Pulled",
    "as_pair",
    "calibrations",
    "default_entry",
    "entries",
    "entry_named",
    "example_image",
    "located",
    "models_folder",
    "named",
    "pair_named",
    "pair_names",
    "reference",
    "spoken",
    "vlm_files",
    "without_projector",
]

DEMO = "demo"
DEMOS = DEMO, "demo-tiles"
HEADROOM = 1 << 30
"""Bytes of memory that a pair needs beside its files: KV caches and compute buffers."""
PROJECTORS = {"guide": "guide_mmproj", "model": "mmproj"}
"""PAIR_KEYS of a VLM and of its projector."""
PROJECTOR = "a projector (mmproj file)"
"""What a model cannot see without."""


@dataclass(frozen=True)
class Entry:
    """A pair that has a name.

    Attributes:
        files: by PAIR_KEYS, those whose place is known; the guide's may be missing.
        references: what "guide" and "model" are called on the hub, where they come from there.
        lacking: what is not on this machine: paths, and names on the hub.
        about: licence, tokens, good-at and gb of the catalogue, where they are known.
        run: whether this project has run it.
    """

    name: str
    summary: str
    files: Mapping[str, Path]
    references: Mapping[str, Reference] = field(default_factory=dict)
    lacking: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    run: bool = True

    @property
    def size(self) -> int:
        """Bytes of all files that are there."""
        from localvlm.engine.gguf_header import parts_of

        paths = {part for path in self.files.values() for part in parts_of(path)}
        return sum(path.stat().st_size for path in paths if path.is_file())


class Pulled:
    """The models in the cache that is shared with other programs, looked at when first asked for."""

    @cached_property
    def files(self) -> list[CachedFile]:
        """All GGUF files of it."""
        from localvlm.hub_cache import cached_files

        return cached_files()

    def commits(self, wanted: Reference) -> Iterator[list[CachedFile]]:
        """Files of a repository, commit by commit, the newest first; of one alone where a revision is asked for."""
        from localvlm.hub_cache import commit_of

        mine = [file for file in self.files if file.repo == wanted.repo]
        if wanted.revision != "main":
            commit = commit_of(wanted.repo, wanted.revision)
            mine = [file for file in mine if file.commit == commit]
        for _, found in groupby(mine, key=lambda file: file.commit):
            yield list(found)

    def models(self) -> dict[Reference, list[CachedFile]]:
        """What can be asked for, of each repository's newest commit that has it; without a projector it cannot see."""
        found: dict[Reference, list[CachedFile]] = {}
        for repo in dict.fromkeys(file.repo for file in self.files):
            for commit in self.commits(Reference(repo)):
                named = {file.name: file for file in commit}
                for head in heads(named):
                    quants = [quant_of(name) for name in heads(named)]
                    single = quant_of(head) and quants.count(quant_of(head)) == 1
                    wanted = Reference(repo, quant_of(head)) if single else Reference(repo, file=head)
                    found.setdefault(wanted, self.chosen(wanted) or [named[head]])
        return found

    def chosen(self, wanted: Reference) -> list[CachedFile]:
        """What a reference means of what is there: the model's files and, at the end, its projector; or nothing."""
        for commit in self.commits(wanted):
            named = {file.name: file for file in commit}
            try:
                names, projector = choose(wanted, sorted(named))
            except ModelError:
                continue
            return [named[name] for name in (*names, projector) if name]
        return []

    def part(self, wanted: Reference) -> tuple[list[CachedFile], str]:
        """What there is of a reference that :meth:`chosen` does not find, and what is missing: PROJECTOR where it is
        the model alone; else all that is there of its repository, or nothing.
        """
        for commit in self.commits(wanted):
            named = {file.name: file for file in commit}
            try:
                return [named[name] for name in files_of(wanted, sorted(named))], PROJECTOR
            except ModelError:
                continue
        missing = f"quantization {wanted.quant}" if wanted.quant else wanted.file or "a model"
        return next(self.commits(wanted), []), missing

    def removable(self, wanted: Reference) -> list[CachedFile]:
        """What removing a model removes: of all commits, or of the one that is asked for, its files, and projectors
        that no other model needs then.
        """
        found: list[CachedFile] = []
        for commit in self.commits(wanted):
            named = {file.name: file for file in commit}
            if not (wanted.quant or wanted.file):
                found += commit
                continue
            try:
                names, projector = choose(wanted, sorted(named))
            except ModelError:
                continue
            rest = set(named) - set(names)
            needed = any(self._projector(wanted.repo, head, rest) == projector for head in heads(rest))
            found += [named[name] for name in (*names, "" if needed else projector) if name]
        return found

    @staticmethod
    def _projector(repo: str, head: str, names: set[str]) -> str:
        try:
            return choose(Reference(repo, file=head), sorted(names))[1]
        except ModelError:
            return ""


def models_folder() -> Path:
    """Where the bundled models lie."""
    import localvlm.models

    return Path(localvlm.models.__file__).parent


def example_image() -> Path:
    """The bundled picture that goes with the demo pair."""
    return models_folder() / "demo" / "example.png"


def named(name: str, files: Mapping[str, Path | Reference]) -> Entry:
    """Files by PAIR_KEYS as a pair of that name."""
    return _entry(name, {"summary": ""}, files, Pulled())


def entries(user_pairs: Mapping[str, Mapping[str, Path | Reference]] = {}, pulled: Pulled | None = None) -> list[Entry]:
    """All pairs that have a name, the user's own first; these win over bundled ones of the same name."""
    pulled = pulled or Pulled()
    found = [_user_entry(name, files, pulled) for name, files in user_pairs.items()]
    return found + [_bundled_entry(name, t, pulled) for name, t in _bundled().items() if name not in user_pairs]


def _user_entry(name: str, files: Mapping[str, Path | Reference], pulled: Pulled) -> Entry:
    return _entry(name, {"summary": "from the settings file"}, files, pulled)


def _bundled_entry(name: str, table: dict[str, Any], pulled: Pulled) -> Entry:
    written = {key: table[key.replace("_", "-")] for key in PAIR_KEYS if key.replace("_", "-") in table}
    return _entry(name, table, {key: parse(text) or models_folder() / text for key, text in written.items()}, pulled)


def _entry(name: str, table: Mapping[str, Any], files: Mapping[str, Path | Reference], pulled: Pulled) -> Entry:
    about = {key: table[key] for key in ("licence", "tokens", "good-at", "gb") if key in table}
    found, lacking = _found(files, pulled)
    lacking += [str(path) for path in found.values() if not path.is_file()]
    references = {key: value for key, value in files.items() if isinstance(value, Reference)}
    return Entry(name, table["summary"], found, references, tuple(lacking), about, table.get("run", True))


def _found(files: Mapping[str, Path | Reference], pulled: Pulled) -> tuple[dict[str, Path], list[str]]:
    """Paths by PAIR_KEYS, and the names on the hub of what was not pulled."""
    found = {key: value for key, value in files.items() if isinstance(value, Path)}
    lacking = []
    for key, wanted in files.items():
        if isinstance(wanted, Path):
            continue
        chosen = [file.path for file in pulled.chosen(wanted)]
        if not chosen:
            alone, missing = pulled.part(wanted)
            if missing == PROJECTOR and PROJECTORS.get(key) in files:
                found[key] = alone[0].path
            else:
                lacking.append(str(wanted))
            continue
        found[key] = chosen[0 if key in PROJECTORS else -1]
        if key in PROJECTORS and len(chosen) > 1:
            found.setdefault(PROJECTORS[key], chosen[-1])
    return found, lacking


def reference(text: str) -> Reference | None:
    """What ``text`` is called on the hub; None where it is a path or a single word.

    Raises:
        UsageError: an address that is not on the hub.
    """
    hosts = []
    if "://" in text:
        from urllib.parse import urlsplit

        from localvlm.hub_cache import hub_address

        hosts = [urlsplit(hub_address()).netloc]
    return parse(text, hosts)


def located(files: Mapping[str, Path | Reference]) -> dict[str, Path]:
    """Where files are, by PAIR_KEYS; those that come from the hub bring their projectors, unless one is given.

    Raises:
        ModelNotFound: one from the hub was not pulled.
    """
    pulled = Pulled()
    found, lacking = _found(files, pulled)
    for key, wanted in files.items():
        if isinstance(wanted, Reference) and str(wanted) in lacking:
            there, missing = pulled.part(wanted)
            alone = missing == PROJECTOR
            here = f"; here: {', '.join(file.name for file in there)}" * bool(there)
            what = f"'{wanted}' " + (f"is here without {missing}" if alone else f"is not on this machine{here}")
            flag = f" or pass one with --{PROJECTORS[key].replace('_', '-')}" * alone
            raise ModelNotFound(what, f"run `localvlm pull {spoken(wanted)}`{flag}")
    return found


def without_projector(entry: Entry, pulled: Pulled | None = None) -> dict[str, Path]:
    """The models of a pair, by role, that are there and have no projector."""
    pulled = pulled or Pulled()
    found = {}
    for role, key in PROJECTORS.items():
        model, wanted = entry.files.get(role), entry.references.get(role)
        if model is not None and model.is_file() and key not in entry.files:
            if not _mmprojs(model):
                found[role] = model
        elif model is None and wanted is not None:
            there, missing = pulled.part(wanted)
            if there and missing == PROJECTOR:
                found[role] = there[0].path
    return found


def spoken(wanted: Path | Reference) -> str:
    """A reference, or a path, as it is written on the command line."""
    if not isinstance(wanted, Reference) or (not wanted.file and wanted.revision == "main"):
        return str(wanted)
    repo, revision = f"https://huggingface.co/{wanted.repo}", quote(wanted.revision, safe="")
    if wanted.file:
        return f"{repo}/resolve/{revision}/{quote(wanted.file)}"
    return f"{repo}{f':{wanted.quant}' * bool(wanted.quant)}/tree/{revision}"


def calibrations() -> dict[str, dict[str, Any]]:
    """Thresholds of early exit that bundled pairs come with, by digest of their weights (localvlm.calibration)."""
    tables = [table["calibration"] for table in _bundled().values() if "calibration" in table]
    return {table.pop("digest"): table for table in tables}


def _bundled() -> dict[str, Any]:
    import tomllib

    with (models_folder() / "catalog.toml").open("rb") as file:
        return tomllib.load(file)


def entry_named(name: str, user_pairs: Mapping[str, Mapping[str, Path | Reference]] = {}) -> Entry:
    """The pair called ``name``, whose files are there.

    Raises:
        ModelNotFound: there is none, or one of its files is missing.
    """
    bundled, pulled = _bundled(), Pulled()
    if name in user_pairs:
        entry = _user_entry(name, user_pairs[name], pulled)
    elif name in bundled:
        entry = _bundled_entry(name, bundled[name], pulled)
    else:
        from difflib import get_close_matches

        known = pair_names(user_pairs)
        near = get_close_matches(name, known, 1)
        told = ", ".join(dict.fromkeys([*near, *known]))
        raise ModelNotFound(f"there is no pair {name!r}", f"`localvlm list` shows them: {told}")
    if entry.lacking and entry.references:
        raise ModelNotFound(f"pair {name!r} lacks '{entry.lacking[0]}'", f"run `localvlm pull {name}`")
    if entry.lacking:
        raise ModelNotFound(f"pair {name!r} lacks the file '{entry.lacking[0]}'", "`localvlm list` shows what is there")
    return entry


def pair_names(user_pairs: Mapping[str, Mapping[str, Path | Reference]] = {}) -> list[str]:
    """What pairs are called, whether their files are there or not; the user's own first."""
    return list(dict.fromkeys([*user_pairs, *_bundled()]))


def pair_named(name: str) -> Pair:
    """The bundled pair called ``name``, as the pipeline takes it."""
    return as_pair(name, entry_named(name).files)


def default_entry(user_pairs: Mapping[str, Mapping[str, Path | Reference]] = {}) -> Entry:
    """The largest installed pair that fits the memory now available, else the demo pair."""
    import psutil

    installed = [e for e in entries(user_pairs) if "model" in e.files and not e.lacking and e.name not in DEMOS]
    room = psutil.virtual_memory().available - HEADROOM
    fitting = [e for e in installed if e.size <= room]
    return max(fitting, key=lambda e: e.size) if fitting else entry_named(DEMO, user_pairs)


def as_pair(name: str | None, files: Mapping[str, Path]) -> Pair:
    """Files by PAIR_KEYS as a pair; missing mmproj files are looked for beside their models."""
    from localvlm.pair import Pair

    guide, model = files.get("guide"), files.get("model")
    return Pair(
        name,
        vlm_files(guide, files.get("guide_mmproj"), "--guide-mmproj") if guide else None,
        vlm_files(model, files.get("mmproj"), "--mmproj") if model else None,
    )


def vlm_files(model: Path, mmproj: Path | None, flag: str) -> VlmFiles:
    """The two files of a VLM.

    Raises:
        ModelNotFound: a file is missing, or no mmproj was given and none lies beside the model.
        NotGguf: none lies beside it, and it is no model.
    """
    from localvlm.pair import VlmFiles

    for path in (model, mmproj):
        if path is not None and not path.is_file():
            why = "is not a file" if path.exists() else "does not exist"
            raise ModelNotFound(f"model file {str(path)!r} {why}", "check the path")
    return VlmFiles(model, mmproj or _sibling_mmproj(model, flag))


_KINDS = ("f16", "bf16", "q8_0", "f32")
_KIND = re.compile(r"[-_.](bf16|f16|f32|i?q\d\w*)$", re.IGNORECASE)


def _mmprojs(model: Path) -> list[Path]:
    beside = model.absolute().parent.glob("*.gguf")
    return [path for path in beside if "mmproj" in path.name.lower() and path.name != model.name]


def _is_gguf(path: Path) -> bool:
    """By how it begins; yes where it cannot be read, which loading it tells."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return True


def _sibling_mmproj(model: Path, flag: str) -> Path:
    """The GGUF beside the model whose name holds "mmproj": most alike in name, then F16 before BF16 before others."""
    own = _KIND.sub("", model.stem.lower())

    def rank(path: Path) -> tuple[int, int, int, str]:
        stem = path.stem.lower()
        bare = _KIND.sub("", stem).replace("mmproj", "").strip("-_.")
        alike = next((i for i, (a, b) in enumerate(zip(bare, own, strict=False)) if a != b), min(len(bare), len(own)))
        found = _KIND.search(stem)
        kind = found[1] if found else ""
        return -alike, len(bare) - alike, _KINDS.index(kind) if kind in _KINDS else len(_KINDS), path.name

    found = _mmprojs(model)
    if not found and not _is_gguf(model):
        raise NotGguf(f"{str(model)!r} is not a GGUF file", "pass a .gguf model file")
    if not found:
        raise ModelNotFound(f"no mmproj file lies beside {str(model)!r}", f"pass it with {flag}")
    return min(found, key=rank)
