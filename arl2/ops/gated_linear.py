"""Gated linear attention: a state that only adds, without the correction of the delta rule.

For the tokens of a block in raster order, for every head, with state S [key dim, value dim]:

    S ← exp(g)·S + β·k·vᵀ

Here g ≤ 0 is the log decay and β in (0, 2) the write strength of the token. Source: Mamba-2 (arXiv 2405.21060), whose
state-space duality is this recurrence with one decay per head; gated linear attention (arXiv 2312.06635).
"""

import torch
from torch import Tensor

from arl2.ops.gated_delta import DeltaInputs


def write_linear(state_BHKV: Tensor, inputs: DeltaInputs) -> Tensor:
    """Compute the state after writing L tokens, [B, H, K, V] in the dtype of `state_BHKV`; that is not changed."""
    kept, added = _effect(inputs.segments(1), state_BHKV.dtype)
    return kept[:, 0] * state_BHKV + added[:, 0]


def linear_states_between(state_BHKV: Tensor, segments: DeltaInputs) -> Tensor:
    """States before, between and after N blocks that are written one after the other, [B, N + 1, H, K, V].

    Args:
        state_BHKV: state before the first.
        segments: inputs with an axis N of blocks before that of tokens.
    """
    states = [state_BHKV]
    for kept, added in zip(*(part.unbind(1) for part in _effect(segments, state_BHKV.dtype)), strict=True):
        states.append(kept * states[-1] + added)
    return torch.stack(states, dim=1)


def _effect(segments: DeltaInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Effect S ← M·S + N of every block: M [B, N, H, 1, 1] and N [B, N, H, K, V]. All exponents are ≤ 0."""
    k, v, log_decay, beta = (x.to(dtype) for x in segments)
    decay = log_decay.cumsum(dim=2)
    last = decay[:, :, -1]
    weight = (last[:, :, None] - decay).exp() * beta
    return last.exp()[..., None, None], torch.einsum("bnlhk,bnlhv->bnhkv", weight[..., None] * k, v)
