"""What users call a model on a hub, and which of a repository's files they mean: names alone, nothing is asked."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from localvlm.errors import ModelError, ModelNotFound, UnsupportedModel, UsageError

__all__ = ["QUANTS", "Reference", "choose", "files_of", "heads", "parse", "quant_of"]

QUANTS = ("Q4_K_M", "Q8_0")
"""Taken in this order where none is asked for, as llama.cpp does."""
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
_REPO = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?::(?P<quant>[\w.-]+))?", re.ASCII)
_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$", re.IGNORECASE)
_QUANT = re.compile(r"(?:^|[-._])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|F32))$", re.IGNORECASE)
_NO_MODEL = ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")
"""Names of files that go with a model, as llama.cpp has them."""


@dataclass(frozen=True)
class Reference:
    """A model on a hub: a repository, and of its files one, those of a quantization, or the usual."""

    repo: str
    quant: str = ""
    file: str = ""
    revision: str = "main"

    def __str__(self) -> str:
        at = f" at {self.revision}" if self.revision != "main" else ""
        return f"{self.repo}{f':{self.quant}' if self.quant else ''}{f' ({self.file})' if self.file else ''}{at}"


def parse(text: str, hosts: Collection[str] = ()) -> Reference | None:
    """What ``text`` refers to; None where it is the path of a file, or a single word.

    ``hosts``: further names of the hub. Known forms: user/repo[:quant], hf.co/user/repo[:quant], and addresses of
    repositories and of their files.

    Raises:
        UsageError: an address of another host, or of nothing that can be fetched.
    """
    known = {*HOSTS, *hosts}
    plain = text.removeprefix("hf://")
    if plain == text and "://" not in plain and plain.split("/")[0] in known:
        plain = f"https://{plain}"
    if "://" in plain:
        return _of_address(plain, known)
    found = _REPO.fullmatch(plain)
    if found is None or plain.lower().endswith(".gguf") or ".." in plain:
        return None
    return Reference(found["repo"], found["quant"] or "")


def _of_address(address: str, hosts: Collection[str]) -> Reference:
    try:
        parts = urlsplit(address)
    except ValueError as error:
        raise UsageError(f"'{address}' is no address: {error}", "write user/repo, or user/repo:quant") from error
    if parts.scheme not in ("http", "https") or (parts.netloc not in hosts and parts.hostname not in hosts):
        raise UsageError(
            f"'{address}' is not on a Hugging Face hub, which tells the digest of each file",
            "fetch it by other means and give its path",
        )
    steps = [unquote(step) for step in parts.path.strip("/").split("/")]
    repo = _REPO.fullmatch("/".join(steps[:2]))
    if repo is None or (len(steps) > 2 and (steps[2] not in ("resolve", "blob", "raw", "tree") or len(steps) < 4)):
        raise UsageError(f"'{address}' names no repository of models", "write user/repo, or user/repo:quant")
    revision = steps[3] if len(steps) > 2 else "main"
    file = "/".join(steps[4:]) if len(steps) > 2 and steps[2] != "tree" else ""
    return Reference(repo["repo"], repo["quant"] or "", file, revision)


def quant_of(name: str) -> str:
    """The quantization that a file's name tells, in capitals, or ``""``."""
    found = _QUANT.search(_stem(name))
    return found[1].upper() if found else ""


def _stem(name: str) -> str:
    bare = _SPLIT.sub(".gguf", name.rpartition("/")[2])
    return bare.removesuffix(".gguf").removesuffix(".GGUF")


def heads(names: Iterable[str]) -> list[str]:
    """Of a repository's files those that stand for a model: whole ones, and first parts of split ones."""
    models = (name for name in names if _is_model(name))
    return sorted(name for name in models if (part := _SPLIT.search(name)) is None or int(part[1]) == 1)


def _is_model(name: str) -> bool:
    last = name.rpartition("/")[2].lower()
    return last.endswith(".gguf") and not any(word in last for word in _NO_MODEL)


def choose(reference: Reference, names: Sequence[str]) -> tuple[list[str], str]:
    """The files of a reference among a repository's: the model's, all parts of a split one, and its projector's.

    Raises:
        ModelNotFound: what was asked for is not among them.
        UnsupportedModel: there is no projector: no vision.
    """
    parts = files_of(reference, names)
    usable = [name for name in names if name.lower().endswith(".gguf")]
    return parts, _projector(reference, parts[0], usable) if _is_model(parts[0]) else ""


def files_of(reference: Reference, names: Sequence[str]) -> list[str]:
    """The same without the projector: the model's file, or all parts of it.

    Raises:
        ModelNotFound: what was asked for is not among them.
        UnsupportedModel: no model is.
    """
    usable = [name for name in names if name.lower().endswith(".gguf")]
    models = [name for name in usable if _is_model(name)]
    if reference.file:
        if reference.file not in names:
            raise _missing(reference, reference.file, usable)
        return _all_parts(reference.file, models) if _is_model(reference.file) else [reference.file]
    if not models:
        raise _without_models(reference, usable)
    return _all_parts(_first(reference, models), models)


def _first(reference: Reference, models: Sequence[str]) -> str:
    """The model's file, or the first part of it."""
    whole = heads(models)
    for quant in (reference.quant,) if reference.quant else QUANTS:
        found = [name for name in whole if _has(name, quant)]
        if len(found) > 1 and len({_stem(name) for name in found}) > 1:
            exact = [name for name in found if quant_of(name) == quant.upper()]
            if len(exact) != 1:
                raise ModelNotFound(f"'{reference}' means several files: {_listed(found)}", "give the address of one")
            found = exact
        if found:
            return found[0]
    if reference.quant or not whole:
        raise _missing(reference, f"quantization '{reference.quant}'", models)
    return min(whole, key=lambda name: (abs(_bits(name) - _bits(QUANTS[0])), name))


def _has(name: str, quant: str) -> bool:
    return re.search(rf"(?:^|[-._]){re.escape(quant)}$", _stem(name), re.IGNORECASE) is not None


def _all_parts(first: str, models: Iterable[str]) -> list[str]:
    split = _SPLIT.search(first)
    if split is None:
        return [first]
    wanted = [f"{first[: split.start()]}-{i:05d}-of-{split[2]}.gguf" for i in range(1, int(split[2]) + 1)]
    lacking = [name for name in wanted if name not in set(models)]
    if lacking:
        raise ModelNotFound(f"of '{first}' the part '{lacking[0]}' is missing", "take another repository")
    return wanted


def _projector(reference: Reference, model: str, names: Iterable[str]) -> str:
    """The file whose name holds "mmproj": nearest in the folders, then in bits, F16 before BF16."""
    folders = model.split("/")[:-1]

    def rank(name: str) -> tuple[int, int, bool, str]:
        return -name.count("/"), abs(_bits(name) - _bits(model)), quant_of(name) == "BF16", name

    found = [n for n in names if "mmproj" in n.rpartition("/")[2].lower()]
    near = [n for n in found if n.split("/")[:-1] == folders[: n.count("/")]]
    if not near:
        raise UnsupportedModel(
            f"'{reference.repo}' has no mmproj file: its model cannot see",
            "take a repository of a vision-language model in GGUF, as `localvlm list` shows some",
        )
    return min(near, key=rank)


def _bits(name: str) -> int:
    """Bits of a weight, by name."""
    found = re.search(r"\d+", quant_of(name) or name.rpartition("/")[2])
    return int(found[0]) if found and quant_of(name) else 0


def _listed(names: Sequence[str]) -> str:
    quants = sorted({quant_of(name) for name in names} - {""})
    shown = quants if len(quants) > 1 else sorted(names)
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _missing(reference: Reference, what: str, names: Sequence[str]) -> ModelError:
    return ModelNotFound(f"'{reference.repo}' has no {what}", f"it has {_listed(names)}" if names else "")


def _without_models(reference: Reference, names: Sequence[str]) -> ModelError:
    if names:
        return UnsupportedModel(f"'{reference.repo}' has projectors and no model", "take the repository of the model")
    return UnsupportedModel(
        f"'{reference.repo}' has no GGUF files, which llama.cpp needs", "look for a repository whose name ends in -GGUF"
    )
