"""TF32: detection, and rounding to the bits that it keeps."""

import torch
from torch import Tensor

from wan.utils.device import triton_installed

TF32_HALF, TF32_MASK = 1 << 12, -1 << 13
"""Half of the last bit that TF32 keeps, and the mask of those that it keeps, for a float32 seen as an integer."""


def products_round(x: Tensor) -> bool:
    """Returns whether products of such a tensor are computed in TF32."""
    return x.is_cuda and x.dtype is torch.float32 and torch.get_float32_matmul_precision() != "highest"


def rounded(x: Tensor) -> Tensor:
    """Round a tensor in place to TF32, if products of it are in TF32; it must not be shared.

    Tensor cores of Hopper truncate the last 13 bits. Every product is then too small by about 2⁻¹¹. A state passes
    through dozens of products in a row, and with slow decay it would be wrong by several percent. Rounding to nearest
    first gives errors of both signs, and the truncation then has no effect.
    """
    if not products_round(x):
        return x
    if x.is_cuda and triton_installed():
        from arl2.ops.tf32_triton import round_to_tf32

        round_to_tf32(x, TF32_HALF, TF32_MASK)
    else:
        x.detach().view(torch.int32).add_(TF32_HALF).bitwise_and_(TF32_MASK)
    return x
