"""Interface of metrics: rows measured frame by frame, and a value that sums up any run of rows.

A row belongs to a frame, or to a pair of frames that follow each other. A whole video, its first seconds and its last
ones are summed up in the same way, so that every metric has a drift.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
"""Frames of a video in RGB, [T, H, W, 3]."""
Rows = NDArray[np.float64]
"""Measurements, [N, D]: one row per frame or pair."""
Measure = Callable[[Frames], Rows]
"""Measures frames that follow each other. A metric of pairs gets one frame more than it returns rows."""


NOT_MEASURED = "not_measured"
"""Key in JSON of the reason why something has no value."""


class Direction(Enum):
    """Which values of a metric are better.

    `SAME` is for metrics that have no better side: a change either way is a change for the worse.
    """

    HIGHER = "higher"
    LOWER = "lower"
    SAME = "same"


class NotMeasuredError(Exception):
    """A metric has no value here; the text is one line that names the reason and the cure."""


@dataclass(frozen=True)
class Blocks:
    """Lengths of the blocks in which a video was generated, in frames of video.

    Attributes:
        first: frames of the first block.
        length: frames of every later one.
    """

    first: int
    length: int

    def starts_block(self, frame: int) -> bool:
        """Check whether a block other than the first starts with a frame."""
        return frame >= self.first and (frame - self.first) % self.length == 0


@dataclass(frozen=True)
class Clip:
    """A video to score.

    Attributes:
        name: its file's name.
        path: where it is.
        sha256: hash of the file.
        prompt: what it is to show; None where nothing says so.
        group: what bootstrap draws together: the prompt, or what stands for it.
        index: which of the prompt's videos.
        num_frames, height, width, fps: as the container states them.
        blocks: how it was generated; None if that is not known.
    """

    name: str
    path: Path
    sha256: str
    prompt: str | None
    group: str
    index: int
    num_frames: int
    height: int
    width: int
    fps: float
    blocks: Blocks | None = None

    @property
    def seconds(self) -> float:
        """Duration."""
        return self.num_frames / self.fps


@dataclass(frozen=True)
class Spec:
    """Description of a metric.

    Attributes:
        name: of the metric.
        needs: what must be there: nothing, a file, a library.
        direction: which values are better.
        unit: of its values.
        description: what it measures.
        source: where the definition is from.
    """

    name: str
    needs: str
    direction: Direction
    unit: str
    description: str
    source: str


class Metric(ABC):
    """A metric that is ready to measure.

    Attributes:
        of_pairs: whether rows belong to pairs of frames.
        is_read: whether values were measured elsewhere before, so that how long they take here says nothing.
    """

    of_pairs = False
    is_read = False

    def identity(self) -> dict[str, Any]:
        """Everything beside the video that values depend on: settings, hashes of weights."""
        return {}

    def origin(self) -> dict[str, Any]:
        """Files that values are read from; those of two runs that are compared may differ."""
        return {}

    def stride(self, clip: Clip) -> int:
        """Distance between the frames that are measured."""
        return 1

    def known(self, clip: Clip) -> float | None:
        """The value of a video if it is known without its frames, else None.

        Raises:
            NotMeasuredError: it should be known, and is not.
        """
        return None

    @abstractmethod
    def begin(self, clip: Clip) -> Measure:
        """Start a video.

        Raises:
            NotMeasuredError: the metric does not apply to it.
        """

    def summarise(self, rows: Rows) -> float:
        """The value of rows that follow each other.

        Raises:
            NotMeasuredError: there are too few rows.
        """
        if not len(rows):
            raise NotMeasuredError("the video has a single frame" if self.of_pairs else "the video has no frames")
        return float(rows.mean())

    def details(self, rows: Rows) -> dict[str, float]:
        """Further values of a whole video, by name."""
        return {}
