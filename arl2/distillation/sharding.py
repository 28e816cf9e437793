"""Sharding of the frozen backbone over ranks by FSDP2, so that 14B fits; trainables stay whole on every rank."""

import warnings
from collections.abc import Iterable
from functools import cache

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from arl2.hybrid_attention import StateView
from arl2.model import HybridWanModel
from wan.checkpoints.loading import StateDict
from wan.memory import ConcatView, KVUpdate

TENSOR_CLASSES = (StateView, ConcatView, KVUpdate)
"""What blocks take and return beside tensors, and what gradients flow through."""


def shard_backbone(model: HybridWanModel, trainables: Iterable[nn.Parameter]) -> None:
    """Shard all parameters in place except the trainables, which must be on the device already.

    Modules that are called outside a block's forward are units of their own: stage 1 calls the self-attention of a
    layer, and all cross-attentions embed the text before the first block.
    """
    show_tensors()
    # FSDP2 warns of in-place operations on a unit's output; the model has none.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    whole = set(trainables)
    for block in model.layers():
        fully_shard(block.self_attn, ignored_params=whole)
        fully_shard(block.cross_attn, ignored_params=whole)
        register_fsdp_forward_method(block.cross_attn, "keys_values")
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)
    register_fsdp_forward_method(model, "embed_text")


@cache
def show_tensors() -> None:
    """Let FSDP2 see the tensors in `TENSOR_CLASSES`.

    It gathers a unit's weights for the backward pass by hooks on the tensors that it finds in the unit's inputs and
    outputs. It did not find those in our classes: where a gradient came through the keys and values of a clean pass
    alone, the weights were gone ("setStorage: … out of bounds for storage of size 0", on CUDA).
    """
    for kind in TENSOR_CLASSES:
        torch.export.register_dataclass(kind)


def gathered_state(model: nn.Module, keep: bool) -> StateDict:
    """Gather all weights on the CPU; every rank must call this, and only ranks with `keep` receive them."""
    state: StateDict = {}
    for name, value in model.state_dict().items():
        whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu().contiguous()
    return state
