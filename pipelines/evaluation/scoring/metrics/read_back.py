"""Scores that VBench, VBench-Long or FastVideo gave in an environment of its own, read back by video."""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluation.scoring.metric import Clip, Direction, Measure, Metric, NotMeasuredError, Spec
from pipelines.evaluation.scoring.metrics.elsewhere.note_environment import NOTE_SUFFIX
from pipelines.evaluation.suites import DIMENSIONS
from pipelines.prompts.names import shown
from wan.utils.errors import InputError
from wan.utils.files import content_hash, parse_json, read_json

log = logging.getLogger(__name__)

MAX_BYTES = 2**28
DIVISORS = {"imaging_quality": 100.0}
"""Divisors that VBench applies to its mean, but not to the values of videos."""
COUNT = "long_video_cnt"
"""VBench-Long ends a list of videos with their number."""
LOWER = ("common.lpips",)
NOTE = "pipelines/evaluation/scoring/metrics/elsewhere/note_environment.py"


@dataclass(frozen=True)
class Program:
    """A program that scores videos in an environment of its own.

    Attributes:
        name: in words.
        flag: of evaluate.py that takes its results.
        prefix: of its metrics' names here.
        metrics: their names there.
        writes: the file that it writes.
    """

    name: str
    flag: str
    prefix: str
    metrics: tuple[str, ...]
    writes: str

    @property
    def cure(self) -> str:
        """What to do about a file that cannot be read."""
        return f"give a file that {self.name} wrote, {self.writes}"

    @property
    def specs(self) -> dict[str, Spec]:
        """Descriptions by the names there."""
        return {name: self._spec(name) for name in self.metrics}

    def _spec(self, name: str) -> Spec:
        direction = Direction.LOWER if name in LOWER else Direction.HIGHER
        unit, about = f"{self.name}'s, not normalised", f"{self.name}'s own {name}, read back"
        source = f"{self.name}, in the version that wrote the file"
        return Spec(self.prefix + name.replace(".", "_"), self.flag, direction, unit, about, source)


VBENCH = Program("VBench", "--vbench_results", "vbench_", DIMENSIONS, "*_eval_results.json")
VBENCH_LONG = Program("VBench-Long", "--vbench_long_results", "vbench_long_", DIMENSIONS, "*_eval_results.json")
FASTVIDEO = Program(
    "FastVideo",
    "--fastvideo_results",
    "fastvideo_",
    (*(f"vbench.{dimension}" for dimension in DIMENSIONS), "common.lpips", "common.psnr", "common.ssim"),
    "by fastvideo eval run --output",
)
PROGRAMS = (VBENCH, VBENCH_LONG, FASTVIDEO)


@dataclass(frozen=True)
class Results:
    """A file of results.

    Attributes:
        program: that wrote it.
        fingerprint: hash of the file.
        made_with: versions and hashes of weights, of the note beside it; None without a note.
        values: by metric and by name of the video.
    """

    program: Program
    fingerprint: str
    made_with: Mapping[str, Any] | None
    values: Mapping[str, Mapping[str, float]]


def read_results(program: Program, path: Path) -> Results:
    """Read the values of videos that a program wrote, and the note beside them.

    Raises:
        InputError: no such file, one of another form, two values for one video, or a note of another file.
    """
    values = _of_fastvideo(path) if program is FASTVIDEO else _of_vbench(program, path)
    fingerprint = content_hash(path)
    return Results(program, fingerprint, _note(path, fingerprint), values)


def _note(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What the note beside a file says of packages and weights."""
    note = path.with_suffix(NOTE_SUFFIX)
    if not note.is_file():
        log.warning("nothing says with which packages and weights %s was made: run %s on it there", path, NOTE)
        return None
    page = read_json(note)
    if page.get("results") != fingerprint:
        raise InputError(f"{shown(note)} is about another file than {shown(path)}: run {NOTE} again")
    return {key: page.get(key) for key in ("versions", "weights")}


def _of_vbench(program: Program, path: Path) -> dict[str, dict[str, float]]:
    """Values of `*_eval_results.json`: per dimension its mean, and lists of videos; the last one is of whole videos."""
    page = read_json(path, cure=program.cure, max_bytes=MAX_BYTES)
    unknown = page.keys() - set(DIMENSIONS)
    if unknown or not page:
        raise InputError(
            f"{shown(path)} holds no dimensions of VBench ({shown(', '.join(sorted(unknown)))[:60]}): {program.cure}"
        )
    found: dict[str, dict[str, float]] = {}
    for dimension, entry in page.items():
        videos = entry[-1] if isinstance(entry, list) and len(entry) in (2, 3) else None
        for video in videos if isinstance(videos, list) else [None]:
            if isinstance(video, dict) and video.keys() == {COUNT}:
                continue
            where, value = (
                video.get(key) if isinstance(video, dict) else None for key in ("video_path", "video_results")
            )
            _add(found, program, path, dimension, where, value, DIVISORS.get(dimension, 1.0))
    return found


def _of_fastvideo(path: Path) -> dict[str, dict[str, float]]:
    """Values of a list of videos, each with its scores by metric; a metric that skipped a video has null."""
    try:
        page = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read {shown(path)} ({error}): {FASTVIDEO.cure}") from error
    found: dict[str, dict[str, float]] = {}
    others: set[str] = set()
    for video in page if isinstance(page, list) and page else [None]:
        scores = video.get("scores") if isinstance(video, dict) else None
        where = video.get("video") if isinstance(video, dict) else None
        if not isinstance(scores, dict):
            raise InputError(f"{shown(path)} holds no scores of videos: {FASTVIDEO.cure}")
        for name, score in scores.items():
            if name not in FASTVIDEO.metrics:
                others.add(name)
            elif not isinstance(score, dict) or score.get("score") is not None:
                value = score.get("score") if isinstance(score, dict) else None
                _add(found, FASTVIDEO, path, name, where, value)
    if others:
        log.warning("%s has metrics that are not read back: %s", path, ", ".join(sorted(others)))
    return found


def _add(
    found: dict[str, dict[str, float]],
    program: Program,
    path: Path,
    metric: str,
    where: Any,
    value: Any,
    divisor: float = 1.0,
) -> None:
    """Add the value of a video.

    Raises:
        InputError: it is none, or there is one already.
    """
    is_number = isinstance(value, int | float) and math.isfinite(value)
    if not isinstance(where, str) or not is_number:
        raise InputError(f"{shown(path)} holds no values of videos for {metric}: {program.cure}")
    name = Path(where).name
    if name in found.setdefault(metric, {}):
        raise InputError(f"{shown(path)} has two values of {metric} for {shown(name)}: give results of one run")
    found[metric][name] = float(value) / divisor


class ReadBack(Metric):
    """A metric of a file of results.

    Args:
        program: that wrote the file.
        name: of the metric there.
        results: None without a file.
    """

    is_read = True

    def __init__(self, program: Program, name: str, results: Results | None) -> None:
        if results is None:
            raise NotMeasuredError(
                f"no results of {program.name}: run it in an environment of its own (docs/evaluation.md), and give "
                f"{program.flag} FILE"
            )
        if name not in results.values:
            raise NotMeasuredError(f"the file of {program.flag} has no {name}: run {program.name} for it")
        self._values, self._results, self._flag = results.values[name], results, program.flag

    def origin(self) -> dict[str, Any]:
        """See `Metric`."""
        made_with = self._results.made_with or "not noted"
        return {self._flag.removeprefix("--"): self._results.fingerprint, "made_with": made_with}

    def begin(self, clip: Clip) -> Measure:
        """Never called, since the value is known."""
        raise NotImplementedError

    def known(self, clip: Clip) -> float:
        """See `Metric`.

        Raises:
            NotMeasuredError: the program did not score the video.
        """
        if clip.name not in self._values:
            raise NotMeasuredError(f"the file of {self._flag} has no video of this name")
        return self._values[clip.name]
