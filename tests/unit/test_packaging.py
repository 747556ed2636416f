"""The package works installed, editable and from the checkout, wherever Python is started."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import click
import pytest

import localvlm
from localvlm import _native_path, _search_path
from localvlm.cli.main import cli
from localvlm.errors import UnsupportedModel

ROOT = Path(__file__).resolve().parents[2]
SHOW = (
    "import localvlm, localvlm.errors, localvlm.models, localvlm.models.demo.world as world, localvlm.tui\n"
    "from localvlm._native_path import native_library\n"
    "for module in (localvlm.errors, localvlm.models, world, localvlm.tui): print(module.__file__)\n"
    "print(native_library())"
)

OFFLINE = ("--no-deps", "--no-build-isolation", "--no-index")


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    return [block.strip() for block in blocks]


# ---- what the files say


def test_the_first_screen_has_the_picture_and_two_commands():
    screen = "\n".join((ROOT / "README.md").read_text(encoding="utf-8").splitlines()[:26])
    assert "docs/picture.png" in screen
    assert "localvlm ask example" in readme_commands()[0]
    assert "pytest" in readme_commands()[1]
    assert all(command in screen for command in readme_commands()[:2])


def test_every_command_is_in_the_readme_and_its_help_in_the_first_steps():
    names = cli.list_commands(click.Context(cli))
    for page, told in (("README.md", "localvlm {}"), ("docs/first-steps.md", "$ localvlm {} --help")):
        text = (ROOT / page).read_text(encoding="utf-8")
        assert [name for name in names if not re.search(re.escape(told.format(name)) + r"\b", text)] == [], page
    assert "pip install" in (ROOT / "docs" / "first-steps.md").read_text(encoding="utf-8")


def test_ci_runs_the_test_lines_of_the_readme_and_nothing_else():
    lines = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    commands = [line for line in lines if line and not line.startswith("#")]
    assert commands == ["set -euo pipefail", 'cd "$(dirname "$0")/.."', readme_commands()[1]]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_headers_and_libraries_of_llama_cpp_are_of_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pins = [r for r in (*project["build-system"]["requires"], *project["project"]["dependencies"]) if "llama" in r]
    assert len(pins) == 2
    assert len(set(pins)) == 1
    assert "==" in pins[0]


def test_installed_and_checked_out_versions_agree():
    from importlib.metadata import version

    assert version("localvlm") == localvlm.__version__
    assert f'__version__ = "{localvlm.__version__}"' in (ROOT / "localvlm" / "__init__.py").read_text(encoding="utf-8")


# ---- where modules and the library are found


def make_checkout(root: Path) -> Path:
    for folder in ("localvlm", "models", "tui"):
        (root / folder).mkdir(parents=True)
    (root / "pyproject.toml").touch()
    return root / "localvlm"


def test_an_installed_copy_goes_before_the_checkout(tmp_path):
    here = make_checkout(tmp_path / "checkout")
    installed = tmp_path / "site" / "localvlm"
    (installed / "models").mkdir(parents=True)
    (installed / "models" / "__init__.py").touch()
    sys_path = ["", str(tmp_path / "checkout"), "/nowhere", str(tmp_path / "site")]
    assert _search_path(str(here), [str(here)], sys_path) == [str(installed)]
    assert _search_path(str(installed), [str(installed)], sys_path) == [str(installed)]


def test_a_checkout_alone_provides_its_subpackages(tmp_path):
    here = make_checkout(tmp_path)
    assert _search_path(str(here), [str(here)], [str(tmp_path)]) == [str(here), str(tmp_path)]


def test_an_editable_install_keeps_its_search_path(tmp_path):
    here = make_checkout(tmp_path)
    path = ["/site/localvlm", str(tmp_path), str(here)]
    assert _search_path(str(here), path, [str(tmp_path)]) == path


def test_native_library(monkeypatch, tmp_path):
    monkeypatch.delenv("LOCALVLM_NATIVE_LIBRARY", raising=False)
    assert _native_path.native_library().name == _native_path.NAME
    other = tmp_path / "other.so"
    monkeypatch.setenv("LOCALVLM_NATIVE_LIBRARY", str(other))
    with pytest.raises(UnsupportedModel, match=r"other\.so"):
        _native_path.native_library()
    other.touch()
    assert _native_path.native_library() == other
    monkeypatch.delenv("LOCALVLM_NATIVE_LIBRARY")
    monkeypatch.setattr(_native_path, "NAME", "no-such-library")
    with pytest.raises(UnsupportedModel, match="no-such-library"):
        _native_path.native_library()


# ---- real installs


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """A wheel of this checkout, built with what is installed here."""
    folder = tmp_path_factory.mktemp("wheel")
    pip("wheel", *OFFLINE, "-w", folder, ROOT)
    return next(folder.glob("*.whl"))


def pip(*args: object, python: object = sys.executable) -> None:
    command = [python, "-m", "pip", "-q", "--disable-pip-version-check", *args]
    subprocess.run([str(a) for a in command], check=True, timeout=900)


def venv(folder: Path) -> Path:
    """A new environment that sees the dependencies installed here, but not this localvlm."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)}))
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        ours = "localvlm" in package.name
        if not ours and not package.name.startswith(("pip", "_distutils", "__pycache__")):
            target = site / package.name
            if not target.exists():
                target.symlink_to(package)
    return folder / "bin" / "python"


def run(python: Path, *args: str, cwd: Path, **env: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LOCALVLM_NATIVE"))}
    done = subprocess.run(
        [python, *args], cwd=cwd, env={**clean, **env}, capture_output=True, text=True, check=True, timeout=300
    )
    return done.stdout


@pytest.mark.slow
def test_the_wheel_holds_everything_and_nothing_generic(wheel):
    assert "-py3-none-" in wheel.name
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].partition("-")[0] for name in names} == {"localvlm"}
    assert f"localvlm/_native/{_native_path.NAME}" in names
    assert {"localvlm/models/catalog.toml", "localvlm/tui/__init__.py", "localvlm/py.typed"} <= set(names)
    for folder in (ROOT / "localvlm", ROOT / "models", ROOT / "tui"):
        for source in folder.rglob("*.py"):
            parts = (folder.name, *source.relative_to(folder).parts)
            inside = "/".join(parts if folder.name == "localvlm" else ("localvlm", *parts))
            assert inside in names, inside
    assert not [n for n in names if n.endswith((".pyc", ".pt", ".ckpt"))]


@pytest.mark.slow
def test_a_wheel_works_from_everywhere(wheel, tmp_path):
    python = venv(tmp_path / "env")
    pip("install", *OFFLINE, wheel, python=python)
    site = str(tmp_path / "env")
    for cwd, env in ((tmp_path, {}), (ROOT, {}), (tmp_path, {"PYTHONPATH": str(ROOT)})):
        files = run(python, "-c", SHOW, cwd=cwd, **env).split()
        assert all(f.startswith(site) for f in files), (cwd, env, files)
        assert "Ask questions" in run(python, "-m", "localvlm", "--help", cwd=cwd, **env)
    run(python, "-m", "pytest", "-q", str(ROOT / "tests" / "unit" / "test_exports.py"), cwd=tmp_path)
    run(python, "-m", "pytest", "-q", "tests/unit/test_exports.py", cwd=ROOT)


@pytest.mark.slow
def test_an_editable_install_works_from_everywhere(tmp_path):
    checkout = tmp_path / "checkout"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "__pycache__", "work", ".*_cache")
    shutil.copytree(ROOT, checkout, ignore=skip)
    python = venv(tmp_path / "env")
    pip("install", *OFFLINE, "-e", checkout, python=python)
    for cwd in (tmp_path, checkout):
        *sources, library = run(python, "-c", SHOW, cwd=cwd).split()
        assert all(f.startswith(str(checkout)) for f in sources), sources
        assert library.startswith(str(tmp_path / "env"))
    (checkout / "models" / "demo" / "added_later.py").write_text("X = 1\n")
    assert run(python, "-c", "import localvlm.models.demo.added_later as a; print(a.X)", cwd=tmp_path) == "1\n"
