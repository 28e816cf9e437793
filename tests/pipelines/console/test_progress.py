"""Progress bars of a run that goes on begin where it goes on."""

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from inference_world import run_inference, save_model, write_config
from paths import ROOT
from rich.progress import Progress, TaskID


@pytest.fixture
def bars(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float | None, float]]:
    """Where bars end and begin."""
    begun: list[tuple[float | None, float]] = []
    honest = Progress.add_task

    def noted(self: Progress, description: str, **options: Any) -> TaskID:
        begun.append((options.get("total"), options.get("completed", 0)))
        return honest(self, description, **options)

    monkeypatch.setattr(Progress, "add_task", noted)
    return begun


def test_of_videos(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bars: list[tuple[float | None, float]]) -> None:
    config = write_config(tmp_path, save_model(tmp_path / "model"))
    prompts = tmp_path / "prompts.txt"
    assert run_inference(monkeypatch, config, "--prompt", "a red ring") == 0
    prompts.write_text("a red ring\na blue cross\na green disc\n")
    assert run_inference(monkeypatch, config, "--data_path", prompts) == 0
    assert (1, 0) in bars and (3, 1) in bars


def test_of_training_data(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, bars: list[tuple[float | None, float]]
) -> None:
    flags = ["--config", str(ROOT / "configs/toyworld/inference.yaml"), "--device", "cpu", "num_output_frames=3"]
    flags += [f"model_folder={ROOT / 'models/toyworld'}", "--output_folder", str(tmp_path / "data")]
    prompts = tmp_path / "prompts.txt"
    for text in ("a red ring\n", "a red ring\na blue cross\n"):
        prompts.write_text(text)
        monkeypatch.setattr(sys, "argv", ["generate_latents.py", "--data_path", str(prompts), *flags])
        assert import_module("generate_latents").main() == 0
    assert bars == [(1, 0), (2, 1)]
    drawn = ["draw_latents.py", "--num_output_frames", "3", "--batch", "1", "--output_folder", str(tmp_path / "drawn")]
    for count in ("1", "2"):
        monkeypatch.setattr(sys, "argv", [*drawn, "--num_videos", count, "--device", "cpu"])
        assert import_module("draw_latents").main() == 0
    assert bars[2:] == [(1, 0), (2, 1)]
