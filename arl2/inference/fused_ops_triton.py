"""`arl2.inference.fused_ops` by Triton kernels. Imported only where they run."""

from torch import Tensor, nn

from arl2.hybrid_attention import L2_NORM_EPS, HybridAttention
from arl2.inference.fused_ops import FFN_GATE, DeferredResidual, FusedOps, NormedBy, Operand, StateRead
from arl2.inference.head_triton import HEAD_SIZES, norm_heads, read_state, state_keys
from arl2.inference.linear import RowScaledFP8
from arl2.inference.row_triton import linear_gelu, norm, quantize
from wan.model import Block, RMSNorm
from wan.ops.rope import Rotary

SHIFT, GATE, FFN_SHIFT = 0, 2, 3
"""Indices among the six modulations of a block; a scale follows its shift."""


class TritonFusedOps(FusedOps):
    """`FusedOps` by kernels, which round less often; sizes without a kernel use the plain functions."""

    def operand(self, x: Tensor) -> Operand:
        """See `FusedOps.operand`."""
        return RowScaledFP8(*quantize(x, gelu=False)) if self.fp8 else x

    def before_self_attention(
        self, block: Block, stream: DeferredResidual, time_BF6D: Tensor
    ) -> tuple[Tensor, Operand]:
        """See `FusedOps.before_self_attention`."""
        x, added, gates = stream
        eps, modulation = block.norm1.eps, block.modulation
        outputs = norm(x, added, gates, FFN_GATE, modulation, SHIFT, time_BF6D, None, None, eps, self.fp8)
        return x if added is None else outputs[0], self._operand(outputs)

    def before_cross_attention(
        self, block: Block, x_BLD: Tensor, mixed_BLD: Tensor, time_BF6D: Tensor
    ) -> tuple[Tensor, Operand]:
        """See `FusedOps.before_cross_attention`."""
        affine = block.norm3
        if not isinstance(affine, nn.LayerNorm):
            return super().before_cross_attention(block, x_BLD, mixed_BLD, time_BF6D)
        weight, bias, eps = affine.weight, affine.bias, affine.eps
        outputs = norm(x_BLD, mixed_BLD, block.modulation, GATE, None, 0, time_BF6D, weight, bias, eps, self.fp8)
        return outputs[0], self._operand(outputs)

    def before_feed_forward(
        self, block: Block, x_BLD: Tensor, crossed_BLD: Tensor, time_BF6D: Tensor
    ) -> tuple[Tensor, Operand]:
        """See `FusedOps.before_feed_forward`."""
        eps, modulation = block.norm2.eps, block.modulation
        outputs = norm(x_BLD, crossed_BLD, None, 0, modulation, FFN_SHIFT, time_BF6D, None, None, eps, self.fp8)
        return outputs[0], self._operand(outputs)

    def _operand(self, outputs: list[Tensor]) -> Operand:
        """Operand of a product from the outputs of `norm`."""
        return RowScaledFP8(outputs[-2], outputs[-1]) if self.fp8 else outputs[-1]

    def hidden(self, ffn_in: nn.Module, gelu: nn.Module, tokens: Operand) -> Operand:
        """See `FusedOps.hidden`; Wan uses the tanh approximation of GELU."""
        if isinstance(tokens, RowScaledFP8):
            return RowScaledFP8(*quantize(ffn_in(tokens), gelu=True))
        return linear_gelu(tokens, ffn_in.weight, ffn_in.bias)

    def normed_heads(
        self, normed: NormedBy, measured: NormedBy, num_heads: int, rotary: Rotary | None = None
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """See `FusedOps.normed_heads`."""
        norms = [each for each, _ in (*normed, *measured)]
        if not all(isinstance(each, RMSNorm) for each in norms):
            return super().normed_heads(normed, measured, num_heads, rotary)
        cos, sin = (None, None) if rotary is None else rotary[:2]
        weights, eps = [each.weight for each, _ in normed], norms[0].eps
        outputs = norm_heads([x for _, x in normed], weights, [x for _, x in measured], num_heads, cos, sin, eps)
        heads = [x.unflatten(-1, (num_heads, -1)) for x in outputs[: len(normed)]]
        return heads, outputs[len(normed) :]

    def put_keys(
        self, layer: HybridAttention, key_BLD: Tensor, inverse_rms_BL: Tensor | None, rotary: Rotary, out_BLHK: Tensor
    ) -> None:
        """See `FusedOps.put_keys`."""
        if inverse_rms_BL is None or layer.head_dim not in HEAD_SIZES:
            return super().put_keys(layer, key_BLD, inverse_rms_BL, rotary, out_BLHK)
        maps_HOI = layer.phi_k.weight.view(layer.num_heads, layer.head_dim, layer.head_dim)
        cos, sin = layer.state_rotary(rotary)
        state_keys(key_BLD, inverse_rms_BL, layer.norm_k.weight, maps_HOI, cos, sin, L2_NORM_EPS, out_BLHK)

    def state_queries(
        self, layer: HybridAttention, query_BLD: Tensor, inverse_rms_BL: Tensor | None, rotary: Rotary
    ) -> Tensor:
        """See `FusedOps.state_queries`."""
        if inverse_rms_BL is None or layer.head_dim not in HEAD_SIZES:
            return super().state_queries(layer, query_BLD, inverse_rms_BL, rotary)
        maps_HOI = layer.phi_q.weight.view(layer.num_heads, layer.head_dim, layer.head_dim)
        out = query_BLD.new_empty(*query_BLD.shape[:2], layer.num_heads, layer.head_dim)
        cos, sin = layer.state_rotary(rotary)
        state_keys(query_BLD, inverse_rms_BL, layer.norm_q.weight, maps_HOI, cos, sin, L2_NORM_EPS, out)
        return out

    def add_state_read(self, layer: HybridAttention, mixed_BLHD: Tensor, reading: StateRead) -> Tensor:
        """See `FusedOps.add_state_read`."""
        state, query, inverse_rms, gate, rotary = reading
        if inverse_rms is None or layer.head_dim not in HEAD_SIZES:
            return super().add_state_read(layer, mixed_BLHD, reading)
        maps_HOI = layer.phi_q.weight.view(layer.num_heads, layer.head_dim, layer.head_dim)
        weight, (cos, sin) = layer.norm_q.weight, layer.state_rotary(rotary)
        return read_state(mixed_BLHD, state, gate, query, inverse_rms, weight, maps_HOI, cos, sin, L2_NORM_EPS)
