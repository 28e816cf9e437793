"""Types and devices: what kernels on a GPU ask for, and which type has range enough."""

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import nn

from wan.utils.errors import InputError

HALF = (torch.float16, torch.bfloat16)
"""Half precision: what tensor cores and kernels are made for."""


BFLOAT16_CAPABILITY = (8, 0)
"""GPUs from this one on compute in bfloat16."""


def wide_range_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """A type with the range of float32, for parts whose activations exceed 65,504, where float16 ends.

    Returns:
        `dtype`; in the place of float16 bfloat16, which is as large, where the GPU computes in it, else float32.
    """
    if dtype is not torch.float16:
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= BFLOAT16_CAPABILITY
    return torch.bfloat16 if has_bfloat16 else torch.float32


def holds_float16(module: nn.Module) -> bool:
    """Whether a parameter of a module is float16."""
    return any(parameter.dtype is torch.float16 for parameter in module.parameters())


@cache
def triton_installed() -> bool:
    """Whether Triton is there, which our kernels on a GPU need."""
    return find_spec("triton") is not None


def use_deterministic_algorithms(wanted: bool) -> None:
    """Let PyTorch compute with algorithms that repeat bit by bit, or with the fastest ones again.

    It warns of operations that have no deterministic algorithm. Call it before the first product on a GPU: cuBLAS reads
    the size of its workspace once.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # none of ours is read


def require_device(device: torch.device) -> None:
    """Make sure that this machine has a device.

    Raises:
        InputError: it has not.
    """
    if device.type == "cpu":
        return
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    count = 0 if here is None or here.type != device.type else torch.accelerator.device_count()
    if (device.index or 0) >= count:
        raise InputError(f"there is no device {device} here ({count} of its kind): give 'cpu', or one that there is")
