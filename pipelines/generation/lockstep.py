"""Several processes that generate the same videos together: one leads, the others follow."""

from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

Block = TypeVar("Block")
GO, STOP = "go", "stop"


def join_processes(device: torch.device) -> None:
    """Set up the exchange of tensors between the processes that torchrun started, unless it is.

    Args:
        device: this process's.
    """
    if not distributed.is_initialized():
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


class Lockstep:
    """Tells the processes of a run what to compute next, so that all enter the same passes.

    Orders travel on the CPU, beside whatever the GPUs exchange: nobody waits for a GPU to hear them.

    Attributes:
        leads: whether this process is the one that decides, decodes and writes.
        size: number of processes.
    """

    def __init__(self) -> None:
        self._orders = distributed.new_group(backend="gloo")
        self.leads, self.size = distributed.get_rank() == 0, distributed.get_world_size()

    def tell(self, order: Any) -> None:
        """Give an order to the others; for the process that leads."""
        distributed.broadcast_object_list([order], src=0, group=self._orders)

    def hear(self) -> Any:
        """Wait for the next order; for the processes that follow."""
        heard = [None]
        distributed.broadcast_object_list(heard, src=0, group=self._orders)
        return heard[0]

    def blocks(self, generated: Iterator[Block]) -> Iterator[Block]:
        """The blocks of a video, each computed by all processes; when the leading one takes no more, none does."""
        if not self.leads:
            while self.hear() == GO and (block := next(generated, None)) is not None:
                yield block
            return
        is_over = False
        try:
            while not is_over:
                self.tell(GO)
                block = next(generated, None)
                is_over = block is None
                if block is not None:
                    yield block
        finally:
            if not is_over:
                self.tell(STOP)
