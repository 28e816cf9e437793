"""Variants of the hybrid layer that test the paper's claims; `install` puts one into a model.

Let S_b be the state after block b, whose clean tokens are written last. The `plain` layer reads and writes as follows:

    every token of b reads S_{b-1}; the clean pass of b writes its tokens: S_{b-1} → S_b

Each of the others differs in one respect:

- `noisy_writes`: every denoising pass of b also writes its own noisy tokens, after reading. So pass s reads the state
  after passes 1 … s-1 of b, and the clean pass writes on top of all of them.
- `token_reads`: token t of a pass reads S_{b-1} after tokens 1 … t of the same pass are written to it. This is the
  read of Gated DeltaNet (arXiv 2412.06464). Only the writes of the clean pass are kept.
- `no_gate`: the gate is 1. `gate_zero`: it is 0, so that nothing is remembered.
- `no_rope`: q̂ and k̂ are not rotated; queries and keys of local attention are.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, ClassVar

import torch
from torch import Tensor

from arl2.hybrid_attention import BlockwiseView, HybridAttention, StateMemory, StateView, combine
from arl2.model import HybridWanModel
from arl2.ops.gated_delta import DeltaInputs
from arl2.ops.token_reads import read_while_written
from arl2.toyworld.study.delta_segments import states_before
from wan.memory import LayerMemory, MemorySpec
from wan.ops.rope import Rotary
from wan.parallel import ParallelLayout


class Variant(StrEnum):
    """Variants of the hybrid layer; see the module."""

    PLAIN = "plain"
    NOISY_WRITES = "noisy_writes"
    TOKEN_READS = "token_reads"
    NO_GATE = "no_gate"
    GATE_ZERO = "gate_zero"
    NO_ROPE = "no_rope"


class StudyAttention(HybridAttention):
    """The hybrid layer with a method for each part that a variant changes.

    In a forward over all blocks it computes all writes together, which is faster for the toy world's short blocks.

    Attributes:
        writes_to_read: whether a pass that only attends needs the write inputs of its tokens.
    """

    writes_to_read: ClassVar[bool] = False

    def forward(
        self, x_BLD: Tensor, rotary: Rotary, view: Any, *, attend: bool, remember: bool
    ) -> tuple[Tensor | None, Any]:
        """See `HybridAttention.forward`."""
        if not self.enabled:
            return super().forward(x_BLD, rotary, view, attend=attend, remember=remember)
        q, k, v = self.q(x_BLD), self.k(x_BLD), self.v(x_BLD)
        blockwise = isinstance(view, BlockwiseView)
        if blockwise and (remember or view.state_BHKV is not None):
            raise NotImplementedError("variants of the study are trained on whole videos, not on segments")
        tokens = x_BLD.shape[1]
        if not self.writes_to_read:  # write inputs are needed only for tokens that are remembered: the clean half
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
        """State after the tokens of one pass."""
        return states_before(view.state_BHKV, written.segments(1), ends=True)[:, -1]

    def read_pass(self, view: StateView, queries_BLHK: Tensor, written: DeltaInputs, remember: bool) -> Tensor:
        """Read for the tokens of one pass, [B, L, H, value dim]."""
        return self.read(view.state_BHKV, queries_BLHK)

    def read_all_passes(self, queries_BLHK: Tensor, written: DeltaInputs, layout: ParallelLayout) -> Tensor:
        """Read for the tokens of all blocks in all halves, [B, L, H, value dim]."""
        return self.read_blocks(self.states_between(written, layout), queries_BLHK, layout)

    def states_between(self, written: DeltaInputs, layout: ParallelLayout) -> Tensor:
        """States before each block, [B, N, H, key dim, value dim]; the first half of the sequence is written."""
        clean = DeltaInputs(*(part[:, : layout.num_blocks * layout.tokens_per_block] for part in written))
        return states_before(self.empty_state(written), clean.segments(layout.num_blocks))

    def empty_state(self, written: DeltaInputs) -> Tensor:
        """Empty state, [B, H, key dim, value dim]."""
        return written.k.new_zeros(len(written.k), self.num_heads, self.head_dim, self.head_dim)


class TokenReads(StudyAttention):
    """Layer whose tokens read while they are written; see `Variant.TOKEN_READS`."""

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
    """View of a state that attending passes write to; the only view that is not a pure read."""

    memory: "ReadsCommitMemory"


class ReadsCommitMemory(StateMemory):
    """Memory whose views commit the writes of attending passes; see `ReadsCommitView`."""

    def read(self, tokens: int) -> ReadsCommitView:
        """View of the state; the size of the block does not matter."""
        return ReadsCommitView(super().read(tokens).state_BHKV, self)


class NoisyWrites(StudyAttention):
    """Layer whose denoising passes write too; see `Variant.NOISY_WRITES`.

    In a forward over all blocks, halves 1 to S are a block's denoising passes in their order.
    """

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
            """Reorder [B, L, …] to [B, blocks · halves, tokens of a block, …]: passes in order, the clean one last."""
            return x.unflatten(1, (halves, blocks, size)).roll(-1, 1).transpose(1, 2).flatten(1, 2)

        states = states_before(self.empty_state(written), DeltaInputs(*map(in_order, written)))
        read = self.read(states, in_order(queries_BLHK))
        return read.unflatten(1, (blocks, halves)).transpose(1, 2).roll(1, 1).flatten(1, 3)


class NoGate(StudyAttention):
    """Layer without a gate; see `Variant.NO_GATE`."""

    def output_gate(self, x_BLD: Tensor) -> Tensor:
        """Gate of ones, [B, L, H]."""
        return torch.ones_like(x_BLD[..., : self.num_heads])


class GateZero(StudyAttention):
    """Layer without a state branch; see `Variant.GATE_ZERO`."""

    def output_gate(self, x_BLD: Tensor) -> Tensor:
        """Gate of zeros, [B, L, H]."""
        return torch.zeros_like(x_BLD[..., : self.num_heads])


class NoRope(StudyAttention):
    """Layer without rotation in the state branch; see `Variant.NO_ROPE`."""

    def state_query(self, x_BLD: Tensor, q_BLD: Tensor, rotary: Rotary) -> Tensor:
        """See `HybridAttention.state_query`."""
        return super().state_query(x_BLD, q_BLD, unrotated(rotary))

    def delta_inputs(self, x_BLD: Tensor, k_BLD: Tensor, v_BLD: Tensor, rotary: Rotary) -> DeltaInputs:
        """See `HybridAttention.delta_inputs`."""
        return super().delta_inputs(x_BLD, k_BLD, v_BLD, unrotated(rotary))


def unrotated(rotary: Rotary) -> Rotary:
    """Rotation by zero, in the shape of the given one."""
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
