"""Several processes that generate the same videos together: one leads, the others follow."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from pipelines.cli import rank_and_world_size
from wan.utils.ranks import waiting_for_others
from wan.vae.bands import Band

Block = TypeVar("Block")
Result = TypeVar("Result")
GO, FINISH, STOP = "go", "finish", "stop"
_LEADER = 0


def join_processes(device: torch.device) -> None:
    """Set up the exchange of tensors between the processes that torchrun started, unless it is.

    Args:
        device: this process's.

    Raises:
        InputError: the environment does not say where they meet.
    """
    if not distributed.is_initialized():
        with waiting_for_others(rank_and_world_size()[1]):
            distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")


class Lockstep:
    """Tells the processes of a run what to compute next, so that all enter the same passes.

    Orders travel on the CPU, beside whatever the GPUs exchange: nobody waits for a GPU to hear them. Bands of frames
    travel in a group of their own. In one group, exchanges wait for those that were asked for before: the transformer's
    for the next block would wait for the decoder. All processes ask for exchanges in the same order, since all follow
    the same orders; so exchanges of the two groups, which may be under way at one time, do not wait for one another.

    A process that fails while it computes or decodes a block leaves the others waiting in an exchange, until they find
    it gone: its program must end. So after a failure the leading one gives no more orders, which nobody would hear.

    Args:
        device: this process's. Bands are exchanged once at the start, since the first exchange between GPUs takes long.

    Attributes:
        leads: whether this process is the one that decides and writes.
        rank, size: this process among all of them.
    """

    def __init__(self, device: torch.device) -> None:
        self._orders = distributed.new_group(backend="gloo")
        self._bands = distributed.new_group()
        self.rank, self.size = distributed.get_rank(), distributed.get_world_size()
        self.leads = self.rank == _LEADER
        self._failed = False
        self._gather(torch.zeros(1, device=device))

    def tell(self, order: Any) -> None:
        """Give an order to the others; for the process that leads.

        Raises:
            RuntimeError: what was ordered before failed: nobody would hear.
        """
        if self._failed:
            raise RuntimeError("an order to all processes failed: they cannot go on together")
        distributed.broadcast_object_list([order], src=_LEADER, group=self._orders)

    def hear(self) -> Any:
        """Wait for the next order; for the processes that follow."""
        heard = [None]
        distributed.broadcast_object_list(heard, src=_LEADER, group=self._orders)
        return heard[0]

    def blocks(self, generated: Iterator[Block]) -> Iterator[Block]:
        """The blocks of a video, each computed by all processes; when the leading one takes no more, none does.

        Yields:
            on the leading process all blocks, on the others those that `together` finishes.
        """
        if not self.leads:
            block = None
            while (order := self.hear()) != STOP:
                if order == FINISH:
                    assert block is not None
                    yield block
                elif (block := next(generated, None)) is None:
                    return
            return
        is_over = False
        try:
            while not is_over:
                with self._ordered(GO):
                    block = next(generated, None)
                is_over = block is None
                if block is not None:
                    yield block
        finally:
            if not is_over and not self._failed:
                self.tell(STOP)

    def together(self, finish: Callable[[Block], Result]) -> Callable[[Block], Result]:
        """`finish` for blocks of `blocks`, entered by all processes as soon as the leading one enters it."""
        if not self.leads:
            return finish

        def finish_together(block: Block) -> Result:
            with self._ordered(FINISH):
                return finish(block)

        return finish_together

    @contextmanager
    def _ordered(self, order: str) -> Iterator[None]:
        """Order what all processes do inside. Left by an error, this one is no more where the others wait for it."""
        self.tell(order)
        self._failed = True
        yield
        self._failed = False

    def band(self, latent_rows: int) -> Band:
        """The band of a video's rows that this process decodes.

        There are not more bands than rows of latents; processes beyond those decode the last band, too.
        """
        count = min(self.size, latent_rows)
        return Band(min(self.rank, count - 1), count)

    def gather(self, pixels_BTCHW: Tensor, band: Band, height: int) -> Tensor:
        """Put frames together from the bands of all processes.

        Args:
            pixels_BTCHW: this process's band.
            band: see `band`.
            height: rows of a frame.

        Returns:
            the frames on the leading process; on the others the band, as it was given.
        """
        heights = [rows.end - rows.begin for rows in (Band(i, band.count).rows(height) for i in range(band.count))]
        # Exchanges want tensors of one size: bands differ by a row at most.
        mine_BTHWC = pixels_BTCHW.movedim(2, -1)
        missing = max(heights) - mine_BTHWC.shape[2]
        parts = self._gather(F.pad(mine_BTHWC, (0, 0, 0, 0, 0, missing)).contiguous())
        if parts is None:
            return pixels_BTCHW
        bands = [part[:, :, :rows] for part, rows in zip(parts, heights, strict=False)]
        return torch.cat(bands, dim=2).movedim(-1, 2)

    def _gather(self, mine: Tensor) -> list[Tensor] | None:
        """The tensors of all processes, on the leading one."""
        parts = [torch.empty_like(mine) for _ in range(self.size)] if self.leads else None
        distributed.gather(mine, parts, dst=_LEADER, group=self._bands)
        return parts
