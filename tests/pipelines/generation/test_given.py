"""inference.py with a picture for a chunk-wise model, and with a video to continue or to go through again."""

import json
from pathlib import Path

import numpy as np
import pytest
from inference_world import planned, run_inference
from PIL import Image

from pipelines.config import InferenceConfig
from pipelines.media.video import VideoWriter, read_video
from wan.utils.files import content_hash

PROMPT = ("--prompt", "a red shape")


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """21 frames, at the rate of the config."""
    path = tmp_path / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (21, 32, 48, 3), np.uint8)
    with VideoWriter(path, 32, 48) as writer:
        writer.write(frames)
    return path


def test_a_picture_starts_a_video_of_a_chunk_wise_model(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    Image.fromarray(np.full((64, 64, 3), 200, np.uint8)).save(tmp_path / "image.png")
    assert run_inference(monkeypatch, config, *PROMPT, "--i2v", "--image", tmp_path / "image.png") == 0
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert read_video(video).shape == (21, 32, 48, 3)
    assert "image" in json.loads(video.with_suffix(".json").read_text())["settings"]


def test_a_video_is_continued_and_told_apart(
    monkeypatch: pytest.MonkeyPatch, config: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = ("--video", clip, "--num_output_frames", 9)
    assert run_inference(monkeypatch, config, *PROMPT, *longer) == 0
    (video,) = (tmp_path / "out").glob("*.mp4")
    assert read_video(video).shape == (33, 32, 48, 3)
    assert run_inference(monkeypatch, config, *PROMPT, *longer) == 0, "finished"
    assert run_inference(monkeypatch, config, *PROMPT, "--num_output_frames", 9) == 2
    assert "video was" in capsys.readouterr().err


def test_a_video_goes_through_the_steps_again(
    monkeypatch: pytest.MonkeyPatch, config: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = ("--video", clip, "--strength", 0.5)
    assert run_inference(monkeypatch, config, *PROMPT, *again) == 0
    (record,) = (tmp_path / "out").glob("*.json")
    settings = json.loads(record.read_text())["settings"]
    assert settings["strength"] == 0.5 and settings["video"] == content_hash(clip)
    assert run_inference(monkeypatch, config, *PROMPT, "--video", clip, "--strength", 0.75) == 2
    assert "strength was 0.5, is 0.75" in capsys.readouterr().err


def test_lengths_are_checked_before_models_load(
    config: Path, clip: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert planned(config, *PROMPT, "--video", clip, "--num_output_frames", 9).given_frames == 6
    for flags, message in (
        (("--video", clip), "6 latent frames are given for a video of 6: raise --num_output_frames"),
        (("--video", clip, "--strength", 0.5, "--num_output_frames", 9), "33 are needed"),
        (("--video", clip, "--strength", 0.1), "no step: give at least 0.25"),
    ):
        assert run_inference(monkeypatch, config, *PROMPT, *flags) == 2
        assert message in capsys.readouterr().err


def test_what_is_off_is_no_part_of_an_identity() -> None:
    assert not {"strength", "guidance_distilled"} & InferenceConfig().identity().keys()
    assert InferenceConfig(strength=0.5).identity()["strength"] == 0.5
