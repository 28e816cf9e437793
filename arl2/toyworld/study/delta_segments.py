"""Gated delta rule over many short segments at once, with reads between and within them.

`arl2.ops.gated_delta` writes one block. The study's variants also read while they write, and train on all blocks of a
video together. A segment is one chunk here: a block of the toy world has 72 tokens. So the part that does not depend
on the state is computed for all segments at once. Symbols are those of `arl2.ops.gated_delta.solve_chunks`.
"""

import torch
from torch import Tensor

from arl2.ops.gated_delta import DeltaInputs, solve_chunks, states_between


def states_before(state_BHKV: Tensor, segments: DeltaInputs, ends: bool = False) -> Tensor:
    """States before each of N segments that are written one after the other, [B, N, H, K, V].

    Args:
        state_BHKV: state before the first segment.
        segments: inputs of the writes, divided into segments.
        ends: whether to append the state after the last segment, as an (N + 1)th.
    """
    with torch.autocast(state_BHKV.device.type, enabled=False):
        return states_between(state_BHKV, *(segments if ends else (x[:, :-1] for x in segments)))


def read_while_written(states_BNHKV: Tensor, queries_BNCHK: Tensor, segments: DeltaInputs) -> Tensor:
    """Read qᵀS for every token, where S includes the writes of its segment up to and including the token.

    Args:
        states_BNHKV: states before each segment.
        queries_BNCHK: queries of every token.
        segments: inputs of the writes, divided into segments.

    Returns:
        [B, N, C, H, V], in the precision of the states.
    """
    with torch.autocast(states_BNHKV.device.type, enabled=False):
        k, u, w, decay = solve_chunks(*segments)
        states = states_BNHKV.transpose(1, 2)
        q = queries_BNCHK.to(states.dtype).permute(0, 3, 1, 2, 4)
        updates = u + w @ states
        weights = ((decay - decay.mT).tril().exp() * (q @ k.mT)).tril()
        read = decay.exp() * (q @ states) + weights @ updates
        return read.permute(0, 2, 3, 1, 4)
