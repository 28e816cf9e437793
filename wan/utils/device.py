"""What kernels on a GPU ask for."""

from functools import cache
from importlib.util import find_spec

import torch

HALF = (torch.float16, torch.bfloat16)
"""Half precision: what tensor cores and kernels are made for."""


@cache
def triton_installed() -> bool:
    """Whether Triton is there, which our kernels on a GPU need."""
    return find_spec("triton") is not None
