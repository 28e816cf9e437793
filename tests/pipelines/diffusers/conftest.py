"""A tiny pipeline that is called as diffusers' are."""

from pathlib import Path

import pytest
from diffusers_world import new_pipeline

from pipelines.generation.pipeline import CausalVideoPipeline


@pytest.fixture(scope="session")
def shared_pipeline() -> CausalVideoPipeline:
    return new_pipeline()


@pytest.fixture
def pipeline() -> CausalVideoPipeline:
    return new_pipeline()


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of such a model."""
    folder = tmp_path_factory.mktemp("diffusers") / "model"
    new_pipeline().save_pretrained(folder)
    return folder
