"""Means over prompts with bootstrap intervals, and the drift of a video's scores over time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.scoring.metric import NOT_MEASURED, NotMeasuredError, Rows

RESAMPLES = 10_000
COVERAGE = 0.95
_AT_A_TIME = 2**22
_WINDOW_SECONDS = 1.0


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts.

    Attributes:
        mean: of the prompts' means, so that every prompt counts the same.
        low, high: bounds of the 95 % percentile bootstrap interval over prompts; None for a single prompt.
        num_prompts, num_values: what it is the mean of.
    """

    mean: float
    low: float | None
    high: float | None
    num_prompts: int
    num_values: int

    def as_record(self) -> dict[str, Any]:
        """For JSON."""
        interval = None if self.low is None else [self.low, self.high]
        return {"mean": self.mean, "interval": interval, "prompts": self.num_prompts, "videos": self.num_values}


def estimate(values: Mapping[str, Sequence[float]]) -> Estimate:
    """Estimate a mean over prompts.

    Prompts are drawn with replacement, all videos of a prompt together, from random numbers of a fixed seed.

    Args:
        values: by prompt, at least one; an entry holds at least one value.
    """
    means = np.array([np.mean(group) for group in values.values()], np.float64)
    count = sum(len(group) for group in values.values())
    if len(means) < 2:
        return Estimate(float(means.mean()), None, None, len(means), count)
    low, high = np.quantile(_resampled(means), [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])
    return Estimate(float(means.mean()), float(low), float(high), len(means), count)


def _resampled(means: NDArray[np.float64]) -> NDArray[np.float64]:
    """Means of resampled prompts, [RESAMPLES]."""
    generator = np.random.default_rng(0)
    rows = max(1, _AT_A_TIME // len(means))
    parts = []
    for begin in range(0, RESAMPLES, rows):
        draws = generator.integers(len(means), size=(min(rows, RESAMPLES - begin), len(means)))
        parts.append(means[draws].mean(axis=1))
    return np.concatenate(parts)


def over_time(
    rows: Rows, seconds: NDArray[np.float64], duration: float, window: float, summarise: Callable[[Rows], float]
) -> dict[str, Any]:
    """The change of a metric within a video: drift, slope and the values of every whole second.

    Args:
        rows: of the whole video, [N, D].
        seconds: when the frame of each row is shown, [N].
        duration: of the video, in seconds.
        window: seconds at both ends that drift compares.
        summarise: see `Metric`.

    Returns:
        `drift`, the value of the first `window` seconds minus that of the last ones; `slope`, per second, of a line
        through the values of whole seconds; both may be `{"not_measured": why}`. `per_second`, those values.
    """
    values = _per_second(rows, seconds, duration, summarise)
    points = [(second + 0.5, value) for second, value in enumerate(values) if value is not None]
    found: dict[str, Any] = {"per_second": values}
    if len(points) < 2:
        found["slope"] = _missing("a slope needs values of two whole seconds")
    else:
        times, heights = np.array(points, np.float64).T
        centred = times - times.mean()
        found["slope"] = float(centred @ (heights - heights.mean()) / (centred @ centred))
    return found | {"drift": _drift(rows, seconds, duration, window, summarise)}


def _per_second(
    rows: Rows, seconds: NDArray[np.float64], duration: float, summarise: Callable[[Rows], float]
) -> list[float | None]:
    """Values of every whole second; None where there are too few rows."""
    count = int(duration / _WINDOW_SECONDS + 1e-6)
    edges = np.searchsorted(seconds, np.arange(count + 1) * _WINDOW_SECONDS - 1e-6)
    return [_value(rows[begin:end], summarise) for begin, end in pairwise(edges)]


def _value(rows: Rows, summarise: Callable[[Rows], float]) -> float | None:
    try:
        return summarise(rows)
    except NotMeasuredError:
        return None


def _drift(
    rows: Rows, seconds: NDArray[np.float64], duration: float, window: float, summarise: Callable[[Rows], float]
) -> Any:
    if duration < 2 * window - 1e-6:
        return _missing(f"the video lasts {duration:.2f} s, less than twice --drift_seconds {window:g}")
    parts = rows[seconds < window - 1e-6], rows[seconds >= duration - window - 1e-6]
    first, last = (_value(part, summarise) for part in parts)
    if first is None or last is None:
        return _missing("too few frames in the first or last seconds")
    return first - last


def _missing(why: str) -> dict[str, str]:
    return {NOT_MEASURED: why}
