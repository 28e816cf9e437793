"""Features of whole videos, kept beside the scores by content, so that no video is encoded twice."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.evaluation.scoring.metric import Clip, Frames, NotMeasuredError
from pipelines.evaluation.scoring.sets.distances import Features
from pipelines.evaluation.scoring.sets.networks import VideoNetwork
from pipelines.media.video import iterate_video
from pipelines.prompts.names import shown
from pipelines.provenance import package_version, summary_of
from wan.utils.errors import InputError
from wan.utils.files import atomic_path

log = logging.getLogger(__name__)

ROUNDING = 1e-6


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video a network sees: the first ones, at a common rate.

    Attributes:
        frames: how many.
        fps: of them.
    """

    frames: int
    fps: float

    def places(self, clip: Clip) -> list[int]:
        """Indices of frames: those that are shown at the times 0, 1 / fps, 2 / fps …"""
        return [int(place * clip.fps / self.fps + ROUNDING) for place in range(self.frames)]

    def check(self, clips: Sequence[Clip]) -> None:
        """Make sure that videos are long enough.

        Raises:
            NotMeasuredError: one is not.
        """
        short = [clip for clip in clips if self.places(clip)[-1] >= clip.num_frames]
        if short:
            raise NotMeasuredError(
                f"{len(short)} videos are shorter than {self.frames} frames at {self.fps:g} per second, such as "
                f"{shown(short[0].path)} with {short[0].num_frames} at {short[0].fps:g}: give fewer --fvd_frames"
            )


class VideoFeatures:
    """Vectors of videos by one network.

    Args:
        network: makes them.
        sampling: of frames.
        folder: keeps them.
    """

    def __init__(self, network: VideoNetwork, sampling: Sampling, folder: Path) -> None:
        self.network, self.sampling = network, sampling
        versions = {name: package_version(name) for name in network.packages} | {"torch": torch.__version__}
        self._folder = folder / summary_of([self.identity(), versions, network.device.type])

    def identity(self) -> dict[str, Any]:
        """Everything beside videos that vectors depend on."""
        sampling = {"frames": self.sampling.frames, "fps": self.sampling.fps}
        return {"network": self.network.name, "weights": self.network.weights, **sampling}

    def fill(self, clips: Sequence[Clip]) -> int:
        """Encode the videos that are not kept yet.

        Returns:
            how many frames were encoded.

        Raises:
            InputError: a video is damaged, or the folder cannot be written.
            NotMeasuredError: numbers that are not finite.
        """
        missing = {clip.sha256: clip for clip in clips if self._kept(clip) is None}
        for clip in missing.values():
            vector = self.network(frames_at(clip, self.sampling.places(clip)))
            if not np.isfinite(vector).all():
                raise NotMeasuredError(f"{self.network.name} gives numbers that are not finite for {shown(clip.name)}")
            with atomic_path(self._path(clip)) as temporary, temporary.open("wb") as file:
                np.save(file, vector)
        return len(missing) * self.sampling.frames

    def of(self, clips: Sequence[Clip]) -> Features:
        """Vectors of videos, [N, D]."""
        self.fill(clips)
        kept = [self._kept(clip) for clip in clips]
        return np.stack([vector for vector in kept if vector is not None])

    def _path(self, clip: Clip) -> Path:
        return self._folder / f"{clip.sha256}.npy"

    def _kept(self, clip: Clip) -> NDArray[np.float64] | None:
        """The vector of a video, if it is kept and whole."""
        path = self._path(clip)
        try:
            vector = np.load(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, EOFError) as error:
            log.warning("%s is damaged (%s): it is made again", path, error)
            return None
        if vector.shape != (self.network.width,) or vector.dtype != np.float64 or not np.isfinite(vector).all():
            log.warning("%s holds no features: it is made again", path)
            return None
        found: NDArray[np.float64] = vector
        return found


def frames_at(clip: Clip, places: Sequence[int]) -> Frames:
    """Some frames of a video, [len(places), H, W, 3]; nothing after the last one is decoded.

    Args:
        places: indices, none before the one that precedes it.

    Raises:
        InputError: the video is damaged, or ends before.
    """
    found: list[NDArray[np.uint8]] = []
    for index, frame in enumerate(iterate_video(clip.path)):
        found += [frame] * places.count(index)
        if len(found) == len(places):
            return np.stack(found)
    raise InputError(f"{shown(clip.path)} ends before frame {places[-1]}, its container says more: make it again")
