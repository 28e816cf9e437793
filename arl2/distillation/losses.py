"""Squared error of attention outputs with few passes over memory."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def mean_squares(x_BLD: Tensor, passes: int) -> Tensor:
    """Mean square over the tokens of each pass in the sequence, [B, passes] in float32 at least."""
    wide = torch.promote_types(x_BLD.dtype, torch.float32)
    # Per token first: a CPU sums in one long chain, and millions of terms would lose half the digits.
    per_token_BL = torch.linalg.vector_norm(x_BLD, dim=2, dtype=wide).square()
    return per_token_BL.unflatten(1, (passes, -1)).mean(2) / x_BLD.shape[2]


def mean_squared_errors(output_BLD: Tensor, target_BLD: Tensor, passes: int) -> Tensor:
    """Mean squared difference over the tokens of each pass, [B, passes]; only the output has a gradient.

    The difference is kept in the dtype of its operands, as is its gradient, so that one rounding is the only loss.
    """
    errors: Tensor = _MeanSquaredErrors.apply(output_BLD, target_BLD, passes)
    return errors


class _MeanSquaredErrors(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, output_BLD: Tensor, target_BLD: Tensor, passes: int) -> Tensor:
        difference = output_BLD - target_BLD
        context.save_for_backward(difference)
        return mean_squares(difference, passes)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient_BP: Tensor) -> tuple[Tensor | None, ...]:
        (difference,) = context.saved_tensors
        parts = difference.unflatten(1, (gradient_BP.shape[1], -1))
        scale_BP11 = (2 / parts[0, 0].numel() * gradient_BP)[..., None, None]
        out = torch.empty_like(parts)
        torch.mul(parts, scale_BP11, out=out)  # into a buffer: the product is rounded once
        return out.flatten(1, 2), None, None
