"""A tiny model with random weights, and runs of inference.py on it in this process."""

import sys
from pathlib import Path

import pytest

import inference
from arl2.model import HybridSettings
from pipelines.generation.arguments import InferenceRun, inference_parser, plan_run
from pipelines.generation.random_model import random_pipeline
from wan.vae.wan_vae import TOY_VAE

SIZE = {"height": 32, "width": 48}
CONFIG = """
model_folder: {folder}
num_output_frames: 6
height: 32
width: 48
"""


def save_model(folder: Path) -> Path:
    """Write a model that makes a video of 6 latent frames in a moment."""
    pipeline = random_pipeline("toy", HybridSettings((0, 1, 2)), vae_config=TOY_VAE | {"dim": 4})
    pipeline.save_pretrained(folder)
    return folder


def write_config(folder: Path, model: Path, extra: str = "") -> Path:
    """Write a config for the model."""
    path = folder / "config.yaml"
    path.write_text(CONFIG.format(folder=model) + extra)
    return path


def flags_of(config: Path, *flags: object) -> list[str]:
    """A command line; videos go beside the config if nothing else is said."""
    output = [] if "--output_folder" in flags else ["--output_folder", config.parent / "out"]
    return list(map(str, ["--config_path", config, *output, "--device", "cpu", *flags]))


def planned(config: Path, *flags: object) -> InferenceRun:
    """A checked request."""
    return plan_run(inference_parser().parse_args(flags_of(config, *flags)))


def run_inference(monkeypatch: pytest.MonkeyPatch, config: Path, *flags: object) -> int:
    """The status of inference.py."""
    monkeypatch.setattr(sys, "argv", ["inference.py", *flags_of(config, *flags)])
    return inference.main()


def videos_in(folder: Path) -> dict[str, bytes]:
    """Videos by name."""
    return {path.name: path.read_bytes() for path in folder.glob("*.mp4")}


def names_in(folder: Path) -> set[str]:
    """Endings of everything in a folder, hidden files by their whole names."""
    return {path.name if path.name.startswith(".") else path.suffix for path in folder.iterdir()}
