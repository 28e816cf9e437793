"""Processes of one run that end together: what one of them cannot do, none goes on without."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import distributed

from wan.utils.errors import InputError
from wan.utils.signals import end_at_once_while_waiting

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 30.0
"""That processes may take to come before the others say that they wait."""
MOST_NAMED = 3
MEETING_POINT = ("LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""Variables that torchrun sets beside the number of processes."""


class OtherRankError(InputError):
    """Another process of the run failed; its own message says why."""

    def __init__(self) -> None:
        super().__init__("another process of this run cannot go on, see its message: mend that and start again")


def num_ranks() -> int:
    """Number of processes of the run, of which this is one."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def raise_together(error: BaseException | None, device: torch.device) -> None:
    """Raise an error on every rank if any rank has one. All ranks must call this, which waits for the last of them.

    Args:
        error: this rank's, if it has one.
        device: where the processes exchange tensors.

    Raises:
        BaseException: this rank's error.
        OtherRankError: another rank has one.
    """
    if num_ranks() > 1:
        failed = torch.tensor(float(error is not None), device=device)
        distributed.all_reduce(failed, distributed.ReduceOp.MAX)
        if error is None and failed:
            error = OtherRankError()
    if error is not None:
        raise error


@contextmanager
def waiting_for_others(processes: int) -> Iterator[None]:
    """Say after a while that the other processes do not come, and let signals end this one. For joining a group.

    Args:
        processes: of the run. A single one waits for nobody.

    Raises:
        InputError: the environment does not say where they meet.
    """
    if processes == 1:
        yield
        return
    missing = [name for name in MEETING_POINT if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"this is one of {processes} processes (WORLD_SIZE), but {' and '.join(missing)} is not in the "
            "environment: start with torchrun, which sets all of them"
        )
    text = (
        "still waiting for all %d processes of this run: if one has ended with an error, or was not started, end this "
        "one (Ctrl-C), mend that and start all again"
    )
    timer = threading.Timer(PATIENCE_SECONDS, log.warning, (text, processes))
    timer.daemon = True
    if os.environ.get("LOCAL_RANK", "0") == "0":  # one voice per machine
        timer.start()
    try:
        with end_at_once_while_waiting():
            yield
    finally:
        timer.cancel()


def require_agreement(values: Mapping[str, object]) -> None:
    """Make sure that all processes of a run were started alike. All ranks must call this.

    Args:
        values: what must be the same on all ranks, by name; those of a mapping inside are compared one by one. With
            NCCL the current device must be the rank's.

    Raises:
        InputError: ranks differ. All raise it; the message names entries with the values of two ranks.
    """
    if num_ranks() == 1:
        return
    found: list[dict[str, object]] = [{}] * num_ranks()
    distributed.all_gather_object(found, _flat(values))
    differing = {
        name: f"{name} is {found[0].get(name)} on rank 0 and {other.get(name)} on rank {rank}"
        for rank, other in reversed(list(enumerate(found)))
        for name in found[0] | other
        if found[0].get(name) != other.get(name)
    }
    if differing:
        named = "; ".join(sorted(differing.values())[:MOST_NAMED])
        more = f"; and {len(differing) - MOST_NAMED} more" if len(differing) > MOST_NAMED else ""
        raise InputError(
            f"processes of this run were not started alike: {named}{more}: start the same command with the same code "
            "everywhere, with files and output folders on a disk that all nodes share"
        )


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    """The values of nested mappings by dotted names."""
    flat: dict[str, object] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat
