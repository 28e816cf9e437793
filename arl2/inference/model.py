"""Transformer for inference: called like `wan.model.CausalWanModel`, equal to it within rounding."""

from collections.abc import Sequence
from copy import copy
from typing import Any, Self

import torch
from torch import Tensor

from arl2.inference.blocks import (
    BatchedStateWrites,
    BlockForm,
    FastBlock,
    FastHybridBlock,
    PlainBlock,
    compiled,
    fast_block,
    flow,
    head_patches,
    uncompiled,
)
from arl2.inference.fused_ops import DeferredResidual, FusedOps
from arl2.inference.linear import ParkedWeights, separate
from arl2.inference.parallel.sequence_parallel import SequenceParallel, ShardedWeights
from arl2.model import HybridWanModel
from arl2.ops.gated_delta import WriteBackend
from wan.model import CausalWanModel, PassOutput, TextKV

WRITES_TOGETHER = 8
"""Layers per batched state write: enough to fill a GPU, few enough to keep the buffers small."""


class InferenceModel:
    """Block-by-block forward of a model with fused projections, optionally compiled and in FP8.

    It shares the model's parameters, and reads adapters and switches at construction. Later in-place changes of a
    parameter are seen only in part. It has no gradients and no parallel form. Hybrid layers without a fused
    form, see `StateSettings`, compute plainly, see `arl2.inference.blocks.PlainBlock`.

    Args:
        model: stays usable, with the same names and values.
        compile: compile the functions between attentions; the first pass of every size is slow then.
        fp8: compute the linear layers of the blocks in FP8, see `arl2.inference.linear.FP8Linear`. Until `release`,
            their weights in the model are in host memory.
        kernels: compute the operations between products by Triton kernels, see
            `arl2.inference.fused_ops.require_kernels`.
        parallel: ranks that compute every pass together; all call with the same arguments, and all get the result.
            Memories hold the heads of their rank: see `wan.memory.MemorySpec.head_shards`.
        sharded: shards the large weights of all blocks but the first over these ranks; None keeps them whole. Until
            `release`, the parameters of the model that are sharded are on the meta device.
    """

    def __init__(
        self,
        model: HybridWanModel,
        compile: bool = False,
        fp8: bool = False,
        kernels: bool = False,
        parallel: SequenceParallel | None = None,
        sharded: ShardedWeights | None = None,
    ) -> None:
        self.model = model
        self._sharded = sharded
        self._parked = ParkedWeights()
        self._parallel = parallel
        self._fp8 = fp8
        self._compile_fn = compiled if compile else uncompiled
        attentions = list(model.hybrid_attentions().values())
        self._write_backend = attentions[0].write_backend if attentions else WriteBackend.AUTO
        form = BlockForm(new_fused_ops(fp8, kernels), self._compile_fn, parallel)
        self._blocks: list[FastBlock | PlainBlock] = []
        for block in model.layers():
            fast = fast_block(block, form)
            self._blocks.append(fast.eval())
            if sharded is not None and len(self._blocks) == 1:
                sharded.keep()  # no block runs before it, under which to fetch its weights
            elif sharded is not None:
                assert isinstance(fast, FastBlock)  # plain ones are refused where there are several ranks
                sharded.add(fast.large_weights(), block)
            if fp8 and isinstance(fast, FastBlock):
                self._parked.add(fast.replaced())
        if sharded is not None:
            sharded.finish()

    def without_kernels(self) -> Self:
        """Copy that shares the weights and uses the plain functions between products."""
        other = copy(self)
        other._blocks, ops = [copy(block) for block in self._blocks], new_fused_ops(self._fp8, kernels=False)
        for block in other._blocks:
            if isinstance(block, FastBlock):
                block.ops = ops
        return other

    def release(self) -> None:
        """Give the model's parameters tensors of their own again; this object must not be called afterwards."""
        self._blocks = []
        if self._sharded is not None:
            self._sharded.release()
        self._parked.release()
        separate(self.model)

    def tokens_per_frame(self, height: int, width: int) -> int:
        """See `wan.model.CausalWanModel.tokens_per_frame`."""
        return self.model.tokens_per_frame(height, width)

    @torch.no_grad()
    def __call__(
        self,
        latents_BFCHW: Tensor,
        timesteps_BF: Tensor,
        text: TextKV,
        views: Sequence[Any],
        frames_F: Tensor,
        remember: bool = False,
    ) -> PassOutput:
        """See `wan.model.CausalWanModel.forward`; the text comes from `embed_text`."""
        # Contiguous: each pattern of strides would be compiled anew.
        inputs = (x.contiguous() for x in (latents_BFCHW, timesteps_BF, frames_F))
        x, rotary, time_BFD, time_BF6D = self._compile_fn(CausalWanModel.embed)(self.model, *inputs)
        parallel, frames = self._parallel, latents_BFCHW.shape[1]
        if parallel is not None:
            x, rotary = parallel.shard(x, frames).contiguous(), parallel.shard_rotary(rotary, frames)
            parallel.begin_pass(x, self.model.config.dim // self.model.config.num_heads)
        stream, updates = DeferredResidual(x, None, None), list[Any]()
        waiting: list[int] = []
        to_write = sum(isinstance(block, FastHybridBlock) for block in self._blocks) if remember else 0
        for layer, (block, view, kv) in enumerate(zip(self._blocks, views, text, strict=True)):
            delta_out = None
            if self._sharded is not None:
                self._sharded.before(layer)
            if to_write and isinstance(block, FastHybridBlock):
                if not waiting:
                    ranks = 1 if parallel is None else parallel.size
                    writes = BatchedStateWrites(min(to_write, WRITES_TOGETHER), x, block.hybrid.num_heads, ranks)
                delta_out = writes.buffer(view.state_BHKV)
                waiting.append(layer)
            attend = not (remember and block is self._blocks[-1])
            stream, update = block(
                stream, time_BF6D, rotary, view, kv, attend=attend, remember=remember, delta_out=delta_out
            )
            updates.append(update)
            if waiting and writes.full:
                to_write -= len(waiting)
                for place, state in zip(waiting, writes.states(self._write_backend), strict=True):
                    updates[place] = state
                waiting.clear()
        if remember:
            return PassOutput(None, updates)
        sizes = latents_BFCHW.shape[-2:]
        if parallel is not None:
            patches = self._compile_fn(head_patches)(self.model, stream, time_BFD, time_BF6D)
            return PassOutput(self.model.unpatchify(parallel.gather(patches, frames), *sizes), None)
        return PassOutput(self._compile_fn(flow)(self.model, stream, time_BFD, time_BF6D, *sizes), None)


def new_fused_ops(fp8: bool, kernels: bool) -> FusedOps:
    """Plain operations or, with `kernels`, the Triton ones; see `require_kernels`."""
    if not kernels:
        return FusedOps(fp8)
    from arl2.inference.fused_ops_triton import TritonFusedOps  # needs Triton

    return TritonFusedOps(fp8)
