"""What an objective is given, and how it walks through a video."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arl2.rollout import num_blocks


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
    for number in range(num_blocks(batch.latents_BFCHW.shape[1], frames_per_block)):
        start = number * frames_per_block
        frames = torch.arange(start, start + frames_per_block, device=batch.latents_BFCHW.device)
        yield TrainingBlock(number, start, frames, batch.latents_BFCHW[:, start : start + frames_per_block])
