"""What an objective is given, and how it walks through a video."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arl2.model import HybridWanModel
from wan.errors import InputError
from wan.memory import Memory, MemorySpec


@dataclass(frozen=True)
class VideoBatch:
    """Videos to learn from.

    Attributes:
        latents_BFCHW: clean latents.
        text_BTD: text embeddings.
    """

    latents_BFCHW: Tensor
    text_BTD: Tensor


class TrainingBlock(NamedTuple):
    """One block of a batch.

    Attributes:
        number: from 0.
        start: its first latent frame.
        frames: absolute index of every latent frame.
        clean: its latents.
    """

    number: int
    start: int
    frames: Tensor
    clean: Tensor


def video_blocks(batch: VideoBatch, frames_per_block: int) -> Iterator[TrainingBlock]:
    """The blocks of a batch in order.

    Raises:
        InputError: the frames do not divide into blocks.
    """
    num_frames = batch.latents_BFCHW.shape[1]
    if num_frames % frames_per_block:
        raise InputError(f"{num_frames} latent frames do not divide into blocks of {frames_per_block}")
    for number, start in enumerate(range(0, num_frames, frames_per_block)):
        frames = torch.arange(start, start + frames_per_block, device=batch.latents_BFCHW.device)
        yield TrainingBlock(number, start, frames, batch.latents_BFCHW[:, start : start + frames_per_block])


def new_memory(model: HybridWanModel, batch: VideoBatch, differentiable: bool) -> Memory:
    """An empty memory for a batch; the teacher's inside `model.as_teacher()`."""
    latents = batch.latents_BFCHW
    return model.new_memory(
        MemorySpec(
            batch_size=latents.shape[0],
            tokens_per_frame=model.tokens_per_frame(*latents.shape[-2:]),
            device=latents.device,
            dtype=model.patch_embedding.weight.dtype,
            frames=latents.shape[1],
            differentiable=differentiable,
        )
    )
