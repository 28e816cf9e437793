"""Distances between two sets of features: Fréchet, and the maximum mean discrepancy of a polynomial kernel; float64.

Both take every row of the first set some number of times, which is what a bootstrap asks for.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluation.scoring.statistics import COVERAGE

Features = NDArray[np.float64]
"""Features of videos, [N, D]."""
Counts = NDArray[np.int64]
"""How often each row is taken, [N]."""
DRAWS = 500
MIN_KERNEL_VIDEOS = 10
"""Fewer have no interval that means anything."""
DEGREE = 3


class SetDistance(ABC):
    """A distance between two sets of features.

    Args:
        features: of the set that is judged, [N, D].
        reference: of the other one, [M, D].
    """

    name: str

    def __init__(self, features: Features, reference: Features) -> None:
        if features.shape[1] != reference.shape[1]:
            raise ValueError(f"features have {features.shape[1]} and {reference.shape[1]} columns")
        self.features, self.reference = features.astype(np.float64), reference.astype(np.float64)

    @staticmethod
    @abstractmethod
    def least(width: int) -> int:
        """Fewest rows of either set for features of some width."""

    @abstractmethod
    def value(self, counts: Counts) -> float:
        """The distance with each row of the first set taken so many times."""


class FrechetDistance(SetDistance):
    """Squared Fréchet distance between normal distributions with the means and covariances of the two sets.

    |m₁ - m₂|² + tr(C₁ + C₂ - 2 (C₁C₂)^½), covariances over N - 1. The trace of the root is the sum of the singular
    values of X₁X₂ᵀ, Xᵢ being the centred features over (Nᵢ - 1)^½: no root of a matrix has to be taken.
    """

    name = "fvd"

    def __init__(self, features: Features, reference: Features) -> None:
        super().__init__(features, reference)
        self._mean = self.reference.mean(axis=0)
        centred = (self.reference - self._mean) / np.sqrt(len(self.reference) - 1)
        self._trace = float(np.square(centred).sum())
        # Any matrix with the same product RᵀR does; this one has no more rows than columns.
        self._root: Features = np.linalg.qr(centred, mode="r")  # type: ignore[assignment]  # that of the mode "reduced"

    @staticmethod
    def least(width: int) -> int:
        """See `SetDistance`; fewer rows have covariances without full rank."""
        return width + 1

    def value(self, counts: Counts) -> float:
        """See `SetDistance`."""
        total = int(counts.sum())
        taken, weights = self.features[counts > 0], counts[counts > 0].astype(np.float64)
        mean = weights @ taken / total
        centred = (taken - mean) * np.sqrt(weights / (total - 1))[:, None]
        common = np.linalg.svd(centred @ self._root.T, compute_uv=False).sum()
        apart = np.square(mean - self._mean).sum()
        return float(apart + np.square(centred).sum() + self._trace - 2 * common)


class KernelDistance(SetDistance):
    """Unbiased estimate of the squared maximum mean discrepancy under the kernel (x·y / D + 1)³; may be negative."""

    name = "kvd"

    def __init__(self, features: Features, reference: Features) -> None:
        super().__init__(features, reference)
        within = self._kernel(self.reference, self.reference)
        size = len(self.reference)
        self._within = (within.sum() - np.trace(within)) / (size * (size - 1))
        self._own = self._kernel(self.features, self.features)
        self._cross = self._kernel(self.features, self.reference).mean(axis=1)

    @staticmethod
    def least(width: int) -> int:
        """See `SetDistance`."""
        return MIN_KERNEL_VIDEOS

    def _kernel(self, left: Features, right: Features) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (left @ right.T / left.shape[1] + 1) ** DEGREE
        return found

    def value(self, counts: Counts) -> float:
        """See `SetDistance`; a row that is taken twice makes no pair with itself."""
        weights = counts.astype(np.float64)
        total, squares = weights.sum(), np.square(weights)
        own = (weights @ self._own @ weights - squares @ np.diagonal(self._own)) / (total**2 - squares.sum())
        return float(own + self._within - 2 * (weights @ self._cross) / total)


@dataclass(frozen=True)
class Spread:
    """A distance with its bootstrap.

    Attributes:
        value: the distance.
        draws: of resampled prompts, moved so that their mean is the value, since videos that are drawn twice raise
            distances. None for a single prompt.
    """

    value: float
    draws: NDArray[np.float64] | None

    def as_record(self) -> dict[str, Any]:
        """For JSON: `mean` is the distance, so that it reads as other metrics do."""
        return {"mean": self.value, "interval": None if self.draws is None else interval(self.draws)}


def interval(draws: NDArray[np.float64]) -> list[float]:
    """The 95 % percentile interval of draws."""
    return [float(bound) for bound in np.quantile(draws, [(1 - COVERAGE) / 2, (1 + COVERAGE) / 2])]


def spread(distance: SetDistance, groups: Sequence[str]) -> Spread:
    """A distance and its bootstrap over prompts.

    Prompts of the first set are drawn with replacement, all videos of a prompt together; the reference stays. The
    random numbers depend on the number of prompts alone, so that draws of two sets of the same prompts belong together.

    Args:
        groups: the prompt of every row of the first set.
    """
    names, places = np.unique(np.array(groups), return_inverse=True)
    value = distance.value(np.ones(len(groups), np.int64))
    if len(names) < 2:
        return Spread(value, None)
    generator = np.random.default_rng(0)
    drawn = [
        distance.value(np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))[places])
        for _ in range(DRAWS)
    ]
    draws = np.array(drawn)
    return Spread(value, draws - draws.mean() + value)
