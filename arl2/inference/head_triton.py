"""Triton kernels of the inference path for queries and keys; see `arl2.inference.row_triton`."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_SIZES = (32, 64, 128)
"""Supported channels per head of `state_keys` and `read_state`: their products need powers of two."""
STATE_ROWS = 64
"""Tokens per program of `state_keys` and `read_state`: enough to amortize reading the state."""
STATE_WARPS = 4
STATE_REGISTERS = 168
"""Upper bound per thread, so that three programs share a multiprocessor and loads overlap with computation."""


@triton.jit
def _inverse_rms(even, odd, eps, CHANNELS: tl.constexpr):  # type: ignore[no-untyped-def]  # Triton's own types
    return tl.rsqrt(tl.sum(even * even + odd * odd) / CHANNELS + eps)


@triton.jit
def _load_pairs(x, place, mask):  # type: ignore[no-untyped-def]
    # Split only after the load: loading pairs would load them one by one.
    channels = tl.load(x + place, mask, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(channels, (channels.shape[0], channels.shape[1] // 2, 2)))


@triton.jit
def _norm_row(  # type: ignore[no-untyped-def]
    x, weight, out, start, out_start, place, mask, cos, sin, eps, ROTATE: tl.constexpr, CHANNELS: tl.constexpr
):
    even, odd = _load_pairs(x, start + place, mask)
    even_weight, odd_weight = _load_pairs(weight, place, mask)
    inverse = _inverse_rms(even, odd, eps, CHANNELS)
    even *= inverse * even_weight
    odd *= inverse * odd_weight
    if ROTATE:
        even, odd = even * cos - odd * sin, odd * cos + even * sin
    channels = tl.reshape(tl.join(even, odd), place.shape)
    tl.store(out + out_start + place, channels.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["tokens"])  # every size would compile anew
def _norm_heads_kernel(  # type: ignore[no-untyped-def]
    x0,
    x1,
    weight0,
    weight1,
    out0,
    out1,
    measured0,
    measured1,
    inverse0,
    inverse1,
    cos,
    sin,
    tokens,
    x_batch,
    x_token,
    eps,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_PAIRS: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * PAIRS * 2
    token, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    head = tl.arange(0, BLOCK_HEADS)[:, None]
    pair = tl.arange(0, BLOCK_PAIRS)[None, :]
    channel = tl.arange(0, 2 * BLOCK_PAIRS)[None, :]
    mask = (head < HEADS) & (channel < 2 * PAIRS)
    place = head * (2 * PAIRS) + channel
    start = batch * x_batch + token.to(tl.int64) * x_token
    row = batch * tokens + token
    ROTATE: tl.constexpr = cos is not None
    cosine, sine = 1.0, 0.0
    if ROTATE:
        cosine = tl.load(cos + token * PAIRS + pair, pair < PAIRS, other=0.0)
        sine = tl.load(sin + token * PAIRS + pair, pair < PAIRS, other=0.0)
    if x0 is not None:
        _norm_row(x0, weight0, out0, start, row * CHANNELS, place, mask, cosine, sine, eps, ROTATE, CHANNELS)
    if x1 is not None:
        _norm_row(x1, weight1, out1, start, row * CHANNELS, place, mask, cosine, sine, eps, ROTATE, CHANNELS)
    if measured0 is not None:
        even, odd = _load_pairs(measured0, start + place, mask)
        tl.store(inverse0 + row, _inverse_rms(even, odd, eps, CHANNELS))
    if measured1 is not None:
        even, odd = _load_pairs(measured1, start + place, mask)
        tl.store(inverse1 + row, _inverse_rms(even, odd, eps, CHANNELS))


@torch.library.custom_op("arl2::norm_heads", mutates_args=())
def norm_heads(
    normed_BLD: list[Tensor],
    weights_D: list[Tensor],
    measured_BLD: list[Tensor],
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> list[Tensor]:
    """RMS norm and rotation of some projections, and only the norm factor of others.

    Args:
        normed_BLD, weights_D: up to two projections, with the weights of their norms.
        measured_BLD: up to two projections whose factor is wanted. All may be slices of one product's output.
        heads: number of heads.
        cos, sin: see `wan.ops.rope.Rotary`, or None for no rotation.
        eps: epsilon of the norms.

    Returns:
        the normed [B, L, D], contiguous, then 1 / √(mean of squares + eps) of the measured, [B, L] in float32.
    """
    inputs = [*normed_BLD, *measured_BLD]
    if any(x.stride() != inputs[0].stride() or x.stride(-1) != 1 for x in inputs):
        inputs = [x.contiguous() for x in inputs]
    first = inputs[0]
    batch, tokens, channels = first.shape
    normed, measured = inputs[: len(normed_BLD)], inputs[len(normed_BLD) :]
    outputs = _norm_heads_outputs(normed, measured)
    pairs = channels // heads // 2
    kernel: Any = _norm_heads_kernel
    with torch.cuda.device_of(first):
        kernel[(tokens, batch)](
            *_two(normed),
            *_two(weights_D),
            *_two(outputs[: len(normed)]),
            *_two(measured),
            *_two(outputs[len(normed) :]),
            None if cos is None else cos.contiguous(),
            None if sin is None else sin.contiguous(),
            tokens,
            first.stride(0),
            first.stride(1),
            eps,
            HEADS=heads,
            PAIRS=pairs,
            BLOCK_HEADS=triton.next_power_of_2(heads),
            BLOCK_PAIRS=triton.next_power_of_2(pairs),
            num_warps=4,
        )
    return outputs


def _two(tensors: list[Tensor]) -> list[Tensor | None]:
    """Pad a list of up to two tensors with None."""
    assert len(tensors) <= 2
    return [*tensors, *[None] * (2 - len(tensors))]


def _norm_heads_outputs(normed_BLD: list[Tensor], measured_BLD: list[Tensor]) -> list[Tensor]:
    """Output buffers of `norm_heads`."""
    rows = [x.new_empty(x.shape[:2], dtype=torch.float32) for x in measured_BLD]
    return [x.new_empty(x.shape) for x in normed_BLD] + rows


@norm_heads.register_fake
def _(
    normed_BLD: list[Tensor],
    weights_D: list[Tensor],
    measured_BLD: list[Tensor],
    heads: int,
    cos: Tensor | None,
    sin: Tensor | None,
    eps: float,
) -> list[Tensor]:
    return _norm_heads_outputs(normed_BLD, measured_BLD)


@triton.jit(do_not_specialize=["tokens"])
def _state_kernel(  # type: ignore[no-untyped-def]
    x,
    inverse_rms,
    weight,
    maps,
    cos,
    sin,
    state,
    gate,
    mixed,
    out,
    tokens,
    x_batch,
    x_token,
    gate_batch,
    gate_token,
    mixed_batch,
    mixed_token,
    mixed_head,
    eps,
    HEADS: tl.constexpr,
    SIZE: tl.constexpr,
    ROWS: tl.constexpr,
):
    head, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    token = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    inside = token < tokens
    channel, pair = tl.arange(0, SIZE), tl.arange(0, SIZE // 2)
    far = token.to(tl.int64)[:, None]
    rows = tl.load(x + batch * x_batch + far * x_token + head * SIZE + channel[None, :], inside[:, None], other=0.0)
    factor = tl.load(inverse_rms + batch * tokens + token, inside, other=0.0)[:, None]
    weights = tl.load(weight + head * SIZE + channel).to(tl.float32)[None, :]
    normed = (rows.to(tl.float32) * factor * weights).to(rows.dtype)
    # Outputs of the map in two parts, even and odd, so that each pair to rotate lies in one thread.
    even_map = maps + head * SIZE * SIZE + channel[:, None] + 2 * SIZE * pair[None, :]
    even = tl.dot(normed, tl.load(even_map))
    odd = tl.dot(normed, tl.load(even_map + SIZE))
    angle = token[:, None] * (SIZE // 2) + pair[None, :]
    cosine = tl.load(cos + angle, inside[:, None], other=0.0)
    sine = tl.load(sin + angle, inside[:, None], other=0.0)
    even, odd = even * cosine - odd * sine, odd * cosine + even * sine
    inverse = tl.rsqrt(tl.sum(even * even + odd * odd, axis=1) + eps)[:, None]
    even, odd = (even * inverse).to(rows.dtype), (odd * inverse).to(rows.dtype)
    target = out + ((batch * tokens + far) * HEADS + head) * SIZE
    if state is None:
        tl.store(target + channel[None, :], tl.reshape(tl.join(even, odd), (ROWS, SIZE)), inside[:, None])
    else:
        opened = tl.load(gate + batch * gate_batch + token * gate_token + head, inside, other=0.0).to(tl.float32)
        opened = (tl.sigmoid(opened) * SIZE**-0.5)[:, None]
        even_rows = state + (batch * HEADS + head) * SIZE * SIZE + 2 * SIZE * pair[:, None]
        local = mixed + batch * mixed_batch + far * mixed_token + head * mixed_head
        # Half of the values at a time: otherwise the registers of one program exclude all others.
        for half in tl.static_range(2):
            value = (half * (SIZE // 2) + pair)[None, :]
            read = tl.dot(even, tl.load(even_rows + value).to(rows.dtype))
            read = tl.dot(odd, tl.load(even_rows + SIZE + value).to(rows.dtype), read)
            y = tl.load(local + value, inside[:, None], other=0.0).to(tl.float32) + opened * read
            tl.store(target + value, y.to(out.dtype.element_ty), inside[:, None])


def _launch(
    x_BLD: Tensor,
    inverse_rms_BL: Tensor,
    weight_D: Tensor,
    maps_HOI: Tensor,
    cos: Tensor,
    sin: Tensor,
    read: tuple[Tensor, Tensor, Tensor] | None,
    out_BLHD: Tensor,
    eps: float,
) -> None:
    """Write a state's queries or keys into `out_BLHD`, or the sum with the read if `read` is (state, gate, mixed)."""
    x = x_BLD if x_BLD.stride(-1) == 1 else x_BLD.contiguous()
    state, gate, mixed = (None, None, None) if read is None else read
    gate_strides = (0, 0) if gate is None else (gate.stride(0), gate.stride(1))
    mixed_strides = (0, 0, 0) if mixed is None else mixed.stride()[:3]
    batch, tokens, heads, size = out_BLHD.shape
    kernel: Any = _state_kernel
    with torch.cuda.device_of(x):
        kernel[(heads, triton.cdiv(tokens, STATE_ROWS), batch)](
            x,
            inverse_rms_BL,
            weight_D,
            maps_HOI,
            cos.contiguous(),
            sin.contiguous(),
            state,
            gate,
            mixed,
            out_BLHD,
            tokens,
            x.stride(0),
            x.stride(1),
            *gate_strides,
            *mixed_strides,
            eps,
            HEADS=heads,
            SIZE=size,
            ROWS=STATE_ROWS,
            num_warps=STATE_WARPS,
            maxnreg=STATE_REGISTERS,
        )


@torch.library.custom_op("arl2::state_keys", mutates_args=("out_BLHD",))
def state_keys(
    x_BLD: Tensor,
    inverse_rms_BL: Tensor,
    weight_D: Tensor,
    maps_HOI: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out_BLHD: Tensor,
) -> None:
    """Keys or queries of a state: rows normed, mapped per head, rotated and L2-normalised.

    Args:
        x_BLD: a projection; may be a slice of a product's output.
        inverse_rms_BL: norm factor of its rows, from `norm_heads`.
        weight_D: weight of that norm.
        maps_HOI: φ, contiguous; a head has one of `HEAD_SIZES` channels.
        cos, sin: see `wan.ops.rope.Rotary`.
        eps: epsilon of the L2 norm.
        out_BLHD: output buffer; contiguous.
    """
    assert out_BLHD.is_contiguous()
    _launch(x_BLD, inverse_rms_BL, weight_D, maps_HOI, cos, sin, None, out_BLHD, eps)


@torch.library.custom_op("arl2::read_state", mutates_args=())
def read_state(
    mixed_BLHD: Tensor,
    state_BHKV: Tensor,
    gate_BLH: Tensor,
    x_BLD: Tensor,
    inverse_rms_BL: Tensor,
    weight_D: Tensor,
    maps_HOI: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    """Sum mixed + sigmoid(gate)·D^-½·q̂ᵀS, with q̂ as in `state_keys` and S rounded to its dtype.

    Args:
        mixed_BLHD: output of the attention in the block.
        state_BHKV: S, float32.
        gate_BLH: output gate before its sigmoid.

    Returns:
        [B, L, H, D], contiguous.
    """
    out = mixed_BLHD.new_empty(mixed_BLHD.shape)
    mixed = mixed_BLHD if mixed_BLHD.stride(-1) == 1 else mixed_BLHD.contiguous()
    gate = gate_BLH if gate_BLH.stride(-1) == 1 else gate_BLH.contiguous()
    read = (state_BHKV.contiguous(), gate, mixed)
    _launch(x_BLD, inverse_rms_BL, weight_D, maps_HOI, cos, sin, read, out, eps)
    return out


@state_keys.register_fake
def _(
    x_BLD: Tensor,
    inverse_rms_BL: Tensor,
    weight_D: Tensor,
    maps_HOI: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
    out_BLHD: Tensor,
) -> None:
    return None


@read_state.register_fake
def _(
    mixed_BLHD: Tensor,
    state_BHKV: Tensor,
    gate_BLH: Tensor,
    x_BLD: Tensor,
    inverse_rms_BL: Tensor,
    weight_D: Tensor,
    maps_HOI: Tensor,
    cos: Tensor,
    sin: Tensor,
    eps: float,
) -> Tensor:
    return mixed_BLHD.new_empty(mixed_BLHD.shape)
