"""VBench's totals from its dimensions: normalised, weighted, and joined.

Source: scripts/constant.py and scripts/cal_final_score.py of github.com/Vchitect/VBench.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Dimension:
    """A dimension of VBench.

    Attributes:
        low, high: values that count as 0 and as 1.
        weight: in the mean of its kind.
    """

    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0

    def normalised(self, value: float) -> float:
        """The value between low and high, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)


QUALITY = {
    "subject_consistency": Dimension(0.1462),
    "background_consistency": Dimension(0.2615),
    "temporal_flickering": Dimension(0.6293),
    "motion_smoothness": Dimension(0.706, 0.9975),
    "aesthetic_quality": Dimension(),
    "imaging_quality": Dimension(),
    "dynamic_degree": Dimension(weight=0.5),
}
SEMANTIC = {
    "object_class": Dimension(),
    "multiple_objects": Dimension(),
    "human_action": Dimension(),
    "color": Dimension(),
    "spatial_relationship": Dimension(),
    "scene": Dimension(high=0.8222),
    "appearance_style": Dimension(0.0009, 0.2855),
    "temporal_style": Dimension(high=0.364),
    "overall_consistency": Dimension(high=0.364),
}
QUALITY_WEIGHT, SEMANTIC_WEIGHT = 4, 1
SHOWN = (
    *("subject_consistency", "background_consistency", "motion_smoothness"),
    *("dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
"""The six dimensions of custom videos, which the paper's tables have."""


def mean_of(kind: Mapping[str, Dimension], values: Mapping[str, float]) -> float | None:
    """Weighted mean of the normalised dimensions of one kind, in %; None if one is missing."""
    if any(name not in values for name in kind):
        return None
    weighted = sum(each.weight * each.normalised(values[name]) for name, each in kind.items())
    return 100 * weighted / sum(each.weight for each in kind.values())


def total_of(values: Mapping[str, float]) -> float | None:
    """VBench's total score, in %; None if a dimension is missing."""
    quality, semantic = mean_of(QUALITY, values), mean_of(SEMANTIC, values)
    if quality is None or semantic is None:
        return None
    return (QUALITY_WEIGHT * quality + SEMANTIC_WEIGHT * semantic) / (QUALITY_WEIGHT + SEMANTIC_WEIGHT)
