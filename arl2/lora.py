"""Low-rank adapters, under the names and shapes of ARL² checkpoints: A [in, rank], B [rank, out].

The scale alpha / rank is not in a checkpoint; it comes from the configuration.
"""

import math

import torch
from torch import Tensor, nn


def new_lora_pair(linear: nn.Linear, rank: int | None) -> tuple[nn.Parameter | None, nn.Parameter | None]:
    """New adapter (A, B) of a linear layer, or (None, None) without a rank.

    A is Kaiming-uniform with a = √5 and B is zero, so that the adapter adds nothing at first.
    """
    if rank is None:
        return None, None
    a = nn.Parameter(linear.weight.new_empty(linear.in_features, rank))
    # A is stored [in, rank]; its fan-in is the linear's.
    nn.init.kaiming_uniform_(a.detach().T, a=math.sqrt(5))
    return a, nn.Parameter(linear.weight.new_zeros(rank, linear.out_features))


@torch.no_grad()
def merged_weight(linear: nn.Linear, a: Tensor | None, b: Tensor | None, scale: float) -> Tensor:
    """Weight of a linear layer with an adapter folded in, computed in float64."""
    assert a is not None and b is not None
    return (linear.weight.double() + scale * (a.double() @ b.double()).T).to(linear.weight.dtype)


def with_adapter(projected: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """Sum projected + scale·x·A·B, [..., out]; the last product adds it, to save a pass over memory."""
    narrow = scale * (x @ a)
    return torch.addmm(projected.flatten(0, -2), narrow.flatten(0, -2), b).view_as(projected)


class LoRALinear(nn.Module):
    """A linear layer with an adapter: x·Wᵀ + bias + scale·x·A·B.

    Attributes:
        enabled: if False, the layer is the plain linear layer.
    """

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.enabled = True
        a, b = new_lora_pair(linear, rank)
        assert a is not None and b is not None
        self.lora_A, self.lora_B = a, b

    def forward(self, x: Tensor) -> Tensor:
        out = self.linear(x)
        return with_adapter(out, x, self.lora_A, self.lora_B, self.scale) if self.enabled else out

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Plain linear layer with the adapter folded into its weight; it shares nothing with this layer."""
        bias = self.linear.bias
        linear = nn.Linear(self.linear.in_features, self.linear.out_features, bias is not None, device="meta")
        linear.weight = nn.Parameter(merged_weight(self.linear, self.lora_A, self.lora_B, self.scale))
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().clone())
        return linear
