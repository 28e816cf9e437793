"""The hybrid attention layer: softmax inside the block, a recurrent state for everything earlier.

Source: ARL², "Attend Locally, Remember Linearly", arXiv 2605.16579. Every token of a block reads the state after the
previous block. A block is written once, token by token, from its clean latents:

    out = W_o( softmax(q, k, v within the block) + sigmoid(W_gate·x) ⊙ D^-½·q̂ᵀS )

where q̂ = l2norm(RoPE(φ_q(norm_q(W_q·x + Δ_q·x)))), k̂ is formed in the same way, and v̂ = φ_v(W_v·x + Δ_v·x).

With S = 0 the layer equals the teacher's attention on the first block exactly.

`arl2.state_settings.StateSettings` has variants of the state, and ablations of reads, writes and gate. With several
states per head, or values of more channels than a head has, each state adds its own gated read, and a read is mapped
back to the channels of a head:

    out = W_o( softmax(…) + Σ_n sigmoid(W_gate,n·x) ⊙ φ_o(D^-½·q̂ᵀS_n) )

Where the state is not rotated as the softmax is, the `Rotary` of a pass has four tensors: cosine and sine of the
softmax, then those of the state. The model computes both once per pass; see `HybridWanModel.rotary`.
"""

import math
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from arl2.lora import new_lora_pair, with_adapter
from arl2.ops.gated_delta import DeltaInputs, WriteBackend
from arl2.ops.token_reads import read_while_written
from arl2.ops.update_rules import rule_named
from arl2.state_memory import BlockwiseView as BlockwiseView  # imported from here by what was written before
from arl2.state_memory import LocalBlocksView, LocalMemory, LocalWindow, joined, padded_in_front
from arl2.state_memory import StateMemory as StateMemory
from arl2.state_memory import StateView as StateView
from arl2.state_settings import PAPER_STATE, Decay, Gate, Reads, Rotation, StateSettings, Writes
from wan.memory import ConcatView, LayerMemory, MemorySpec
from wan.model import SelfAttention
from wan.ops.attention import attention
from wan.ops.dispatch import norm_by_kernel
from wan.ops.rope import Rotary, rotate
from wan.parallel import BlocksView, ParallelLayout
from wan.utils.errors import InputError

L2_NORM_EPS = 1e-6
SLOW_BLOCKS = (4, 400)
"""Initial half-lives of the fastest and the slowest head with `Decay.SLOW`, in blocks."""
SECOND_STATE_FACTOR = 64
"""Initial half-life of a head's second state, as a multiple of that of its first."""


def l2_norm(x: Tensor) -> Tensor:
    """L2 norm x / √(Σx² + 1e-6) over the last axis, computed in float32 at least."""
    by_kernel = norm_by_kernel(x, None, 1.0, L2_NORM_EPS)
    if by_kernel is not None:
        return by_kernel
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(dim=-1, keepdim=True) + L2_NORM_EPS)).to(x.dtype)


def gated(remembered_BLHV: Tensor, gate_BLH: Tensor) -> Tensor:
    """Reads weighted by the output gate, [B, L, H, value dim]."""
    return gate_BLH[..., None] * remembered_BLHV


def combine(local_BLHV: Tensor, remembered_BLHV: Tensor, gate_BLH: Tensor) -> Tensor:
    """Output before the last projection, [B, L, H, value dim]: local attention plus the gated reads of all states."""
    branch, heads = gated(remembered_BLHV, gate_BLH), local_BLHV.shape[2]
    if branch.shape[2] != heads:
        branch = branch.unflatten(2, (-1, heads)).sum(2)
    return local_BLHV + branch


class HeadMap(nn.Conv1d):
    """A linear map of the channels of every head, stored as a grouped 1×1 convolution, [out dim, in dim / heads, 1].

    Args:
        in_dim: channels of all heads.
        num_heads: number of heads.
        out_dim: channels of all heads after the map; None for `in_dim`.
    """

    def __init__(self, in_dim: int, num_heads: int, out_dim: int | None = None) -> None:
        super().__init__(in_dim, out_dim or in_dim, kernel_size=1, groups=num_heads, bias=False)

    def forward(self, x_BLHI: Tensor) -> Tensor:
        """Apply it to the channels of each head, [..., H, out dim / H]."""
        heads, channels = x_BLHI.shape[-2:]
        return torch.einsum("...hi,hoi->...ho", x_BLHI, self.weight.view(heads, -1, channels))


class HybridAttention(SelfAttention):
    """Drop-in for `wan.model.SelfAttention`, which it extends: q, k, v, o and their norms are the teacher's.

    Args:
        dim, num_heads, qk_norm, eps: as in the layer that it replaces.
        lora_rank: rank of the adapters on q, k and v of the state branch; None for no adapters.
        lora_alpha: scale of the adapters times their rank.
        state: variant of the state.

    Attributes:
        enabled: if False, the layer is the softmax layer that it replaced, memory included.
        lora_enabled: if False, the adapters add nothing.
        write_backend: implementation of the write.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        qk_norm: bool,
        eps: float,
        lora_rank: int | None,
        lora_alpha: float,
        state: StateSettings = PAPER_STATE,
    ) -> None:
        super().__init__(dim, num_heads, qk_norm, eps)
        if state.value_expansion > num_heads:
            raise InputError(
                f"state.value_expansion {state.value_expansion} is above the model's {num_heads} heads, whose values "
                "the state would hold: lower it"
            )
        self.state = state
        self._rule = rule_named(state.rule)
        self.enabled = True
        self.lora_enabled = True
        self.write_backend = WriteBackend.AUTO
        states = state.num_states * num_heads
        self.a_proj = nn.Linear(dim, states, bias=False)
        self.b_proj = nn.Linear(dim, states, bias=False)
        self.gate_proj = nn.Linear(dim, states, bias=False) if state.gate is Gate.HEADWISE else None
        self.A_log = nn.Parameter(torch.empty(states))
        self.dt_bias = nn.Parameter(torch.empty(states))
        self.phi_q = HeadMap(dim, num_heads)
        self.phi_k = HeadMap(dim, num_heads)
        values = state.value_expansion * dim
        self.phi_v = HeadMap(dim, num_heads, values)
        self.phi_o = HeadMap(values, num_heads, dim) if values != dim else None
        self.lora_scale = lora_alpha / lora_rank if lora_rank else 0.0
        self.lora_q_A, self.lora_q_B = new_lora_pair(self.q, lora_rank)
        self.lora_k_A, self.lora_k_B = new_lora_pair(self.k, lora_rank)
        self.lora_v_A, self.lora_v_B = new_lora_pair(self.v, lora_rank)
        self.init_hybrid_weights()

    @classmethod
    def sharing(cls, layer: "HybridAttention") -> Self:
        """Layer of this class with the modules, parameters and settings of another, which stays as it is.

        Args:
            layer: neither sharded nor compiled; its hooks are not taken over.
        """
        rank = None if layer.lora_q_A is None else layer.lora_q_A.shape[1]
        with torch.device("meta"):
            other = cls(layer.q.in_features, layer.num_heads, False, 0.0, rank, lora_alpha=1.0, state=layer.state)
        for name, part in (*layer.named_children(), *layer.named_parameters(recurse=False)):
            setattr(other, name, part)
        for name in ("backend", "enabled", "lora_enabled", "lora_scale", "write_backend", "training"):
            setattr(other, name, vars(layer)[name])
        return other

    @torch.no_grad()
    def init_hybrid_weights(self) -> None:
        """Initialize the new parameters: φ as the identity, decays from slow to fast, gates near one half.

        With expanded values, a head's further channels hold the values of the next heads as they are, and φ_o reads the
        head's own alone. So the layer starts as one without them, and φ_o has gradients from the first step on; the
        further maps of φ_v have them once φ_o reads their channels, as the two matrices of an adapter do.
        """
        for phi in (self.phi_q, self.phi_k, self.phi_v):
            copies = self.num_heads * phi.out_channels // phi.in_channels
            phi.weight.copy_(torch.eye(self.head_dim).repeat(copies, 1)[..., None])
        if self.phi_o is not None:
            own = torch.eye(self.head_dim, self.state.value_expansion * self.head_dim)
            self.phi_o.weight.copy_(own.repeat(self.num_heads, 1)[..., None])
        for projection in filter(None, (self.a_proj, self.b_proj, self.gate_proj)):
            nn.init.xavier_uniform_(projection.weight, gain=2**-2.5)
        self._init_decay()

    def _init_decay(self) -> None:
        """Draw half-lives per token, with W_a·x = 0: ln 2 / (A·dt), where A = exp(A_log) and dt = softplus(dt_bias).

        - `Decay.PAPER`: A is uniform in (0, 16), dt log-uniform in [0.001, 0.1].
        - `Decay.SLOW`: half-lives are spaced geometrically over the heads, from 4 to 400 blocks (`SLOW_BLOCKS`), with
          A = 1: head h of H has 4·100^(h / (H - 1)) blocks of `decay_block_tokens` tokens.

        A second state has the half-lives of the first times `SECOND_STATE_FACTOR`, by its A.
        """
        states = len(self.A_log)
        if self.state.decay is Decay.SLOW:
            assert self.state.decay_block_tokens is not None
            self.A_log.zero_()
            fastest, slowest = (math.log(blocks * self.state.decay_block_tokens) for blocks in SLOW_BLOCKS)
            half_lives = torch.linspace(fastest, slowest, self.num_heads, dtype=torch.float64).exp()
            dt = (math.log(2) / half_lives).repeat(self.state.num_states)
        else:
            # log U(0, 16): zero itself has no logarithm.
            self.A_log.uniform_(torch.finfo(torch.float32).tiny, 16).log_()
            dt = torch.empty(states).uniform_(math.log(0.001), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log[self.num_heads :] -= math.log(SECOND_STATE_FACTOR)

    def new_memory(self, spec: MemorySpec) -> LayerMemory:
        """Empty state, or the softmax layer's memory while the hybrid is not enabled."""
        if not self.enabled:
            return super().new_memory(spec)
        heads, frames = self.num_heads // spec.head_shards, self.state.local_frames
        shape = self._state_shape(spec.batch_size, heads)
        if frames:
            return LocalMemory(spec, shape, heads, self.head_dim, frames)
        return StateMemory(spec, shape, takes_noisy=self.state.writes is Writes.NOISY)

    def _state_shape(self, batch: int, heads: int) -> tuple[int, int, int, int]:
        """Shape of the states of some heads: the first of every head, then the second of every head."""
        return batch, self.state.num_states * heads, self.head_dim, self.state.value_expansion * self.head_dim

    def parallel_view(self, layout: ParallelLayout, past: Any = None) -> Any:
        """See `SelfAttention.parallel_view`."""
        if not self.enabled:
            return super().parallel_view(layout, past)
        if self.state.local_frames:
            return LocalBlocksView.of(layout, past, self.state.local_frames)
        return BlockwiseView(layout, None if past is None else past.state_BHKV)

    def forward(
        self, x_BLD: Tensor, rotary: Rotary, view: Any, *, attend: bool, remember: bool
    ) -> tuple[Tensor | None, Any]:
        """Attend over a `StateView`, or return the new state as update, or both; see `SelfAttention.forward`.

        With a window beside the state, view and update are a `LocalWindow`. With a `BlockwiseView`, or a
        `LocalBlocksView`, the tokens are those of all blocks of a sequence.
        """
        if not self.enabled:
            return super().forward(x_BLD, rotary, view, attend=attend, remember=remember)
        if isinstance(view, BlockwiseView | LocalBlocksView):
            return self._forward_blockwise(x_BLD, rotary, view, remember)
        k, v = self.k(x_BLD), self.v(x_BLD)
        update: Tensor | LocalWindow | None = None
        if remember and isinstance(view, LocalWindow):
            update = self._moved_on(view, x_BLD, k, v, rotary)
        elif remember:
            update = self.write(view.state_BHKV, x_BLD, k, v, rotary)
        if not attend:
            return None, update
        q = self.q(x_BLD)
        local = self.local_attention(q, k, v, rotary, None, view.softmax if isinstance(view, LocalWindow) else None)
        queries = self.state_query(x_BLD, q, rotary)
        if self.state.reads is Reads.TOKEN:
            segments = self.delta_inputs(x_BLD, k, v, rotary).segments(1)
            remembered = self._read_by_token(view.state_BHKV[:, None], queries[:, None], segments)
        else:
            remembered = self.read(view.state_BHKV, queries)
        return self.o(combine(local, remembered, self.output_gate(x_BLD)).flatten(2)), update

    def _forward_blockwise(
        self, x_BLD: Tensor, rotary: Rotary, view: BlockwiseView | LocalBlocksView, remember: bool
    ) -> tuple[Tensor, Tensor | LocalWindow | None]:
        """Attend in all blocks at once; each reads the state after the blocks of the first half before it."""
        layout = view.layout
        q, k, v = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
        clean = slice(0, layout.clean_tokens)
        written = (x_BLD[:, clean], k[:, clean], v[:, clean], tuple(part[clean] for part in rotary))
        update: Tensor | LocalWindow | None = None
        if isinstance(view, LocalBlocksView):
            local = self._windowed_attention(q, k, v, rotary, view)
            states, update = self._states_before_windows(*written, view, remember)
        else:
            local = self.local_attention(q, k, v, rotary, layout.tokens_per_block)
            states = self._states_between(self.delta_inputs(*written), layout, view.state_BHKV, remember)
            update = states[:, -1] if remember else None
        states, queries = states[:, : layout.num_blocks], self.state_query(x_BLD, q, rotary)
        if self.state.reads is Reads.TOKEN:
            passes = layout.halves * layout.num_blocks
            segments = self.delta_inputs(x_BLD, k, v, rotary).segments(passes)
            of_passes = states.repeat(1, layout.halves, 1, 1, 1), queries.unflatten(1, (passes, -1))
            remembered = self._read_by_token(*of_passes, segments)
        else:
            remembered = self.read_blocks(states, queries, layout)
        mixed = combine(local, remembered, self.output_gate(x_BLD))
        return self.o(mixed.flatten(2)), update

    def _windowed_attention(
        self, q_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary, view: LocalBlocksView
    ) -> Tensor:
        """Softmax attention of all blocks, each over itself and the window before it."""
        queries, keys = self.rotated(q_BLD, self.norm_q, rotary), self.rotated(k_BLD, self.norm_k, rotary)
        seen = view.of_softmax()
        if isinstance(seen, BlocksView):
            return seen.attention(queries, keys, self.heads(v_BLD), self.backend)
        keys, values, mask = seen.with_block(keys, self.heads(v_BLD))
        return attention(queries, keys, values, mask_LM=mask, backend=self.backend)

    def _states_before_windows(
        self,
        x_BLD: Tensor,
        k_BLD: Tensor,
        v_BLD: Tensor,
        rotary: Rotary,
        view: LocalBlocksView,
        remember: bool,
    ) -> tuple[Tensor, LocalWindow | None]:
        """States before each block and its window, and with `remember` the content after the last block."""
        inputs, past = self.delta_inputs(x_BLD, k_BLD, v_BLD, rotary), view.past
        layout, window = view.layout, self.state.local_frames * view.layout.tokens_per_frame
        written = inputs if past is None else joined(past.waiting, inputs)
        # The window of the first block, which may begin before the video, then all blocks: the first of these leave.
        shifted = padded_in_front(written, window + layout.clean_tokens)
        leaving = DeltaInputs(*(part[:, : layout.clean_tokens] for part in shifted))
        states = self._states_between(leaving, layout, None if past is None else past.state_BHKV, remember)
        if not remember:
            return states, None
        softmax = ConcatView(self.rotated(k_BLD, self.norm_k, rotary), self.heads(v_BLD))
        if past is not None:
            softmax = ConcatView(*past.softmax.with_block(softmax.keys_BMHD, softmax.values_BMHD)[:2])
        empty = past or LocalWindow(states[:, -1], softmax, written, window)
        return states, empty.newest(states[:, -1], softmax, written)

    def _moved_on(self, view: LocalWindow, x_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary) -> LocalWindow:
        """Content after a block: what leaves the window is written."""
        inputs = joined(view.waiting, self.delta_inputs(x_BLD, k_BLD, v_BLD, rotary))
        keys, values, _ = view.softmax.with_block(self.rotated(k_BLD, self.norm_k, rotary), self.heads(v_BLD))
        leaving, state = inputs.k.shape[1] - view.capacity, view.state_BHKV
        if leaving > 0:
            state = self._written(state, DeltaInputs(*(part[:, :leaving] for part in inputs)))
        return view.newest(state, ConcatView(keys, values), inputs)

    def local_attention(
        self,
        q_BLD: Tensor,
        k_BLD: Tensor,
        v_BLD: Tensor,
        rotary: Rotary,
        tokens_per_block: int | None = None,
        past: ConcatView | None = None,
    ) -> Tensor:
        """Softmax attention inside each block, [B, L, H, D], from the teacher's projections.

        Args:
            q_BLD, k_BLD, v_BLD: projections of the tokens, without adapters.
            rotary: rotation of the tokens.
            tokens_per_block: length of each of the blocks in the sequence; None for a single block.
            past: window that a single block also sees.
        """
        heads = self.rotated(q_BLD, self.norm_q, rotary), self.rotated(k_BLD, self.norm_k, rotary), self.heads(v_BLD)
        if past is not None:
            return attention(heads[0], *past.with_block(*heads[1:])[:2], backend=self.backend)
        if tokens_per_block is None:
            return attention(*heads, backend=self.backend)
        per_block = (x.reshape(-1, tokens_per_block, *x.shape[2:]) for x in heads)
        return attention(*per_block, backend=self.backend).reshape(heads[0].shape)

    def _states_between(
        self, inputs: DeltaInputs, layout: ParallelLayout, first: Tensor | None, include_last: bool
    ) -> Tensor:
        """States before each block, [B, blocks, H, key dim, value dim], and with `include_last` after the last.

        Args:
            inputs: of all blocks.
            first: state before the first; None for an empty one.
        """
        if first is None:
            shape = self._state_shape(len(inputs.k), self.num_heads)
            first = torch.zeros(shape, device=inputs.k.device, dtype=inputs.log_decay.dtype)
        written = layout.num_blocks if include_last else layout.num_blocks - 1
        blocks = DeltaInputs(*(x[:, :written] for x in inputs.segments(layout.num_blocks)))
        with torch.autocast(inputs.k.device.type, enabled=False):
            return self._rule.states_between(first, blocks)

    def read(self, state: Tensor, q: Tensor) -> Tensor:
        """Read φ_o(D^-½·qᵀS) for every token and state, in the dtype of the queries; φ_o is there for expanded values.

        Args:
            state: S, [B, states·H, key dim, value dim]; more axes may stand between B and H.
            q: normalised queries, [B, L, H, key dim]; the same axes stand between B and L.

        Returns:
            [B, L, states·H, D], with the axes between B and L.
        """
        states = state.to(q.dtype)
        if self.state.has_one_plain_state:
            return torch.einsum("...lhk,...hkv->...lhv", q, states) * self.head_dim**-0.5
        states = states.unflatten(-3, (self.state.num_states, -1))
        read = torch.einsum("...lhk,...nhkv->...lnhv", q, states) * self.head_dim**-0.5
        return (read if self.phi_o is None else self.phi_o(read)).flatten(-3, -2)

    def read_blocks(self, states_BNHKV: Tensor, q_BLHK: Tensor, layout: ParallelLayout) -> Tensor:
        """Read for the tokens of all blocks in all halves, each block from its own state; see `read`."""
        queries = q_BLHK.unflatten(1, (layout.halves, layout.num_blocks, layout.tokens_per_block))
        return self.read(states_BNHKV[:, None], queries).flatten(1, 3)

    def _read_by_token(self, states_BNHKV: Tensor, q_BNLHK: Tensor, segments: DeltaInputs) -> Tensor:
        """Read for the tokens of N passes while they are written, [B, N·L, H, D]; see `Reads.TOKEN`."""
        read = read_while_written(states_BNHKV, q_BNLHK, segments) * self.head_dim**-0.5
        return read.to(q_BNLHK.dtype).flatten(1, 2)

    def write(self, state_BHKV: Tensor, x_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary) -> Tensor:
        """State after writing these tokens; `k_BLD` and `v_BLD` are the teacher's projections of `x_BLD`."""
        return self._written(state_BHKV, self.delta_inputs(x_BLD, k_BLD, v_BLD, rotary))

    def _written(self, state_BHKV: Tensor, inputs: DeltaInputs) -> Tensor:
        # Under autocast the products inside a write would lose the precision of the state.
        with torch.autocast(state_BHKV.device.type, enabled=False):
            return self._rule.write(state_BHKV, inputs, self.write_backend)

    def delta_inputs(self, x_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary) -> DeltaInputs:
        """Keys k̂, values v̂, log decay and write strength of every token, from the teacher's projections."""
        k = self._adapted(k_BLD, x_BLD, self.lora_k_A, self.lora_k_B)
        v = self._adapted(v_BLD, x_BLD, self.lora_v_A, self.lora_v_B)
        keys, values = self.state_key_of(k, rotary), self.state_values_of(v)
        if self.state.num_states > 1:
            keys, values = (part.repeat(1, 1, self.state.num_states, 1) for part in (keys, values))
        return DeltaInputs(keys, values, self.log_decay(x_BLD), self.beta(x_BLD))

    def state_values_of(self, v_BLD: Tensor) -> Tensor:
        """Values v̂ of the state branch, [B, L, H, value dim], from a projection that includes the adapter.

        Channels of a linear map of a head's own value would add nothing to a state, which is linear in its values: they
        could be computed from the others after the read. So the j-th further map of a head takes the value of the j-th
        next head.
        """
        expansion, heads = self.state.value_expansion, self.heads(v_BLD)
        if expansion == 1:
            return self.mapped(v_BLD, self.phi_v)
        neighbours = torch.stack([heads.roll(-distance, dims=2) for distance in range(expansion)], dim=3)
        maps = self.phi_v.weight.view(self.num_heads, expansion, self.head_dim, self.head_dim)
        return torch.einsum("blhmi,hmoi->blhmo", neighbours, maps).flatten(3)

    def state_query(self, x_BLD: Tensor, q_BLD: Tensor, rotary: Rotary) -> Tensor:
        """Queries q̂ of the state branch, [B, L, H, D]; `q_BLD` is the teacher's projection of `x_BLD`."""
        return self.state_query_of(self._adapted(q_BLD, x_BLD, self.lora_q_A, self.lora_q_B), rotary)

    def state_query_of(self, q_BLD: Tensor, rotary: Rotary) -> Tensor:
        """Queries q̂ of the state branch, from a projection that includes the adapter."""
        return l2_norm(rotate(self.mapped(self.norm_q(q_BLD), self.phi_q), self.state_rotary(rotary)))

    def state_key_of(self, k_BLD: Tensor, rotary: Rotary) -> Tensor:
        """Keys k̂ of the state branch, from a projection that includes the adapter."""
        return l2_norm(rotate(self.mapped(self.norm_k(k_BLD), self.phi_k), self.state_rotary(rotary)))

    def state_rotary(self, rotary: Rotary) -> Rotary:
        """Rotation of the state's queries and keys, among the rotations of a pass.

        Raises:
            ValueError: the state has a rotation of its own, and it is not given.
        """
        if len(rotary) == 2 and self.state.rotation is not Rotation.ABSOLUTE:
            raise ValueError(f"a state of rotation {self.state.rotation} needs the `HybridWanModel.rotary` of the pass")
        return rotary[-2:]

    def log_decay(self, x_BLD: Tensor) -> Tensor:
        """Log decay g = -exp(A_log)·softplus(W_a·x + dt_bias), [B, L, states·H] in float32 at least."""
        return self.log_decay_of(self.a_proj(x_BLD))

    def log_decay_of(self, a_BLH: Tensor) -> Tensor:
        """Log decay of tokens from their projection W_a·x."""
        wide = torch.promote_types(a_BLH.dtype, torch.float32)
        return -self.A_log.to(wide).exp() * F.softplus(a_BLH.to(wide) + self.dt_bias.to(wide))

    def beta(self, x_BLD: Tensor) -> Tensor:
        """Write strength 2·sigmoid(W_b·x), [B, L, states·H] in float32 at least."""
        return self.beta_of(self.b_proj(x_BLD))

    def beta_of(self, b_BLH: Tensor) -> Tensor:
        """Write strength of tokens from their projection W_b·x."""
        return 2 * b_BLH.to(torch.promote_types(b_BLH.dtype, torch.float32)).sigmoid()

    def output_gate(self, x_BLD: Tensor) -> Tensor:
        """Output gate sigmoid(W_gate·x), [B, L, states·H]: weight of each state's read; 1 without a gate."""
        if self.gate_proj is None:
            return x_BLD.new_ones(*x_BLD.shape[:2], len(self.A_log))
        return self.gate_proj(x_BLD).sigmoid()

    def _adapted(
        self,
        projected_BLD: Tensor,
        x_BLD: Tensor,
        a: Tensor | None,
        b: Tensor | None,
    ) -> Tensor:
        """Projection plus its adapter, if there is one and adapters are enabled."""
        if a is None or b is None or not self.lora_enabled:
            return projected_BLD
        return with_adapter(projected_BLD, x_BLD, a, b, self.lora_scale)

    def mapped(self, x_BLD: Tensor, phi: HeadMap) -> Tensor:
        """Map of each head applied to its channels, [B, L, H, D]."""
        mapped: Tensor = phi(self.heads(x_BLD))
        return mapped
