"""What an objective is given, and how it walks through a video."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

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


@dataclass(frozen=True)
class ObjectiveSettings:
    """What both objectives need to be told.

    Attributes:
        frames_per_block: latent frames of a block.
        noise_levels: σ at which every block is compared with the teacher before it is remembered.
        blocks_per_graph: blocks through which gradients go back; None for the whole video.
    """

    frames_per_block: int
    noise_levels: tuple[float, ...]
    blocks_per_graph: int | None = None

    def starts_graph(self, block: int) -> bool:
        """Whether the memory is to be detached before this block is remembered.

        Before, not after: afterwards it would cut the gradient of what the block writes.
        """
        return self.blocks_per_graph is not None and block % self.blocks_per_graph == 0


class TrainingBlock(NamedTuple):
    """One block of a batch.

    Attributes:
        number: from 0.
        start: its first latent frame.
        clean: its latents.
    """

    number: int
    start: int
    clean: Tensor


def video_blocks(batch: VideoBatch, frames_per_block: int) -> Iterator[TrainingBlock]:
    """The blocks of a batch in order.

    Raises:
        InputError: the frames do not divide into blocks.
    """
    for number in range(num_blocks(batch.latents_BFCHW.shape[1], frames_per_block)):
        start = number * frames_per_block
        yield TrainingBlock(number, start, batch.latents_BFCHW[:, start : start + frames_per_block])
