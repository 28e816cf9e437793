"""A folder for the hub: in a process of its own, plain diffusers loads it with one call, saves it, and loads that."""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers_world import new_pipeline
from paths import ROOT

from arl2.trained_memory import TrainedMemory

CONFIG = """
model_folder: {folder}
num_output_frames: 3
height: 16
width: 32
denoising_steps: [1000, 500]
"""
USER = """
import sys, torch
from diffusers import DiffusionPipeline
source, copy, target = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
pipe.set_progress_bar_config(disable=True)
pipe.save_pretrained(copy)
again = DiffusionPipeline.from_pretrained(copy, trust_remote_code=True, custom_pipeline=copy)
again.set_progress_bar_config(disable=True)
frames = [each("a red shape", seeds=[1], output_type="latent").frames for each in (pipe, again)]
torch.save({"frames": frames, "class": [type(each).__name__ for each in (pipe, again)]}, target)
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    pipeline = new_pipeline()
    pipeline.transformer.set_trained_memory(TrainedMemory(9, 3))
    pipeline.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(CONFIG.format(folder=folder / "model"))
    return folder / "config.yaml"


def export(monkeypatch: pytest.MonkeyPatch, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", ["export_hub", *map(str, flags)])
    status = import_module("export_hub").main()
    assert isinstance(status, int)
    return status


def user(folder: Path, tmp_path: Path, path: str) -> "subprocess.CompletedProcess[str]":
    """A program that knows diffusers alone."""
    environment = os.environ | {"PYTHONPATH": path, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", USER, str(folder), str(tmp_path / "copy"), str(tmp_path / "found.pt")]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)


def test_plain_diffusers_loads_and_saves_it(monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path) -> None:
    recipe, records = tmp_path / "recipe.md", tmp_path / "records"
    recipe.write_text("Two stages, 12,000 steps.\n")
    records.mkdir()
    record = {"fps": {"end_to_end": 12.5}, "settings": {"a": 1}, "device": "a card", "versions": {"torch": "2.13"}}
    (records / "a.json").write_text(json.dumps(record | {"peak_memory_bytes": 8.5e9, "time_to_first_frame": 0.25}))
    folder, flags = (
        tmp_path / "hub",
        ("--recipe", recipe, "--records", records, "--licence", "mit", "--dtype", "float32"),
    )
    assert export(monkeypatch, "--config", config, "--output_folder", folder, *flags) == 0
    card = (folder / "README.md").read_text()
    told = ("license: mit", "base_model: Wan-AI/", "Two stages", "12.50", "8.50", "1000, 500", "9 frames of 16×32")
    assert all(each in card for each in told), card
    done = user(folder, tmp_path, str(ROOT))
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    own = import_module("pipelines.generation.pipeline").CausalVideoPipeline.from_pretrained(folder)
    own.set_progress_bar_config(disable=True)
    expected = own("a red shape", seeds=[1], output_type="latent").frames
    assert found["class"] == ["ArlVideoPipeline"] * 2
    assert expected.shape[1] == 3 and all(torch.equal(frames, expected) for frames in found["frames"])


def test_without_the_package_one_line_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    assert export(monkeypatch, "--config", config, "--output_folder", tmp_path / "hub") == 0
    if "site-packages" not in str(import_module("diffusers").__file__):
        pytest.skip("diffusers is not installed apart")
    # -P and an editable install: the package is taken off the path in the program itself.
    blocked = "import sys; sys.modules['pipelines'] = None\n"
    monkeypatch.setattr(sys.modules[__name__], "USER", blocked + USER)
    done = user(tmp_path / "hub", tmp_path, "")
    assert done.returncode and "needs the code of ARL2 beside diffusers" in done.stderr.strip().splitlines()[-1]


def test_what_cannot_be_exported(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "no_records").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.json").write_text("{}")
    for flags, message in (
        (("--output_folder", tmp_path), "is there already"),
        (("--output_folder", tmp_path / "x", "--records", tmp_path / "no_records"), "no records in"),
        (("--output_folder", tmp_path / "x", "--records", tmp_path / "other"), "is no record of a video"),
        (("--output_folder", tmp_path / "x", "--recipe", tmp_path / "none.md"), "give a Markdown file"),
        (("--output_folder", tmp_path / "x", "strength=0.5"), "give --video too"),
    ):
        assert export(monkeypatch, "--config", config, *flags) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and "\n" not in error and not (tmp_path / "x").exists()


def test_what_a_folder_cannot_store_stands_on_its_card(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = ("memory.kind=window", "memory.window_frames=6", "memory.sink_frames=0", "caveat=No anchors.")
    flags = ("--config", config, "--output_folder")
    assert export(monkeypatch, *flags, tmp_path / "a", *settings) == 0
    card = (tmp_path / "a" / "README.md").read_text()
    assert "memory=MemoryConfig(kind='window', window_frames=6, sink_frames=0)" in card and "No anchors." in card
    assert "does not store the memory of kind window" in caplog.text and "No anchors." in caplog.text
    caplog.clear()
    assert export(monkeypatch, *flags, tmp_path / "b", "memory.kind=window") == 0  # as in training
    assert "MemoryConfig" not in (tmp_path / "b" / "README.md").read_text() and "does not store" not in caplog.text


def test_sizes_of_a_window_that_there_is_not_stand_on_no_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    new_pipeline().save_pretrained(tmp_path / "model")  # trained with full memory
    text = CONFIG.format(folder=tmp_path / "model") + "memory: {{kind: {}, window_frames: 6, sink_frames: 0}}\n"
    for kind in ("trained", "full"):
        config = tmp_path / f"{kind}.yaml"
        config.write_text(text.format(kind))
        assert export(monkeypatch, "--config", config, "--output_folder", tmp_path / kind) == 0
        assert "MemoryConfig" not in (tmp_path / kind / "README.md").read_text()
        assert "does not store" not in caplog.text
