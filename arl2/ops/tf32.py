"""TF32: whether products are computed in it, and rounding to what it keeps."""

import torch
from torch import Tensor

from wan.utils.device import triton_installed

TF32_HALF, TF32_MASK = 1 << 12, -1 << 13
"""Of a float32 as an integer: half of the last bit that TF32 has, and the bits that it has."""


def products_round(x: Tensor) -> bool:
    """Whether products of such a tensor are in TF32."""
    return x.is_cuda and x.dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"


def rounded(x: Tensor) -> Tensor:
    """A tensor that nobody else holds, rounded in place to what TF32 keeps, if products of it are in TF32.

    Tensor cores of Hopper cut the last 13 bits off instead of rounding them. Every product is then too small by about
    2⁻¹¹, and a state is what dozens of products in a row leave of it: with slow decay it would be wrong by several
    percent. Rounded to the nearest, errors are of both signs; what is cut off afterwards is zero.
    """
    if not products_round(x):
        return x
    if x.is_cuda and triton_installed():
        from arl2.ops.tf32_triton import round_to_tf32

        round_to_tf32(x, TF32_HALF, TF32_MASK)
    else:
        x.detach().view(torch.int32).add_(TF32_HALF).bitwise_and_(TF32_MASK)
    return x
