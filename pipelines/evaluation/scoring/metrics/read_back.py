"""Scores that VBench gave in an environment of its own, read back by video."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.scoring.metric import Clip, Direction, Measure, Metric, NotMeasuredError, Spec
from pipelines.evaluation.suites import DIMENSIONS
from pipelines.prompts.names import shown
from wan.utils.errors import InputError
from wan.utils.files import content_hash, read_json

MAX_BYTES = 2**28
PREFIX = "vbench_"
DIVISORS = {"imaging_quality": 100.0}
"""Divisors that VBench applies to its mean, but not to the values of videos."""
NO_RESULTS = "no results of VBench: run it in an environment of its own, and give --vbench_results *_eval_results.json"
CURE = "give a file that VBench wrote, *_eval_results.json"
SPECS = {
    dimension: Spec(
        PREFIX + dimension,
        "--vbench_results",
        Direction.HIGHER,
        "VBench's, not normalised",
        f"VBench's own {dimension}, read back",
        "VBench, in the version that wrote the file",
    )
    for dimension in DIMENSIONS
}


@dataclass(frozen=True)
class VBenchResults:
    """A file of results.

    Attributes:
        fingerprint: hash of the file.
        values: by dimension and by name of the video.
    """

    fingerprint: str
    values: Mapping[str, Mapping[str, float]]


def read_results(path: Path) -> VBenchResults:
    """Read `*_eval_results.json`: per dimension its mean, and a list of videos with their values.

    Raises:
        InputError: no such file, one of another form, an unknown dimension, or two values for one video.
    """
    page = read_json(path, cure=CURE, max_bytes=MAX_BYTES)
    unknown = page.keys() - set(DIMENSIONS)
    if unknown or not page:
        raise InputError(
            f"{shown(path)} holds no dimensions of VBench ({shown(', '.join(sorted(unknown)))[:60]}): {CURE}"
        )
    return VBenchResults(content_hash(path), {name: _values(page[name], name, path) for name in page})


def _values(entry: Any, dimension: str, path: Path) -> dict[str, float]:
    """The values of a dimension by video."""
    videos = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    found: dict[str, float] = {}
    for video in videos if isinstance(videos, list) else [None]:
        where, value = (video.get(key) if isinstance(video, dict) else None for key in ("video_path", "video_results"))
        if not isinstance(where, str) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{shown(path)} holds no values of videos for {dimension}: {CURE}")
        name = Path(where).name
        if name in found:
            raise InputError(f"{shown(path)} has two values of {dimension} for {shown(name)}: give results of one run")
        found[name] = float(value) / DIVISORS.get(dimension, 1.0)
    return found


class ReadBack(Metric):
    """A dimension of VBench, of a file of results."""

    def __init__(self, dimension: str, results: VBenchResults | None) -> None:
        if results is None:
            raise NotMeasuredError(NO_RESULTS)
        if dimension not in results.values:
            raise NotMeasuredError(f"the file of --vbench_results has no {dimension}: run VBench for it")
        self._values, self._fingerprint = results.values[dimension], results.fingerprint

    def origin(self) -> dict[str, Any]:
        """See `Metric`."""
        return {"vbench_results": self._fingerprint}

    def begin(self, clip: Clip) -> Measure:
        """Never called, since the value is known."""
        raise NotImplementedError

    def known(self, clip: Clip) -> float:
        """See `Metric`.

        Raises:
            NotMeasuredError: VBench did not score the video.
        """
        if clip.name not in self._values:
            raise NotMeasuredError("the file of --vbench_results has no video of this name")
        return self._values[clip.name]
