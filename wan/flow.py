"""Flow matching: the noise schedule and the conversions between velocity, clean latent and noise.

x_t = (1 - σ)·x0 + σ·noise, the network predicts the velocity v = noise - x0, hence x0 = x_t - σ·v.
Pure mathematics: nothing here knows a solver or a model. Timesteps run from 1000 (noise) to 0 (clean).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated

import torch
from torch import Tensor

from wan.utils.ranges import Bounds, check_ranges

NUM_TRAIN_TIMESTEPS = 1000
Shift = Annotated[float, Bounds(0.001, 1000)]
"""How far noise levels are moved; beyond it float32 cannot tell the levels apart."""


def shift_sigma(u: Tensor, shift: float) -> Tensor:
    """σ(u) = s·u / (1 + (s - 1)·u): moves a uniform noise level towards noise for s > 1."""
    return shift * u / (1 + (shift - 1) * u)


def _per_sample(sigma: Tensor, like: Tensor) -> Tensor:
    """Give σ trailing axes so that it broadcasts against `like`, whose leading axes it has."""
    return sigma.reshape(sigma.shape + (1,) * (like.ndim - sigma.ndim))


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """x_t = (1 - σ)·x0 + σ·noise, in float32 at least, returned in the dtype of `x0`.

    Args:
        x0, noise: [...] of one shape.
        sigma: noise levels in [0, 1], of any number of leading axes of `x0`.
    """
    dtype = torch.promote_types(x0.dtype, torch.float32)
    sigma = _per_sample(sigma.to(dtype), x0)
    return ((1 - sigma) * x0.to(dtype) + sigma * noise.to(dtype)).to(x0.dtype)


def flow_to_x0(flow: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """x0 = x_t - σ·v, computed in float64, returned in the dtype of `x_t`."""
    sigma = _per_sample(sigma.double(), x_t)
    return (x_t.double() - sigma * flow.double()).to(x_t.dtype)


def x0_to_flow(x0: Tensor, x_t: Tensor, sigma: Tensor) -> Tensor:
    """v = (x_t - x0) / σ, computed in float64, returned in the dtype of `x_t`; σ must not be 0."""
    sigma = _per_sample(sigma.double(), x_t)
    return ((x_t.double() - x0.double()) / sigma).to(x_t.dtype)


@dataclass(frozen=True)
class FlowSchedule:
    """The shifted table of 1000 noise levels that Causal Forcing trains and samples with.

    Attributes:
        shift: s of `shift_sigma`; 5 for the few-step models.
    """

    shift: Shift

    def __post_init__(self) -> None:
        check_ranges(self)

    @cached_property
    def sigmas(self) -> Tensor:
        """Noise levels from 1 downwards, [1000] float32; 0 is not among them."""
        u = torch.arange(NUM_TRAIN_TIMESTEPS, 0, -1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
        return shift_sigma(u, self.shift).float()

    @cached_property
    def timesteps(self) -> Tensor:
        """1000·σ, [1000] float32."""
        return self.sigmas * NUM_TRAIN_TIMESTEPS

    @cached_property
    def training_weights(self) -> Tensor:
        """Loss weight of every table entry, [1000] float32 with mean 1: a bell centred on timestep 500."""
        bell = torch.exp(-2 * ((self.timesteps.double() - NUM_TRAIN_TIMESTEPS / 2) / NUM_TRAIN_TIMESTEPS) ** 2)
        bell = bell - bell.min()
        return (bell * (NUM_TRAIN_TIMESTEPS / bell.sum())).float()

    def nearest_index(self, timesteps: Tensor) -> Tensor:
        """Index of the table entry nearest to each timestep, the first one on a tie; any shape."""
        distance = (self.timesteps.to(timesteps.device) - timesteps.float()[..., None]).abs()
        return distance.argmin(dim=-1)

    def sigma_at(self, timesteps: Tensor) -> Tensor:
        """σ of the table entry nearest to each timestep. Timestep 0 gives the last, non-zero level."""
        return self.sigmas.to(timesteps.device)[self.nearest_index(timesteps)]

    def weight_at(self, timesteps: Tensor) -> Tensor:
        """Training weight of the table entry nearest to each timestep."""
        return self.training_weights.to(timesteps.device)[self.nearest_index(timesteps)]

    def warp(self, steps: Sequence[int]) -> Tensor:
        """Timesteps of a step list counted on the unshifted table: 750 becomes 937.5 at shift 5; 0 stays 0."""
        table = torch.cat([self.timesteps, torch.zeros(1)])
        return table[torch.tensor([NUM_TRAIN_TIMESTEPS - step for step in steps])]


def timestep_embedding(timesteps: Tensor, dim: int) -> Tensor:
    """Sinusoids of (fractional) timesteps: cosines, then sines.

    Args:
        timesteps: any shape [...].
        dim: even number of channels.

    Returns:
        [..., dim] in float64.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timesteps.device) / half
    angles = timesteps.double()[..., None] * torch.exp(-math.log(10000) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
