"""Public names are those in ``__all__``: all of them exist, and other layers take no others."""

from __future__ import annotations

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import localvlm

NEEDS_TRAINING = ("localvlm.models.demo",)
SCRIPTS = ("localvlm.__main__", "localvlm.engine.worker")


def modules() -> list[str]:
    found = []
    for package in (localvlm, importlib.import_module("localvlm.models"), importlib.import_module("localvlm.tui")):
        home = [p for p in package.__path__ if (Path(p) / "__init__.py").is_file()]
        found += [package.__name__]
        found += [m.name for m in pkgutil.walk_packages(home, package.__name__ + ".")]
    return sorted(name for name in set(found) if not name.startswith(NEEDS_TRAINING) and name not in SCRIPTS)


def test_modules_were_found():
    assert {"localvlm.pipeline", "localvlm.cli.ask", "localvlm.engine.api", "localvlm.tui"} <= set(modules())


@pytest.mark.parametrize("name", modules())
def test_all_names_exist_and_are_sorted(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert list(names) == sorted(set(names), key=list(names).index), "a name is listed twice"
    missing = [n for n in names if not hasattr(module, n)]
    assert not missing
    assert module.__doc__, "a module says what it is for"


@pytest.mark.parametrize("name", modules())
def test_only_listed_names_are_imported_from_other_layers(name):
    """`from localvlm.x import y` takes public names alone; modules of one package may share more."""
    source = Path(importlib.import_module(name).__file__ or "")
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.ImportFrom) or node.level or not (node.module or "").startswith("localvlm"):
            continue
        if node.module.rpartition(".")[0] != name.rpartition(".")[0] or "." not in node.module:
            other = importlib.import_module(node.module)
            listed = getattr(other, "__all__", None)
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if listed is not None and alias.name not in listed and submodule not in modules():
                    pytest.fail(f"{name} imports {alias.name} from {node.module}, which does not list it")
