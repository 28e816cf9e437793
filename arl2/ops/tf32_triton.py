"""Triton kernels of training. Imported only where they run: they need Triton and a GPU."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 2048
"""Numbers that a program of `round_to_tf32` takes."""


@triton.jit
def _round_kernel(  # type: ignore[no-untyped-def]  # Triton's own types
    x, count, HALF: tl.constexpr, MASK: tl.constexpr, NUMBERS: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * NUMBERS + tl.arange(0, NUMBERS)
    bits = tl.load(x + place, place < count, other=0)
    # A carry runs into the exponent.
    tl.store(x + place, (bits + HALF) & MASK, place < count)


def round_to_tf32(x: Tensor, half: int, mask: int) -> None:
    """Round float32 in place to the nearest that TF32 has; ties away from zero. Gradients pass as if it were not there.

    Args:
        x: contiguous, as it is or with its last two axes exchanged (as solvers return it).
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
