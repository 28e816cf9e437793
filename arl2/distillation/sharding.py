"""The frozen backbone divided over ranks by FSDP2, so that 14B fits; what trains stays whole on every rank."""

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from arl2.model import HybridWanModel
from wan.checkpoints.loading import StateDict


def shard_backbone(model: HybridWanModel, trainables: Iterable[nn.Parameter]) -> None:
    """Shard all parameters but the trainables, which must be on the device already.

    What is called on its own, and not through a block's forward, is a unit of its own: stage 1 calls the
    self-attention of a layer, and the text is embedded by all cross-attentions before the first block.
    """
    # It warns of in-place operations on a unit's output; there are none in the model.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    whole = set(trainables)
    for block in model.layers():
        fully_shard(block.self_attn, ignored_params=whole)
        fully_shard(block.cross_attn, ignored_params=whole)
        register_fsdp_forward_method(block.cross_attn, "keys_values")
        fully_shard(block, ignored_params=whole)
    fully_shard(model, ignored_params=whole)
    register_fsdp_forward_method(model, "embed_text")


def gathered_state(model: nn.Module, keep: bool) -> StateDict:
    """All weights, whole and on the CPU. Every rank must call this; only those that `keep` get any."""
    state: StateDict = {}
    for name, value in model.state_dict().items():
        whole: torch.Tensor = value.full_tensor() if isinstance(value, DTensor) else value
        if keep:
            state[name] = whole.detach().cpu().contiguous()
    return state
