"""All metrics by name: how each is made from what the command line gives."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from pipelines.evaluation.scoring.clips import ClipFolder
from pipelines.evaluation.scoring.metric import Metric, NotMeasuredError, Spec
from pipelines.evaluation.scoring.metrics import embeddings, learned, pixels, read_back, reference, smoothness
from pipelines.evaluation.scoring.metrics.read_back import PROGRAMS, Program, Results
from pipelines.evaluation.scoring.sets.metric import KINDS, NO_REFERENCE, SPECS, SetMetric, SetSettings
from pipelines.evaluation.scoring.sets.networks import video_network
from pipelines.evaluation.scoring.weights import WeightFolder
from wan.utils.errors import InputError


@dataclass(frozen=True)
class Resources:
    """Files and devices that metrics are made from.

    Attributes:
        device: for models.
        weights: where weights are looked for.
        videos: that are scored; metrics of sets need them.
        reference: videos to compare with; None without.
        results: of other programs to read back, by the prefix of their metrics.
        vbench_python: interpreter of an environment that has VBench.
        sets: how sets of videos are compared.
    """

    device: torch.device
    weights: WeightFolder
    videos: ClipFolder | None = None
    reference: ClipFolder | None = None
    results: Mapping[str, Results] = field(default_factory=dict)
    vbench_python: Path = smoothness.DEFAULT_PYTHON
    sets: SetSettings = field(default_factory=SetSettings)


@dataclass(frozen=True)
class Entry:
    """A metric of the registry.

    Attributes:
        spec: its description.
        make: makes it; raises `NotMeasuredError` where something is missing.
        packages: libraries whose versions its values depend on.
    """

    spec: Spec
    make: Callable[[Resources], Metric | SetMetric]
    packages: tuple[str, ...] = ()


def _set_metric(name: str, given: Resources) -> SetMetric:
    """A distance between sets of videos."""
    if given.reference is None or given.videos is None:
        raise NotMeasuredError(NO_REFERENCE)
    network = video_network(given.sets.network, given.weights, given.device, given.sets.frames)
    return SetMetric.make(KINDS[name], network, given.sets, given.videos, given.reference)


def _read_back(program: Program, name: str, given: Resources) -> Metric:
    return read_back.ReadBack(program, name, given.results.get(program.prefix))


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
            smoothness.MotionSmoothness.SPEC,
            lambda given: smoothness.MotionSmoothness.load(given.vbench_python, given.weights, given.device),
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
ENTRIES |= {name: Entry(spec, partial(_set_metric, name), _VISION) for name, spec in SPECS.items()}
ENTRIES |= {
    spec.name: Entry(spec, partial(_read_back, program, name))
    for program in PROGRAMS
    for name, spec in program.specs.items()
}
READ_BACK = {
    program.prefix.removesuffix("_"): tuple(spec.name for spec in program.specs.values()) for program in PROGRAMS
}
SETS = tuple(SPECS)
"""Metrics of the set of all videos: no video has a value of its own."""
OWN = tuple(name for name in ENTRIES if not any(name in names for names in READ_BACK.values()))
GROUPS = {"pixels": PIXELS, "reference": REFERENCE, "learned": LEARNED, "sets": SETS, **READ_BACK, "all": OWN}
"""Names that stand for several metrics."""


def chosen_metrics(names: Sequence[str]) -> list[str]:
    """Resolve names of metrics and groups, each once, in the order given.

    Raises:
        InputError: an unknown name.
    """
    unknown = [name for name in names if name not in ENTRIES and name not in GROUPS]
    if unknown:
        raise InputError(
            f"--metrics {', '.join(unknown)}: no such metric; there are {', '.join(OWN)}, vbench_DIMENSION …, groups: "
            f"{', '.join(GROUPS)}"
        )
    return list(dict.fromkeys(one for name in names for one in GROUPS.get(name, (name,))))
