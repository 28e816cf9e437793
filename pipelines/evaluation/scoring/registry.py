"""All metrics by name: how each is made from what the command line gives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pipelines.evaluation.scoring.clips import ClipFolder
from pipelines.evaluation.scoring.metric import Direction, Metric, NotMeasuredError, Spec
from pipelines.evaluation.scoring.metrics import embeddings, learned, pixels, read_back, reference
from pipelines.evaluation.scoring.weights import WeightFolder
from wan.utils.errors import InputError


@dataclass(frozen=True)
class Resources:
    """Files and devices that metrics are made from.

    Attributes:
        device: for models.
        weights: where weights are looked for.
        reference: videos to compare with; None without.
        vbench: results to read back; None without.
    """

    device: torch.device
    weights: WeightFolder
    reference: ClipFolder | None = None
    vbench: read_back.VBenchResults | None = None


@dataclass(frozen=True)
class Entry:
    """A metric of the registry.

    Attributes:
        spec: its description.
        make: makes it; raises `NotMeasuredError` where something is missing.
        packages: libraries whose versions its values depend on.
    """

    spec: Spec
    make: Callable[[Resources], Metric]
    packages: tuple[str, ...] = ()


def _elsewhere(why: str) -> Callable[[Resources], Metric]:
    """A metric that this project does not compute."""

    def make(resources: Resources) -> Metric:
        raise NotMeasuredError(why)

    return make


def _read_back(dimension: str, given: Resources) -> Metric:
    return read_back.ReadBack(dimension, given.vbench)


MOTION_SMOOTHNESS = Spec(
    "motion_smoothness",
    "VBench",
    Direction.HIGHER,
    "0 to 1",
    "likeness of every other frame to one that a network interpolates from its neighbours",
    "vbench 0.1.5, vbench/motion_smoothness.py",
)
PIXELS = ("temporal_flickering", "frozen_share", "dynamic_range", "sharpness", "seam_jumps")
REFERENCE = ("psnr", "ssim")
LEARNED = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "text_alignment",
)
_CLIP, _VISION = ("open_clip_torch",), ("torchvision",)
ENTRIES = {
    entry.spec.name: entry
    for entry in (
        Entry(pixels.TemporalFlickering.SPEC, lambda _: pixels.TemporalFlickering()),
        Entry(pixels.FrozenShare.SPEC, lambda _: pixels.FrozenShare()),
        Entry(pixels.DynamicRange.SPEC, lambda _: pixels.DynamicRange()),
        Entry(pixels.Sharpness.SPEC, lambda _: pixels.Sharpness()),
        Entry(pixels.SeamJumps.SPEC, lambda _: pixels.SeamJumps()),
        Entry(reference.PSNR.SPEC, lambda given: reference.PSNR(given.reference)),
        Entry(reference.SSIM.SPEC, lambda given: reference.SSIM(given.reference), ("torchmetrics",)),
        Entry(
            embeddings.SubjectConsistency.SPEC,
            lambda given: embeddings.SubjectConsistency.load(given.weights, given.device),
            ("timm",),
        ),
        Entry(
            embeddings.BackgroundConsistency.SPEC,
            lambda given: embeddings.BackgroundConsistency.load(given.weights, given.device),
            _CLIP,
        ),
        Entry(
            MOTION_SMOOTHNESS,
            _elsewhere(
                "its network, AMT, has no maintained package: run VBench, and read vbench_motion_smoothness back"
            ),
        ),
        Entry(
            learned.DynamicDegree.SPEC, lambda given: learned.DynamicDegree.load(given.weights, given.device), _VISION
        ),
        Entry(
            embeddings.AestheticQuality.SPEC,
            lambda given: embeddings.AestheticQuality.load(given.weights, given.device),
            _CLIP,
        ),
        Entry(
            learned.ImagingQuality.SPEC,
            lambda given: learned.ImagingQuality.load(given.weights, given.device),
            ("pyiqa",),
        ),
        Entry(
            embeddings.TextAlignment.SPEC,
            lambda given: embeddings.TextAlignment.load(given.weights, given.device),
            _CLIP,
        ),
    )
}
ENTRIES |= {spec.name: Entry(spec, partial(_read_back, dimension)) for dimension, spec in read_back.SPECS.items()}
VBENCH = tuple(spec.name for spec in read_back.SPECS.values())
OWN = tuple(name for name in ENTRIES if name not in VBENCH)
GROUPS = {"pixels": PIXELS, "reference": REFERENCE, "learned": LEARNED, "vbench": VBENCH, "all": OWN}
"""Names that stand for several metrics."""


def chosen_metrics(names: Sequence[str]) -> list[str]:
    """Resolve names of metrics and groups, each once, in the order given.

    Raises:
        InputError: an unknown name.
    """
    unknown = [name for name in names if name not in ENTRIES and name not in GROUPS]
    if unknown:
        raise InputError(
            f"--metrics {', '.join(unknown)}: no such metric; there are {', '.join(OWN)}, vbench_DIMENSION, groups: "
            f"{', '.join(GROUPS)}"
        )
    return list(dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,))))
