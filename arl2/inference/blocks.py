"""The blocks of the transformer for inference: the computation of `wan.model.Block`, cut at its attentions.

What lies before, between and after the two attentions of a block are functions of tensors only. They are compiled
once and serve all blocks; views of memory, attention and writes to states stay outside, so that nothing which changes
from block to block of a video reaches the compiler.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arl2.compiling import allow_variants
from arl2.gated_delta import WriteBackend, gated_delta_write
from arl2.hybrid_attention import HybridAttention, StateView, l2_norm
from arl2.inference.linear import FusedLinear, inference_linear
from arl2.lora import merged_weight
from wan.attention import attention
from wan.memory import KVUpdate
from wan.model import Block, gated, modulate
from wan.rope import Rotary, rotate

Function = Callable[..., Any]


def uncompiled(function: Function) -> Function:
    """The function as it is."""
    return function


@cache
def compiled(function: Function) -> Function:
    """The function compiled; one compilation serves all calls with tensors of the same sizes."""
    allow_variants()
    return torch.compile(function, dynamic=False, fullgraph=True)


class FastBlock(nn.Module):
    """A block with softmax attention.

    Args:
        block: whose parameters it shares.
        fp8: see `arl2.inference.linear.FP8Linear`.
        stage: what makes the functions between attentions fast: `compiled` or `uncompiled`.
    """

    def __init__(self, block: Block, fp8: bool, stage: Callable[[Function], Function]) -> None:
        super().__init__()
        self.block = block
        self.stage = stage
        self.attention = block.self_attn
        self.projections = FusedLinear(self.parts(), fp8)
        self.out = inference_linear(self.attention.o, fp8)
        self.cross_q = inference_linear(block.cross_attn.q, fp8)
        self.cross_out = inference_linear(block.cross_attn.o, fp8)
        self.ffn_in = inference_linear(block.ffn[0], fp8)
        self.ffn_out = inference_linear(block.ffn[2], fp8)

    def parts(self) -> dict[str, nn.Linear]:
        """The projections of self-attention, in an order in which those that a pass needs are neighbours."""
        return {"q": self.attention.q, "k": self.attention.k, "v": self.attention.v}

    def forward(
        self,
        x_BLD: Tensor,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: Any,
        text_kv: tuple[Tensor, Tensor],
        attend: bool,
        remember: bool,
    ) -> tuple[Tensor, Any]:
        """See `wan.model.Block.forward`."""
        q, k, v = self.stage(softmax_tokens)(self, x_BLD, time_BF6D, rotary, attend)
        update = KVUpdate(k, v) if remember else None
        if not attend:
            return x_BLD, update
        keys, values, mask = view.with_block(k, v)
        mixed = attention(q, keys, values, mask_LM=mask, backend=self.attention.backend)
        return self.rest(x_BLD, mixed, None, time_BF6D, text_kv), update

    def rest(
        self,
        x_BLD: Tensor,
        mixed_BLHD: Tensor,
        recalled_BLHD: Tensor | None,
        time_BF6D: Tensor,
        text_kv: tuple[Tensor, Tensor],
    ) -> Tensor:
        """What follows self-attention."""
        x, q = self.stage(after_attention)(self, x_BLD, mixed_BLHD, recalled_BLHD, time_BF6D)
        crossed = attention(q, *text_kv, backend=self.block.cross_attn.backend)
        return self.stage(after_cross_attention)(self, x, crossed, time_BF6D)


class FastHybridBlock(FastBlock):
    """A block with hybrid attention. Its adapters, and φ_v, are folded into the projections as they are now."""

    def __init__(self, block: Block, fp8: bool, stage: Callable[[Function], Function]) -> None:
        attention = block.self_attn
        assert isinstance(attention, HybridAttention)
        self.adapted = attention.lora_q_A is not None and attention.lora_enabled
        super().__init__(block, fp8, stage)
        self.hybrid = attention

    def parts(self) -> dict[str, nn.Linear]:
        """See `FastBlock.parts`: a pass needs those up to the last that attends, or from the first that remembers."""
        layer = self.attention
        assert isinstance(layer, HybridAttention)
        small = {"gate": layer.gate_proj, "decay": layer.a_proj, "beta": layer.b_proj}
        if not self.adapted:
            written = {"v_state": mapped_linear(layer.v, layer.v.weight, layer.phi_v), "decay": small["decay"]}
            first = {"q": layer.q, "v": layer.v, "gate": small["gate"], "k": layer.k}
            return first | written | {"beta": small["beta"]}
        merged = {
            name: merged_weight(linear, a, b, layer.lora_scale)
            for name, linear, a, b in (
                ("q", layer.q, layer.lora_q_A, layer.lora_q_B),
                ("k", layer.k, layer.lora_k_A, layer.lora_k_B),
                ("v", layer.v, layer.lora_v_A, layer.lora_v_B),
            )
        }
        return {
            "q": layer.q,
            "k": layer.k,
            "v": layer.v,
            "q_state": like(layer.q, merged["q"], layer.q.bias),
            "gate": small["gate"],
            "k_state": like(layer.k, merged["k"], layer.k.bias),
            "v_state": mapped_linear(layer.v, merged["v"], layer.phi_v),
            "decay": small["decay"],
            "beta": small["beta"],
        }

    @property
    def attending(self) -> tuple[str, ...]:
        """The projections that attending needs."""
        return ("q", "k", "v", "q_state", "gate") if self.adapted else ("q", "v", "gate", "k")

    @property
    def remembering(self) -> tuple[str, ...]:
        """The projections that remembering needs."""
        return ("k_state" if self.adapted else "k", "v_state", "decay", "beta")

    def forward(
        self,
        x_BLD: Tensor,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: StateView,
        text_kv: tuple[Tensor, Tensor],
        attend: bool,
        remember: bool,
    ) -> tuple[Tensor, Any]:
        """See `wan.model.Block.forward`; the update is a `Write` that is still to be done."""
        state = view.state_BHKV
        read, written = self.stage(hybrid_tokens)(self, x_BLD, time_BF6D, rotary, state, attend, remember)
        update = None if written is None else Write(state, *written)
        if read is None:
            return x_BLD, update
        mixed = attention(read.q, read.k, read.v, backend=self.hybrid.backend)
        return self.rest(x_BLD, mixed, read.recalled, time_BF6D, text_kv), update


class Reading(NamedTuple):
    """Of a hybrid layer's tokens: q, k, v of the softmax in the block, and the gated read of the state."""

    q: Tensor
    k: Tensor
    v: Tensor
    recalled: Tensor


class Write(NamedTuple):
    """A write to a state: the arguments of `arl2.gated_delta.gated_delta_write`."""

    state_BHKV: Tensor
    k_BLHK: Tensor
    v_BLHV: Tensor
    log_decay_BLH: Tensor
    beta_BLH: Tensor


def written_states(writes: Sequence[Write], backend: WriteBackend) -> list[Tensor]:
    """The states after writes of several layers, done as one of a larger batch.

    A write walks through its tokens chunk by chunk, which leaves most of a GPU idle; nothing in a pass waits for it.
    """
    state, k, v, log_decay, beta = (torch.cat(parts) for parts in zip(*writes, strict=True))
    return list(gated_delta_write(state, k, v, log_decay, beta, backend=backend).chunk(len(writes)))


def fast_block(block: Block, fp8: bool, stage: Callable[[Function], Function]) -> FastBlock:
    """The counterpart of a block as it is switched now."""
    hybrid = isinstance(block.self_attn, HybridAttention) and block.self_attn.enabled
    return (FastHybridBlock if hybrid else FastBlock)(block, fp8, stage)


def like(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """A linear layer with other values."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
    other.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        # A copy: what is fused becomes a view, and a bias is one layer's only.
        other.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return other


@torch.no_grad()
def mapped_linear(linear: nn.Linear, weight: Tensor, phi: nn.Conv1d) -> nn.Linear:
    """A projection with these weights followed by a map of every head, as one linear layer; folded in float64."""
    maps_HOI = phi.weight.double().view(phi.groups, phi.out_channels // phi.groups, -1)
    heads = weight.double().unflatten(0, (phi.groups, -1))
    bias = None
    if linear.bias is not None:
        bias = (maps_HOI @ linear.bias.double().view(phi.groups, -1, 1)).flatten().to(weight.dtype)
    return like(linear, (maps_HOI @ heads).flatten(0, 1).to(weight.dtype), bias)


def block_modulation(block: Block, time_BF6D: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of self-attention, then of the feed-forward, each [B, F, D]."""
    return (block.modulation[:, None] + time_BF6D).unbind(dim=2)


def softmax_tokens(
    fast: FastBlock, x_BLD: Tensor, time_BF6D: Tensor, rotary: Rotary, attend: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q (if wanted), k and v of a softmax layer, ready for attention, [B, L, H, D]."""
    layer = fast.attention
    shift, scale, *_ = block_modulation(fast.block, time_BF6D)
    tokens = modulate(fast.block.norm1(x_BLD), shift, scale)
    *q, k, v = fast.projections(tokens, ("q", "k", "v") if attend else ("k", "v"))
    k, v = rotate(layer.heads(layer.norm_k(k)), rotary), layer.heads(v)
    return (rotate(layer.heads(layer.norm_q(q[0])), rotary) if attend else None), k, v


def hybrid_tokens(
    fast: FastHybridBlock,
    x_BLD: Tensor,
    time_BF6D: Tensor,
    rotary: Rotary,
    state_BHKV: Tensor,
    attend: bool,
    remember: bool,
) -> tuple[Reading | None, tuple[Tensor, Tensor, Tensor, Tensor] | None]:
    """What a hybrid layer attends with, and the k̂, v̂, log decay and write strength that it remembers."""
    layer = fast.hybrid
    shift, scale, *_ = block_modulation(fast.block, time_BF6D)
    tokens = modulate(fast.block.norm1(x_BLD), shift, scale)
    names = (fast.attending if attend else ()) + (fast.remembering if remember else ())
    names = tuple(dict.fromkeys(names))
    out = dict(zip(names, fast.projections(tokens, names), strict=True))
    read = written = None
    if attend:
        q = layer.norm_q(out["q"])
        query = layer.norm_q(out["q_state"]) if fast.adapted else q
        query = l2_norm(rotate(layer.mapped(query, layer.phi_q), rotary))
        recalled = out["gate"].sigmoid()[..., None] * layer.read(state_BHKV, query)
        k = rotate(layer.heads(layer.norm_k(out["k"])), rotary)
        read = Reading(rotate(layer.heads(q), rotary), k, layer.heads(out["v"]), recalled)
    if remember:
        key = layer.norm_k(out["k_state"] if fast.adapted else out["k"])
        key = l2_norm(rotate(layer.mapped(key, layer.phi_k), rotary))
        decay, beta = layer.log_decay_of(out["decay"]), layer.beta_of(out["beta"])
        # Contiguous, so that a write that waits does not hold on to all other projections.
        written = (key, layer.heads(out["v_state"]).contiguous(), decay, beta)
    return read, written


def after_attention(
    fast: FastBlock, x_BLD: Tensor, mixed_BLHD: Tensor, recalled_BLHD: Tensor | None, time_BF6D: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens after self-attention, and their queries to the text [B, L, H, D]."""
    block = fast.block
    _, _, gate, *_ = block_modulation(block, time_BF6D)
    mixed = mixed_BLHD if recalled_BLHD is None else mixed_BLHD + recalled_BLHD
    x = x_BLD + gated(fast.out(mixed.flatten(2)), gate)
    return x, block.cross_attn.heads(block.cross_attn.norm_q(fast.cross_q(block.norm3(x))))


def after_cross_attention(fast: FastBlock, x_BLD: Tensor, crossed_BLHD: Tensor, time_BF6D: Tensor) -> Tensor:
    """The tokens that leave the block."""
    block = fast.block
    *_, shift, scale, gate = block_modulation(block, time_BF6D)
    x = x_BLD + fast.cross_out(crossed_BLHD.flatten(2))
    return x + gated(fast.ffn_out(block.ffn[1](fast.ffn_in(modulate(block.norm2(x), shift, scale)))), gate)
