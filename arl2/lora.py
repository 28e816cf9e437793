"""Low-rank adapters, under the names and shapes of ARL² checkpoints: A [in, rank], B [rank, out].

The scale alpha / rank is not in a checkpoint; it comes from the configuration.
"""

import math

import torch
from torch import Tensor, nn


def new_lora_pair(linear: nn.Linear, rank: int) -> tuple[nn.Parameter, nn.Parameter]:
    """A, Kaiming-uniform with a = √5, and B, zero: at first the adapter adds nothing."""
    like = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    a = nn.Parameter(torch.empty(linear.in_features, rank, **like))
    # A is stored [in, rank]; its fan-in is the linear's.
    nn.init.kaiming_uniform_(a.data.T, a=math.sqrt(5))
    return a, nn.Parameter(torch.zeros(rank, linear.out_features, **like))


class LoRALinear(nn.Module):
    """A linear layer with an adapter: x·Wᵀ + bias + scale·x·A·B.

    Attributes:
        enabled: without it the layer is the plain linear.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.enabled = True
        self.lora_A, self.lora_B = new_lora_pair(linear, rank)

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return out + self.scale * (x @ self.lora_A @ self.lora_B) if self.enabled else out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """The plain linear with the adapter folded into its weight; shares nothing with this layer but the bias."""
        linear = nn.Linear(self.linear.in_features, self.linear.out_features, device="meta")
        delta = self.scale * (self.lora_A.double() @ self.lora_B.double()).T
        linear.weight = nn.Parameter((self.linear.weight.double() + delta).to(self.linear.weight.dtype))
        linear.bias = self.linear.bias
        return linear
