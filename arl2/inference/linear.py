"""Linear layers for inference: several fused into one product, and products of eight-bit floats."""

from collections.abc import Iterable, Mapping
from itertools import combinations_with_replacement
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arl2.lora import LoRALinear
from wan.utils.errors import InputError

FP8 = torch.float8_e4m3fn
ROW_MULTIPLE = 16
"""Rows of each part of a fused product are padded to a multiple of this, which FP8 requires and alignment prefers."""
SMALLEST_SCALE = 1e-12


def require_fp8(device: torch.device, *sizes: int) -> None:
    """Check that a device multiplies FP8 matrices of some sizes.

    Raises:
        InputError: the device or one of the sizes does not allow it.
    """
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError(
            f"fp8 needs an NVIDIA GPU of compute capability 8.9 or newer (Ada, Hopper), not {device}: leave it off"
        )
    odd = [size for size in sizes if size % ROW_MULTIPLE]
    if odd:
        raise InputError(f"fp8 needs sizes that are multiples of {ROW_MULTIPLE}, this model has {odd[0]}: leave it off")


class RowScaledFP8(NamedTuple):
    """Tensor in e4m3 with one scale per row: x ≈ values·scales, values [..., K], scales [..., 1] in float32."""

    values: Tensor
    scales: Tensor


def quantized(x: Tensor) -> RowScaledFP8:
    """Convert x to e4m3, each row scaled to the whole range."""
    wide = x.float()
    scales = (wide.abs().amax(dim=-1, keepdim=True) / torch.finfo(FP8).max).clamp(min=SMALLEST_SCALE)
    # Division by the rounded scale may exceed the range, and e4m3 has no infinity to saturate to.
    limit = torch.finfo(FP8).max
    return RowScaledFP8((wide / scales).clamp(-limit, limit).to(FP8), scales)


class RowsLinear(nn.Module):
    """Linear layer x·Wᵀ + bias that can compute a range of its output channels.

    Args:
        weight_NK, bias_N: parameters of the linear layer.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor) -> None:
        super().__init__()
        self.weight_NK, self.bias_N = weight_NK, bias_N

    def forward(self, x: Tensor, rows: slice = slice(None)) -> Tensor:
        """Compute the output channels `rows` for any number of tokens, [..., rows]."""
        return F.linear(x, self.weight_NK[rows], self.bias_N[rows])


class FP8Linear(nn.Module):
    """Linear layer x·Wᵀ + bias with W and x in e4m3: one scale per output channel and one per token.

    On a device without such products (the CPU), rounded values are multiplied in float32.

    Args:
        weight_NK, bias_N: parameters of the linear layer.
        parts: ranges of output channels that will be asked for, besides the whole range.
    """

    def __init__(self, weight_NK: Tensor, bias_N: Tensor | None, parts: Iterable[tuple[int, int]] = ()) -> None:
        super().__init__()
        self.values_NK, self.scales_N1 = quantized(weight_NK.detach())
        # Copies: for a view, torch.compile (2.11) passes the base tensor to the e4m3 product.
        self.biases: dict[tuple[int | None, int | None], Tensor] = {}
        if bias_N is not None:
            self.biases = {(None, None): bias_N.detach()} | {
                (start, stop): bias_N[start:stop].detach().clone() for start, stop in parts
            }
        self.dtype = weight_NK.dtype

    def forward(self, x: Tensor | RowScaledFP8, rows: slice = slice(None)) -> Tensor:
        """Compute the output channels `rows` for any number of tokens, [..., rows] in the dtype of the weight."""
        values, scales = self.values_NK[rows], self.scales_N1[rows]
        bias = self.biases[rows.start, rows.stop] if self.biases else None
        x = x if isinstance(x, RowScaledFP8) else quantized(x)
        x_values, x_scales = x.values.flatten(0, -2), x.scales.flatten(0, -2)
        if x_values.is_cuda:
            # With a scale per row, the product cannot add a float16 bias.
            fused = bias if self.dtype is torch.bfloat16 else None
            y = torch._scaled_mm(
                x_values,
                values.T,
                scale_a=x_scales,
                scale_b=scales.T,
                bias=fused,
                out_dtype=self.dtype,
                use_fast_accum=True,
            )
            bias = bias if fused is None else None
        else:
            y = ((x_values.float() @ values.float().T) * x_scales * scales.T).to(self.dtype)
        y = y.unflatten(0, x.values.shape[:-1])
        return y if bias is None else y + bias


class ParkedWeights:
    """Weights that are in host memory while their FP8 form computes in their place.

    The model keeps its parameters, their names and values; a forward of its own would be on two devices.
    """

    def __init__(self) -> None:
        self._parked: list[tuple[nn.Parameter, torch.device]] = []

    def add(self, linears: Iterable[nn.Module]) -> None:
        """Move the weights of linear layers to the host; biases stay, since FP8 layers share them."""
        for linear in linears:
            weight = (linear.linear if isinstance(linear, LoRALinear) else linear).weight
            assert isinstance(weight, nn.Parameter)
            self._parked.append((weight, weight.device))
            weight.data = weight.data.cpu()

    def release(self) -> None:
        """Move them back."""
        for weight, device in self._parked:
            weight.data = weight.data.to(device)
        self._parked = []


def inference_linear(linear: nn.Module, fp8: bool) -> nn.Module:
    """Linear layer for inference: with its adapter folded in, and in FP8 if wanted; otherwise the layer itself."""
    if isinstance(linear, LoRALinear):
        linear = linear.merged() if linear.enabled else linear.linear
    assert isinstance(linear, nn.Linear)
    return FP8Linear(linear.weight, linear.bias) if fp8 else linear


class Weight(NamedTuple):
    """The tensor `name` of `module`."""

    module: nn.Module
    name: str


def weight_name(linear: nn.Module) -> str:
    """Name of the tensor that holds a linear layer's weight."""
    if isinstance(linear, FP8Linear):
        return "values_NK"
    return "weight_NK" if isinstance(linear, RowsLinear) else "weight"


def separate(module: nn.Module) -> None:
    """Copy every parameter that is a view of a larger tensor, so that the larger one can be freed.

    Undoes what `FusedLinear` does to the parts that belong to the module.
    """
    for parameter in module.parameters():
        if parameter.untyped_storage().nbytes() > parameter.nbytes:
            parameter.data = parameter.data.clone()


class FusedLinear(nn.Module):
    """Linear layers of the same tokens as one product; neighbouring layers can be computed without the others.

    Without `fp8`, the weights of the given modules become views of the fused weight. So nothing is stored twice, and
    names and values do not change.

    Args:
        parts: layers by name, in order.
        fp8: see `FP8Linear`.
    """

    @torch.no_grad()
    def __init__(self, parts: Mapping[str, nn.Linear], fp8: bool) -> None:
        super().__init__()
        self.rows: dict[str, tuple[int, int]] = {}
        rows, first = 0, next(iter(parts.values())).weight
        for name, linear in parts.items():
            self.rows[name] = (rows, rows + linear.out_features)
            rows += linear.out_features + -linear.out_features % ROW_MULTIPLE
        weight_NK, bias_N = first.new_zeros(rows, first.shape[1]), first.new_zeros(rows)
        for name, linear in parts.items():
            place = slice(*self.rows[name])
            for whole, part in ((weight_NK, linear.weight), (bias_N, linear.bias)):
                if part is not None:
                    whole[place] = part
                    if not fp8:
                        # Re-pointed: a second copy takes gigabytes at 1.3B, and new parameters would break references.
                        # `separate` undoes it.
                        part.data = whole[place]
        neighbours = combinations_with_replacement(self.rows, 2)
        self.product = (
            FP8Linear(weight_NK, bias_N, [self._range(first, last) for first, last in neighbours])
            if fp8
            else RowsLinear(weight_NK, bias_N)
        )

    def _range(self, first: str, last: str) -> tuple[int, int]:
        """Range of output channels from one part to another, padding of the last included."""
        start, stop = self.rows[first][0], self.rows[last][1]
        return start, stop + -stop % ROW_MULTIPLE

    def forward(self, x: Tensor | RowScaledFP8, names: tuple[str, ...]) -> list[Tensor]:
        """Compute the outputs of some parts, [..., out_features] each; views of one tensor.

        Args:
            names: neighbouring parts, in order.
        """
        start, stop = self._range(names[0], names[-1])
        y = self.product(x, slice(start, stop))
        return [y[..., first - start : last - start] for first, last in (self.rows[name] for name in names)]
