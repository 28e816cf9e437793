"""Metrics of pixels alone: flickering, frozen frames, dynamic range, sharpness, jumps between blocks."""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.scoring.metric import Clip, Direction, Frames, Measure, Metric, NotMeasuredError, Rows, Spec

LEVELS = 255.0
FROZEN = 0.001
"""Mean absolute difference, as a share of the range of values, below which a frame repeats the one before."""
LUMA = np.array([0.299, 0.587, 0.114], np.float32)
"""Weights of red, green and blue, ITU-R BT.601."""
RANGE_PERCENTILES = (1.0, 99.0)


def differences(frames: Frames) -> Rows:
    """Mean absolute difference between each frame and the one before, in grey levels: [T, H, W, 3] to [T - 1, 1]."""
    rows = [_difference(before, after) for before, after in pairwise(frames)]
    return np.array(rows, np.float64).reshape(-1, 1)


def _difference(before: Frames, after: Frames) -> float:
    return float((np.maximum(before, after) - np.minimum(before, after)).mean(dtype=np.float64))


def luma(frame: Frames) -> NDArray[np.float32]:
    """Brightness of a frame in grey levels: [H, W, 3] to [H, W]."""
    weighted: NDArray[np.float32] = frame.astype(np.float32) @ LUMA
    return weighted


class TemporalFlickering(Metric):
    """One minus the mean absolute difference of consecutive frames, which is between 0 and 1."""

    SPEC = Spec(
        "temporal_flickering",
        "nothing",
        Direction.HIGHER,
        "0 to 1",
        "(255 - mean absolute difference of consecutive frames) / 255; meant for still scenes, motion lowers it too",
        "vbench 0.1.5, vbench/temporal_flickering.py",
    )
    of_pairs = True

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`."""
        return differences

    def summarise(self, rows: Rows) -> float:
        """See `Metric`."""
        return (LEVELS - super().summarise(rows)) / LEVELS


class FrozenShare(Metric):
    """Share of frames that repeat the frame before."""

    SPEC = Spec(
        "frozen_share",
        "nothing",
        Direction.LOWER,
        "0 to 1",
        f"share of frames that differ from the one before by less than {FROZEN} of the range on average",
        "the default threshold, -60 dB, of FFmpeg's filter freezedetect",
    )
    of_pairs = True

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`."""
        return lambda frames: (differences(frames) < FROZEN * LEVELS).astype(np.float64)


class DynamicRange(Metric):
    """Distance between the darkest and the brightest parts of a frame."""

    SPEC = Spec(
        "dynamic_range",
        "nothing",
        Direction.SAME,
        "grey levels, 0 to 255",
        "99th minus 1st percentile of a frame's luma, mean over frames; no benchmark scores it, falls as pictures fade",
        "this project; luma as in ITU-R BT.601",
    )

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`."""
        return lambda frames: np.array([[np.subtract(*_percentiles(frame))] for frame in frames], np.float64)


def _percentiles(frame: Frames) -> tuple[float, float]:
    low, high = np.percentile(luma(frame), RANGE_PERCENTILES)
    return float(high), float(low)


class Sharpness(Metric):
    """Strength of edges: falls with blur, rises with noise."""

    SPEC = Spec(
        "sharpness",
        "nothing",
        Direction.SAME,
        "grey levels",
        "mean absolute Laplacian (four neighbours) of a frame's luma, mean over frames; blur lowers, noise raises it",
        "this project; after the focus measures in Pertuz et al. 2013, doi 10.1016/j.patcog.2012.11.011",
    )

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`.

        Raises:
            NotMeasuredError: frames without inner pixels.
        """
        if min(clip.height, clip.width) < 3:
            raise NotMeasuredError(f"frames of {clip.height}×{clip.width} pixels have no inner pixels")
        return lambda frames: np.array([[_mean_laplacian(luma(frame))] for frame in frames], np.float64)


def _mean_laplacian(picture: NDArray[np.float32]) -> float:
    inner = picture[1:-1, 1:-1]
    around = picture[:-2, 1:-1] + picture[2:, 1:-1] + picture[1:-1, :-2] + picture[1:-1, 2:]
    return float(np.abs(4 * inner - around).mean(dtype=np.float64))


class SeamJumps(Metric):
    """Change of frames where a block ends, beyond their change inside of blocks."""

    SPEC = Spec(
        "seam_jumps",
        "length of blocks: of the manifest, or --blocks",
        Direction.LOWER,
        "grey levels",
        "mean absolute difference of the two frames at borders of blocks, minus that of all other consecutive frames",
        "this project",
    )
    of_pairs = True

    def begin(self, clip: Clip) -> Measure:
        """See `Metric`; rows are the difference, and whether the pair is a border.

        Raises:
            NotMeasuredError: it is not known where blocks end, or the video has one block.
        """
        blocks, frame = clip.blocks, 0
        if blocks is None:
            raise NotMeasuredError("nothing says how long its blocks are: give --blocks FIRST LENGTH")
        if clip.num_frames <= blocks.first:
            raise NotMeasuredError(f"the video has a single block of {blocks.first} frames")

        def measure(frames: Frames) -> Rows:
            nonlocal frame
            found = differences(frames)
            borders = [[blocks.starts_block(frame + 1 + place)] for place in range(len(found))]
            frame += len(found)
            return np.hstack([found, np.array(borders, np.float64).reshape(-1, 1)])

        return measure

    def summarise(self, rows: Rows) -> float:
        """See `Metric`."""
        borders, inside = self._parted(rows)
        return float(borders.mean() - inside.mean())

    def details(self, rows: Rows) -> dict[str, float]:
        """See `Metric`."""
        borders, inside = (float(part.mean()) for part in self._parted(rows))
        return {"at_borders": borders, "inside": inside} | ({"ratio": borders / inside} if inside else {})

    def _parted(self, rows: Rows) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        is_border = rows[:, 1] > 0
        if is_border.all() or not is_border.any():
            raise NotMeasuredError("there are no borders of blocks, or nothing else")
        return rows[is_border, 0], rows[~is_border, 0]
