"""Triton kernels of the inference path for whole rows of channels, each in one pass over memory.

Each is a torch operator, `arl2::…`, so that compiled functions and recordings contain it without graph breaks. All
compute in float32 and round their results once. They equal the plain functions in `arl2.inference.fused_ops` within
rounding. Imported only where they run: they need Triton.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from arl2.inference.linear import FP8, SMALLEST_SCALE

NORM_ROWS = 2
"""Rows per program of `norm`: they share the modulation, which is as large as a row."""
NORM_WARPS = 4
WIDE_ROW = 2048
"""Channels from which a row uses twice the threads."""

_LARGEST = tl.constexpr(torch.finfo(FP8).max)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
# Of tanh-GELU, x·sigmoid(2·√(2/π)·(x + 0.044715·x³)), times -log2(e) for a power of two.
_GELU_LINEAR = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634)
_GELU_CUBIC = tl.constexpr(-2 * 0.7978845608028654 * 1.4426950408889634 * 0.044715)


@triton.jit
def _scale_of(largest):  # type: ignore[no-untyped-def]  # Triton's own types, here and below
    return tl.maximum(largest / _LARGEST, _SMALLEST_SCALE)


@triton.jit
def _e4m3(x, scale):  # type: ignore[no-untyped-def]
    # NaN is kept: the default clamp would turn it into the largest value.
    scaled = tl.clamp(x * (1.0 / scale), -_LARGEST, _LARGEST, propagate_nan=tl.PropagateNan.ALL)
    return scaled.to(tl.float8e4nv)


@triton.jit
def _modulation(modulation, time, frame, channel, inside, PLACE: tl.constexpr, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]
    of_block = tl.load(modulation + PLACE * CHANNELS + channel, inside, other=0.0).to(tl.float32)
    of_time = tl.load(time + (frame * 6 + PLACE) * CHANNELS + channel, inside, other=0.0).to(tl.float32)
    return (of_block + of_time)[None, :]


@triton.jit(do_not_specialize=["frame_tokens"])  # every size would compile anew
def _norm_kernel(  # type: ignore[no-untyped-def]
    x,
    added,
    gates,
    modulation,
    time,
    weight,
    bias,
    total,
    out,
    scales,
    frame_tokens,
    eps,
    GATE: tl.constexpr,
    SHIFT: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    frame = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    mask = (token < frame_tokens)[:, None] & inside[None, :]
    row = frame * frame_tokens + token
    # At most eight per thread, also for stored bytes: more would need a shuffle between threads.
    place = tl.max_contiguous(row[:, None] * CHANNELS + channel[None, :], [1, 8])
    y = tl.load(x + place, mask, other=0.0).to(tl.float32)
    if added is not None:
        more = tl.load(added + place, mask, other=0.0).to(tl.float32)
        if gates is not None:
            more *= _modulation(gates, time, frame, channel, inside, GATE, CHANNELS)
        y += more
        tl.store(total + place, y.to(total.dtype.element_ty), mask)
    # Loaded before the sums over the row, which synchronize all threads.
    if modulation is not None:
        shift = _modulation(modulation, time, frame, channel, inside, SHIFT, CHANNELS)
        scale = 1.0 + _modulation(modulation, time, frame, channel, inside, SHIFT + 1, CHANNELS)
    else:
        shift = tl.load(bias + channel, inside, other=0.0).to(tl.float32)[None, :]
        scale = tl.load(weight + channel, inside, other=0.0).to(tl.float32)[None, :]
    y = tl.where(mask, y - (tl.sum(y, axis=1) / CHANNELS)[:, None], 0.0)
    y = y * tl.rsqrt(tl.sum(y * y, axis=1) / CHANNELS + eps)[:, None] * scale + shift
    if scales is not None:
        row_scale = _scale_of(tl.max(tl.abs(y), axis=1))
        tl.store(scales + row, row_scale, token < frame_tokens)
        tl.store(out + place, _e4m3(y, row_scale[:, None]), mask)
    else:
        tl.store(out + place, y.to(out.dtype.element_ty), mask)


@torch.library.custom_op("arl2::norm", mutates_args=())
def norm(
    x_BLD: Tensor,
    added_BLD: Tensor | None,
    gates: Tensor | None,
    gate_place: int,
    modulation: Tensor | None,
    shift_place: int,
    time_BF6D: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    fp8: bool,
) -> list[Tensor]:
    """Sum of two tensors and its layer norm, modulated by each frame's timestep or with weight and bias.

    Args:
        x_BLD, added_BLD: summands; the second may be None.
        gates: modulation of a block, six rows of D. Row `gate_place` of it plus that of `time_BF6D` multiplies
            `added_BLD`. None for no gate.
        modulation: likewise for the norm: shift in row `shift_place`, scale in the next. None for weight and bias.
        time_BF6D: modulation by the timestep of every frame; F divides L.
        weight_D, bias_D: parameters of the norm without modulation.
        eps: epsilon of the norm.
        fp8: whether to return the norm as `arl2.inference.linear.quantized` does.

    Returns:
        the sum, if there is one, and the norm [B, L, D]; with `fp8` its values [B, L, D] and scales [B, L, 1].
    """
    x, time = x_BLD.contiguous(), time_BF6D.contiguous()
    added = None if added_BLD is None else added_BLD.contiguous()
    (batch, tokens, channels), frames = x.shape, time.shape[1]
    outputs = _norm_outputs(x, added, fp8)
    total = None if added is None else outputs[0]
    out, scales = outputs[-2:] if fp8 else (outputs[-1], None)
    block = triton.next_power_of_2(channels)
    rows = NORM_ROWS if block <= WIDE_ROW else 1
    kernel: Any = _norm_kernel
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(tokens // frames, rows), batch * frames)](
            x,
            added,
            gates,
            modulation,
            time,
            weight_D,
            bias_D,
            total,
            out,
            scales,
            tokens // frames,
            eps,
            GATE=gate_place,
            SHIFT=shift_place,
            CHANNELS=channels,
            BLOCK=block,
            ROWS=rows,
            num_warps=NORM_WARPS if block <= WIDE_ROW else 2 * NORM_WARPS,
        )
    return outputs


def _norm_outputs(x_BLD: Tensor, added_BLD: Tensor | None, fp8: bool) -> list[Tensor]:
    """Output buffers of `norm`."""
    totals = [] if added_BLD is None else [x_BLD.new_empty(x_BLD.shape)]
    return totals + (_rows_outputs(x_BLD) if fp8 else [x_BLD.new_empty(x_BLD.shape)])


def _rows_outputs(x: Tensor) -> list[Tensor]:
    """Buffers for the values and scales of rows in e4m3."""
    return [x.new_empty(x.shape, dtype=FP8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)]


@norm.register_fake
def _(
    x_BLD: Tensor,
    added_BLD: Tensor | None,
    gates: Tensor | None,
    gate_place: int,
    modulation: Tensor | None,
    shift_place: int,
    time_BF6D: Tensor,
    weight_D: Tensor | None,
    bias_D: Tensor | None,
    eps: float,
    fp8: bool,
) -> list[Tensor]:
    return _norm_outputs(x_BLD, added_BLD, fp8)


@triton.jit
def _piece(x, place, mask, GELU: tl.constexpr):  # type: ignore[no-untyped-def]
    y = tl.load(x + place, mask, other=0.0).to(tl.float32)
    if GELU:
        y = y / (1.0 + tl.exp2(y * (_GELU_LINEAR + _GELU_CUBIC * y * y)))
    return y


@triton.jit
def _quantize_kernel(  # type: ignore[no-untyped-def]
    x, out, scales, stride, GELU: tl.constexpr, CHANNELS: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    # In two pieces: a power of two that holds all 8960 channels would be half empty.
    channel = tl.arange(0, MAIN)
    y = _piece(x, row * stride + channel, channel < CHANNELS, GELU)
    largest = tl.max(tl.abs(y), axis=0)
    if REST > 0:
        more = MAIN + tl.arange(0, REST)
        z = _piece(x, row * stride + more, more < CHANNELS, GELU)
        largest = tl.maximum(largest, tl.max(tl.abs(z), axis=0))
    scale = _scale_of(largest)
    tl.store(scales + row, scale)
    tl.store(out + row * CHANNELS + channel, _e4m3(y, scale), channel < CHANNELS)
    if REST > 0:
        tl.store(out + row * CHANNELS + more, _e4m3(z, scale), more < CHANNELS)


@torch.library.custom_op("arl2::quantize", mutates_args=())
def quantize(x: Tensor, gelu: bool) -> list[Tensor]:
    """Compute `arl2.inference.linear.quantized` of x, or of its tanh-GELU, in one pass over memory.

    Args:
        x: rows of channels, [..., K].

    Returns:
        values [..., K] in e4m3 and scales [..., 1] in float32.
    """
    rows = x.flatten(0, -2)
    rows = rows if rows.stride(-1) == 1 else rows.contiguous()
    channels = rows.shape[-1]
    main = triton.next_power_of_2(channels + 1) // 2
    rest = channels - main
    outputs = _rows_outputs(x)
    kernel: Any = _quantize_kernel
    with torch.cuda.device_of(x):
        kernel[(len(rows),)](
            rows,
            *outputs,
            rows.stride(0),
            GELU=gelu,
            CHANNELS=channels,
            MAIN=main,
            REST=triton.next_power_of_2(rest) if rest else 0,
            num_warps=4 if channels <= WIDE_ROW else 8,
        )
    return outputs


@quantize.register_fake
def _(x: Tensor, gelu: bool) -> list[Tensor]:
    return _rows_outputs(x)


@torch.library.custom_op("arl2::linear_gelu", mutates_args=())
def linear_gelu(x: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    """Linear layer followed by tanh-approximated GELU, which cuBLASLt fuses with the product.

    It is an operator because the compiler would decompose `_addmm_activation`.

    Args:
        x: [..., K].

    Returns:
        [..., N].
    """
    if not x.is_cuda:  # there `_addmm_activation` is exact GELU
        return F.gelu(F.linear(x, weight_NK, bias_N), approximate="tanh")
    y = torch._addmm_activation(bias_N, x.flatten(0, -2), weight_NK.T, use_gelu=True)
    return y.unflatten(0, x.shape[:-1])


@linear_gelu.register_fake
def _(x: Tensor, weight_NK: Tensor, bias_N: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], len(weight_NK)))
