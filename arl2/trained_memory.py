"""The memory that a model's softmax layers had in training, which travels with its weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from wan.checkpoints.configs import check_settings
from wan.checkpoints.fields import MEMORY
from wan.utils.errors import CheckpointError


@dataclass(frozen=True)
class TrainedMemory:
    """What the softmax layers saw in training.

    Attributes:
        window_frames: latent frames that a query saw, its own block and the sink included; None for all.
        sink_frames: first latent frames, which the window kept.
        num_frames: latent frames of the videos trained on; None if it is not known.
    """

    window_frames: int | None = None
    sink_frames: int = 0
    num_frames: int | None = None

    @classmethod
    def from_plain(cls, settings: Mapping[str, Any], source: str | Path) -> Self:
        """The record as a config.json, a header or a `.pt` holds it.

        Raises:
            CheckpointError: a name is missing or unknown, or a value out of range; the message names `source`.
        """
        memory = cls(**check_settings(settings, MEMORY, f"{source}: trained_memory", needed=MEMORY.keys()))
        if memory.sink_frames and (memory.window_frames is None or memory.sink_frames >= memory.window_frames):
            raise CheckpointError(
                f"{source}: trained_memory has a sink of {memory.sink_frames} frames in a window of "
                f"{memory.window_frames}: a sink must leave room in its window"
            )
        return memory

    def as_plain(self) -> dict[str, int | None]:
        """The record as plain values."""
        return asdict(self)

    def __str__(self) -> str:
        """For messages: "a window of 9 latent frames, 3 of them a sink, on videos of 21"."""
        videos = f", on videos of {self.num_frames} latent frames" if self.num_frames is not None else ""
        return describe_memory(self.window_frames, self.sink_frames) + videos

    def covers(self, window_frames: int | None, sink_frames: int) -> bool:
        """Whether a memory shows the softmax layers no less, and nothing else, than what they saw in training.

        With full memory in training that is full memory, or a window as long as the videos trained on.
        """
        if (window_frames, sink_frames) == (self.window_frames, self.sink_frames):
            return True
        is_long = window_frames is not None and self.num_frames is not None and window_frames >= self.num_frames
        return self.window_frames is None and is_long


def describe_memory(window_frames: int | None, sink_frames: int) -> str:
    """A memory of the softmax layers in words."""
    if window_frames is None:
        return "full memory"
    sink = f", {sink_frames} of them a sink" if sink_frames else ""
    return f"a window of {window_frames} latent frames{sink}"
