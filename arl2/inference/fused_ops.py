"""Operations of a block between matrix products and attentions, in plain torch; the specification of the kernels.

`arl2.inference.model.new_fused_ops` makes one object for all blocks of a model.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from arl2.hybrid_attention import HybridAttention, combine
from arl2.inference.linear import RowScaledFP8, quantized
from wan.model import Block
from wan.ops.modulation import modulate, plus_gated
from wan.ops.rope import Rotary, rotate
from wan.utils.device import HALF, triton_installed
from wan.utils.errors import InputError

Operand = Tensor | RowScaledFP8
"""Operand of a product: tokens, or with FP8 their e4m3 form."""
NormedBy = Sequence[tuple[nn.Module, Tensor]]
"""Projections [B, L, D], each with its norm; all norms have the same epsilon."""

FFN_GATE = 5
"""Index of the feed-forward's gate among the six modulations of a block."""


class DeferredResidual(NamedTuple):
    """Tokens between two blocks as an unevaluated sum x + added·gate; the next block fuses it with its norm.

    Attributes:
        x_BLD: tokens.
        added_BLD: output of the feed-forward; None for nothing.
        modulation: modulation of the block that computed it, which holds the gate.
    """

    x_BLD: Tensor
    added_BLD: Tensor | None
    modulation: Tensor | None

    def total(self, time_BF6D: Tensor) -> Tensor:
        """Evaluate the sum, [B, L, D]."""
        if self.added_BLD is None or self.modulation is None:
            return self.x_BLD
        gate = self.modulation[:, FFN_GATE, None] + time_BF6D[:, :, FFN_GATE]
        return plus_gated(self.x_BLD, self.added_BLD, gate)


class StateRead(NamedTuple):
    """Arguments of a state read.

    Attributes:
        state_BHKV: the state.
        query_BLD: projection from which the queries are formed.
        inverse_rms_BL: norm factor of its rows, from `FusedOps.normed_heads`.
        gate_BLH: output gate before its sigmoid.
        rotary: rotation of the tokens.
    """

    state_BHKV: Tensor
    query_BLD: Tensor
    inverse_rms_BL: Tensor | None
    gate_BLH: Tensor
    rotary: Rotary


class FusedOps:
    """Plain torch implementation, for any device and dtype.

    Args:
        fp8: whether products take e4m3.
    """

    def __init__(self, fp8: bool) -> None:
        self.fp8 = fp8

    def operand(self, x: Tensor) -> Operand:
        """Convert tokens to the operand of a product."""
        return quantized(x) if self.fp8 else x

    def before_self_attention(
        self, block: Block, stream: DeferredResidual, time_BF6D: Tensor
    ) -> tuple[Tensor, Operand]:
        """Tokens, and the operand of the projections: normed and modulated tokens."""
        shift, scale, *_ = block_modulation(block, time_BF6D)
        x = stream.total(time_BF6D)
        return x, self.operand(modulate(block.norm1(x), shift, scale))

    def before_cross_attention(
        self, block: Block, x_BLD: Tensor, mixed_BLD: Tensor, time_BF6D: Tensor
    ) -> tuple[Tensor, Operand]:
        """Tokens plus the output of self-attention, and the operand of cross-attention: their norm."""
        x = plus_gated(x_BLD, mixed_BLD, block_modulation(block, time_BF6D)[2])
        return x, self.operand(block.norm3(x))

    def before_feed_forward(
        self, block: Block, x_BLD: Tensor, crossed_BLD: Tensor, time_BF6D: Tensor
    ) -> tuple[Tensor, Operand]:
        """Tokens plus the output of cross-attention, and the operand of the feed-forward."""
        *_, shift, scale, _ = block_modulation(block, time_BF6D)
        x = x_BLD + crossed_BLD
        return x, self.operand(modulate(block.norm2(x), shift, scale))

    def hidden(self, ffn_in: nn.Module, gelu: nn.Module, tokens: Operand) -> Operand:
        """Hidden values of the feed-forward, as an operand."""
        return self.operand(gelu(ffn_in(tokens)))

    def normed_heads(
        self, normed: NormedBy, measured: NormedBy, num_heads: int, rotary: Rotary | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Normed and rotated queries and keys of attention, and norm factors for those of a state.

        Args:
            normed: projections to norm over all channels and to rotate.
            measured: projections whose norm factor is wanted.
            num_heads: number of heads.
            rotary: rotation of the tokens; None for no rotation.

        Returns:
            for each of `normed` [B, L, H, D]; for each of `measured` a factor per row, or None if it is not used.
        """
        heads = [norm(x_BLD).unflatten(-1, (num_heads, -1)) for norm, x_BLD in normed]
        return heads if rotary is None else [rotate(x, rotary) for x in heads], [None for _ in measured]

    def put_keys(
        self, layer: HybridAttention, key_BLD: Tensor, inverse_rms_BL: Tensor | None, rotary: Rotary, out_BLHK: Tensor
    ) -> None:
        """Write the keys k̂ of a state into `out_BLHK`; see `StateRead` for the arguments."""
        out_BLHK.copy_(layer.state_key_of(key_BLD, rotary))

    def state_queries(
        self, layer: HybridAttention, query_BLD: Tensor, inverse_rms_BL: Tensor | None, rotary: Rotary
    ) -> Tensor:
        """Queries q̂ of a state read, [B, L, H, D]; see `StateRead` for the arguments."""
        return layer.state_query_of(query_BLD, rotary)

    def add_state_read(self, layer: HybridAttention, mixed_BLHD: Tensor, read_state: StateRead) -> Tensor:
        """Add a gated state read to the output of the attention in the block, `mixed_BLHD`."""
        query = layer.state_query_of(read_state.query_BLD, read_state.rotary)
        remembered = layer.read(read_state.state_BHKV, query)
        return combine(mixed_BLHD, remembered, read_state.gate_BLH.sigmoid())


def block_modulation(block: Block, time_BF6D: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention, then of the feed-forward, each [B, F, D]."""
    return (block.modulation[:, None] + time_BF6D).unbind(dim=2)


def require_kernels(device: torch.device, dtype: torch.dtype) -> None:
    """Check that the kernels can run.

    Raises:
        InputError: there is no GPU or no Triton, or the dtype is not half precision.
    """
    if device.type != "cuda" or not triton_installed():
        raise InputError("kernels need a GPU and Triton: leave them off")
    if dtype not in HALF:
        raise InputError(f"kernels take bfloat16 and float16, not {str(dtype).removeprefix('torch.')}: leave them off")
