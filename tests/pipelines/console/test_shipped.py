"""What a command line may name although it is not below the working directory."""

import logging
import os
from pathlib import Path

import pytest
from paths import ROOT

from pipelines.config import InferenceConfig
from pipelines.console import shipped
from pipelines.console.shipped import find_shipped
from pipelines.settings import load_config
from pipelines.training.config import Stage1Config
from wan.utils.errors import InputError

CONFIG = Path("configs/toyworld/inference.yaml")


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Another working directory than the checkout."""
    monkeypatch.chdir(tmp_path)
    shipped._say_once.cache_clear()
    return tmp_path


def test_what_ships_is_found_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert find_shipped(CONFIG) == find_shipped(CONFIG) == ROOT / CONFIG
    assert find_shipped(Path("prompts/test.txt")) == ROOT / "prompts/test.txt"
    assert find_shipped(Path("models/toyworld")) == ROOT / "models/toyworld"
    said = [record.getMessage() for record in caplog.records]
    assert said[0] == f"{CONFIG} is not here: taking the one that comes with arl2" and len(said) == 3


def test_the_working_directory_goes_before(elsewhere: Path) -> None:
    (elsewhere / CONFIG).parent.mkdir(parents=True)
    (elsewhere / CONFIG).write_text("height: 32\n")
    assert find_shipped(CONFIG) == CONFIG


@pytest.mark.parametrize(
    "path",
    [
        "configs/none.yaml",
        "toyworld/inference.yaml",
        "scripts/demo.py",
        "configs/../README.md",
        "../prompts/test.txt",
    ],
)
def test_other_names_stay(path: str) -> None:
    assert find_shipped(Path(path)) == Path(path)


def test_absolute_names_stay(elsewhere: Path) -> None:
    assert find_shipped(elsewhere / CONFIG) == elsewhere / CONFIG


def test_configs_find_models_that_come_with_the_project() -> None:
    config = load_config(InferenceConfig, ROOT / CONFIG)
    assert config.model_folder == str(ROOT / "models/toyworld")
    given = load_config(InferenceConfig, ROOT / CONFIG, ["checkpoint_path=models/toyworld/hybrid_75.safetensors"])
    assert given.checkpoint_path == str(ROOT / "models/toyworld/hybrid_75.safetensors")
    assert load_config(InferenceConfig, ROOT / CONFIG, ["model_folder=models/none"]).model_folder == "models/none"


def test_what_is_written_stays_below_the_working_directory() -> None:
    config = load_config(Stage1Config, ROOT / "configs/toyworld/stage1.yaml", ["run_folder=models/toyworld"])
    assert config.run_folder == "models/toyworld" and config.model_folder == str(ROOT / "models/toyworld")


def test_a_config_that_is_nowhere_is_one_clear_line() -> None:
    with pytest.raises(InputError, match=r"no config file configs/none\.yaml: it is not there; those of the project"):
        load_config(InferenceConfig, find_shipped(Path("configs/none.yaml")))


def test_in_the_checkout_nothing_is_looked_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert find_shipped(CONFIG) == CONFIG and os.path.samefile(CONFIG, ROOT / CONFIG)
