"""Rotary position embedding over (frame, row, column), for any frame index.

Source: Wan 2.1. The D/2 rotated pairs of a head are adjacent channels. They are divided between the
three axes as D/2 - 2⌊D/6⌋ for frames and ⌊D/6⌋ each for rows and columns. Angles are computed from
the requested positions, so the length of a video is not limited by a table.
"""

import torch
from torch import Tensor

from wan.ops.dispatch import rotation_by_kernel

ROPE_THETA = 10000.0

Rotary = tuple[Tensor, ...]
"""Cosine and sine of the rotation angle of every token and pair, each [L, D/2].

Two further tensors of this kind may follow, for layers that rotate otherwise: see `arl2.hybrid_attention`.
"""


def _axis_angles(positions: Tensor, pairs: int) -> Tensor:
    """Angles of `pairs` rotated pairs at `positions` [N], as [N, pairs] in float64."""
    exponent = torch.arange(pairs, dtype=torch.float64, device=positions.device) / pairs
    return positions.to(torch.float64)[:, None] * ROPE_THETA**-exponent


def rotary_angles(frames: Tensor, height: int, width: int, head_dim: int) -> Rotary:
    """Rotation of the tokens of latent frames, in (frame, row, column) raster order.

    Args:
        frames: absolute index of each latent frame, [F]; need not be consecutive, nor whole.
        height, width: token grid of one frame.
        head_dim: channels of one attention head, even.

    Returns:
        cosine and sine, each [F·height·width, head_dim/2] in float32; the angles are float64.
    """
    spatial = head_dim // 2 // 3
    device = frames.device
    frame = _axis_angles(frames, head_dim // 2 - 2 * spatial)
    row = _axis_angles(torch.arange(height, device=device), spatial)
    column = _axis_angles(torch.arange(width, device=device), spatial)
    grid = (len(frames), height, width, -1)
    angles = torch.cat(
        [
            frame[:, None, None].expand(grid),
            row[None, :, None].expand(grid),
            column[None, None, :].expand(grid),
        ],
        dim=-1,
    ).flatten(0, 2)
    return angles.cos().float(), angles.sin().float()


def rotate(x_BLHD: Tensor, rotary: Rotary) -> Tensor:
    """Rotate adjacent channel pairs of every head; computed in float32 at least, returned in x's dtype.

    Only the first two tensors of `rotary` count.
    """
    cos, sin = rotary[:2]
    by_kernel = rotation_by_kernel(x_BLHD, cos, sin)
    if by_kernel is not None:
        return by_kernel
    cos, sin = cos[:, None, :, None], sin[:, None, :, None]
    pairs = x_BLHD.to(torch.promote_types(x_BLHD.dtype, torch.float32)).unflatten(-1, (-1, 2))
    # (even·cos - odd·sin, odd·cos + even·sin), in a form that stays one kernel when it is compiled.
    rotated = pairs * cos + pairs.flip(-1) * torch.cat([-sin, sin], dim=-1)
    return rotated.flatten(-2).to(x_BLHD.dtype)
