"""What segments of tokens do to a gated delta state, as matrices, and their products; see `arl2.ops.gated_delta`."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from arl2.ops.tf32 import rounded


class UnitLowerInverse(torch.autograd.Function):
    """(I + A)⁻¹ for strictly lower triangular A [..., C, C]; what is on and above the diagonal is not looked at.

    The gradient is that of an inverse, -XᵀGXᵀ: two products, where that of a triangular solve is another solve.
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
    """What N segments of tokens do to a state, one after the other: S ← M·S + N. No M makes anything longer.

    Attributes:
        factor: M, [B, H, N, K, K].
        added: N, [B, H, N, K, V].
    """

    factor: Tensor
    added: Tensor

    def states(self, state_BHKV: Tensor) -> Iterator[Tensor]:
        """The state after each segment, in order."""
        state = state_BHKV
        for n in range(self.factor.shape[2]):
            state = self.factor[:, :, n] @ state + self.added[:, :, n]
            yield state

    def composed(self) -> "Transitions":
        """All segments as one, neighbour with neighbour: log2(N) rounds of large products, not N small ones."""
        return self if self.factor.shape[2] == 1 else Transitions(*_Composition.apply(*self))


class PlusDiagonal(torch.autograd.Function):
    """X + d·I, in the place of X [..., K, K]; d is [..., 1, 1]."""

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
    """First and second of every pair of neighbours along axis 2, [B·H·pairs, ·, ·] each; views, of an even number."""
    return x[:, :, 0::2].flatten(0, 2), x[:, :, 1::2].flatten(0, 2)


def _even(factor: Tensor, added: Tensor) -> tuple[Tensor, Tensor]:
    """The same segments, and one that changes nothing if their number is odd: pairs of the others would be copies."""
    if not factor.shape[2] % 2:
        return factor, added
    one = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    rest = one.expand_as(factor[:, :, :1]), torch.zeros_like(added[:, :, :1])
    return torch.cat([factor, rest[0]], dim=2), torch.cat([added, rest[1]], dim=2)


class _Composition(torch.autograd.Function):
    """See `Transitions.composed`. By itself, autograd would copy and add up the halves of every round several times."""

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
    """Gradients of what went into a round of `_Composition` from those of what came out."""
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
