"""Writing to the recurrent memory: the gated delta rule.

For the tokens of a block in raster order, for every head, with state S [key dim, value dim]:

    S ← exp(g)·S,    S ← S + β·k·(v - Sᵀk)ᵀ

Here g ≤ 0 is the log decay and β in (0, 2) the write strength of the token.

Only the final state is computed. Reads happen elsewhere, on the state after a whole block (ARL², arXiv 2605.16579).
Three writers compute the same function: `write_recurrent` is the specification, `write_chunked` the plain-torch path
for any device, and `write_fla` calls flash-linear-attention's kernels on CUDA.
"""

from collections.abc import Callable
from enum import StrEnum
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from packaging.version import Version
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from arl2.ops.transitions import PlusDiagonal, Transitions, UnitLowerInverse, rounded
from wan.utils.device import HALF, triton_installed

CHUNK = 64
FLA_WITH_KNOWN_PARTS = "0.6.0"
"""Version of fla-core whose internal steps `write_fla` calls; with any other it calls the public function.

The internal steps can go once FLA has a public function that computes the final state without an output.
"""


class WriteBackend(StrEnum):
    """Implementations of a write."""

    AUTO = "auto"
    RECURRENT = "recurrent"
    CHUNKED = "chunked"
    FLA = "fla"
    FLA_FORWARD = "fla_forward"


Writer = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Function from state, keys, values, log decays and write strengths to the new state."""


class DeltaInputs(NamedTuple):
    """Arguments of `gated_delta_write` other than the state; with segments there is an axis N before L.

    Attributes:
        k, v: L2-normalised keys and values, [B, L, H, key dim] and [B, L, H, value dim].
        log_decay, beta: log decay ≤ 0 and write strength of every token and head, [B, L, H].
    """

    k: Tensor
    v: Tensor
    log_decay: Tensor
    beta: Tensor

    def segments(self, number: int) -> "DeltaInputs":
        """Divide the tokens into `number` segments of equal length: [B, L, …] becomes [B, N, L / N, …]."""
        return DeltaInputs(*(x.unflatten(1, (number, -1)) for x in self))


def gated_delta_write(
    state_BHKV: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLH: Tensor,
    beta_BLH: Tensor,
    backend: WriteBackend = WriteBackend.AUTO,
) -> Tensor:
    """Compute the state after writing L tokens; the given state is not changed. Differentiable in all tensors.

    Args:
        state_BHKV: state before, float32 or float64.
        k_BLHK, v_BLHV: L2-normalised keys, and values; computation is in the precision of the state.
        log_decay_BLH, beta_BLH: log decay ≤ 0 and write strength of every token and head.
        backend: `AUTO` takes the FLA kernel where it runs (CUDA, half-precision keys), else `CHUNKED`. If gradients
            are needed and FLA's backward does not run, it takes `FLA_FORWARD`: FLA's value, `CHUNKED`'s gradient.

    Returns:
        new state [B, H, K, V] in the dtype of `state_BHKV`.
    """
    inputs = (state_BHKV, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    if backend is WriteBackend.AUTO:
        backend = WriteBackend.CHUNKED
        if k_BLHK.is_cuda and k_BLHK.dtype in HALF and fla_installed():
            whole = not _learns(inputs) or fla_trains(k_BLHK.device)
            backend = WriteBackend.FLA if whole else WriteBackend.FLA_FORWARD
    writers: dict[WriteBackend, Writer] = {
        WriteBackend.RECURRENT: write_recurrent,
        WriteBackend.CHUNKED: write_chunked,
        WriteBackend.FLA: write_fla,
        WriteBackend.FLA_FORWARD: partial(write_recomputed, forward=write_fla),
    }
    return writers[backend](*inputs)


def _learns(inputs: tuple[Tensor, ...]) -> bool:
    """Returns whether gradients with respect to any of the inputs are needed."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in inputs)


def fla_installed() -> bool:
    """Returns whether flash-linear-attention and Triton are installed."""
    return find_spec("fla") is not None and triton_installed()


@cache
def fla_trains(device: torch.device) -> bool:
    """Returns whether FLA's backward runs; it refuses on Hopper with Triton 3.4 to 3.7.0, which miscompiles it."""
    hopper = torch.cuda.get_device_capability(device) == (9, 0)
    triton = Version(version("triton"))
    return not hopper or not Version("3.4") <= triton < Version("3.7.1") or find_spec("tilelang") is not None


def write_recurrent(
    state_BHKV: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor
) -> Tensor:
    """Write token by token, as in the formula; slow. The specification of all writers."""
    state = state_BHKV
    k_LBHK, v_LBHV, log_decay_LBH, beta_LBH = (
        x.to(state.dtype).transpose(0, 1) for x in (k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    )
    for k, v, log_decay, beta in zip(k_LBHK, v_LBHV, log_decay_LBH, beta_LBH, strict=True):
        state = log_decay.exp()[..., None, None] * state
        error = v - torch.einsum("bhk,bhkv->bhv", k, state)
        state = state + torch.einsum("bhk,bhv->bhkv", beta[..., None] * k, error)
    return state


class SolvedChunks(NamedTuple):
    """Effect of N chunks of C tokens on any state S: the rank-one updates of the tokens are u + w·S.

    Attributes:
        k: keys, [B, H, N, C, K].
        u, w: see above, [B, H, N, C, V] and [B, H, N, C, K].
        decay: G, log decay accumulated from the start of the chunk, [B, H, N, C, 1].
    """

    k: Tensor
    u: Tensor
    w: Tensor
    decay: Tensor

    def transitions(self) -> Transitions:
        """Transition S' = exp(G_C)·S + Σ_j exp(G_C - G_j)·k_j·(u_j + w_j·S)ᵀ of each chunk, in the form M·S + N."""
        last = self.decay[..., -1:, :]
        kept = rounded((last - self.decay).exp() * self.k).mT  # [B, H, N, K, C]
        return Transitions(rounded(PlusDiagonal.apply(kept @ self.w, last.exp())), rounded(kept @ self.u))


def solve_chunks(
    k_BNCHK: Tensor, v_BNCHV: Tensor, log_decay_BNCH: Tensor, beta_BNCH: Tensor, dtype: torch.dtype | None = None
) -> SolvedChunks:
    """Compute the part of a write that does not depend on the state, for all chunks at once.

    The rank-one updates of a chunk's tokens solve a unit lower triangular system:
    (I + A)·(u + w·S) = β·(v - exp(G)·kᵀS), with A_ij = β_i·exp(G_i - G_j)·k_i·k_j for j < i.

    All exponents are ≤ 0, so nothing overflows.

    Args:
        k_BNCHK, v_BNCHV, log_decay_BNCH, beta_BNCH: N chunks of C tokens.
        dtype: dtype of the computation; None for that of the arguments.
    """
    # One copy to the layout and dtype of products per head and chunk.
    k, v = (_contiguous(x.permute(0, 3, 1, 2, 4), dtype) for x in (k_BNCHK, v_BNCHV))
    log_decay, beta = (_contiguous(x.permute(0, 3, 1, 2), dtype)[..., None] for x in (log_decay_BNCH, beta_BNCH))
    decay = log_decay.cumsum(dim=3)
    between = (decay - decay.mT).tril(-1).exp()
    inverse = UnitLowerInverse.apply(beta * between * (k @ k.mT))
    u, w = inverse @ rounded(beta * v), inverse @ rounded(-beta * decay.exp() * k)
    return SolvedChunks(k, rounded(u), rounded(w), decay)


def _contiguous(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x.to(x.dtype if dtype is None else dtype, memory_format=torch.contiguous_format)


def chunk_size(tokens: int, chunk: int) -> int:
    """Choose the tokens per chunk, close to `chunk`: the size that pads the last chunk least, and then the largest.

    Candidates are multiples of `chunk` / 8, because products of other sizes are slower.
    """
    step = max(1, chunk // 8)
    least, most = max(1, chunk - 2 * step), chunk + 2 * step
    return tokens if tokens <= most else min(range(least, most + 1, step), key=lambda size: (-tokens % size, -size))


def block_transition(
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLH: Tensor,
    beta_BLH: Tensor,
    *,
    chunk: int = CHUNK,
    dtype: torch.dtype | None = None,
) -> Transitions:
    """Effect of L tokens on a state as one transition, computed chunk by chunk and then composed.

    Args:
        k_BLHK, v_BLHV, log_decay_BLH, beta_BLH: see `gated_delta_write`.
        chunk: approximate number of tokens per chunk.
        dtype: dtype of the computation; None for that of the arguments.
    """
    length = k_BLHK.shape[1]
    size = chunk_size(length, chunk)
    # An even number of chunks: see `arl2.ops.transitions`.
    padding = -length % (size if length <= size else 2 * size)
    tokens = [k_BLHK, v_BLHV, log_decay_BLH, beta_BLH]
    if padding:  # a padded token has k = 0, β = 0 and g = 0: it changes nothing
        tokens = [F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding)) for x in tokens]
    k, v, log_decay, beta = (x.unflatten(1, (-1, size)) for x in tokens)
    return solve_chunks(k, v, log_decay, beta, dtype).transitions().composed()


def states_between(
    state_BHKV: Tensor, k_BNLHK: Tensor, v_BNLHV: Tensor, log_decay_BNLH: Tensor, beta_BNLH: Tensor
) -> Tensor:
    """States before, between and after N blocks that are written one after the other, [B, N + 1, H, K, V].

    All blocks are computed at once except for one product per block, which suits many short blocks. Computation is in
    the precision of the state.
    """
    batch = k_BNLHK.shape[:2]
    k, v, log_decay, beta = (x.flatten(0, 1) for x in (k_BNLHK, v_BNLHV, log_decay_BNLH, beta_BNLH))
    composed = block_transition(k, v, log_decay, beta, dtype=state_BHKV.dtype)
    blocks = Transitions(*(x.squeeze(2).unflatten(0, batch).transpose(1, 2) for x in composed))
    return torch.stack([state_BHKV, *blocks.states(state_BHKV)], dim=1)


def write_chunked(
    state_BHKV: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Write by matrix products only, in plain torch; see `block_transition`.

    The backward pass recomputes the chunks: keeping them takes 430 MB per layer and block at 1.3B.
    """
    inputs = (state_BHKV, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    writer = partial(_write_by_products, chunk=chunk)
    if _learns(inputs) and k_BLHK.shape[1] > 2 * chunk:
        return write_recomputed(*inputs, forward=writer)
    return writer(*inputs)


def _write_by_products(
    state_BHKV: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor, chunk: int = CHUNK
) -> Tensor:
    block = block_transition(k_BLHK, v_BLHV, log_decay_BLH, beta_BLH, chunk=chunk, dtype=state_BHKV.dtype)
    (state,) = block.states(state_BHKV)
    return state


def write_recomputed(
    state_BHKV: Tensor,
    k_BLHK: Tensor,
    v_BLHV: Tensor,
    log_decay_BLH: Tensor,
    beta_BLH: Tensor,
    forward: Writer,
) -> Tensor:
    """Write whose value comes from any writer and whose gradient is that of `write_chunked`, recomputed.

    Args:
        state_BHKV, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH: see `gated_delta_write`.
        forward: writer that computes the value.
    """
    state: Tensor = RecomputedWrite.apply(forward, state_BHKV, k_BLHK, v_BLHV, log_decay_BLH, beta_BLH)
    return state


class RecomputedWrite(torch.autograd.Function):
    """See `write_recomputed`."""

    @staticmethod
    def forward(writer: Writer, *inputs: Tensor) -> Tensor:
        return writer(*inputs)

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context.save_for_backward(*inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        wanted = context.needs_input_grad[1:]
        inputs = [x.detach().requires_grad_(learns) for x, learns in zip(context.saved_tensors, wanted, strict=True)]
        # A backward pass has the autocast state of its caller, not that of the forward pass.
        with torch.enable_grad(), torch.autocast(gradient.device.type, enabled=False):
            state = _write_by_products(*inputs)
        gradients = iter(torch.autograd.grad(state, [x for x in inputs if x.requires_grad], gradient))
        return None, *(next(gradients) if learns else None for learns in wanted)


def write_fla(state_BHKV: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor) -> Tensor:
    """Write by flash-linear-attention's chunked kernels, forward and backward.

    FLA's public function also computes a causal read, which is discarded. Without gradients, and in the version whose
    internal steps are known, only the steps before that read run.
    """
    log_decay, beta = log_decay_BLH.float(), beta_BLH.float()
    inputs = (state_BHKV, k_BLHK, v_BLHV, log_decay, beta)
    if not _learns(inputs) and fla_parts_known():
        return _write_by_fla_parts(*(x.contiguous() for x in inputs))
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # needs Triton and a GPU

    _, state = chunk_gated_delta_rule(
        k_BLHK, k_BLHK, v_BLHV, log_decay, beta, initial_state=state_BHKV, output_final_state=True
    )
    return state


@cache
def fla_parts_known() -> bool:
    """Returns whether the installed FLA is the version that `_write_by_fla_parts` was written for."""
    try:
        return version("fla-core") == FLA_WITH_KNOWN_PARTS
    except PackageNotFoundError:
        return False


def _write_by_fla_parts(
    state_BHKV: Tensor, k_BLHK: Tensor, v_BLHV: Tensor, log_decay_BLH: Tensor, beta_BLH: Tensor
) -> Tensor:
    """Write by FLA's internal steps: solve all chunks, then go through them in order."""
    from fla.ops.common.chunk_delta_h import chunk_gated_delta_rule_fwd_h
    from fla.ops.gated_delta_rule.chunk_fwd import chunk_gated_delta_rule_fwd_intra
    from fla.ops.utils import chunk_local_cumsum
    from fla.ops.utils.constant import RCP_LN2

    with torch.cuda.device_of(k_BLHK):
        # Its kernels take decays as logarithms to base 2.
        decay = chunk_local_cumsum(log_decay_BLH, chunk_size=CHUNK, scale=RCP_LN2)
        w, u, _ = chunk_gated_delta_rule_fwd_intra(k=k_BLHK, v=v_BLHV, g=decay, beta=beta_BLH, chunk_size=CHUNK)
        _, _, state = chunk_gated_delta_rule_fwd_h(
            k=k_BLHK,
            w=w,
            u=u,
            g=decay,
            initial_state=state_BHKV,
            output_final_state=True,
            chunk_size=CHUNK,
            save_new_value=False,
        )
    return state
