"""Triton kernels for the norms and rotations of tokens, with gradients. Imported only by `wan.ops.dispatch`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_TILE = 4096  # values a program works on


@triton.jit(do_not_specialize=["rows"])  # every size would compile anew
def _norm_kernel(  # type: ignore[no-untyped-def]  # Triton's own types
    x, weight, gradient, out, rows, scale, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    place = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (place < SIZE)
    offset = row.to(tl.int64) * SIZE + place
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(value * value, axis=1)[:, None] * scale + eps)
    if gradient is None:
        # Rounded between norm and weight, as in the plain form.
        result = (value * inverse).to(out.dtype.element_ty).to(tl.float32)
        if weight is not None:
            result *= tl.load(weight + place, place < SIZE, other=0.0).to(tl.float32)
    else:
        asked = tl.load(gradient + offset, mask, other=0.0).to(tl.float32)
        if weight is not None:
            asked *= tl.load(weight + place, place < SIZE, other=0.0).to(tl.float32)
        along = tl.sum(asked * value, axis=1)[:, None] * (inverse * inverse * scale)
        result = inverse * (asked - value * along)
    tl.store(out + offset, result.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["rows", "tokens"])
def _rotate_kernel(  # type: ignore[no-untyped-def]
    x,
    cos,
    sin,
    out,
    rows,
    tokens,
    heads,
    x_batch,
    x_token,
    x_head,
    sign,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = row < rows
    place = tl.arange(0, SIZE)[None, :]
    token, batch = (row // heads) % tokens, (row // heads) // tokens
    offset = batch.to(tl.int64) * x_batch + token.to(tl.int64) * x_token + (row % heads).to(tl.int64) * x_head + place
    angle = token * (SIZE // 2) + tl.arange(0, SIZE // 2)[None, :]
    cosine = tl.load(cos + angle, mask, other=0.0)
    sine = tl.load(sin + angle, mask, other=0.0) * sign
    value = tl.load(x + offset, mask, other=0.0).to(tl.float32)
    even, odd = tl.split(tl.reshape(value, (ROWS, SIZE // 2, 2)))
    pairs = tl.join(even * cosine - odd * sine, odd * cosine + even * sine)
    out_offset = row.to(tl.int64) * SIZE + place
    tl.store(out + out_offset, tl.reshape(pairs, (ROWS, SIZE)).to(out.dtype.element_ty), mask)


def _norm(x: Tensor, weight: Tensor | None, gradient: Tensor | None, scale: float, eps: float) -> Tensor:
    x, size = x.contiguous(), x.shape[-1]
    out, rows, block = torch.empty_like(x), x.numel() // size, triton.next_power_of_2(size)
    tile = max(1, _TILE // block)
    gradient = None if gradient is None else gradient.contiguous()
    kernel: Any = _norm_kernel
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, tile),)](x, weight, gradient, out, rows, scale, eps, size, block, tile, num_warps=4)
    return out


def _rotate(x_BLHD: Tensor, cos_LP: Tensor, sin_LP: Tensor, sign: float) -> Tensor:
    # Products per head and attention often return heads in another memory order.
    x = x_BLHD if x_BLHD.stride(-1) == 1 else x_BLHD.contiguous()
    _, tokens, heads, size = x.shape
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, tile = x.numel() // size, max(1, _TILE // size)
    angles, sizes = (cos_LP.contiguous(), sin_LP.contiguous()), (rows, tokens, heads, *x.stride()[:3])
    kernel: Any = _rotate_kernel
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(rows, tile),)](x, *angles, out, *sizes, sign, size, tile, num_warps=4)
    return out


class Norm(torch.autograd.Function):
    """Norm x / √(scale·Σx² + eps) over the last axis, times an optional weight that gets no gradient."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor | None, scale: float, eps: float) -> Tensor:
        return _norm(x, weight, None, scale, eps)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context.save_for_backward(*inputs[:2])
        context.numbers = inputs[2:]

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = context.saved_tensors
        return _norm(x, weight, gradient.to(x.dtype), *context.numbers), None, None, None


class Rotation(torch.autograd.Function):
    """Rotation as in `wan.ops.rope.rotate`; the gradient is rotated back."""

    @staticmethod
    def forward(x_BLHD: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor:
        return _rotate(x_BLHD, cos_LP, sin_LP, 1.0)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = context.saved_tensors
        return _rotate(gradient, cos, sin, -1.0), None, None
