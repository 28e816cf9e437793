"""Batches of videos and noise, and iteration over their blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from arl2.rollout import generator_for, num_blocks
from wan.flow import NUM_TRAIN_TIMESTEPS, add_noise


@dataclass(frozen=True)
class VideoBatch:
    """Videos of a training batch.

    Attributes:
        latents_BFCHW: clean latents.
        text_BTD: text embeddings.
    """

    latents_BFCHW: Tensor
    text_BTD: Tensor

    def to(self, device: torch.device) -> Self:
        """Copy of the batch on another device."""
        return type(self)(*(x.to(device, non_blocking=True) for x in (self.latents_BFCHW, self.text_BTD)))


@dataclass(frozen=True)
class BatchNoise:
    """Everything random about a batch: for B videos of N blocks, each compared with the teacher P times.

    Attributes:
        levels_BNP: σ of the comparisons.
        noise_BNPFCHW: noise added to each block; entries beyond the P of the levels are for the self-rollout.
        seeds: a seed per video for further draws of an objective; a function of the run's seed, step and video.
    """

    levels_BNP: Tensor
    noise_BNPFCHW: Tensor
    seeds: tuple[int, ...] = ()

    @property
    def num_noise_levels(self) -> int:
        """Noise levels per block."""
        return self.levels_BNP.shape[2]

    def to(self, device: torch.device) -> Self:
        """Copy of the noise on another device."""
        levels, noise = (x.to(device, non_blocking=True) for x in (self.levels_BNP, self.noise_BNPFCHW))
        return type(self)(levels, noise, self.seeds)

    def in_order_of_sampling(self) -> Self:
        """The same comparisons of every block, from the noisiest to the cleanest, as a sampler goes through them."""
        order = self.levels_BNP.argsort(dim=2, descending=True)
        levels, noise = self.levels_BNP.gather(2, order), self.noise_BNPFCHW.clone()
        of_comparisons = noise[:, :, : self.num_noise_levels]
        places = order.view(*order.shape, *(1,) * (noise.ndim - 3)).expand_as(of_comparisons)
        noise[:, :, : self.num_noise_levels] = of_comparisons.gather(2, places)
        return type(self)(levels, noise, self.seeds)

    def of_rollout(self, block: int, step: int) -> Tensor:
        """Noise of a block before a step of the self-rollout, [B, F, C, h, w]."""
        return self.noise_BNPFCHW[:, block, self.num_noise_levels + step]

    def applied(self, clean_BFCHW: Tensor, block: int, place: int) -> tuple[Tensor, Tensor]:
        """Add the noise of one comparison to a block; returns noisy latents and timesteps [B, 1]."""
        level_B = self.levels_BNP[:, block, place]
        noisy = add_noise(clean_BFCHW, self.noise_BNPFCHW[:, block, place], level_B)
        return noisy, level_B[:, None] * NUM_TRAIN_TIMESTEPS

    def disturbed(self, clean_BFCHW: Tensor, block: int, most: float) -> Tensor:
        """Add noise to what is remembered of a block, at a level that is uniform in [0, most].

        Level and noise of a video depend on its seed and the block alone. They are drawn on the CPU.
        """
        generators = self._generators(clean_BFCHW, "context", block)
        level_B = torch.stack([most * torch.rand((), generator=generator) for generator in generators])
        shape = clean_BFCHW.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        return add_noise(clean_BFCHW, noise.to(clean_BFCHW), level_B.to(clean_BFCHW.device))

    def resampled(self, clean_BFCHW: Tensor, frames_per_block: int, step: int, sigma: float) -> Tensor:
        """Add noise to all blocks of a video at one level, for a step of the student's sampler.

        The noise of a video depends on its seed, the step and the block alone. It is drawn on the CPU.
        """
        noisy = []
        for number, block in enumerate(clean_BFCHW.split(frames_per_block, dim=1)):
            generators = self._generators(block, "resampled", step, number)
            noise = torch.stack([torch.randn(block.shape[1:], generator=generator) for generator in generators])
            noisy.append(add_noise(block, noise.to(block), block.new_full((len(block),), sigma)))
        return torch.cat(noisy, dim=1)

    def _generators(self, videos: Tensor, *key: object) -> list[torch.Generator]:
        """A generator per video."""
        if len(self.seeds) != len(videos):
            raise ValueError(f"noise on the context needs a seed per video: {len(self.seeds)} for {len(videos)}")
        return [generator_for(seed, *key) for seed in self.seeds]


class TrainingBlock(NamedTuple):
    """Block of a batch.

    Attributes:
        number: index of the block from 0.
        start: index of its first latent frame.
        clean: its clean latents.
        last: whether it is the last of the video, which need not be remembered.
    """

    number: int
    start: int
    clean: Tensor
    last: bool


def video_blocks(batch: VideoBatch, frames_per_block: int) -> Iterator[TrainingBlock]:
    """Iterate over the blocks of a batch in order.

    Raises:
        InputError: the frames do not divide into blocks.
    """
    blocks = num_blocks(batch.latents_BFCHW.shape[1], frames_per_block)
    for number in range(blocks):
        start = number * frames_per_block
        clean = batch.latents_BFCHW[:, start : start + frames_per_block]
        yield TrainingBlock(number, start, clean, number + 1 == blocks)


def noisy_video(batch: VideoBatch, noise: BatchNoise, frames_per_block: int) -> tuple[Tensor, Tensor]:
    """Noisy latents of all blocks at their first level, [B, F, C, h, w], and timesteps of all frames, [B, F]."""
    blocks = [noise.applied(block.clean, block.number, 0) for block in video_blocks(batch, frames_per_block)]
    times = [timestep.expand(-1, frames_per_block) for _, timestep in blocks]
    return torch.cat([noisy for noisy, _ in blocks], dim=1), torch.cat(times, dim=1)
