"""Folders of small videos whose pixels are known, and one real output of the toy world."""

import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.evaluation.scoring.clips import ClipFolder, find_clips
from pipelines.media.video import VideoWriter

Frames = NDArray[np.uint8]
Folder = Callable[..., Path]
evaluate = import_module("evaluate")


@pytest.fixture
def cross() -> Path:
    """The toy world's "a green cross bounces off the sides", 33 frames of 64×96, by scripts/sample_suite.py."""
    return Path(__file__).parent / "cross.mp4"


@pytest.fixture
def write() -> Callable[..., Path]:
    return write_video


@pytest.fixture
def pictures() -> Callable[..., Frames]:
    return moving_colours


def moving_colours(num_frames: int, height: int = 22, width: int = 38, seed: int = 0) -> Frames:
    """Frames of smooth colours that move, and some noise."""
    generator = np.random.default_rng(seed)
    base = generator.uniform(40, 215, (1, 1, 1, 3)) + 30 * np.sin(
        np.arange(num_frames)[:, None, None, None] / 3 + np.arange(width)[None, None, :, None] / 5 + seed
    )
    noisy = base + generator.normal(0, 6, (num_frames, height, width, 3))
    return np.clip(noisy, 0, 255).astype(np.uint8)


def write_video(path: Path, frames: Frames, fps: int = 16) -> Path:
    """Write an mp4."""
    with VideoWriter(path, *frames.shape[1:3], fps=fps) as video:
        video.write(frames)
    return path


@pytest.fixture
def damage_frames() -> Callable[[Path], None]:
    """Spoils the second half of a video's coded frames, which only the decoder notices."""

    def damage(path: Path) -> None:
        content = bytearray(path.read_bytes())
        begin = content.rfind(b"mdat")
        size = int.from_bytes(content[begin - 4 : begin])
        for place in range(begin + size // 2, begin + size - 8):
            content[place] ^= 0x5A
        path.write_bytes(bytes(content))

    return damage


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Makes a folder of videos: two prompts of two videos each, or what is asked for."""

    def make(
        name: str = "videos_of_a_run",
        prompts: tuple[str, ...] = ("one", "two"),
        samples: int = 2,
        num_frames: int = 33,
        change: Callable[[Frames], Frames] = lambda frames: frames,
        fps: int = 16,
    ) -> Path:
        for number, prompt in enumerate(prompts):
            for index in range(samples):
                frames = change(moving_colours(num_frames, seed=10 * number + index))
                write_video(tmp_path / name / f"{prompt}-{index}.mp4", frames, fps)
        return tmp_path / name

    return make


@pytest.fixture
def clips(folder: Folder) -> ClipFolder:
    return find_clips(folder())


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """scripts/evaluate.py with some words."""

    def call(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, words)])
        status: int = evaluate.main()
        return status

    return call


class Tiny(nn.Module):
    """A random network with the interface of the literature's I3D."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv3d(3, 6, 3, stride=2), nn.Conv3d(6, 5, 3)

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False) -> Tensor:
        if resize:
            size = [x.size(2), 16, 16]
            x = F.interpolate(x, size=size, mode="trilinear", align_corners=False)
        if rescale:
            x = x / 127.5 - 1
        features = 20 * self.second(torch.tanh(self.first(x))).mean(dim=[2, 3, 4])
        return features if return_features else features * 0


@pytest.fixture
def tiny() -> nn.Module:
    """A network of videos, with 5 features."""
    return Tiny().eval()


@pytest.fixture
def script(tiny: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It as a TorchScript file."""
    path = tmp_path_factory.mktemp("network") / "i3d_torchscript.pt"
    torch.jit.script(tiny).save(str(path))
    return path
