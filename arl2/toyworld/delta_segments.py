"""The gated delta rule over many short segments at once, with reads between and within them.

`arl2.gated_delta` writes one block; a study of variants also reads while it writes, and trains on all blocks of a video
together. A segment is one chunk here (a block of the toy world has 72 tokens), so that what does not depend on the
state is computed for all segments in one go. Symbols as in `arl2.gated_delta.write_chunked`.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor


class Written(NamedTuple):
    """What writing needs of every token, in the precision of the state.

    Attributes:
        k, v: L2-normalised keys and values, [B, L, H, ·]; with segments [B, N, C, H, ·].
        log_decay, beta: ≤ 0, and write strength, [B, L, H]; with segments [B, N, C, H].
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor

    def segments(self, number: int) -> Self:
        """Divided into segments of one length."""
        return type(self)(*(x.unflatten(1, (number, -1)) for x in self))


class Solved(NamedTuple):
    """What segments do to a state: the rank-one updates of the tokens are u - w·S.

    Attributes:
        k: keys, [B, H, N, C, K].
        u, w: [B, H, N, C, V] and [B, H, N, C, K].
        decay: accumulated since the start of the segment, [B, H, N, C, 1].
    """

    k: Tensor
    u: Tensor
    w: Tensor
    decay: Tensor


def _solve(segments: Written) -> Solved:
    k, v = (x.permute(0, 3, 1, 2, 4) for x in (segments.k, segments.v))
    decay = segments.log_decay.cumsum(dim=2).permute(0, 3, 1, 2)[..., None]
    beta = segments.beta.permute(0, 3, 1, 2)[..., None]
    between = (decay - decay.mT).tril(-1).exp()
    system = torch.eye(k.shape[-2], dtype=k.dtype, device=k.device) + (beta * between * (k @ k.mT)).tril(-1)
    right = torch.cat([beta * v, beta * decay.exp() * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
    return Solved(k, u, w, decay)


def states_before(state_BHKV: Tensor, segments: Written, ends: bool = False) -> Tensor:
    """The state before each of N segments that are written one after the other, [B, N, H, K, V].

    Args:
        state_BHKV: before the first.
        segments: what is written, with segments.
        ends: also the state after the last, as an (N + 1)th.
    """
    with torch.autocast(state_BHKV.device.type, enabled=False):
        k, u, w, decay = _solve(segments)
        total = decay[..., -1:, :].exp()
        kept = ((decay[..., -1:, :] - decay).exp() * k).mT
        states = [state_BHKV]
        for n in range(k.shape[2] if ends else k.shape[2] - 1):
            state = states[-1]
            states.append(total[:, :, n] * state + kept[:, :, n] @ (u[:, :, n] - w[:, :, n] @ state))
        return torch.stack(states, dim=1)


def read_while_written(states_BNHKV: Tensor, queries_BNCHK: Tensor, segments: Written) -> Tensor:
    """qᵀS of every token, S being its segment's state with the tokens up to and including its own written to it.

    Args:
        states_BNHKV: before each segment.
        queries_BNCHK: of every token.
        segments: what is written, with segments.

    Returns:
        [B, N, C, H, V], in the precision of the states.
    """
    with torch.autocast(states_BNHKV.device.type, enabled=False):
        k, u, w, decay = _solve(segments)
        states = states_BNHKV.transpose(1, 2)
        q = queries_BNCHK.to(states.dtype).permute(0, 3, 1, 2, 4)
        updates = u - w @ states
        weights = ((decay - decay.mT).tril().exp() * (q @ k.mT)).tril()
        read = decay.exp() * (q @ states) + weights @ updates
        return read.permute(0, 2, 3, 1, 4)
