"""Builds the tap and its C tests with every warning an error, and runs them plain and under the sanitizers."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"


def _run(command: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


def _build(directory: Path, *options: str) -> Path:
    """Configures and builds the native directory on its own; its test program."""
    cmake, compiler = shutil.which("cmake"), shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if cmake is None or compiler is None:
        pytest.skip("no cmake or no C compiler")
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        pytest.skip("llama-cpp-python is not installed: its headers are compiled against")
    package = Path(spec.origin).parent
    definitions = {
        "LLAMA_CPP_DIR": package.as_posix(),
        "Python_EXECUTABLE": sys.executable,
        "LOCALVLM_BUILD_TESTS": "ON",
        "LOCALVLM_WERROR": "ON",
    }
    flags = [f"-D{name}={value}" for name, value in definitions.items()]
    for command in (
        [cmake, "-S", str(NATIVE), "-B", str(directory), f"-DCMAKE_C_COMPILER={compiler}", *flags, *options],
        [cmake, "--build", str(directory), "--parallel", "2"],
    ):
        done = _run(command)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / "tests" / "tap_test"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build(tmp_path_factory.mktemp("tap"))


def test_builds_without_warnings(plain: Path) -> None:
    assert plain.is_file()


def test_agrees_with_a_plain_softmax(plain: Path) -> None:
    """Attention, cells, positions, repairs, cancels, refusals; 10,000 taps grow by less than 1 MiB."""
    arguments = ["rss"] if Path("/proc/self/statm").exists() else []
    done = _run([str(plain), *arguments], OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout


def test_library_names_no_path(plain: Path) -> None:
    """Only what the header declares is exported, and ggml is found by its SONAME beside llama_cpp's own."""
    readelf, nm = shutil.which("readelf"), shutil.which("nm")
    library = plain.parents[1] / "liblocalvlm_tap.so"
    if readelf is None or nm is None or not library.exists():
        pytest.skip("no ELF tools")
    dynamic = _run([readelf, "-d", str(library)]).stdout
    assert "libggml-base.so.0" in dynamic
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    exported = [line.split()[-1] for line in _run([nm, "-D", "--defined-only", str(library)]).stdout.splitlines()]
    assert exported
    assert [name for name in exported if not name.startswith(("lv_tap_", "lv_stage", "lv_tower_"))] == []
    header = (NATIVE / "localvlm_tap.h").read_text()
    assert [name for name in exported if f"{name}(" not in header] == []


def test_alone_it_is_refused(plain: Path) -> None:
    """Without llama_cpp loaded first, opening the library fails with ggml's name, and nothing crashes."""
    library = plain.parents[1] / "liblocalvlm_tap.so"
    if not library.exists():
        pytest.skip("Linux only")
    done = _run([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library)])
    assert done.returncode == 1
    assert "libggml-base.so.0" in done.stderr


def test_guard_names_both_versions(plain: Path) -> None:
    """A library built for another ggml says so."""
    library = plain.parents[1] / "liblocalvlm_tap.so"
    if not library.exists():
        pytest.skip("Linux only")
    ask = (
        "import ctypes, sys, llama_cpp; tap = ctypes.CDLL(sys.argv[1]); "
        "tap.lv_tap_guard.restype = ctypes.c_char_p; print(tap.lv_tap_guard())"
    )
    assert _run([sys.executable, "-c", ask, str(library)]).stdout.strip() == "None"
    other = plain.parents[1] / "other.so"
    raw = library.read_bytes()
    version = _ggml_version()
    assert raw.count(version + b"\0") >= 1
    other.write_bytes(raw.replace(version + b"\0", b"9" * len(version) + b"\0"))
    said = _run([sys.executable, "-c", ask, str(other)]).stdout
    assert version.decode() in said
    assert "9" * len(version) in said


def _ggml_version() -> bytes:
    """What the ggml inside llama_cpp calls itself."""
    ask = (
        "import ctypes, os, llama_cpp; folder = os.path.dirname(llama_cpp.__file__) + '/lib/libggml-base.so.0'; "
        "ggml = ctypes.CDLL(folder); ggml.ggml_version.restype = ctypes.c_char_p; print(ggml.ggml_version().decode())"
    )
    done = _run([sys.executable, "-c", ask])
    assert done.returncode == 0, done.stderr
    return done.stdout.strip().encode()


@pytest.mark.slow
def test_clean_under_sanitizers(tmp_path: Path) -> None:
    program = _build(tmp_path, "-DLOCALVLM_SANITIZE=ON", "-DCMAKE_BUILD_TYPE=RelWithDebInfo")
    done = _run([str(program)], OMP_WAIT_POLICY="passive", ASAN_OPTIONS="detect_leaks=1:abort_on_error=0")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
    assert "Sanitizer" not in done.stderr
    assert "runtime error" not in done.stderr


@pytest.mark.slow
def test_builds_without_openmp(tmp_path: Path) -> None:
    program = _build(tmp_path, "-DLOCALVLM_OPENMP=OFF")
    done = _run([str(program)], OMP_WAIT_POLICY="passive")
    assert done.returncode == 0, done.stderr[-4000:] + done.stdout
