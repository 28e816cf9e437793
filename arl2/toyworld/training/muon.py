"""Muon: momentum with orthogonalised matrices.

Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024. A convolution's weight is
treated as the matrix from its inputs to its outputs. Parameters that are not matrices need another optimizer.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Quintic iteration that drives singular values towards 1; the constants are those of the source.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
WARM_UP = 100


def orthogonalised(matrices_NRC: Tensor) -> Tensor:
    """Orthogonalise matrices: keep their singular vectors, and move their singular values close to 1."""
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
        lr: learning rate of a square matrix; that of tall ones is larger by the root of their aspect ratio.
        momentum: Nesterov momentum.
    """

    def __init__(self, params: Iterable[Tensor], lr: float = 0.02, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step along the orthogonalised momentum."""
        assert closure is None
        for group in self.param_groups:
            # Matrices of one shape are batched: otherwise a step is many small products.
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
        """Update the Nesterov momentum with the current gradient, and return it."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        state["momentum"].lerp_(weight.grad, 1 - decay)
        return weight.grad.lerp(state["momentum"], decay)


class MuonWithAdam:
    """Muon for a module's matrices and Adam for its other parameters, with warm-up and cosine decay.

    Args:
        module: its parameters that require gradients are trained.
        steps: step at which the learning rates reach zero.
        muon_lr, adam_lr: peak learning rates.
        adam_names: name prefixes of matrices for Adam: those at the ends of a network.
        clip_norm: upper bound on the norm of all gradients together.
    """

    def __init__(
        self,
        module: nn.Module,
        steps: int,
        muon_lr: float,
        adam_lr: float,
        adam_names: Iterable[str] = (),
        clip_norm: float = 1.0,
    ) -> None:
        matrices: list[Tensor] = []
        rest: list[Tensor] = []
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                plain = parameter.ndim < 2 or min(parameter.flatten(1).shape) < 2 or name.startswith(tuple(adam_names))
                (rest if plain else matrices).append(parameter)
        self.muon = Muon(matrices, lr=muon_lr)
        self.adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.99), weight_decay=0.0)
        self._parameters = matrices + rest
        self._steps, self._clip_norm = steps, clip_norm
        self._peaks = [(self.muon, muon_lr), (self.adam, adam_lr)]

    def state_dict(self) -> dict[str, Any]:
        """State of both optimizers."""
        return {"muon": self.muon.state_dict(), "adam": self.adam.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of both optimizers."""
        self.muon.load_state_dict(state["muon"])
        self.adam.load_state_dict(state["adam"])

    def step(self, number: int) -> None:
        """Take step `number`, counted from 0, and clear the gradients."""
        factor = 0.5 * (1 + math.cos(math.pi * number / self._steps)) * min(1, (number + 1) / WARM_UP)
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)
        for optimizer, peak in self._peaks:
            optimizer.param_groups[0]["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
