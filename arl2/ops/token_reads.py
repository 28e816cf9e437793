"""Reading the state token by token while it is written: the read of Gated DeltaNet, for an ablation.

Symbols are those of `arl2.ops.gated_delta.solve_chunks`. Source of the read: arXiv 2412.06464.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from arl2.ops.gated_delta import CHUNK, DeltaInputs, chunk_size, solve_chunks, states_between


def read_while_written(
    states_BNHKV: Tensor, queries_BNLHK: Tensor, segments: DeltaInputs, chunk: int = CHUNK
) -> Tensor:
    """Read qᵀS for every token, where S includes the writes of its segment up to and including the token.

    Differentiable in all tensors. Memory grows with the number of chunks: a state of each is kept.

    Args:
        states_BNHKV: states before each of N segments; they are not changed.
        queries_BNLHK: queries of the L tokens of every segment.
        segments: inputs of the writes, divided into the same segments.
        chunk: approximate number of tokens that are computed by one product.

    Returns:
        [B, N, L, H, V], in the precision of the states.
    """
    batch, length = queries_BNLHK.shape[:2], queries_BNLHK.shape[2]
    size = chunk_size(length, chunk)
    padding = -length % size
    states, dtype = states_BNHKV.flatten(0, 1), states_BNHKV.dtype
    tokens = [x.flatten(0, 1).to(dtype) for x in (queries_BNLHK, *segments)]
    if padding:  # a padded token has k = 0, β = 0 and g = 0: it changes nothing
        tokens = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)) for x in tokens]
    queries, *written = (x.unflatten(1, (-1, size)) for x in tokens)
    chunks = DeltaInputs(*written)
    with torch.autocast(states.device.type, enabled=False):
        earlier = (x[:, :-1] for x in chunks)
        before = states_between(states, *earlier) if chunks.k.shape[1] > 1 else states[:, None]
        read = _read_in_chunks(before, queries, chunks)
    return read.flatten(1, 2)[:, :length].unflatten(0, batch)


def _read_in_chunks(states_BNHKV: Tensor, queries_BNCHK: Tensor, chunks: DeltaInputs) -> Tensor:
    """`read_while_written` where every segment is one chunk."""
    k, u, w, decay = solve_chunks(*chunks)
    states, q = states_BNHKV.transpose(1, 2), queries_BNCHK.permute(0, 3, 1, 2, 4)
    updates = u + w @ states
    weights = ((decay - decay.mT).tril().exp() * (q @ k.mT)).tril()
    read = decay.exp() * (q @ states) + weights @ updates
    return read.permute(0, 2, 3, 1, 4)
