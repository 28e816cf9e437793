"""Softmax attention behind one function; the backend is chosen once, where the model is built.

The reference is PyTorch's scaled_dot_product_attention. FlashAttention 2 and 3 are used only when asked for
and installed. On an H100 (torch 2.11) PyTorch's own choice is cuDNN, which is also the fastest, hence `AUTO`.
"""

from collections.abc import Callable
from enum import StrEnum
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.utils.device import HALF
from wan.utils.errors import InputError


class AttentionBackend(StrEnum):
    """Implementations of softmax attention."""

    AUTO = "auto"
    MATH = "math"
    EFFICIENT = "efficient"
    FLASH = "flash"
    CUDNN = "cudnn"
    FLASH_ATTENTION_2 = "flash_attention_2"
    FLASH_ATTENTION_3 = "flash_attention_3"


_SDPA = {
    AttentionBackend.MATH: SDPBackend.MATH,
    AttentionBackend.EFFICIENT: SDPBackend.EFFICIENT_ATTENTION,
    AttentionBackend.FLASH: SDPBackend.FLASH_ATTENTION,
    AttentionBackend.CUDNN: SDPBackend.CUDNN_ATTENTION,
}
_PACKAGES = {
    AttentionBackend.FLASH_ATTENTION_2: "flash_attn",
    AttentionBackend.FLASH_ATTENTION_3: "flash_attn_interface",
}
_WITHOUT_MASK = (AttentionBackend.FLASH, *_PACKAGES)


def available_backends(device: torch.device, dtype: torch.dtype) -> list[AttentionBackend]:
    """List the backends that can compute unmasked attention on `device` in `dtype`."""
    found = [AttentionBackend.AUTO, AttentionBackend.MATH]
    if device.type != "cuda":
        return found
    found.append(AttentionBackend.EFFICIENT)
    if dtype in HALF:
        found += [AttentionBackend.FLASH, AttentionBackend.CUDNN]
        found += [backend for backend, package in _PACKAGES.items() if find_spec(package)]
    return found


def require_backend(name: str, device: torch.device, dtype: torch.dtype) -> AttentionBackend:
    """Look up a backend by name and check that it works on `device` in `dtype`.

    Raises:
        InputError: no such backend, its package is not installed, or it cannot run there.
    """
    usable = available_backends(device, dtype)
    if name not in usable:
        names = ", ".join(usable)
        raise InputError(
            f"attention backend {name!r} is not available on {device} in {str(dtype).removeprefix('torch.')}: "
            f"choose one of {names}, or install its package"
        )
    return AttentionBackend(name)


def attention(
    q_BLHD: Tensor,
    k_BMHD: Tensor,
    v_BMHD: Tensor,
    *,
    mask_LM: Tensor | None = None,
    backend: AttentionBackend = AttentionBackend.AUTO,
) -> Tensor:
    """Compute softmax(q·kᵀ/√D)·v for every head.

    Args:
        q_BLHD: queries, [batch, L tokens, heads, head dim].
        k_BMHD, v_BMHD: keys and values of M tokens.
        mask_LM: True where a query may see a key; None if every query sees every key.
        backend: implementation. FlashAttention takes no mask; with one, `AUTO` is used instead.

    Returns:
        [batch, L, heads, head dim] in the dtype of the queries.
    """
    if mask_LM is not None and backend in _WITHOUT_MASK:
        backend = AttentionBackend.AUTO
    if backend in _PACKAGES:
        return _flash_attention(_PACKAGES[backend])(q_BLHD, k_BMHD, v_BMHD)
    q, k, v = (x.transpose(1, 2) for x in (q_BLHD, k_BMHD, v_BMHD))
    if backend is AttentionBackend.AUTO:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LM)
    else:
        with sdpa_kernel(_SDPA[backend]):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_LM)
    return out.transpose(1, 2)


def _flash_attention(package: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    function = import_module(package).flash_attn_func

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = function(q, k, v)
        # Some releases of FlashAttention 3 return (output, log-sum-exp).
        return out[0] if isinstance(out, tuple) else out

    return run
