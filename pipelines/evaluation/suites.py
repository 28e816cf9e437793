"""Suites of prompts: what is sampled for a benchmark, how often, and which part of it.

A suite's short prompts name its videos; extended prompts, where there are some, condition the model. Short prompts cost
models that were trained on long ones many points of VBench's semantic score: Self Forcing and Causal Forcing publish
scores of extended prompts (issue 19 of guandeh17/Self-Forcing, issue 18 of thu-ml/Causal-Forcing).
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from pipelines.prompts.schedules import Switch
from wan.utils.errors import InputError

DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "object_class",
    "multiple_objects",
    "human_action",
    "color",
    "spatial_relationship",
    "scene",
    "temporal_style",
    "appearance_style",
    "overall_consistency",
)
"""VBench's sixteen, from `build_full_dimension_list` of vbench 0.1.5."""
SHORT_SECONDS = 5.0
"""VBench scores videos that are shorter, VBench-Long the others."""


@dataclass(frozen=True)
class SuiteEntry:
    """A prompt of a suite.

    Attributes:
        prompt: the short form, which names the videos.
        extended: the form that conditions the model; None where the short form does.
        dimensions: what it tests.
        samples: videos of it, unless a number is asked for.
        prompts: all prompts of the video, this one first, where there are several.
        where: file and line, for messages.
    """

    prompt: str
    extended: str | None = None
    dimensions: tuple[str, ...] = ()
    samples: int = 1
    prompts: tuple[Switch, ...] = ()
    where: str = "the suite"

    @property
    def conditioning(self) -> str:
        """The prompt that the model is given."""
        return self.prompt if self.extended is None else self.extended


@dataclass(frozen=True)
class Suite:
    """Prompts that are sampled together; the short ones differ.

    Attributes:
        name: of the suite; a file's is that of the file.
        entries: in the order of the file.
    """

    name: str
    entries: tuple[SuiteEntry, ...]

    @property
    def dimensions(self) -> tuple[str, ...]:
        """All dimensions, in the order in which they first come."""
        return tuple(dict.fromkeys(name for entry in self.entries for name in entry.dimensions))

    @property
    def num_videos(self) -> int:
        """Videos of all prompts."""
        return sum(entry.samples for entry in self.entries)


def of_dimensions(suite: Suite, names: Sequence[str]) -> Suite:
    """The prompts that test one of some dimensions.

    Raises:
        InputError: the suite does not have one of them.
    """
    unknown = [name for name in names if name not in suite.dimensions]
    if unknown:
        known = ", ".join(suite.dimensions) or "none"
        raise InputError(f"--dimensions {', '.join(unknown)}: {suite.name} has {known}; give some of these")
    return replace(suite, entries=tuple(entry for entry in suite.entries if set(names) & set(entry.dimensions)))


def limited(suite: Suite, limit: int) -> Suite:
    """At most `limit` prompts, spread evenly over the dimensions; those of a lower limit are among them.

    The dimension of which the fewest prompts are chosen so far takes the next one. Within a dimension the order is that
    of a hash, since files list prompts that are alike beside each other. The chosen keep the order of the suite.
    """
    chosen: set[int] = set()
    ordered = sorted(range(len(suite.entries)), key=lambda place: _hash(suite.entries[place].prompt))
    counts = dict.fromkeys(suite.dimensions or ("",), 0)
    while len(chosen) < min(limit, len(suite.entries)):
        name, found = next(
            (name, found)
            for name in sorted(counts, key=lambda name: counts[name])
            if (found := _next_of(name, suite, ordered, chosen)) is not None
        )
        chosen.add(found)
        for other in suite.entries[found].dimensions or (name,):
            counts[other] = counts.get(other, 0) + 1
    return replace(suite, entries=tuple(entry for place, entry in enumerate(suite.entries) if place in chosen))


def _next_of(dimension: str, suite: Suite, ordered: Sequence[int], chosen: set[int]) -> int | None:
    """The first prompt of a dimension that is not chosen; "" stands for prompts without any."""
    for place in ordered:
        if place not in chosen and dimension in (suite.entries[place].dimensions or ("",)):
            return place
    return None


def _hash(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


def with_samples(suite: Suite, samples: int) -> Suite:
    """The suite with the same number of videos for every prompt."""
    return replace(suite, entries=tuple(replace(entry, samples=samples) for entry in suite.entries))
