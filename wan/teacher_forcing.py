"""Parallel training forward: all blocks denoised at once, each after the given clean blocks before it."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from wan.memory import Memory
from wan.model import CausalWanModel, PassOutput, TextKV
from wan.parallel import ParallelLayout


def teacher_forced_flow(
    model: CausalWanModel,
    noisy_BFCHW: Tensor,
    timesteps_BF: Tensor,
    text: Tensor | TextKV,
    frames_per_block: int,
    clean_BFCHW: Tensor | None = None,
    window_frames: int | None = None,
    sink_frames: int = 0,
) -> Tensor:
    """Compute the flow of all blocks of a video; equal to the block loop that remembers the same latents.

    Args:
        model: any causal model; hybrid layers included.
        noisy_BFCHW: noisy latents of the whole video.
        timesteps_BF: their timesteps.
        text: as in `CausalWanModel.forward`.
        frames_per_block: latent frames per block.
        clean_BFCHW: latents that are remembered (teacher forcing). Without them the noisy latents are remembered, at
            their own timesteps (diffusion forcing).
        window_frames, sink_frames: as in `wan.memory.MemorySpec`.

    Returns:
        [B, F, C, H, W].

    Raises:
        InputError: the frames do not divide into blocks.
    """
    sequence = _sequence(model, noisy_BFCHW, timesteps_BF, frames_per_block, clean_BFCHW, window_frames, sink_frames)
    views = model.parallel_views(sequence.layout)
    flow = model(sequence.latents_BFCHW, sequence.timesteps_BF, text, views, sequence.frames_F).flow
    assert flow is not None
    return flow[:, -noisy_BFCHW.shape[1] :]


def teacher_forced_segment(
    model: CausalWanModel,
    noisy_BFCHW: Tensor,
    timesteps_BF: Tensor,
    text: Tensor | TextKV,
    frames_per_block: int,
    clean_BFCHW: Tensor,
    memory: Memory,
    start_frame: int,
    window_frames: int | None = None,
    sink_frames: int = 0,
    remember: bool = True,
) -> PassOutput:
    """Compute the flow of some blocks in the middle of a video at once, after a memory of those before them.

    Together, the segments of a video have the flow of `teacher_forced_flow`, at a cost in bytes that does not depend on
    the length of the video if softmax layers have a window.

    Args:
        model, text, frames_per_block: see `teacher_forced_flow`.
        noisy_BFCHW, timesteps_BF, clean_BFCHW: of the segment.
        memory: of the blocks before it, from `memory_for(…, differentiable=True)`; only read.
        start_frame: index in the video of the segment's first latent frame.
        window_frames, sink_frames: those of the memory.
        remember: whether to compute updates of the memory.

    Returns:
        flow [B, F, C, H, W], and the updates that commit the clean latents of the segment, or None.

    Raises:
        InputError: the frames do not divide into blocks.
    """
    sequence = _sequence(
        model, noisy_BFCHW, timesteps_BF, frames_per_block, clean_BFCHW, window_frames, sink_frames, start_frame
    )
    past = memory.read(sequence.layout.tokens_per_block) if start_frame else None
    views = model.parallel_views(sequence.layout, past)
    flow, updates = model(
        sequence.latents_BFCHW, sequence.timesteps_BF, text, views, sequence.frames_F, remember=remember, attend=True
    )
    assert flow is not None
    return PassOutput(flow[:, -noisy_BFCHW.shape[1] :], updates)


def teacher_forced_layers(
    model: CausalWanModel,
    noisy_BFCHW: Tensor,
    timesteps_BF: Tensor,
    text: Tensor | TextKV,
    frames_per_block: int,
    clean_BFCHW: Tensor,
) -> Iterator[int]:
    """Run the layers of `teacher_forced_flow` one by one; the caller may use a layer's result before the next runs.

    Every `next` runs in the contexts of its caller. The flow is not computed.

    Args:
        model, noisy_BFCHW, timesteps_BF, text, frames_per_block, clean_BFCHW: see `teacher_forced_flow`.

    Yields:
        The index of the layer that has run.
    """
    sequence = _sequence(model, noisy_BFCHW, timesteps_BF, frames_per_block, clean_BFCHW)
    text_kv = model.embed_text(text) if isinstance(text, Tensor) else text
    x, rotary, _, time_BF6D = model.embed(sequence.latents_BFCHW, sequence.timesteps_BF, sequence.frames_F)
    views = model.parallel_views(sequence.layout)
    for layer, (block, view, kv) in enumerate(zip(model.layers(), views, text_kv, strict=True)):
        x, _ = block(x, time_BF6D, rotary, view, kv, attend=True, remember=False)
        yield layer


class _Sequence(NamedTuple):
    """All blocks of a video as one sequence, and the views' layout of it."""

    latents_BFCHW: Tensor
    timesteps_BF: Tensor
    frames_F: Tensor
    layout: ParallelLayout


def _sequence(
    model: CausalWanModel,
    noisy_BFCHW: Tensor,
    timesteps_BF: Tensor,
    frames_per_block: int,
    clean_BFCHW: Tensor | None,
    window_frames: int | None = None,
    sink_frames: int = 0,
    start_frame: int = 0,
) -> _Sequence:
    num_frames, _, height, width = noisy_BFCHW.shape[1:]
    frames = torch.arange(start_frame, start_frame + num_frames, device=noisy_BFCHW.device)
    halves = 1 if clean_BFCHW is None else 2
    latents, timesteps = noisy_BFCHW, timesteps_BF
    if clean_BFCHW is not None:
        latents = torch.cat([clean_BFCHW, noisy_BFCHW], dim=1)
        timesteps = torch.cat([torch.zeros_like(timesteps_BF), timesteps_BF], dim=1)
    tokens = model.tokens_per_frame(height, width)
    device = noisy_BFCHW.device
    layout = ParallelLayout(
        num_frames, frames_per_block, tokens, halves, device, window_frames, sink_frames, start_frame
    )
    return _Sequence(latents, timesteps, frames.repeat(halves), layout)
