"""Processes of one run that end together: what one of them cannot do, none goes on without."""

import torch
from torch import distributed

from wan.utils.errors import InputError


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
