"""The processes of one run of scoring: each measures a share, the first one keeps the file."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed

from pipelines.cli import rank_and_world_size
from wan.utils.ranks import raise_together, require_agreement, waiting_for_others

log = logging.getLogger(__name__)

CPU = torch.device("cpu")
LONGEST = timedelta(days=30)
"""That processes wait for the last one."""


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them sees it.

    Attributes:
        rank: this one's number; 0 leads.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process keeps the file."""
        return self.rank == 0

    @contextmanager
    def step(self) -> Iterator[None]:
        """Work after which all go on, or none. All processes must enter it.

        Raises:
            OtherRankError: another process failed, which says why.
        """
        if self.size == 1:
            yield
            return
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        raise_together(failure, CPU)

    def agree(self, values: Mapping[str, object]) -> None:
        """Make sure that all processes have the same values.

        Raises:
            InputError: they have not.
        """
        require_agreement(values)

    def from_leader(self, thing: Any) -> Any:
        """What the leading process has."""
        if self.size == 1:
            return thing
        found = [thing]
        distributed.broadcast_object_list(found, src=0)
        return found[0]

    def leave(self) -> None:
        """End the work with others. Processes that fail end without it, and torchrun ends the others."""
        if self.size > 1:
            distributed.destroy_process_group()

    def gathered(self, thing: Any) -> list[Any]:
        """What every process has, by rank; only the leading one gets it, the others get nothing."""
        if self.size == 1:
            return [thing]
        found: list[Any] | None = [None] * self.size if self.leads else None
        distributed.gather_object(thing, found, dst=0)
        return found or []


def join_team() -> Team:
    """Meet the other processes that torchrun started.

    Raises:
        InputError: the environment does not say where they meet.
    """
    rank, size = rank_and_world_size()
    if size > 1:
        with waiting_for_others(size):
            distributed.init_process_group("gloo", timeout=LONGEST)
    return Team(rank, size)


@dataclass
class Timing:
    """Seconds that metrics took, and frames of the videos that they took them for."""

    seconds: dict[str, float] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)

    @contextmanager
    def of(self, name: str) -> Iterator[None]:
        """Count what the block takes for a metric. Metrics end with numbers on the CPU: a GPU is done by then."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    def count(self, names: Sequence[str], frames: int) -> None:
        """Count the frames of a video for metrics."""
        for name in names:
            self.frames[name] = self.frames.get(name, 0) + frames


def summed(parts: Sequence[Timing]) -> dict[str, Any]:
    """Frames per second of one process by metric, over all processes that measured."""
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in parts for name in part.seconds):
        frames = sum(part.frames.get(name, 0) for part in parts)
        seconds = sum(part.seconds.get(name, 0.0) for part in parts)
        rate = frames / seconds if frames and seconds else None
        processes = sum(name in part.seconds for part in parts)
        if rate is not None:
            found[name] = {"frames_per_second": rate, "frames": frames, "seconds": seconds, "processes": processes}
    return found
