"""Networks that make one vector of a whole video: torchvision's R3D-18, or the literature's I3D as TorchScript."""

from abc import ABC, abstractmethod
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.evaluation.scoring.metric import Frames
from pipelines.evaluation.scoring.weights import R3D, WeightFolder, library, load_weights
from pipelines.prompts.names import shown
from wan.utils.errors import InputError
from wan.utils.files import content_hash

PROBE_SIDE = 64
INTERFACE = "forward(videos, rescale, resize, return_features), videos being [B, 3, T, H, W] from 0 to 255"


class VideoNetwork(ABC):
    """A network that makes one vector of a video.

    Attributes:
        name: what it is, in words.
        weights: hash of its file.
        device: where it lies.
        packages: libraries whose versions its vectors depend on.
    """

    name: str
    packages: tuple[str, ...] = ()

    def __init__(self, device: torch.device, weights: str) -> None:
        self.device, self.weights = device, weights

    @property
    @abstractmethod
    def width(self) -> int:
        """Length of a vector."""

    @abstractmethod
    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """The vector of a video of bytes [T, 3, H, W]: floats [D]."""

    @torch.inference_mode()
    def __call__(self, frames: Frames) -> NDArray[np.float64]:
        """The vector of a video, [T, H, W, 3] to [D]. One video at a time: its vector depends on no other video."""
        found: NDArray[np.float64] = (
            self.encode(torch.from_numpy(frames).to(self.device).permute(0, 3, 1, 2)).double().cpu().numpy()
        )
        return found


class R3DNetwork(VideoNetwork):
    """R3D-18 without its last layer: 512 averages, of frames that torchvision's own transforms prepare.

    Args:
        model: a `VideoResNet` of torchvision, whose last layer is taken off.
        transforms: of frames [T, 3, H, W] to the network's input.
    """

    name = "torchvision r3d_18, Kinetics-400"
    packages = ("torchvision",)

    def __init__(self, model: Any, transforms: Any, device: torch.device, weights: str) -> None:
        super().__init__(device, weights)
        self._width = int(model.fc.in_features)
        model.fc = nn.Identity()
        self._model, self._transforms = model.to(device).eval(), transforms

    @property
    def width(self) -> int:
        """See `VideoNetwork`."""
        return self._width

    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """See `VideoNetwork`."""
        found: Tensor = self._model(self._transforms(frames_TCHW)[None])
        return found[0]


class ScriptedI3D(VideoNetwork):
    """An I3D in TorchScript, as the literature's file has it: it resizes and scales by itself.

    Args:
        model: the program.
        name: of its file.
        num_frames: with which it is tried.

    Raises:
        InputError: it does not take videos in the way of that file, or not of so many frames.
    """

    def __init__(self, model: Any, name: str, device: torch.device, weights: str, num_frames: int) -> None:
        super().__init__(device, weights)
        self.name = f"TorchScript {name}"
        self._model = model
        probe = torch.zeros(num_frames, 3, PROBE_SIDE, PROBE_SIDE, dtype=torch.uint8, device=device)
        try:
            with torch.inference_mode():
                found = self.encode(probe)
        except (RuntimeError, TypeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]
            raise InputError(
                f"--fvd_network {shown(name)} does not take {num_frames} frames by {INTERFACE} ({reason[:120]}): give "
                "i3d_torchscript.pt, or another --fvd_frames"
            ) from error
        if found.ndim != 1:
            raise InputError(
                f"--fvd_network {shown(name)} gives {tuple(found.shape)} for a video: give one that gives [D]"
            )
        self._width = len(found)

    @property
    def width(self) -> int:
        """See `VideoNetwork`."""
        return self._width

    def encode(self, frames_TCHW: Tensor) -> Tensor:
        """See `VideoNetwork`."""
        videos = frames_TCHW.transpose(0, 1)[None].float()
        # Without the executor that compiles after some calls: the first video gets the same numbers as the others.
        with torch.jit.optimized_execution(False):
            found: Tensor = self._model(videos, rescale=True, resize=True, return_features=True)
        return found[0]


@lru_cache(maxsize=2)
def _r3d(path: Path, device: torch.device) -> R3DNetwork:
    video = library("torchvision.models.video", "torchvision")
    model = video.r3d_18(weights=None, progress=False)
    load_weights(model, path)
    return R3DNetwork(model, video.R3D_18_Weights.KINETICS400_V1.transforms(), device, content_hash(path))


@lru_cache(maxsize=2)
def _scripted(path: Path, device: torch.device, num_frames: int) -> ScriptedI3D:
    digest = content_hash(path)
    try:
        model = torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError) as error:
        raise InputError(f"--fvd_network {shown(path)} is no TorchScript file: give i3d_torchscript.pt") from error
    return ScriptedI3D(model, path.name, device, digest, num_frames)


def video_network(script: Path | None, weights: WeightFolder, device: torch.device, num_frames: int) -> VideoNetwork:
    """The network that makes vectors of videos; made once.

    Args:
        script: a TorchScript file; None for R3D-18. It is a program: only its user can say that it is to be trusted.
        num_frames: of every video.

    Raises:
        NotMeasuredError: no torchvision, or no weights.
        InputError: the file is no such network.
    """
    if script is not None:
        return _scripted(script, device, num_frames)
    library("torchvision.models.video", "torchvision")
    return _r3d(weights.find(R3D), device)
