"""One tiny model for all tests of evaluation."""

from pathlib import Path

import pytest
from inference_world import save_model, write_config


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("evaluation") / "model")


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    return write_config(tmp_path, model)
