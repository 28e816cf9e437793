"""Which samples a step sees, and with what noise: functions of the seed and the step, without a state.

A run that resumes needs only the number of its step, and a sample is the same on however many ranks the batch is
divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.distillation.data import Samples
from arl2.rollout import FewStepSampler, generator_for, num_blocks, seed_for
from wan.flow import shift_sigma
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds


class LevelSource(StrEnum):
    """Where noise levels come from: the generator's own steps, or uniform ones through the timestep shift."""

    LIST = "list"
    UNIFORM = "uniform"


@dataclass
class NoiseLevels:
    """At which noise levels a block is compared with the teacher.

    Attributes:
        source: list for the generator's own steps, drawn without replacement; uniform for uniform levels, mapped
            through the timestep shift.
        per_block: levels of every block in every step.
    """

    source: LevelSource = LevelSource.LIST
    per_block: Annotated[int, Bounds(1, 1000)] = 1

    def check(self, steps: int) -> None:
        """Make sure that there are as many levels.

        Raises:
            InputError: more than the generator has `steps`.
        """
        if self.source is LevelSource.LIST and self.per_block > steps:
            raise InputError(
                f"levels.per_block {self.per_block} is more than the generator's {steps} steps: "
                "take fewer, or levels.source=uniform"
            )

    def draw(self, blocks: int, sampler: FewStepSampler, shift: float, generator: torch.Generator) -> Tensor:
        """Levels of the blocks of a video, [N, P]."""
        if self.source is LevelSource.UNIFORM:
            return shift_sigma(torch.rand(blocks, self.per_block, generator=generator), shift)
        order = torch.rand(blocks, len(sampler.sigmas), generator=generator).argsort(dim=1)
        return torch.tensor(sampler.sigmas)[order[:, : self.per_block]]


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, samples: int) -> Tensor:
    """The order of an epoch, [samples]."""
    return torch.randperm(samples, generator=generator_for(seed, "epoch", epoch))


@dataclass(frozen=True)
class Batches:
    """Makes the batches of a run: noise on the CPU, latents and text where the data has them.

    (Noise of 64 videos of the toy world takes 9 ms, beside the step that is being computed: no need to draw it on the
    device, where it would depend on the number of ranks.)

    Attributes:
        data: the samples.
        seed: of order, levels and noise.
        global_batch: samples of an optimiser step, on all ranks together.
        frames_per_block: latent frames of a block.
        levels: see there.
        sampler: the generator's steps.
        shift: timestep shift of uniform levels.
        own_rollout: whether noise for the student's own rollout is needed.
        text_dtype: of the embeddings.
    """

    data: Samples
    seed: int
    global_batch: int
    frames_per_block: int
    levels: NoiseLevels
    sampler: FewStepSampler
    shift: float
    own_rollout: bool = False
    text_dtype: torch.dtype = torch.float32

    def __call__(self, step: int, places: Sequence[int]) -> tuple[VideoBatch, BatchNoise]:
        """Samples of a step by their places in its global batch.

        Raises:
            InputError: a sample cannot be read.
        """
        latents, text = self.data.gather([self.sample_at(step * self.global_batch + place) for place in places])
        noise = self._noise_of(step, places, latents.shape[1:])
        return VideoBatch(latents, text.to(self.text_dtype)), noise

    def blank(self, step: int, places: Sequence[int]) -> tuple[VideoBatch, BatchNoise]:
        """Zeros in the place of samples that cannot be read, with the noise of theirs."""
        shape, width = self.data.latents_shape, self.data.text_shape[1]
        latents, text = torch.zeros(len(places), *shape), torch.zeros(len(places), 1, width, dtype=self.text_dtype)
        return VideoBatch(latents, text), self._noise_of(step, places, latents.shape[1:])

    def sample_at(self, position: int) -> int:
        """Index of the sample that comes at a position of the run: every epoch has an order of its own."""
        epoch, place = divmod(position, len(self.data))
        return int(epoch_order(self.seed, epoch, len(self.data))[place])

    def _noise_of(self, step: int, places: Sequence[int], shape: torch.Size) -> BatchNoise:
        noise = [self._noise(step, place, shape) for place in places]
        levels, drawn = (torch.stack(parts) for parts in zip(*noise, strict=True))
        return BatchNoise(levels, drawn, tuple(seed_for(self.seed, step, place, "objective") for place in places))

    def _noise(self, step: int, place: int, shape: torch.Size) -> tuple[Tensor, Tensor]:
        generator = generator_for(self.seed, step, place)
        blocks = num_blocks(shape[0], self.frames_per_block)
        levels_NP = self.levels.draw(blocks, self.sampler, self.shift, generator)
        draws = self.levels.per_block + (len(self.sampler.sigmas) if self.own_rollout else 0)
        return levels_NP, torch.randn(blocks, draws, self.frames_per_block, *shape[1:], generator=generator)
