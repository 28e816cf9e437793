"""Triton kernel that rounds to TF32. Imported only where it runs: it needs Triton and a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048
"""Numbers per program of `round_to_tf32`."""


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]  # Triton's own types
    x, count, HALF: tl.constexpr, MASK: tl.constexpr, NUMBERS: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    bits = tl.load(x + place, place < count, other=0)
    # A carry increments the exponent, as rounding should.
    tl.store(x + place, (bits + HALF) & MASK, place < count)


def round_to_tf32(x: Tensor, half: int, mask: int) -> None:
    """Round float32 in place to the nearest TF32 number, ties away from zero; autograd sees no operation.

    Args:
        x: contiguous, possibly after exchanging its last two axes (as solvers return it).
        half, mask: `arl2.ops.tf32.TF32_HALF` and `TF32_MASK`.
    """
    bits = x.detach().view(torch.int32)
    bits = bits if bits.is_contiguous() else bits.mT
    assert bits.is_contiguous()
    kernel: Any = _round_kernel
    with torch.cuda.device_of(x):
        blocks = triton.cdiv(bits.numel(), NUMBERS)
        kernel[(blocks,)](bits, bits.numel(), half, mask, NUMBERS, num_warps=8)
    torch.autograd.graph.increment_version(x)
