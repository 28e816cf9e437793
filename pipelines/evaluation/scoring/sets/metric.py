"""FVD and KVD: distances of the videos that are scored to those of a reference folder."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.scoring.clips import ClipFolder
from pipelines.evaluation.scoring.metric import NOT_MEASURED, Direction, NotMeasuredError, Spec
from pipelines.evaluation.scoring.sets.distances import FrechetDistance, KernelDistance, SetDistance, spread
from pipelines.evaluation.scoring.sets.features import Sampling, VideoFeatures
from pipelines.evaluation.scoring.sets.networks import VideoNetwork

log = logging.getLogger(__name__)

NO_REFERENCE = "no reference: give --reference FOLDER with videos to compare the distribution with"
NO_DRIFT = {NOT_MEASURED: "a distance between sets of videos has no change over time"}
SOURCES = {"fvd": "Unterthiner et al. 2018, arXiv 1812.01717", "kvd": "Bińkowski et al. 2018, arXiv 1801.01401"}
USUAL_VIDEOS = 2048
ASPECT_TOLERANCE = 0.01


@dataclass(frozen=True)
class SetSettings:
    """How sets of videos are compared.

    Attributes:
        network: a TorchScript file; None for torchvision's R3D-18.
        frames: of every video.
        fps: of them; None for the lowest rate of all videos.
        folder: where features are kept.
    """

    network: Path | None = None
    frames: int = 16
    fps: float | None = None
    folder: Path = Path("features")


class SetMetric:
    """A distance between two sets of videos, which is ready to measure.

    Args:
        kind: of distance.
        features: of videos.
        clips: the videos that are judged.
        reference: the others.
    """

    def __init__(
        self, kind: type[SetDistance], features: VideoFeatures, clips: ClipFolder, reference: ClipFolder
    ) -> None:
        self._kind, self._features, self._clips, self._reference = kind, features, clips, reference

    @classmethod
    def make(
        cls,
        kind: type[SetDistance],
        network: VideoNetwork,
        settings: SetSettings,
        clips: ClipFolder,
        reference: ClipFolder,
    ) -> "SetMetric":
        """Check both sets.

        Raises:
            NotMeasuredError: too few videos, or one that is too short.
        """
        least = kind.least(network.width)
        sizes = len(clips.clips), len(reference.clips)
        if min(sizes) < least:
            raise NotMeasuredError(_too_few(kind, sizes, least, network.width))
        both = [*clips.clips, *reference.clips]
        sampling = Sampling(settings.frames, settings.fps or min(clip.fps for clip in both))
        sampling.check(both)
        aspects = [clip.width / clip.height for clip in both]
        if max(aspects) > min(aspects) * (1 + ASPECT_TOLERANCE):
            log.warning("%s: videos differ in shape, and all are resized to that of the network", kind.name)
        return cls(kind, VideoFeatures(network, sampling, settings.folder), clips, reference)

    def identity(self) -> dict[str, Any]:
        """See `Metric`."""
        return self._features.identity() | {"reference": self._reference.fingerprint}

    def origin(self) -> dict[str, Any]:
        """See `Metric`."""
        return {}

    def fill(self, rank: int, world_size: int) -> int:
        """Encode one share of all videos; returns how many frames that were."""
        return self._features.fill([*self._clips.clips, *self._reference.clips][rank::world_size])

    def measure(self) -> dict[str, Any]:
        """The distance with its interval, for the file of scores."""
        clips = self._clips.clips
        groups = [clip.group for clip in clips]
        distance = self._kind(self._features.of(clips), self._features.of(self._reference.clips))
        found = spread(distance, groups)
        value = found.as_record() | {"prompts": len(set(groups)), "videos": len(clips)}
        return {
            "value": value,
            "drift": NO_DRIFT,
            "slope": NO_DRIFT,
            "draws": None if found.draws is None else [float(draw) for draw in found.draws],
            "reference_videos": len(self._reference.clips),
            "of": self._clips.fingerprint,
            "of_prompts": _hash_of_prompts(groups),
        }


def _too_few(kind: type[SetDistance], sizes: tuple[int, int], least: int, width: int) -> str:
    """Why a distance of so few videos is not taken."""
    found = f"{sizes[0]} videos and {sizes[1]} of the reference are too few: "
    if kind is FrechetDistance:
        return (
            f"{found}covariances of {width} features have full rank from {least} videos of each on, and published "
            f"values use {USUAL_VIDEOS:,}; kvd takes fewer"
        )
    return f"{found}{least} of each are needed"


def _hash_of_prompts(groups: list[str]) -> str:
    """Hash of the prompts and of how many videos each has: draws of two sets belong together if it is the same."""
    text = "\n".join(sorted(groups))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _spec(name: str, description: str) -> Spec:
    needs = "--reference, torchvision and r3d_18-b3b3357e.pth, or --fvd_network"
    return Spec(name, needs, Direction.LOWER, "of the network's features", description, SOURCES[name])


SPECS = {
    "fvd": _spec("fvd", "squared Fréchet distance between features of videos and of a reference, taken as normal"),
    "kvd": _spec("kvd", "squared maximum mean discrepancy of features, kernel (x·y / D + 1)³, unbiased"),
}
KINDS: dict[str, type[SetDistance]] = {"fvd": FrechetDistance, "kvd": KernelDistance}
