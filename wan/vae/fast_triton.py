"""Triton kernel of the fast VAE decoder. Imported only where it runs: it needs Triton."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # values a program works on


@triton.jit(do_not_specialize=["pixels", "width"])  # every size would compile anew
def _add_norm_silu_kernel(  # type: ignore[no-untyped-def]  # Triton's own types
    raw,
    bias,
    residual,
    gamma,
    out,
    total,
    pixels,
    width,
    raw_image,
    raw_row_pair,
    raw_row,
    raw_column_pair,
    raw_column,
    out_image,
    out_pixel,
    SILU: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
    BLOCK_PIXELS: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK_PIXELS + tl.arange(0, BLOCK_PIXELS)
    channel = tl.arange(0, BLOCK_CHANNELS)
    mask = (pixel < pixels)[:, None] & (channel < CHANNELS)[None, :]

    row, column = pixel // width, pixel % width
    offset = (row // 2).to(tl.int64) * raw_row_pair + (row % 2) * raw_row
    offset += (column // 2) * raw_column_pair + (column % 2) * raw_column
    x = tl.load(raw + image * raw_image + offset[:, None] + channel[None, :], mask, other=0.0).to(tl.float32)
    if bias is not None:
        x += tl.load(bias + channel, channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    packed = (image * pixels + pixel)[:, None] * CHANNELS + channel[None, :]
    if residual is not None:
        x += tl.load(residual + packed, mask, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + packed, x.to(total.dtype.element_ty), mask)
    if gamma is not None:
        # Padded channels must not add to the norm: the bias is 0 there, and so is what was loaded.
        norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
        x = x / norm[:, None] * tl.load(gamma + channel, channel < CHANNELS, other=0.0).to(tl.float32)[None, :]
    if SILU:
        x = x * tl.sigmoid(x)
    target = out + image * out_image + pixel.to(tl.int64)[:, None] * out_pixel + channel[None, :]
    tl.store(target, x.to(out.dtype.element_ty), mask)


def add_norm_silu_triton(
    raw: Tensor,
    strides: tuple[int, int, int, int, int],
    bias_C: Tensor | None,
    residual_BHWC: Tensor | None,
    gamma_C: Tensor | None,
    out_BHWC: Tensor,
    total_BHWC: Tensor | None,
    silu: bool,
) -> None:
    """`wan.vae.fast.add_norm_silu` in one pass over memory.

    Args:
        raw: values wherever `strides` put them; channels adjacent.
        strides: of `raw`, in elements: from image to image, between every second row, from an even row to the next,
            and the same for columns.
        bias_C, residual_BHWC, gamma_C, total_BHWC, silu: as there; both tensors contiguous.
        out_BHWC: channels adjacent, and pixels at one distance throughout an image.
    """
    batch, height, width, channels = out_BHWC.shape
    block_channels = triton.next_power_of_2(channels)
    block_pixels = max(1, _TILE // block_channels)
    kernel: Any = _add_norm_silu_kernel
    grid = (triton.cdiv(height * width, block_pixels), batch)
    with torch.cuda.device_of(out_BHWC):
        kernel[grid](
            raw,
            bias_C,
            residual_BHWC,
            gamma_C,
            out_BHWC,
            total_BHWC,
            height * width,
            width,
            *strides,
            out_BHWC.stride(0),
            out_BHWC.stride(2),
            SILU=silu,
            CHANNELS=channels,
            BLOCK_CHANNELS=block_channels,
            BLOCK_PIXELS=block_pixels,
            num_warps=4,
        )
