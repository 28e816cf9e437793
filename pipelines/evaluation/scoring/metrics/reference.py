"""Likeness to reference videos of the same names: PSNR and SSIM."""

import math
from typing import Any

import numpy as np
import torch

from pipelines.evaluation.scoring.clips import ClipFolder
from pipelines.evaluation.scoring.metric import Clip, Direction, Frames, Measure, Metric, NotMeasuredError, Rows, Spec
from pipelines.evaluation.scoring.weights import library
from pipelines.media.video import iterate_video

PEAK = 255.0
MAX_DECIBELS = 100.0
"""PSNR of frames that are equal."""
NO_REFERENCE = "no reference: give --reference FOLDER with videos of the same names"


class _Likeness(Metric):
    """A metric that compares each frame with the same one of another video."""

    def __init__(self, reference: ClipFolder | None) -> None:
        if reference is None:
            raise NotMeasuredError(NO_REFERENCE)
        self._reference = reference

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"reference": self._reference.fingerprint}

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`.

        Raises:
            NotMeasuredError: no reference of that name, or one of another size or length.
        """
        other = self._reference.by_name.get(clip.name)
        if other is None:
            raise NotMeasuredError("the reference folder has no video of this name")
        sizes = [f"{one.num_frames} frames of {one.height}×{one.width}" for one in (clip, other)]
        if sizes[0] != sizes[1]:
            raise NotMeasuredError(f"it has {sizes[0]}, its reference {sizes[1]}")
        frames_of_other = iterate_video(other.path)

        def measure(frames: Frames) -> Rows:
            return self.compare(frames, np.stack([next(frames_of_other) for _ in frames]))

        return measure

    def compare(self, frames: Frames, others: Frames) -> Rows:
        """Measure frames against others, both [T, H, W, 3]: rows [T, 1]."""
        raise NotImplementedError


class PSNR(_Likeness):
    """Peak signal-to-noise ratio, of the mean squared error over all frames."""

    SPEC = Spec(
        "psnr",
        "--reference",
        Direction.HIGHER,
        "dB",
        f"peak signal-to-noise ratio to the reference, of the squared error of all frames; {MAX_DECIBELS:g} if equal",
        "10 log10(255² / mean squared error of RGB), as FFmpeg's filter psnr averages",
    )

    def compare(self, frames: Frames, others: Frames) -> Rows:
        """See `_Likeness`; rows are squared errors."""
        errors = [
            np.square(one.astype(np.float32) - other).mean(dtype=np.float64)
            for one, other in zip(frames, others, strict=True)
        ]
        return np.array(errors, np.float64).reshape(-1, 1)

    def summarise(self, rows: Rows) -> float:
        """See `Metric`."""
        error = super().summarise(rows)
        return MAX_DECIBELS if error == 0 else min(MAX_DECIBELS, 10 * math.log10(PEAK**2 / error))


class SSIM(_Likeness):
    """Structural similarity, by torchmetrics."""

    SPEC = Spec(
        "ssim",
        "--reference, torchmetrics",
        Direction.HIGHER,
        "-1 to 1",
        "structural similarity of RGB to the reference, Gaussian window of sigma 1.5, mean over frames",
        "Wang et al. 2004, doi 10.1109/TIP.2003.819861; torchmetrics",
    )

    def __init__(self, reference: ClipFolder | None) -> None:
        super().__init__(reference)
        self._ssim = library("torchmetrics.functional.image", "torchmetrics").structural_similarity_index_measure

    def compare(self, frames: Frames, others: Frames) -> Rows:
        """See `_Likeness`."""
        pair = [torch.from_numpy(one).permute(0, 3, 1, 2).float() for one in (frames, others)]
        found = self._ssim(*pair, data_range=PEAK, reduction="none")
        return found.double().reshape(-1, 1).numpy()
