"""Norm, modulation and gate around the layers of a block: by the timestep, one per frame."""

import torch
from torch import Tensor, nn


def modulate(x_BLD: Tensor, shift_BFD: Tensor, scale_BFD: Tensor) -> Tensor:
    """Modulate tokens to x·(1 + scale) + shift, with one shift and scale per frame."""
    x = x_BLD.unflatten(1, (shift_BFD.shape[1], -1))
    return torch.addcmul(shift_BFD[:, :, None], x, 1 + scale_BFD[:, :, None]).flatten(1, 2)


def plus_gated(x_BLD: Tensor, added_BLD: Tensor, gate_BFD: Tensor) -> Tensor:
    """Gated sum x + added·gate, with one gate per frame."""
    x, added = (each.unflatten(1, (gate_BFD.shape[1], -1)) for each in (x_BLD, added_BLD))
    return torch.addcmul(x, added, gate_BFD[:, :, None]).flatten(1, 2)


def layer_norm(norm: nn.Module, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Apply a layer norm in the dtype of the tokens if the weights have it too, as in inference.

    Under autocast the result, and its modulation, would be float32: twice the memory without more precision.

    Args:
        norm: a layer norm or an identity.
        x: tokens.
        dtype: dtype of the weights around it.
    """
    kind = x.device.type
    if x.dtype is not dtype or not torch.is_autocast_enabled(kind):
        normed: Tensor = norm(x)
        return normed
    with torch.autocast(kind, enabled=False):
        normed = norm(x)
    return normed
