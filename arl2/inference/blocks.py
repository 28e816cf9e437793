"""Blocks of the transformer for inference: the computation of `wan.model.Block`, split at its attentions.

The parts before, between and after the two attentions of a block are functions of tensors only. They are compiled
once and serve all blocks. Views of memory, attention and writes to states stay outside: they change from block to
block of a video, which would cause recompilation.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from arl2.hybrid_attention import HybridAttention, combine
from arl2.inference.fused_ops import DeferredResidual, FusedOps, StateRead
from arl2.inference.linear import FusedLinear, Weight, inference_linear, weight_name
from arl2.inference.parallel.sequence_parallel import SequenceParallel
from arl2.lora import merged_weight
from arl2.ops.compiling import allow_variants
from arl2.ops.gated_delta import DeltaInputs, WriteBackend, gated_delta_write
from arl2.state_memory import StateView
from arl2.state_settings import NOISY_WRITES, StateSettings, Writes
from wan.memory import KVUpdate, SlotUpdate, SlotView
from wan.model import Block, CausalWanModel
from wan.ops.attention import attention
from wan.ops.rope import Rotary
from wan.utils.errors import InputError

Function = Callable[..., Any]


def uncompiled(function: Function) -> Function:
    """Return the function unchanged."""
    return function


@cache
def compiled(function: Function) -> Function:
    """Compile a function; one compilation serves all calls with tensors of the same sizes."""
    allow_variants()
    return torch.compile(function, dynamic=False, fullgraph=True)


class BlockForm(NamedTuple):
    """How all blocks of a model compute.

    Attributes:
        ops: operations between products; they also decide whether products are in FP8.
        compile_fn: `compiled` or `uncompiled`, applied to the functions between attentions.
        parallel: exchange of tokens for heads; None if this rank has all of both.
    """

    ops: FusedOps
    compile_fn: Callable[[Function], Function]
    parallel: SequenceParallel | None = None


class FastBlock(nn.Module):
    """Inference form of a block with softmax attention.

    Args:
        block: block whose parameters it shares.
        form: how it computes.
    """

    def __init__(self, block: Block, form: BlockForm) -> None:
        super().__init__()
        self.ops, self.compile_fn, self.parallel = form
        fp8 = form.ops.fp8
        self.block = block
        self.attention = block.self_attn
        self.projections = FusedLinear(self.parts(), fp8)
        self.out = inference_linear(self.attention.o, fp8)
        self.cross_q = inference_linear(block.cross_attn.q, fp8)
        self.cross_out = inference_linear(block.cross_attn.o, fp8)
        self.ffn_in = inference_linear(block.ffn[0], fp8)
        self.ffn_out = inference_linear(block.ffn[2], fp8)

    def parts(self) -> dict[str, nn.Linear]:
        """Projections of self-attention by name, ordered so that those needed by a pass are neighbours."""
        return {"q": self.attention.q, "k": self.attention.k, "v": self.attention.v}

    def replaced(self) -> list[nn.Module]:
        """Linear layers of the block that a form in FP8 computes for."""
        layer, crossing = self.attention, self.block.cross_attn
        return [layer.q, layer.k, layer.v, layer.o, crossing.q, crossing.o, self.block.ffn[0], self.block.ffn[2]]

    def large_weights(self) -> list[Weight]:
        """Weights of the products that take most of the block's memory, apart from the model's own modules."""
        self.ffn_in, self.ffn_out = (
            like(linear, linear.weight, linear.bias) if isinstance(linear, nn.Linear) else linear
            for linear in (self.ffn_in, self.ffn_out)
        )
        return [Weight(module, weight_name(module)) for module in (self.projections.product, self.ffn_in, self.ffn_out)]

    def forward(
        self,
        stream: DeferredResidual,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: Any,
        text_kv: tuple[Tensor, Tensor],
        *,
        attend: bool,
        remember: bool,
        delta_out: DeltaInputs | None = None,
    ) -> tuple[DeferredResidual, Any]:
        """See `wan.model.Block.forward`; only a hybrid block needs `delta_out`."""
        x, q, k, v = self.compile_fn(softmax_tokens)(self, stream, time_BF6D, rotary, attend)
        if self.parallel is not None:
            k, v, *rest = self.parallel.to_heads([k, v, *([] if q is None else [q])], time_BF6D.shape[1])
            q = rest[0] if rest else None
        update = block_update(view, k, v, attend) if remember else None
        if not attend:
            return stream, update
        keys, values, mask = view.with_block(k, v)
        mixed = attention(q, keys, values, mask_LM=mask, backend=self.attention.backend)
        if self.parallel is not None:
            mixed = self.parallel.to_tokens(mixed, time_BF6D.shape[1])
        return self.rest(x, mixed, None, time_BF6D, text_kv), update

    def rest(
        self,
        x_BLD: Tensor,
        mixed_BLHD: Tensor,
        read_state: StateRead | None,
        time_BF6D: Tensor,
        text_kv: tuple[Tensor, Tensor],
    ) -> DeferredResidual:
        """Run the part of the block after self-attention."""
        x, q = self.compile_fn(after_attention)(self, x_BLD, mixed_BLHD, read_state, time_BF6D)
        crossed = attention(q, *text_kv, backend=self.block.cross_attn.backend)
        x, added = self.compile_fn(after_cross_attention)(self, x, crossed, time_BF6D)
        return DeferredResidual(x, added, self.block.modulation)


class FastHybridBlock(FastBlock):
    """Inference form of a block with hybrid attention.

    Adapters and φ_v are folded into the projections with their values at construction.
    """

    def __init__(self, block: Block, form: BlockForm) -> None:
        attention = block.self_attn
        assert isinstance(attention, HybridAttention)
        self.adapted = attention.lora_q_A is not None and attention.lora_enabled
        super().__init__(block, form)
        self.hybrid = attention

    def parts(self) -> dict[str, nn.Linear]:
        """See `FastBlock.parts`; attending needs the first ones, and remembering the last ones."""
        layer = self.attention
        assert isinstance(layer, HybridAttention) and layer.gate_proj is not None
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
        """Names of the projections that attending needs."""
        return ("q", "k", "v", "q_state", "gate") if self.adapted else ("q", "v", "gate", "k")

    @property
    def remembering(self) -> tuple[str, ...]:
        """Names of the projections that remembering needs."""
        return ("k_state" if self.adapted else "k", "v_state", "decay", "beta")

    def forward(
        self,
        stream: DeferredResidual,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: StateView,
        text_kv: tuple[Tensor, Tensor],
        *,
        attend: bool,
        remember: bool,
        delta_out: DeltaInputs | None = None,
    ) -> tuple[DeferredResidual, Any]:
        """See `wan.model.Block.forward`; instead of returning an update, the inputs of the write go to `delta_out`."""
        assert remember == (delta_out is not None)
        if self.parallel is not None:
            return self._forward_parallel(stream, time_BF6D, rotary, view, text_kv, attend, delta_out), None
        reading = self.compile_fn(hybrid_tokens)(self, stream, time_BF6D, rotary, attend, delta_out)
        if reading is None:
            return stream, None
        x, q, k, v, query, inverse_rms, gate = reading
        mixed = attention(q, k, v, backend=self.hybrid.backend)
        read_state = StateRead(view.state_BHKV, query, inverse_rms, gate, rotary)
        return self.rest(x, mixed, read_state, time_BF6D, text_kv), None

    def _forward_parallel(
        self,
        stream: DeferredResidual,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: StateView,
        text_kv: tuple[Tensor, Tensor],
        attend: bool,
        delta_out: DeltaInputs | None,
    ) -> DeferredResidual:
        """As `forward`, with this rank's tokens outside of attention, state and write, and its heads inside."""
        assert self.parallel is not None
        exchange, frames, layer = self.parallel, time_BF6D.shape[1], self.hybrid
        tokens = (*stream.x_BLD.shape[:2], layer.num_heads)
        mine = None if delta_out is None else empty_delta_inputs(stream.x_BLD, layer.head_dim, *tokens)
        reading = self.compile_fn(hybrid_tokens)(self, stream, time_BF6D, rotary, attend, mine)
        parts = []
        if mine is not None:
            parts += [mine.k, mine.v, mine.log_decay[..., None], mine.beta[..., None]]
        if reading is not None:
            x, q, k, v, query, inverse_rms, gate = reading
            query = self.compile_fn(state_queries)(self, query, inverse_rms, rotary)
            parts += [q, k, v, query, gate[..., None]]
        parts = exchange.to_heads(parts, frames)
        if delta_out is not None:
            k, v, log_decay, beta = parts[:4]
            for buffer, part in zip(delta_out, (k, v, log_decay[..., 0], beta[..., 0]), strict=True):
                buffer.copy_(part)
        if reading is None:
            return stream
        q, k, v, query, gate = parts[-5:]
        local = attention(q, k, v, backend=layer.backend)
        mixed = self.compile_fn(with_state_read)(self, local, view.state_BHKV, query, gate[..., 0])
        return self.rest(x, exchange.to_tokens(mixed, frames), None, time_BF6D, text_kv)


class PlainBlock(nn.Module):
    """The block as it is among blocks for inference: hybrid layers whose states have no fused form, see `fast_block`.

    Args:
        block: computes in the precision of its weights, uncompiled.
    """

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(
        self,
        stream: DeferredResidual,
        time_BF6D: Tensor,
        rotary: Rotary,
        view: StateView,
        text_kv: tuple[Tensor, Tensor],
        *,
        attend: bool,
        remember: bool,
        delta_out: None = None,
    ) -> tuple[DeferredResidual, Any]:
        """See `wan.model.Block.forward`."""
        tokens = stream.total(time_BF6D)
        x, update = self.block(tokens, time_BF6D, rotary, view, text_kv, attend=attend, remember=remember)
        return DeferredResidual(x, None, None), update


def block_update(view: Any, k_BLHD: Tensor, v_BLHD: Tensor, attend: bool) -> KVUpdate | SlotUpdate:
    """Update of a softmax layer's memory; without a copy where the view has a slot for the block.

    Args:
        attend: whether the block will attend, which puts it into its slot.
    """
    if not isinstance(view, SlotView):
        return KVUpdate(k_BLHD, v_BLHD)
    if not attend:
        view.write(k_BLHD, v_BLHD)
    return SlotUpdate(view)


def empty_delta_inputs(x: Tensor, head_dim: int, *tokens_and_heads: int) -> DeltaInputs:
    """Buffers for the inputs of a write, in the dtype of `x`; gates are float32 at least.

    One tensor per input: the compiler needs separate buffers for its outputs.

    Args:
        tokens_and_heads: leading axes of all inputs, [..., B, L, H].
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    k, v = (x.new_empty(*tokens_and_heads, head_dim) for _ in range(2))
    log_decay, beta = (x.new_empty(tokens_and_heads, dtype=wide) for _ in range(2))
    return DeltaInputs(k, v, log_decay, beta)


class BatchedStateWrites:
    """State writes of several layers, computed as one write of a larger batch.

    A single write goes through its tokens chunk by chunk, which leaves most of a GPU idle. Nothing in a pass waits for
    it. Each layer puts its inputs into a slice of the buffers that the kernel reads.

    Args:
        layers: number of layers.
        x_BLD: tokens of a layer, for their shape, dtype and device.
        heads: number of heads of the model.
        ranks: over which the tokens `x_BLD` and, inside the write, the heads are divided.
    """

    def __init__(self, layers: int, x_BLD: Tensor, heads: int, ranks: int = 1) -> None:
        batch, tokens, dim = x_BLD.shape
        self._all = empty_delta_inputs(x_BLD, dim // heads, layers, batch, tokens * ranks, heads // ranks)
        self._states: list[Tensor] = []

    def buffer(self, state_BHKV: Tensor) -> DeltaInputs:
        """Slice of the buffers for the inputs of the next layer, whose state is given."""
        place = len(self._states)
        self._states.append(state_BHKV)
        return DeltaInputs(*(x[place] for x in self._all))

    @property
    def full(self) -> bool:
        """True once every layer has asked for its buffer."""
        return len(self._states) == len(self._all.k)

    def states(self, backend: WriteBackend) -> list[Tensor]:
        """Compute the writes; returns the new states in the order of the layers."""
        k, v, log_decay, beta = (x.flatten(0, 1) for x in self._all)
        states = gated_delta_write(torch.cat(self._states), k, v, log_decay, beta, backend=backend)
        return list(states.chunk(len(self._states)))


def fast_block(block: Block, form: BlockForm) -> FastBlock | PlainBlock:
    """Inference form of a block, hybrid if its hybrid layer is enabled now.

    Raises:
        InputError: see `require_divisible`; or passes both attend and write.
    """
    layer = block.self_attn
    if not (isinstance(layer, HybridAttention) and layer.enabled):
        return FastBlock(block, form)
    if layer.state.has_fused_form:
        return FastHybridBlock(block, form)
    if layer.state.writes is Writes.NOISY:
        raise InputError(f"{NOISY_WRITES}: compute plainly")
    if form.parallel is not None:
        require_divisible(layer.state)
    return PlainBlock(block)


def require_divisible(state: StateSettings) -> None:
    """Make sure that the heads of a video can be divided over processes.

    Raises:
        InputError: states are of a form that is computed plainly only.
    """
    if not state.has_fused_form:
        raise InputError(
            f"states of {state} cannot be divided over processes that compute one video: start one process per video"
        )


def like(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Linear layer of the same size with other values."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=bias is not None, device="meta")
    other.weight = nn.Parameter(weight, requires_grad=False)
    if bias is not None:
        # A copy: fused parameters become views, and a bias must not be a view of two tensors.
        other.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    return other


@torch.no_grad()
def mapped_linear(linear: nn.Linear, weight: Tensor, phi: nn.Conv1d) -> nn.Linear:
    """Projection with these weights and the map of each head after it, folded in float64 into one linear layer."""
    maps_HOI = phi.weight.double().view(phi.groups, phi.out_channels // phi.groups, -1)
    heads = weight.double().unflatten(0, (phi.groups, -1))
    bias = None
    if linear.bias is not None:
        bias = (maps_HOI @ linear.bias.double().view(phi.groups, -1, 1)).flatten().to(weight.dtype)
    return like(linear, (maps_HOI @ heads).flatten(0, 1).to(weight.dtype), bias)


def softmax_tokens(
    fast: FastBlock, stream: DeferredResidual, time_BF6D: Tensor, rotary: Rotary, attend: bool
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Compute the inputs of a softmax layer's attention.

    Returns:
        the tokens, then q (None without `attend`), k and v, [B, L, H, D] each.
    """
    layer, ops = fast.attention, fast.ops
    x, tokens = ops.before_self_attention(fast.block, stream, time_BF6D)
    *q, k, v = fast.projections(tokens, ("q", "k", "v") if attend else ("k", "v"))
    normed = [(layer.norm_k, k), *((layer.norm_q, each) for each in q)]
    (k, *q), _ = ops.normed_heads(normed, (), layer.num_heads, rotary)
    return x, q[0] if attend else None, k, layer.heads(v)


def hybrid_tokens(
    fast: FastHybridBlock,
    stream: DeferredResidual,
    time_BF6D: Tensor,
    rotary: Rotary,
    attend: bool,
    delta_out: DeltaInputs | None,
) -> tuple[Tensor | None, ...] | None:
    """Compute the inputs of a hybrid layer's attention, of its state read and of its write.

    Args:
        attend: whether to compute the inputs of attention and of the read.
        delta_out: buffers for the inputs of the write; None if it is not wanted.

    Returns:
        the tokens, q, k and v, then query, norm factors and gate of a `StateRead`; None without `attend`.
    """
    layer, ops = fast.hybrid, fast.ops
    x, tokens = ops.before_self_attention(fast.block, stream, time_BF6D)
    names = (fast.attending if attend else ()) + (() if delta_out is None else fast.remembering)
    names = tuple(dict.fromkeys(names))
    out = dict(zip(names, fast.projections(tokens, names), strict=True))
    query, key = ("q_state", "k_state") if fast.adapted else ("q", "k")
    normed = [(layer.norm_q, out["q"]), (layer.norm_k, out["k"])] if attend else []
    asked = [(layer.norm_q, out[query])] if attend else []
    written = [] if delta_out is None else [(layer.norm_k, out[key])]
    heads, inverse_rms = ops.normed_heads(normed, asked + written, layer.num_heads, rotary)
    if delta_out is not None:
        ops.put_keys(layer, out[key], inverse_rms[-1], rotary, delta_out.k)
        delta_out.v.copy_(layer.heads(out["v_state"]))
        delta_out.log_decay.copy_(layer.log_decay_of(out["decay"]))
        delta_out.beta.copy_(layer.beta_of(out["beta"]))
    return (x, *heads, layer.heads(out["v"]), out[query], inverse_rms[0], out["gate"]) if attend else None


def after_attention(
    fast: FastBlock, x_BLD: Tensor, mixed_BLHD: Tensor, read_state: StateRead | None, time_BF6D: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens after self-attention, and their queries for cross-attention, [B, L, H, D]."""
    block, ops, cross = fast.block, fast.ops, fast.block.cross_attn
    if read_state is not None:
        assert isinstance(fast, FastHybridBlock)
        mixed_BLHD = ops.add_state_read(fast.hybrid, mixed_BLHD, read_state)
    mixed = fast.out(ops.operand(mixed_BLHD.flatten(2)))
    x, tokens = ops.before_cross_attention(block, x_BLD, mixed, time_BF6D)
    (q,), _ = ops.normed_heads([(cross.norm_q, fast.cross_q(tokens))], (), cross.num_heads)
    return x, q


def after_cross_attention(
    fast: FastBlock, x_BLD: Tensor, crossed_BLHD: Tensor, time_BF6D: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens after cross-attention, and the output of the feed-forward, which is still to be gated and added."""
    block, ops = fast.block, fast.ops
    crossed = fast.cross_out(ops.operand(crossed_BLHD.flatten(2)))
    x, tokens = ops.before_feed_forward(block, x_BLD, crossed, time_BF6D)
    return x, fast.ffn_out(ops.hidden(fast.ffn_in, block.ffn[1], tokens))


def state_queries(fast: FastHybridBlock, query_BLD: Tensor, inverse_rms_BL: Tensor | None, rotary: Rotary) -> Tensor:
    """Queries q̂ of a state read, [B, L, H, D]; see `StateRead` for the arguments."""
    return fast.ops.state_queries(fast.hybrid, query_BLD, inverse_rms_BL, rotary)


def with_state_read(
    fast: FastHybridBlock, local_BLHV: Tensor, state_BHKV: Tensor, query_BLHK: Tensor, gate_BLH: Tensor
) -> Tensor:
    """Local attention plus a gated state read; the gate comes before its sigmoid."""
    return combine(local_BLHV, fast.hybrid.read(state_BHKV, query_BLHK), gate_BLH.sigmoid())


def head_patches(model: CausalWanModel, stream: DeferredResidual, time_BFD: Tensor, time_BF6D: Tensor) -> Tensor:
    """Patches of the velocity from the tokens after the last layer; see `wan.model.Head`."""
    return model.head(stream.total(time_BF6D), time_BFD)


def flow(
    model: CausalWanModel, stream: DeferredResidual, time_BFD: Tensor, time_BF6D: Tensor, height: int, width: int
) -> Tensor:
    """See `wan.model.CausalWanModel.flow`."""
    return model.flow(stream.total(time_BF6D), time_BFD, height, width)
