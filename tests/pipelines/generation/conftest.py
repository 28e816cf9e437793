"""One tiny model, and one server of processes, for all tests of generation."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from forked import ForkServer
from inference_world import save_model, write_config

from pipelines.generation.pipeline import CausalVideoPipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("generation") / "model")


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(folder)


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, folder)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    server = ForkServer(tmp_path_factory.mktemp("printed"))
    yield server
    server.close()
