"""Metrics of networks that look at pixels: imaging quality by MUSIQ, dynamic degree by RAFT."""

from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.evaluation.scoring.metric import Clip, Direction, Frames, Measure, Metric, NotMeasuredError, Rows, Spec
from pipelines.evaluation.scoring.weights import MUSIQ, RAFT, WeightFolder, library, load_weights
from wan.utils.files import content_hash

MAX_BYTE, MAX_SCORE = 255.0, 100.0
MUSIQ_SIDE = 512
"""Longer side above which VBench shrinks a frame."""
FLOW_STEPS = 20
FLOW_FPS = 8
"""VBench measures flow between frames of about this rate."""
FASTEST = 0.05
"""Share of pixels whose flow counts: the fastest ones."""
THRESHOLD, THRESHOLD_SIDE = 6.0, 256.0
"""Pixels of flow that are motion, in frames whose shorter side has so many."""
MOVING, MOVING_FRAMES = 4, 16.0
"""Pairs that must move, of so many frames."""
FLOW_MULTIPLE, MIN_FLOW_SIDE = 8, 128
"""Sides that RAFT's pyramid takes."""


def pixels_of(frames: Frames, device: torch.device) -> Tensor:
    """Frames [T, H, W, 3] as floats from 0 to 255, [T, 3, H, W]."""
    return torch.from_numpy(frames).to(device).permute(0, 3, 1, 2).float()


class ImagingQuality(Metric):
    """Quality of frames by MUSIQ.

    Args:
        model: MUSIQ of pyiqa, which takes pictures in [0, 1].
        device: where it lies.
        weights: hash of its file.
    """

    SPEC = Spec(
        "imaging_quality",
        f"pyiqa, {MUSIQ.file}",
        Direction.HIGHER,
        "0 to 1",
        "score of MUSIQ, trained on SPAQ, divided by 100, mean over frames; longer side at most 512 pixels",
        "vbench 0.1.5, vbench/imaging_quality.py",
    )

    def __init__(self, model: Any, device: torch.device, weights: str) -> None:
        self._model, self._device, self._weights = model.to(device).eval(), device, weights

    @classmethod
    def load(cls, weights: WeightFolder, device: torch.device) -> "ImagingQuality":
        """Load MUSIQ."""
        musiq = library("pyiqa.archs.musiq_arch", "pyiqa")
        path = weights.find(MUSIQ)
        model = musiq.MUSIQ(pretrained=False)
        load_weights(model, path)
        return cls(model, device, content_hash(path))

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"weights": self._weights}

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`."""

        @torch.inference_mode()
        def measure(frames: Frames) -> Rows:
            pixels = self._shrunk(pixels_of(frames, self._device)) / MAX_BYTE
            # One by one: MUSIQ's output for a picture depends on the batch it is in, by rounding.
            scores = [float(self._model(picture[None])) / MAX_SCORE for picture in pixels]
            return np.array(scores, np.float64).reshape(-1, 1)

        return measure

    def _shrunk(self, pixels_TCHW: Tensor) -> Tensor:
        """Frames whose longer side is at most `MUSIQ_SIDE`, 0 to 255."""
        height, width = pixels_TCHW.shape[-2:]
        if max(height, width) <= MUSIQ_SIDE:
            return pixels_TCHW
        scale = MUSIQ_SIDE / max(height, width)
        target = [int(scale * height), int(scale * width)]
        return F.interpolate(pixels_TCHW, target, mode="bilinear", align_corners=False, antialias=False)


class DynamicDegree(Metric):
    """Motion of a video: 1 if enough pairs of frames have fast pixels, else 0.

    Args:
        model: RAFT of torchvision.
        device: where it lies.
        weights: hash of its file.
    """

    SPEC = Spec(
        "dynamic_degree",
        f"torchvision, {RAFT.file}",
        Direction.HIGHER,
        "0 or 1",
        "whether a quarter of the pairs of frames, at about 8 per second, have RAFT flow above a threshold",
        "vbench 0.1.5, vbench/dynamic_degree.py",
    )
    of_pairs = True

    def __init__(self, model: Any, device: torch.device, weights: str) -> None:
        self._model, self._device, self._weights = model.to(device).eval(), device, weights

    @classmethod
    def load(cls, weights: WeightFolder, device: torch.device) -> "DynamicDegree":
        """Load RAFT as its authors trained it on FlyingChairs and FlyingThings3D, which is what VBench uses."""
        flow = library("torchvision.models.optical_flow", "torchvision")
        path = weights.find(RAFT)
        model = flow.raft_large(weights=None, progress=False)
        load_weights(model, path)
        return cls(model, device, content_hash(path))

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"weights": self._weights}

    def stride(self, clip: Clip) -> int:
        """See `Metric`."""
        return max(1, round(clip.fps / FLOW_FPS))

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`; rows are the speed of the fastest pixels, as a multiple of the threshold.

        Raises:
            NotMeasuredError: frames that are too small.
        """
        if min(clip.height, clip.width) <= MIN_FLOW_SIDE - FLOW_MULTIPLE:
            raise NotMeasuredError(f"RAFT takes no frames whose sides are below {MIN_FLOW_SIDE} pixels")
        threshold = THRESHOLD * min(clip.height, clip.width) / THRESHOLD_SIDE

        @torch.inference_mode()
        def measure(frames: Frames) -> Rows:
            pixels = self._padded(pixels_of(frames, self._device)) / MAX_BYTE * 2 - 1
            speeds = [self._speed(before[None], after[None]) for before, after in pairwise(pixels)]
            return np.array(speeds, np.float64).reshape(-1, 1) / threshold

        return measure

    def _padded(self, pixels_TCHW: Tensor) -> Tensor:
        """Frames whose edges are repeated on all sides, as far as RAFT's coarsest level asks."""
        down, right = (-length % FLOW_MULTIPLE for length in pixels_TCHW.shape[-2:])
        return F.pad(pixels_TCHW, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")

    def _speed(self, before: Tensor, after: Tensor) -> float:
        """Mean length of the flow of the fastest pixels, in pixels."""
        flow = self._model(before, after, num_flow_updates=FLOW_STEPS)[-1][0]
        lengths = flow.norm(dim=0).flatten()
        return float(lengths.topk(max(1, int(len(lengths) * FASTEST))).values.mean())

    def summarise(self, rows: Rows) -> float:
        """See `Metric`."""
        super().summarise(rows)
        needed = round(MOVING * (len(rows) + 1) / MOVING_FRAMES)
        return float((rows > 1).sum() >= needed)

    def details(self, rows: Rows) -> dict[str, float]:
        """See `Metric`."""
        return {"speed_over_threshold": float(rows.mean())}
