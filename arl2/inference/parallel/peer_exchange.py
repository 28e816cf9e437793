"""Exchanges between the GPUs of one host by direct stores into each other's memory, which CUDA graphs can record.

A kernel puts every value where the receiver wants it, so nothing is packed before or unpacked after; a barrier on the
GPUs follows. Memory that all ranks can address is PyTorch's symmetric memory. Imported only where it runs.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed
from torch.distributed import _symmetric_memory as symmetric_memory

from arl2.inference.parallel.sequence_parallel import SequenceParallel

ALIGNMENT = 128
"""Parts of an exchange begin at multiples of so many bytes."""
MAX_COLUMNS = 1024
TILE = 4096
"""Values that a program copies: enough bytes in flight to fill the link, few enough for many programs."""


@triton.jit(do_not_specialize=["rows", "rank"])  # every size would compile anew
def _scatter_kernel(  # type: ignore[no-untyped-def]  # Triton's own types
    x,
    buffers,
    offset,
    rows,
    frame_rows,
    rank,
    x_batch,
    x_row,
    x_frame_rows,
    x_rank_rows,
    x_rank_columns,
    out_batch_rows,
    out_frame_rows,
    out_rank_rows,
    out_rank_columns,
    out_columns,
    COLUMNS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    target, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    frame, place = row // frame_rows, row % frame_rows
    source = (frame * x_frame_rows + place + target * x_rank_rows).to(tl.int64)
    from_row = x + batch * x_batch + source[:, None] * x_row + target * x_rank_columns
    out_row = batch * out_batch_rows + frame * out_frame_rows + place + rank * out_rank_rows
    buffer = tl.load(buffers + target).to(tl.pointer_type(x.dtype.element_ty))
    to_row = tl.multiple_of(buffer, 16) + offset + out_row[:, None] * out_columns + rank * out_rank_columns
    for start in tl.static_range(0, COLUMNS, BLOCK_COLUMNS):
        column = start + tl.arange(0, BLOCK_COLUMNS)[None, :]
        mask = (row < rows)[:, None] & (column < COLUMNS)
        tl.store(to_row + column, tl.load(from_row + column, mask, other=0.0), mask)


class _Buffers:
    """Two places of `num_bytes` bytes in every rank's memory that all ranks can write.

    Args:
        num_bytes: of a place.
        device: this rank's GPU.
        group: the ranks; all of them make their buffers together.
    """

    def __init__(self, num_bytes: int, device: torch.device, group: distributed.ProcessGroup) -> None:
        self.own = symmetric_memory.empty(2 * num_bytes, dtype=torch.uint8, device=device)
        self.handle: Any = symmetric_memory.rendezvous(self.own, group)
        self.addresses = torch.tensor(self.handle.buffer_ptrs, dtype=torch.int64, device=device)


class PeerParallel(SequenceParallel):
    """`SequenceParallel` by stores over NVLink or PCIe.

    What an exchange returns is valid until the next but one of the same pass: exchanges use two places in turn. The
    barrier of the exchange between them shows that every rank has left the place behind, since kernels of one stream
    run in order. `begin_pass` has a barrier for the first ones.

    Args:
        num_heads: heads of the model.
        group: ranks that compute a video together, with GPUs of one host that can access each other's memory.
    """

    can_be_recorded = True

    @property
    def symmetric_bytes(self) -> int:  # type: ignore[override]
        """See `SequenceParallel`."""
        return sum(len(buffers.own) for buffers in self._buffers.values())

    def __init__(self, num_heads: int, group: distributed.ProcessGroup) -> None:
        super().__init__(num_heads, group)
        self._ranks = group
        # By size: a recorded pass keeps using the buffers that it was recorded with.
        self._buffers: dict[int, _Buffers] = {}
        self._current: _Buffers | None = None
        self._place_bytes = self._exchanges = 0

    def begin_pass(self, x_BLD: Tensor, head_dim: int) -> None:
        """See `SequenceParallel.begin_pass`."""
        batch, tokens, channels = x_BLD.shape
        values = batch * tokens * channels
        # At the most six tensors of a head's channels (q, k, v and those of the state) and three gates travel together.
        gates = 3 * values // head_dim * torch.float64.itemsize
        self._place_bytes = _aligned(6 * values * x_BLD.element_size() + gates + 9 * ALIGNMENT)
        if self._place_bytes not in self._buffers:
            self._buffers[self._place_bytes] = _Buffers(self._place_bytes, x_BLD.device, self._ranks)
        self._current, self._exchanges = self._buffers[self._place_bytes], 0
        self._current.handle.barrier(channel=0)

    def gather(self, x_BLD: Tensor, num_frames: int) -> Tensor:
        """See `SequenceParallel.gather`."""
        batch, tokens, columns = x_BLD.shape
        (out,) = self._received([((batch, tokens * self.size, columns), x_BLD.dtype)])
        frame_rows = tokens // num_frames
        self._scatter(x_BLD, out, frame_rows, frame_rows, (0, 0), (self.size * frame_rows, frame_rows, 0), columns)
        self._finish()
        return out

    def to_heads(self, parts: Sequence[Tensor], num_frames: int) -> list[Tensor]:
        """See `SequenceParallel.to_heads`."""
        shapes = [((*x.shape[:1], x.shape[1] * self.size, x.shape[2] // self.size, x.shape[3]), x.dtype) for x in parts]
        received = self._received(shapes)
        for x, out in zip(parts, received, strict=True):
            frame_rows, columns = x.shape[1] // num_frames, out.shape[2] * out.shape[3]
            target = (self.size * frame_rows, frame_rows, 0)
            self._scatter(_rows(x), out.flatten(2), frame_rows, frame_rows, (0, columns), target, columns)
        self._finish()
        return received

    def to_tokens(self, x_BLHK: Tensor, num_frames: int) -> Tensor:
        """See `SequenceParallel.to_tokens`."""
        batch, tokens, heads, channels = x_BLHK.shape
        (out,) = self._received([((batch, tokens // self.size, heads * self.size, channels), x_BLHK.dtype)])
        frame_rows, columns = out.shape[1] // num_frames, heads * channels
        target = (frame_rows, 0, columns)
        source = (frame_rows, 0)
        self._scatter(_rows(x_BLHK), out.flatten(2), frame_rows, self.size * frame_rows, source, target, columns)
        self._finish()
        return out

    def _received(self, shapes: Sequence[tuple[tuple[int, ...], torch.dtype]]) -> list[Tensor]:
        """This rank's tensors for what it gets in the next exchange."""
        assert self._current is not None, "call begin_pass first"
        place = self._exchanges % 2 * self._place_bytes
        end, tensors = place + self._place_bytes, []
        for shape, dtype in shapes:
            size = prod(shape) * dtype.itemsize
            if place + size > end:
                raise ValueError(f"an exchange of more than the {self._place_bytes} bytes that were set apart")
            tensors.append(self._current.own[place : place + size].view(dtype).view(shape))
            place = _aligned(place + size)
        return tensors

    def _scatter(
        self,
        x_BLC: Tensor,
        out_BLC: Tensor,
        frame_rows: int,
        source_frame_rows: int,
        source: tuple[int, int],
        target: tuple[int, int, int],
        columns: int,
    ) -> None:
        """Store rows of `x_BLC` in every rank's tensor at the place of `out_BLC`, which is this rank's.

        Args:
            frame_rows: rows of a frame that a rank gets.
            source_frame_rows: rows of a frame in `x_BLC`.
            source: rows and columns of `x_BLC` from one receiving rank's part to the next.
            target: in the receiver's tensor, rows from frame to frame, and rows and columns from sender to sender.
            columns: of a row that a rank gets.
        """
        assert self._current is not None
        batch, rows = len(x_BLC), x_BLC.shape[1] // source_frame_rows * frame_rows
        block_columns = min(triton.next_power_of_2(columns), MAX_COLUMNS)
        block_rows = TILE // block_columns
        kernel: Any = _scatter_kernel
        with torch.cuda.device_of(x_BLC):
            kernel[(triton.cdiv(rows, block_rows), self.size, batch)](
                x_BLC,
                self._current.addresses,
                out_BLC.storage_offset(),
                rows,
                frame_rows,
                self.rank,
                x_BLC.stride(0),
                x_BLC.stride(1),
                source_frame_rows,
                *source,
                out_BLC.shape[1],
                *target,
                out_BLC.shape[2],
                COLUMNS=columns,
                BLOCK_COLUMNS=block_columns,
                BLOCK_ROWS=block_rows,
                num_warps=4,
            )

    def _finish(self) -> None:
        """Wait, on the GPU, until all ranks have stored their parts."""
        assert self._current is not None
        self._current.handle.barrier(channel=0)
        self._exchanges += 1


def _aligned(num_bytes: int) -> int:
    return num_bytes + -num_bytes % ALIGNMENT


def _rows(x_BLHK: Tensor) -> Tensor:
    """View [B, L, H·K] whose rows are contiguous; a copy if there is none."""
    *_, heads, channels = x_BLHK.shape
    if x_BLHK.stride(3) != 1 or (heads > 1 and x_BLHK.stride(2) != channels):
        x_BLHK = x_BLHK.contiguous()
    return x_BLHK.flatten(2)
