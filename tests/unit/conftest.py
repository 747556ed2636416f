"""The zoo's models, and an engine that loads them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from localvlm._native_path import native_library
from localvlm.engine.client import Engine, RemoteVlm
from localvlm.errors import UnsupportedModel
from tests import zoo
from tests.asking import load


@pytest.fixture(scope="session")
def native() -> None:
    try:
        native_library()
    except UnsupportedModel as error:
        pytest.skip(f"the native library is not built: {error}")


@pytest.fixture(scope="module")
def files(native: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, zoo.ZooModel]:
    directory = tmp_path_factory.mktemp("zoo")
    halves = [half for family in zoo.LARGE for half in zoo.pair(directory, family)]
    return {half.row.name: half for half in halves}


@pytest.fixture(scope="module")
def engine(native: None) -> Iterator[Engine]:
    with Engine() as e:
        yield e


@pytest.fixture(params=["llava15", "qwen25vl"])
def vlm(request, engine: Engine, files) -> Iterator[RemoteVlm]:
    loaded = load(engine, files[request.param])
    yield loaded
    loaded.close()


@pytest.fixture
def llava(engine: Engine, files) -> Iterator[RemoteVlm]:
    loaded = load(engine, files["llava15"])
    yield loaded
    loaded.close()
