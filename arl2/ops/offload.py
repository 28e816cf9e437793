"""Activation checkpointing whose checkpoints wait for the backward pass in host memory."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class OnHost(NamedTuple):
    """A tensor's values in host memory, and the device that they came from."""

    values: Tensor
    device: torch.device


def checkpoint_on_host(run: Callable[..., Any], tokens: Tensor, *others: Any) -> Any:
    """Run a block with activation checkpointing, and keep its input tokens in host memory; else like `checkpoint`.

    What has another shape stays on the device: it is small, or shared by all blocks. Copies run on the compute
    stream, from and to pinned memory: nothing waits for the host.
    """
    with saved_tensors_hooks(partial(to_host, shape=tokens.shape), to_device):
        return checkpoint(run, tokens, *others, use_reentrant=False)


def to_host(tensor: Tensor, shape: torch.Size) -> Tensor | OnHost:
    """Copy a tensor of a shape to host memory; any other is returned as it is."""
    if tensor.shape != shape:
        return tensor
    values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return OnHost(values.copy_(tensor.detach(), non_blocking=True), tensor.device)


def to_device(kept: Tensor | OnHost) -> Tensor:
    """Copy back what `to_host` copied."""
    return kept.values.to(kept.device, non_blocking=True) if isinstance(kept, OnHost) else kept
