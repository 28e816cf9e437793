"""Muon: momentum whose matrices are orthogonalised before each step.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A convolution's weight is
taken as the matrix from its inputs to its outputs. Everything that is no matrix belongs to another optimiser.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Quintic iteration whose singular values end near 1; the constants are those of the source.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of `matrix` and singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + torch.finfo(torch.float32).tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for the weights of linear and convolutional layers.

    Args:
        params: weights with at least two axes, the first of which is the output.
        lr: step size of a square matrix; tall ones step further by the root of their aspect ratio.
        momentum: of Nesterov's kind.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the orthogonalised momentum."""
        assert closure is None
        for group in self.param_groups:
            for weight in (weight for weight in group["params"] if weight.grad is not None):
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                update = weight.grad.lerp(state["momentum"], group["momentum"]).flatten(1)
                scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
                weight.add_(orthogonalised(update).view_as(weight), alpha=-group["lr"] * scale)


def muon_and_adam(
    module: nn.Module, muon_lr: float, adam_lr: float, *, adam_names: Iterable[str] = ()
) -> list[torch.optim.Optimizer]:
    """Muon for a module's matrices, Adam for everything else and for names that start with one of `adam_names`."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            plain = parameter.ndim < 2 or min(parameter.flatten(1).shape) < 2 or name.startswith(tuple(adam_names))
            (rest if plain else matrices).append(parameter)
    return [Muon(matrices, lr=muon_lr), torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)]
