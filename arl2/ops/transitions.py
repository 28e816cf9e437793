"""Transitions of a gated delta state by segments of tokens, as matrices, and their products.

See `arl2.ops.gated_delta`.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arl2.ops.tf32 import rounded


class UnitLowerInverse(torch.autograd.Function):
    """Inverse (I + A)⁻¹ for strictly lower triangular A [..., C, C]; entries on and above the diagonal are not read.

    The gradient is that of an inverse, -XᵀGXᵀ. It takes two products; a triangular solve would need another solve.
    """

    @staticmethod
    def forward(lower: Tensor) -> Tensor:
        one = torch.eye(lower.shape[-1], dtype=lower.dtype, device=lower.device).expand_as(lower)
        return rounded(torch.linalg.solve_triangular(lower, one, upper=False, unitriangular=True))

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        context.save_for_backward(output)

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:
        (inverse,) = context.saved_tensors
        return -(inverse.mT @ gradient @ inverse.mT).tril(-1)


class Transitions(NamedTuple):
    """Transitions S ← M·S + N of a state by consecutive segments of tokens. The norm of each M is at most 1.

    Attributes:
        factor: M, [B, H, N, K, K].
        added: N, [B, H, N, K, V].
    """

    factor: Tensor
    added: Tensor

    def states(self, state_BHKV: Tensor) -> Iterator[Tensor]:
        """Iterate over the states after each segment."""
        state = state_BHKV
        # The gradient of an index would be a tensor of zeros for all segments, once per segment.
        for factor, added in zip(self.factor.unbind(2), self.added.unbind(2), strict=True):
            state = factor @ state + added
            yield state

    def composed(self) -> "Transitions":
        """Compose all segments into one, in log2(N) rounds of large products of neighbours."""
        return self if self.factor.shape[2] == 1 else Transitions(*_Composition.apply(*self))


class PlusDiagonal(torch.autograd.Function):
    """In-place sum X + d·I for X [..., K, K] and d [..., 1, 1]."""

    @staticmethod
    def forward(context: Any, product: Tensor, value: Tensor) -> Tensor:
        product.diagonal(dim1=-2, dim2=-1).add_(value[..., 0])
        context.mark_dirty(product)
        return product

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _pairs(x: Tensor) -> tuple[Tensor, Tensor]:
    """Split neighbours along axis 2, of even length, into first and second of each pair: views [B·H·pairs, ·, ·]."""
    return x[:, :, 0::2].flatten(0, 2), x[:, :, 1::2].flatten(0, 2)


def _even(factor: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """Append an identity segment if the number of segments is odd, so that pairs are views and not copies."""
    if not factor.shape[2] % 2:
        return factor, added
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    rest = one.expand_as(factor[:, :, :1]), torch.zeros_like(added[:, :, :1])
    return torch.cat([factor, rest[0]], dim=2), torch.cat([added, rest[1]], dim=2)


class _Composition(torch.autograd.Function):
    """Implementation of `Transitions.composed`; autograd alone would copy and add the halves of each round."""

    @staticmethod
    def forward(context: Any, factor: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
        context.segments, rounds = factor.shape[2], []
        while factor.shape[2] > 1:
            factor, added = _even(factor, added)
            rounds += [factor, added]
            (first, second), (first_added, second_added) = _pairs(factor), _pairs(added)
            products = rounded(second @ first), rounded(torch.baddbmm(second_added, second, first_added))
            factor, added = (x.unflatten(0, (*factor.shape[:2], -1)) for x in products)
        context.save_for_backward(*rounds)
        return factor, added

    @staticmethod
    @once_differentiable
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        rounds = list(context.saved_tensors)
        while rounds:
            added, factor = rounds.pop(), rounds.pop()
            gradients = _undone(factor, added, *gradients)
        return tuple(x[:, :, : context.segments] for x in gradients)


def _undone(factor: Tensor, added: Tensor, factor_gradient: Tensor, added_gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the inputs of a round of `_Composition` from those of its outputs."""
    pairs = factor.shape[2] // 2
    (first, second), (first_added, _) = _pairs(factor), _pairs(added)
    of_factor, of_added = (x[:, :, :pairs].flatten(0, 2) for x in (factor_gradient, added_gradient))
    of_second = (of_factor @ first.mT).baddbmm_(of_added, first_added.mT)
    gradients = torch.empty_like(factor), torch.empty_like(added)
    parts = ((second.mT @ of_factor, of_second), (second.mT @ of_added, of_added))
    for gradient, halves in zip(gradients, parts, strict=True):
        for place, half in enumerate(halves):
            gradient[:, :, place::2] = half.unflatten(0, (*factor.shape[:2], -1))
    return gradients
