"""Muon: momentum whose matrices are orthogonalised before each step.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A convolution's weight is
taken as the matrix from its inputs to its outputs. Everything that is no matrix belongs to another optimiser.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

# Quintic iteration whose singular values end near 1; the constants are those of the source.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


def orthogonalised(matrices_NRC: Tensor) -> Tensor:
    """Matrices with the singular vectors of the given ones and singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices_NRC.shape[1] > matrices_NRC.shape[2]
    x = matrices_NRC.mT if tall else matrices_NRC
    x = x / (x.norm(dim=(1, 2), keepdim=True) + torch.finfo(torch.float32).tiny)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


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
            # Matrices of one shape go together: a step is many small products otherwise.
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape[weight.flatten(1).shape].append(weight)
            for shape, weights in by_shape.items():
                updates = torch.stack([self._momentum(weight, group["momentum"]).flatten(1) for weight in weights])
                scale = max(1.0, shape[0] / shape[1]) ** 0.5
                for weight, update in zip(weights, orthogonalised(updates), strict=True):
                    weight.add_(update.view_as(weight), alpha=-group["lr"] * scale)

    def _momentum(self, weight: Tensor, decay: float) -> Tensor:
        """Nesterov's momentum with the present gradient taken in."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(state["momentum"], decay)


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
