"""Where the small operations on tokens have kernels: a norm of 8 kernels in plain torch, or a rotation of 6, is one.

Plain torch is the specification and runs everywhere else: on a CPU, in full precision, and inside of torch.compile,
which makes kernels of its own.
"""

import torch
from torch import Tensor

from wan.utils.device import HALF, triton_installed


def kernels_run(x: Tensor) -> bool:
    """Whether kernels run on such a tensor, here and now."""
    return not torch.compiler.is_compiling() and x.is_cuda and x.dtype in HALF and triton_installed()


def norm_by_kernel(x: Tensor, weight: Tensor | None, scale: float, eps: float) -> Tensor | None:
    """x / √(scale·Σx² + eps)·weight over the last axis; None where the plain form has to compute it."""
    learns = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if not kernels_run(x) or learns or (weight is not None and weight.dtype is not x.dtype):
        return None
    from wan.ops.norm_rope_triton import Norm

    normed: Tensor = Norm.apply(x, weight, scale, eps)
    return normed


def rotation_by_kernel(x_BLHD: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor | None:
    """See `wan.ops.rope.rotate`; None where the plain form has to compute it."""
    size = x_BLHD.shape[-1]
    if not kernels_run(x_BLHD) or size & (size - 1):
        return None
    from wan.ops.norm_rope_triton import Rotation

    rotated: Tensor = Rotation.apply(x_BLHD, cos_LP, sin_LP)
    return rotated
