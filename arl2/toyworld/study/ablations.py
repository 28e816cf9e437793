"""Variants of the hybrid layer that the paper's claims are tested against; `install` puts one into a model.

With S_b the state after block b, b's clean tokens written last, a layer reads and writes (`plain`):

    every token of b reads S_{b-1}; the clean pass of b writes its tokens: S_{b-1} → S_b

The others differ in one thing each:

- `noisy_writes`: every denoising pass of b writes its own, noisy tokens too, after it has read. So pass s reads what
  S_{b-1} became by passes 1 … s-1 of b, and the clean pass writes on top of all of them.
- `token_reads`: token t of a pass reads S_{b-1} with the tokens 1 … t of this very pass written to it, as in Gated
  DeltaNet (arXiv 2412.06464). Only the clean pass's writes are kept.
- `no_gate`: the gate is 1. `gate_zero`: it is 0, so that nothing is remembered.
- `no_rope`: q̂ and k̂ are not rotated; the softmax inside the block is.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from arl2.hybrid_attention import BlockwiseView, HybridAttention, StateMemory, StateView, combine
from arl2.model import HybridWanModel
from arl2.ops.gated_delta import DeltaInputs
from arl2.toyworld.study.delta_segments import read_while_written, states_before
from wan.memory import LayerMemory, MemorySpec
from wan.ops.rope import Rotary
from wan.parallel import ParallelLayout


class Variant(StrEnum):
    """What a hybrid layer does otherwise."""

    PLAIN = "plain"
    NOISY_WRITES = "noisy_writes"
    TOKEN_READS = "token_reads"
    NO_GATE = "no_gate"
    GATE_ZERO = "gate_zero"
    NO_ROPE = "no_rope"


class StudyAttention(HybridAttention):
    """The layer as it is, with one place for everything that a variant changes.

    All blocks at once it computes the writes of all of them together, which the toy world's short blocks gain by.

    Attributes:
        writes_to_read: whether a pass that only attends needs what its tokens would write.
    """

    writes_to_read: ClassVar[bool] = False

    def forward(
        self, x_BLD: Tensor, rotary: Rotary, view: Any, *, attend: bool, remember: bool
    ) -> tuple[Tensor | None, Any]:
        """As `HybridAttention.forward`."""
        if not self.enabled:
            return super().forward(x_BLD, rotary, view, attend=attend, remember=remember)
        q, k, v = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
        blockwise = isinstance(view, BlockwiseView)
        tokens = x_BLD.shape[1]
        if not self.writes_to_read:  # then only what is remembered is needed: of all blocks at once, the clean half
            tokens = tokens // view.layout.halves if blockwise else tokens * remember
        of_these = (x_BLD[:, :tokens], k[:, :tokens], v[:, :tokens], (rotary[0][:tokens], rotary[1][:tokens]))
        written = self.delta_inputs(*of_these)
        update = self.after(view, written) if remember and not blockwise else None
        if not attend:
            return None, update
        local = self.local_attention(q, k, v, rotary, view.layout.tokens_per_block if blockwise else None)
        queries = self.state_query(x_BLD, q, rotary)
        if blockwise:
            remembered = self.read_all_passes(queries, written, view.layout)
        else:
            remembered = self.read_pass(view, queries, written, remember)
        return self.o(combine(local, remembered.to(local.dtype), self.output_gate(x_BLD)).flatten(2)), update

    def delta_inputs(self, x_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary) -> DeltaInputs:
        """See `HybridAttention.delta_inputs`; in the state's precision."""
        wide = torch.promote_types(x_BLD.dtype, torch.float32)
        return DeltaInputs(*(part.to(wide) for part in super().delta_inputs(x_BLD, k_BLD, v_BLD, rotary)))

    def after(self, view: StateView, written: DeltaInputs) -> Tensor:
        """The state after one pass's tokens."""
        return states_before(view.state_BHKV, written.segments(1), ends=True)[:, -1]

    def read_pass(self, view: StateView, queries_BLHK: Tensor, written: DeltaInputs, remember: bool) -> Tensor:
        """Read for the tokens of one pass, [B, L, H, value dim]."""
        return self.read(view.state_BHKV, queries_BLHK)

    def read_all_passes(self, queries_BLHK: Tensor, written: DeltaInputs, layout: ParallelLayout) -> Tensor:
        """Read for the tokens of all blocks in all halves, [B, L, H, value dim]."""
        return self.read_blocks(self.states_between(written, layout), queries_BLHK, layout)

    def states_between(self, written: DeltaInputs, layout: ParallelLayout) -> Tensor:
        """The state before every block, [B, N, H, key dim, value dim]; the first half is what is written."""
        clean = DeltaInputs(*(part[:, : layout.num_blocks * layout.tokens_per_block] for part in written))
        return states_before(self.empty_state(written), clean.segments(layout.num_blocks))

    def empty_state(self, written: DeltaInputs) -> Tensor:
        """Zeros, [B, H, key dim, value dim]."""
        return written.k.new_zeros(len(written.k), self.num_heads, self.head_dim, self.head_dim)


class TokenReads(StudyAttention):
    """See `Variant.TOKEN_READS`."""

    writes_to_read = True

    def read_pass(self, view: StateView, queries_BLHK: Tensor, written: DeltaInputs, remember: bool) -> Tensor:
        """See `StudyAttention.read_pass`."""
        read = read_while_written(view.state_BHKV[:, None], queries_BLHK[:, None], written.segments(1))
        return read[:, 0] * self.head_dim**-0.5

    def read_all_passes(self, queries_BLHK: Tensor, written: DeltaInputs, layout: ParallelLayout) -> Tensor:
        """See `StudyAttention.read_all_passes`."""
        segments = layout.halves * layout.num_blocks
        states = self.states_between(written, layout).repeat(1, layout.halves, 1, 1, 1)
        queries = queries_BLHK.unflatten(1, (segments, layout.tokens_per_block))
        return read_while_written(states, queries, written.segments(segments)).flatten(1, 2) * self.head_dim**-0.5


@dataclass(frozen=True)
class ReadsCommitView(StateView):
    """A state that a pass which attends writes to; the only view that is not a pure read."""

    memory: "ReadsCommitMemory"


class ReadsCommitMemory(StateMemory):
    """See `ReadsCommitView`."""

    def read(self, tokens: int) -> ReadsCommitView:
        """The state, whatever the size of the block."""
        return ReadsCommitView(super().read(tokens).state_BHKV, self)


class NoisyWrites(StudyAttention):
    """See `Variant.NOISY_WRITES`; all blocks at once, halves 1 to S are a block's denoising passes in their order."""

    writes_to_read = True

    def new_memory(self, spec: MemorySpec) -> LayerMemory:
        """See `HybridAttention.new_memory`."""
        if not self.enabled:
            return super().new_memory(spec)
        return ReadsCommitMemory(spec, (spec.batch_size, self.num_heads, self.head_dim, self.head_dim))

    def read_pass(self, view: StateView, queries_BLHK: Tensor, written: DeltaInputs, remember: bool) -> Tensor:
        """See `StudyAttention.read_pass`."""
        read = super().read_pass(view, queries_BLHK, written, remember)
        if not remember and isinstance(view, ReadsCommitView):
            view.memory.commit(self.after(view, written))
        return read

    def read_all_passes(self, queries_BLHK: Tensor, written: DeltaInputs, layout: ParallelLayout) -> Tensor:
        """See `StudyAttention.read_all_passes`."""
        blocks, halves, size = layout.num_blocks, layout.halves, layout.tokens_per_block

        def in_order(x: Tensor) -> Tensor:
            """[B, L, …] as [B, blocks · halves, tokens of a block, …]: the passes as they are made, the clean last."""
            return x.unflatten(1, (halves, blocks, size)).roll(-1, 1).transpose(1, 2).flatten(1, 2)

        states = states_before(self.empty_state(written), DeltaInputs(*map(in_order, written)))
        read = self.read(states, in_order(queries_BLHK))
        return read.unflatten(1, (blocks, halves)).transpose(1, 2).roll(1, 1).flatten(1, 3)


class NoGate(StudyAttention):
    """See `Variant.NO_GATE`."""

    def output_gate(self, x_BLD: Tensor) -> Tensor:
        """One, [B, L, H]."""
        return torch.ones_like(x_BLD[..., : self.num_heads])


class GateZero(StudyAttention):
    """See `Variant.GATE_ZERO`."""

    def output_gate(self, x_BLD: Tensor) -> Tensor:
        """Zero, [B, L, H]."""
        return torch.zeros_like(x_BLD[..., : self.num_heads])


class NoRope(StudyAttention):
    """See `Variant.NO_ROPE`."""

    def state_query(self, x_BLD: Tensor, q_BLD: Tensor, rotary: Rotary) -> Tensor:
        """See `HybridAttention.state_query`."""
        return super().state_query(x_BLD, q_BLD, unrotated(rotary))

    def delta_inputs(self, x_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary) -> DeltaInputs:
        """See `HybridAttention.delta_inputs`."""
        return super().delta_inputs(x_BLD, k_BLD, v_BLD, unrotated(rotary))


def unrotated(rotary: Rotary) -> Rotary:
    """Angles of zero."""
    cos, sin = rotary
    return torch.ones_like(cos), torch.zeros_like(sin)


LAYERS: dict[Variant, type[StudyAttention]] = {
    Variant.PLAIN: StudyAttention,
    Variant.NOISY_WRITES: NoisyWrites,
    Variant.TOKEN_READS: TokenReads,
    Variant.NO_GATE: NoGate,
    Variant.GATE_ZERO: GateZero,
    Variant.NO_ROPE: NoRope,
}


def install(model: HybridWanModel, variant: Variant) -> HybridWanModel:
    """Replace all hybrid layers of a model by a variant; its parameters and their names stay."""
    model.replace_hybrid_attentions(LAYERS[variant])
    return model
