"""Gated delta rule over many short segments at once, with reads between them.

`arl2.ops.gated_delta` writes one block. The study's variants are trained on all blocks of a video together.
"""

import torch
from torch import Tensor

from arl2.ops.gated_delta import DeltaInputs, states_between


def states_before(state_BHKV: Tensor, segments: DeltaInputs, ends: bool = False) -> Tensor:
    """States before each of N segments that are written one after the other, [B, N, H, K, V].

    Args:
        state_BHKV: state before the first segment.
        segments: inputs of the writes, divided into segments.
        ends: whether to append the state after the last segment, as an (N + 1)th.
    """
    with torch.autocast(state_BHKV.device.type, enabled=False):
        return states_between(state_BHKV, *(segments if ends else (x[:, :-1] for x in segments)))
