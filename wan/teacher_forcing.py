"""Parallel training forward: all blocks denoised at once, each after the given clean blocks before it."""

import torch
from torch import Tensor

from wan.model import CausalWanModel, TextKV
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
    num_frames, _, height, width = noisy_BFCHW.shape[1:]
    frames = torch.arange(num_frames, device=noisy_BFCHW.device)
    halves = 1 if clean_BFCHW is None else 2
    latents, timesteps = noisy_BFCHW, timesteps_BF
    if clean_BFCHW is not None:
        latents = torch.cat([clean_BFCHW, noisy_BFCHW], dim=1)
        timesteps = torch.cat([torch.zeros_like(timesteps_BF), timesteps_BF], dim=1)
    layout = ParallelLayout(
        num_frames,
        frames_per_block,
        model.tokens_per_frame(height, width),
        halves,
        noisy_BFCHW.device,
        window_frames,
        sink_frames,
    )
    flow = model(latents, timesteps, text, model.parallel_views(layout), frames.repeat(halves)).flow
    assert flow is not None
    return flow[:, -num_frames:]
