"""Dispatch of norms and rotations of tokens to single Triton kernels; plain torch takes 8 and 6 kernels for them.

Plain torch is the specification. It runs on a CPU, in full precision, and inside torch.compile, which fuses by itself.
"""

import torch
from torch import Tensor

from wan.utils.device import HALF, triton_installed


def kernels_run(x: Tensor) -> bool:
    """Returns whether kernels run on such a tensor in the current context."""
    return not torch.compiler.is_compiling() and x.is_cuda and x.dtype in HALF and triton_installed()


def norm_by_kernel(x: Tensor, weight: Tensor | None, scale: float, eps: float) -> Tensor | None:
    """Norm x / √(scale·Σx² + eps)·weight over the last axis by a kernel; None if the plain form must compute it."""
    learns = weight is not None and weight.requires_grad and torch.is_grad_enabled()
    if not kernels_run(x) or learns or (weight is not None and weight.dtype is not x.dtype):
        return None
    from wan.ops.norm_rope_triton import Norm

    normed: Tensor = Norm.apply(x, weight, scale, eps)
    return normed


def rotation_by_kernel(x_BLHD: Tensor, cos_LP: Tensor, sin_LP: Tensor) -> Tensor | None:
    """Rotation as in `wan.ops.rope.rotate` by a kernel; None if the plain form must compute it."""
    size = x_BLHD.shape[-1]
    if not kernels_run(x_BLHD) or size & (size - 1):
        return None
    from wan.ops.norm_rope_triton import Rotation

    rotated: Tensor = Rotation.apply(x_BLHD, cos_LP, sin_LP)
    return rotated
