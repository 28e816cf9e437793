"""Comparison of two runs of scoring: paired differences with intervals, a verdict per metric, and one for all."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.evaluation.scoring.metric import NOT_MEASURED, Direction
from pipelines.evaluation.scoring.sets.distances import DRAWS, interval
from pipelines.evaluation.scoring.statistics import Estimate, estimate
from pipelines.prompts.names import shown
from wan.utils.errors import InputError
from wan.utils.files import read_json
from wan.utils.settings import require_same_settings

log = logging.getLogger(__name__)

BETTER, WORSE, CHANGED, EQUAL = "better", "worse", "changed", "no difference within the interval"
NOT_COMPARED = "not compared"
MIN_PROMPTS = 2
FEW_PROMPTS = 10
"""Bootstrap intervals of fewer prompts are too narrow."""
CURE = "make it again with scripts/evaluate.py"


@dataclass(frozen=True)
class Tolerance:
    """Largest change for the worse that a comparison lets pass.

    Attributes:
        fraction: of the first run's mean, for metrics that are not named.
        absolute: by metric, in the metric's unit.
    """

    fraction: float = 0.0
    absolute: Mapping[str, float] | None = None

    def of(self, name: str, mean: float) -> float:
        """The tolerance of a metric whose mean in the first run is `mean`."""
        return (self.absolute or {}).get(name, self.fraction * abs(mean))


@dataclass(frozen=True)
class Comparison:
    """A metric in two runs.

    Attributes:
        name, unit, direction: of the metric.
        first, second: means of both runs over the videos compared; None where not measured.
        difference: second minus first, paired by video and averaged over prompts.
        tolerance: in the metric's unit.
        verdict: `BETTER`, `WORSE`, `CHANGED`, `EQUAL` or `NOT_COMPARED`.
        fails: whether the second run is worse by more than the tolerance, or lacks what the first one has.
        reason: why the metric is not compared, or which videos are left out.
    """

    name: str
    unit: str
    direction: str
    verdict: str
    fails: bool
    first: float | None = None
    second: float | None = None
    difference: Estimate | None = None
    tolerance: float | None = None
    reason: str | None = None

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        difference = None if self.difference is None else self.difference.as_record()
        return asdict(self) | {"difference": difference}


def compare(
    first: Path, second: Path, tolerance: Tolerance, names: Sequence[str] | None = None, common: bool = False
) -> list[Comparison]:
    """Compare two files of `pipelines.evaluation.scoring.run.score`, metric by metric.

    Videos are paired by prompt and index. The interval of the mean difference is a bootstrap over prompts. A difference
    counts if its interval does not hold zero.

    Args:
        first: the run to compare with.
        second: the run that is judged.
        names: of metrics; by default all of both files.
        common: compare the videos that both have, if one file lacks some.

    Raises:
        InputError: a damaged file, other definitions, other videos, fewer than two prompts, an unknown metric, or
            nothing that both files have.
    """
    pages = [_read(path) for path in (first, second)]
    require_same_settings(pages[0]["settings"], pages[1]["settings"], f"{first} and {second} were made", CURE)
    pairs = _paired(pages, (first, second), common)
    metrics: list[dict[str, Any]] = [page["metrics"] for page in pages]
    known = list(dict.fromkeys([*metrics[0], *metrics[1]]))
    unknown = [name for name in (*(names or ()), *(tolerance.absolute or {})) if name not in known]
    if unknown:
        raise InputError(f"neither file has {', '.join(unknown)}: they have {', '.join(known)}")
    found = [_compare(name, metrics, pairs, tolerance, (first, second)) for name in names or known]
    if all(row.verdict == NOT_COMPARED for row in found):
        raise InputError(f"{first} and {second} have no values of the same metric: {found[0].name} {found[0].reason}")
    return found


def _read(path: Path) -> dict[str, Any]:
    """A file of scores, whose form is checked as far as it is used here."""
    page = read_json(path, cure=CURE)
    for part in ("settings", "videos", "metrics"):
        if not isinstance(page.get(part), dict):
            raise InputError(f"{shown(path)} holds no scores (no {part}): {CURE}")
    for name, video in page["videos"].items():
        if not _is_video(video):
            raise InputError(f"{shown(path)} holds no scores of {shown(name)}: {CURE}")
    for name, metric in page["metrics"].items():
        if not _is_metric(metric):
            raise InputError(f"{shown(path)} does not say what {shown(name)} is: {CURE}")
    return page


def _is_video(entry: Any) -> bool:
    """Check the form of a video's entry in a file of scores."""
    if not isinstance(entry, dict) or not isinstance(entry.get("scores"), dict):
        return False
    is_named = isinstance(entry.get("group"), str) and type(entry.get("index")) is int
    return is_named and all(isinstance(score, dict) for score in entry["scores"].values())


def _is_metric(entry: Any) -> bool:
    """Check the form of a metric's entry in a file of scores."""
    directions = [direction.value for direction in Direction]
    is_described = isinstance(entry, dict) and entry.get("direction") in directions
    return is_described and isinstance(entry.get("identity", {}), dict) and _is_set_or_none(entry)


def _is_set_or_none(entry: Mapping[str, Any]) -> bool:
    """Check the form of a distance of sets, if a metric's entry is one."""
    if "draws" not in entry:
        return True
    draws, value = entry["draws"], entry.get("value")
    numbers = isinstance(draws, list) and len(draws) == DRAWS and all(isinstance(draw, float) for draw in draws)
    counts = isinstance(value, dict) and all(type(value.get(key)) is int for key in ("prompts", "videos"))
    is_value = isinstance(value, dict) and counts and isinstance(value.get("mean"), float)
    return (draws is None or numbers) and is_value and isinstance(entry.get("of_prompts"), str)


Pair = tuple[str, dict[str, Any], dict[str, Any]]


def _paired(pages: Sequence[Mapping[str, Any]], paths: tuple[Path, Path], common: bool) -> list[Pair]:
    """Videos of the same prompt and index: the prompt, and what both files say."""
    sides = [{(video["group"], video["index"]): video for video in page["videos"].values()} for page in pages]
    shared = [key for key in sides[0] if key in sides[1]]
    for mine, other in ((0, 1), (1, 0)):
        lost = sides[mine].keys() - sides[other].keys()
        if lost and not common:
            raise InputError(
                f"{paths[other]} lacks {len(lost)} videos of {paths[mine]}, such as number {min(lost)[1]} of "
                f"'{shown(min(lost)[0])}': sample the same prompts, or give --common to compare what both have"
            )
    if len({group for group, _ in shared}) < MIN_PROMPTS:
        raise InputError(f"{paths[0]} and {paths[1]} share fewer than {MIN_PROMPTS} prompts: give more for intervals")
    if len({group for group, _ in shared}) < FEW_PROMPTS:
        log.warning("fewer than %d prompts: intervals are too narrow, more prompts make them true", FEW_PROMPTS)
    form = ("num_frames", "height", "width", "fps")
    unlike = [key for key in shared if any(sides[0][key].get(fact) != sides[1][key].get(fact) for fact in form)]
    if unlike:
        log.warning(
            "%d of %d videos differ in length, size or rate, such as '%s'", len(unlike), len(shared), unlike[0][0]
        )
    return [(key[0], sides[0][key], sides[1][key]) for key in shared]


def _compare(
    name: str,
    metrics: Sequence[Mapping[str, Any]],
    pairs: Sequence[Pair],
    tolerance: Tolerance,
    paths: tuple[Path, Path],
) -> Comparison:
    abouts = [side.get(name, {NOT_MEASURED: "was not asked for"}) for side in metrics]
    about = abouts[0] if "direction" in abouts[0] else abouts[1]
    unit, direction = str(about.get("unit")), str(about["direction"])
    for side, path in zip(abouts, paths, strict=True):
        if NOT_MEASURED in side:
            reason = f"in {path}: {side[NOT_MEASURED]}"
            return Comparison(name, unit, direction, NOT_COMPARED, NOT_MEASURED not in abouts[0], reason=reason)
    what = f"{name} of {paths[0]} and of {paths[1]} were measured"
    require_same_settings(abouts[0].get("identity", {}), abouts[1].get("identity", {}), what, CURE)
    if all("draws" in side for side in abouts):
        return _compare_sets(name, abouts, tolerance)
    values: list[dict[str, list[float]]] = [{}, {}, {}]
    lost = unmeasured = 0
    for group, *sides in pairs:
        before, after = (side["scores"].get(name, {}).get("value") for side in sides)
        if not isinstance(before, float) or not isinstance(after, float):
            unmeasured += 1
            lost += isinstance(before, float)
            continue
        for store, value in zip(values, (before, after, after - before), strict=True):
            store.setdefault(group, []).append(value)
    if len(values[0]) < MIN_PROMPTS:
        reason = f"both files have values of {len(values[0])} prompts, {MIN_PROMPTS} are needed"
        return Comparison(name, unit, direction, NOT_COMPARED, bool(lost), reason=reason)
    means = [estimate(store) for store in values]
    allowed = tolerance.of(name, means[0].mean)
    verdict = _verdict(means[2], Direction(direction))
    is_worse = verdict in (WORSE, CHANGED) and abs(means[2].mean) > allowed
    missing = f"{unmeasured} of {len(pairs)} videos have no value in one of the files" if unmeasured else None
    return Comparison(
        name, unit, direction, verdict, is_worse or bool(lost), means[0].mean, means[1].mean, means[2], allowed, missing
    )


def _compare_sets(name: str, sides: Sequence[Mapping[str, Any]], tolerance: Tolerance) -> Comparison:
    """Compare two distances of sets to the same reference, whose draws are of the same prompts."""
    unit, direction = str(sides[0].get("unit")), str(sides[0]["direction"])
    before, after = (side["value"]["mean"] for side in sides)
    draws = [side["draws"] for side in sides]
    if None in draws or sides[0]["of_prompts"] != sides[1]["of_prompts"]:
        reason = "a distance of sets is compared for the same prompts alone, at least two"
        return Comparison(name, unit, direction, NOT_COMPARED, True, before, after, reason=reason)
    low, high = interval(np.array(draws[1]) - np.array(draws[0]))
    value = sides[0]["value"]
    difference = Estimate(after - before, low, high, value["prompts"], value["videos"])
    allowed = tolerance.of(name, before)
    verdict = _verdict(difference, Direction(direction))
    is_worse = verdict in (WORSE, CHANGED) and abs(difference.mean) > allowed
    return Comparison(name, unit, direction, verdict, is_worse, before, after, difference, allowed)


def _verdict(difference: Estimate, direction: Direction) -> str:
    """The verdict of a difference with its interval."""
    assert difference.low is not None and difference.high is not None
    if difference.low <= 0 <= difference.high:
        return EQUAL
    if direction is Direction.SAME:
        return CHANGED
    return BETTER if (difference.low > 0) == (direction is Direction.HIGHER) else WORSE
