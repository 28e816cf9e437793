"""Generating a video block by block: denoise, then remember.

The same loop serves inference and training. Teacher forcing and self-rollout differ only in which latents are
remembered.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import count, pairwise
from typing import Annotated

import torch
from torch import Tensor

from arl2.state_memory import StateMemory
from arl2.state_settings import NOISY_WRITES
from wan.flow import FlowSchedule, add_noise, flow_to_x0
from wan.memory import Memory
from wan.model import CausalWanModel, FlowModel, TextKV
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, typed

Noise = Callable[[int, int], Tensor]
"""(block, step) to the noise of that block before that step, [B, F, C, H, W]."""
StepHook = Callable[[int, int, float, Tensor], Tensor]
"""(block, step, timestep, latents after the step) to the latents to go on with, both [B, F, C, H, W]."""


@dataclass(frozen=True)
class Conditions:
    """Latents that a video is generated from, beside its text and what its memory holds.

    Attributes:
        kept_BFCHW: of the first frames of the first generated block. They stay as they are, at timestep 0, while the
            rest of the block is denoised beside them. None for no such frames.
        source_BFCHW: of all frames of a video. Every block starts from its frames of it, noised to the level of the
            first step that it takes, in place of noise alone. None for none.
        strength: fraction of the steps that a block with a source takes, the last ones, in (0, 1].
        on_step: called after every step; what it returns takes the place of the latents, but for the kept ones.
        context_BFCHW: of the last frames before the first generated block; read only by a rollout that computes frames
            anew.
    """

    kept_BFCHW: Tensor | None = None
    source_BFCHW: Tensor | None = None
    strength: float = 1.0
    on_step: StepHook | None = None
    context_BFCHW: Tensor | None = None

    def first_step(self, steps: int) -> int:
        """Index of the first of some steps that is taken; rounds as diffusers' video to video does."""
        return 0 if self.source_BFCHW is None else max(steps - min(int(steps * self.strength), steps), 0)


NO_CONDITIONS = Conditions()


@dataclass(frozen=True)
class FewStepSampler:
    """Denoising steps of a few-step generator.

    Attributes:
        timesteps: timestep of every step, in decreasing order.
        sigmas: noise level of every step.
        first_block: the steps of a video's first block, which has nothing to attend to; None for those of the others.
    """

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]
    first_block: "FewStepSampler | None" = None

    def __post_init__(self) -> None:
        typed(tuple[Annotated[float, Bounds(0, 1000)], ...], self.timesteps, "timesteps")
        typed(tuple[Annotated[float, Bounds(0, 1)], ...], self.sigmas, "sigmas")

    @classmethod
    def from_steps(
        cls, steps: Sequence[int], shift: float, warp: bool = True, first_block: Sequence[int] | None = None
    ) -> "FewStepSampler":
        """Build a sampler from a step list such as [1000, 750, 500, 250], warped through the shift by default.

        Args:
            first_block: the step list of a video's first block, if it has its own.

        Raises:
            InputError: the list is empty, not falling, or leaves 1..1000.
        """
        if not steps or steps[0] > 1000 or steps[-1] < 1 or any(a <= b for a, b in pairwise(steps)):
            raise InputError(f"denoising steps {list(steps)} must fall from at most 1000 to at least 1")
        schedule = FlowSchedule(shift)
        timesteps = schedule.warp(steps) if warp else torch.tensor(steps, dtype=torch.float32)
        first = None if first_block is None else cls.from_steps(first_block, shift, warp)
        return cls(tuple(timesteps.tolist()), tuple(schedule.sigma_at(timesteps).tolist()), first)

    def for_block(self, start_frame: int) -> "FewStepSampler":
        """The steps of the block that begins at a latent frame. A block after given frames is not a first one."""
        return self.first_block if self.first_block is not None and start_frame == 0 else self


def seed_for(*key: object) -> int:
    """Seed that is a function of some values, written out and hashed."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator_for(*key: object) -> torch.Generator:
    """Generator on the CPU, seeded by `seed_for`: what it draws does not depend on anything drawn before."""
    return torch.Generator().manual_seed(seed_for(*key))


class SeededNoise:
    """Noise of some videos as a function of their seeds, the block and the step.

    It is drawn on the CPU. So it is the same on every device and does not depend on earlier draws.

    Args:
        seeds: one per video.
        shape: shape of one block of one video, (F, C, h, w).
        device: device of the result, which is float32.
    """

    def __init__(self, seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> None:
        self._seeds = seeds
        self._shape = shape
        self._device = device

    def __call__(self, block: int, step: int) -> Tensor:
        # From pinned memory, which the GPU copies without the CPU waiting for it.
        noise = torch.empty(len(self._seeds), *self._shape, pin_memory=self._device.type == "cuda")
        for seed, of_video in zip(self._seeds, noise, strict=True):
            torch.randn(self._shape, generator=generator_for(seed, block, step), out=of_video)
        return noise.to(self._device, non_blocking=True)


def num_blocks(num_frames: int, frames_per_block: int) -> int:
    """Number of blocks of a video of `num_frames` generated latent frames.

    Raises:
        InputError: the frames do not divide into blocks.
    """
    if num_frames < 1 or num_frames % frames_per_block:
        nearest = max(1, round(num_frames / frames_per_block)) * frames_per_block
        raise InputError(
            f"{num_frames} latent frames do not divide into blocks of {frames_per_block}: give a multiple, "
            f"such as {nearest}"
        )
    return num_frames // frames_per_block


def _positions(start_frame: int, latents_BFCHW: Tensor) -> tuple[Tensor, int]:
    """Absolute frame indices of a block and its number of frames."""
    frames = latents_BFCHW.shape[1]
    return torch.arange(start_frame, start_frame + frames, device=latents_BFCHW.device), frames


def predict_flow(
    model: FlowModel, latents_BFCHW: Tensor, timestep: Tensor, text: TextKV, memory: Memory, start_frame: int
) -> Tensor:
    """Predict the velocity of a block at one timestep; a pure read of the memory.

    Of a hybrid whose states take noisy passes too (`arl2.state_settings.Writes.NOISY`), the pass is then written to the
    states, and to nothing else.

    Args:
        model, text, memory, start_frame: as in `denoise_block`.
        latents_BFCHW: noisy latents of the block.
        timestep: a scalar, one per video, [B, 1], or one per frame, [1, F].
    """
    positions, frames = _positions(start_frame, latents_BFCHW)
    views = memory.read(_block_tokens(model, latents_BFCHW))
    timesteps = timestep.expand(latents_BFCHW.shape[0], frames)
    written = layers_of_noisy_writes(memory)
    if not written:
        flow = model(latents_BFCHW, timesteps, text, views, positions).flow
        assert flow is not None
        return flow
    if not isinstance(model, CausalWanModel):
        raise InputError(f"{NOISY_WRITES}: compute plainly")
    flow, updates = model(latents_BFCHW, timesteps, text, views, positions, remember=True, attend=True)
    assert flow is not None and updates is not None
    for layer in written:
        memory.layers[layer].commit(updates[layer])
    return flow


def layers_of_noisy_writes(memory: Memory) -> list[int]:
    """Layers of a memory that every pass is written to."""
    return [place for place, layer in enumerate(memory.layers) if isinstance(layer, StateMemory) and layer.takes_noisy]


def denoise_block(
    model: FlowModel,
    sampler: FewStepSampler,
    noise: Callable[[int], Tensor],
    text: TextKV,
    memory: Memory,
    start_frame: int,
    on_x0: Callable[[Tensor], None] = lambda x0: None,
    *,
    kept_BFCHW: Tensor | None = None,
    source_BFCHW: Tensor | None = None,
    first_step: int = 0,
    on_step: Callable[[int, float, Tensor], Tensor] | None = None,
) -> Tensor:
    """Turn noise into one block of clean latents. The memory is only read, except as in `predict_flow`.

    Args:
        model: predicts the velocity.
        sampler: denoising steps.
        noise: noise of the block before each step, [B, F, C, H, W]; that of the first step is the starting point.
        text: from `CausalWanModel.embed_text`.
        memory: memory of all earlier blocks.
        start_frame: absolute index of the block's first latent frame.
        on_x0: called with the x0 of every step.
        kept_BFCHW: clean latents of the block's first frames, [B, 0 < K < F, C, H, W], which stay as they are.
        source_BFCHW: latents whose first F frames, noised to the level of the first step, are the starting point.
        first_step: index of the first step that is taken.
        on_step: called with (step, timestep, latents) after every step; returns the latents to go on with.

    Returns:
        the last step's x0, [B, F, C, H, W].
    """
    x_t = noise(first_step)
    if source_BFCHW is not None:
        source = source_BFCHW[:, : x_t.shape[1]].to(x_t.dtype)
        x_t = add_noise(source, x_t, torch.full((), sampler.sigmas[first_step], device=x_t.device))
    x_t = with_kept(x_t, kept_BFCHW)
    for step in range(first_step, len(sampler.timesteps)):
        time, level = sampler.timesteps[step], sampler.sigmas[step]
        timestep = _timestep(time, x_t, kept_BFCHW)
        flow = predict_flow(model, x_t, timestep, text, memory, start_frame)
        x0 = with_kept(flow_to_x0(flow, x_t, torch.full((), level, device=x_t.device)), kept_BFCHW)
        on_x0(x0)
        x_t = x0
        if step + 1 < len(sampler.timesteps):
            x_t = add_noise(x0, noise(step + 1), torch.full((), sampler.sigmas[step + 1], device=x_t.device))
            x_t = with_kept(x_t, kept_BFCHW)
        if on_step is not None:
            x_t = with_kept(on_step(step, time, x_t), kept_BFCHW)
    return x_t


def with_kept(latents_BFCHW: Tensor, kept_BFCHW: Tensor | None) -> Tensor:
    """Latents of a block whose first frames are the kept ones, if there are any."""
    if kept_BFCHW is None:
        return latents_BFCHW
    return torch.cat([kept_BFCHW.to(latents_BFCHW.dtype), latents_BFCHW[:, kept_BFCHW.shape[1] :]], dim=1)


def _timestep(time: float, latents_BFCHW: Tensor, kept_BFCHW: Tensor | None) -> Tensor:
    """The timestep of a step: a scalar, or [1, F] with 0 for frames that are kept clean."""
    if kept_BFCHW is None:
        return torch.full((), time, device=latents_BFCHW.device)
    timesteps = torch.full((1, latents_BFCHW.shape[1]), time, device=latents_BFCHW.device)
    timesteps[:, : kept_BFCHW.shape[1]] = 0
    return timesteps


def remember_block(
    model: FlowModel,
    latents_BFCHW: Tensor,
    text: TextKV,
    memory: Memory,
    start_frame: int,
    timestep: float = 0.0,
) -> None:
    """Run the clean pass: the model once more on a finished block, whose updates are committed.

    Args:
        model, text, memory, start_frame: as in `denoise_block`.
        latents_BFCHW: the finished block, generated or given.
        timestep: context noise; 0 for clean latents.
    """
    positions, frames = _positions(start_frame, latents_BFCHW)
    timesteps = torch.full((latents_BFCHW.shape[0], frames), timestep, device=latents_BFCHW.device)
    views = memory.read(_block_tokens(model, latents_BFCHW))
    updates = model(latents_BFCHW, timesteps, text, views, positions, remember=True).updates
    assert updates is not None
    memory.commit(updates)


def remember_anew(
    model: FlowModel,
    latents_BFCHW: Tensor,
    frames_per_block: int,
    text: TextKV,
    memory: Memory,
    start_frame: int,
    timestep: float = 0.0,
) -> None:
    """Let a memory hold some finished blocks and nothing of what came before them.

    Block after block is remembered in the emptied memory, which equals one pass over all of them with a block-causal
    mask. Over a window that never held more, keys and values are no others than those of `remember_block`. Source: the
    recomputed cache of Krea Realtime 14B (github.com/krea-ai/realtime-video), which does so before every block.

    Args:
        model, text, memory, timestep: as in `remember_block`. States of hybrid layers forget earlier blocks too.
        latents_BFCHW: the blocks, one after another.
        frames_per_block: latent frames per block.
        start_frame: absolute index of their first latent frame.
    """
    memory.reset()
    for first in range(0, latents_BFCHW.shape[1], frames_per_block):
        block = latents_BFCHW[:, first : first + frames_per_block]
        remember_block(model, block, text, memory, start_frame + first, timestep)


def _block_tokens(model: FlowModel, latents_BFCHW: Tensor) -> int:
    height, width = latents_BFCHW.shape[-2:]
    return latents_BFCHW.shape[1] * model.tokens_per_frame(height, width)


@dataclass(frozen=True)
class GeneratedBlock:
    """A finished block.

    Attributes:
        index: number of the block from 0, context not counted.
        start_frame: absolute index of its first latent frame.
        latents_BFCHW: its clean latents.
    """

    index: int
    start_frame: int
    latents_BFCHW: Tensor


class Rollout:
    """A video between two of its blocks, see `rollout`: the state of the one loop that generates videos.

    A block is remembered when the next one is asked for. So the last block of a video is never remembered, and what its
    decoding needs can start first.

    Args:
        model, sampler, noise, text, memory, start_frame, context_noise, phase, conditions, recomputed_frames: as in
            `rollout`.
        before_remembering: called with latents and first frame of every block right before it is remembered.

    Attributes:
        model: computes the passes; may be replaced by another form of itself between blocks.
        text: of the next block; may be replaced between blocks.
        index: number of the next block, context not counted.
        start_frame: absolute index of the next block's first latent frame.
        pending_BFCHW: the last block, if it is not remembered yet.
        recent_BFCHW: latents that the memory is made of, where it is made anew before every block.
    """

    def __init__(
        self,
        model: FlowModel,
        sampler: FewStepSampler,
        noise: Noise,
        text: TextKV,
        memory: Memory,
        start_frame: int = 0,
        context_noise: float = 0.0,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        conditions: Conditions = NO_CONDITIONS,
        recomputed_frames: int = 0,
        before_remembering: Callable[[Tensor, int], None] = lambda latents_BFCHW, start_frame: None,
    ) -> None:
        self.model, self.text, self.memory = model, text, memory
        self.index, self.start_frame = 0, start_frame
        self.pending_BFCHW: Tensor | None = None
        self.recent_BFCHW = conditions.context_BFCHW
        self._sampler, self._noise, self._context_noise = sampler, noise, context_noise
        self._phase, self._conditions, self._recomputed_frames = phase, conditions, recomputed_frames
        self._before_remembering = before_remembering

    def next_block(self) -> GeneratedBlock:
        """Remember the last block, and generate the next."""
        self.remember()
        given, source = self._conditions, self._conditions.source_BFCHW
        with self._phase("denoise"):
            steps = self._sampler.for_block(self.start_frame)
            latents = denoise_block(
                self.model,
                steps,
                partial(self._noise, self.index),
                self.text,
                self.memory,
                self.start_frame,
                kept_BFCHW=given.kept_BFCHW if self.index == 0 else None,
                source_BFCHW=source if source is None else source[:, self.start_frame :],
                first_step=given.first_step(len(steps.timesteps)),
                on_step=None if given.on_step is None else partial(given.on_step, self.index),
            )
        block = GeneratedBlock(self.index, self.start_frame, latents)
        self.pending_BFCHW = latents
        self.index += 1
        self.start_frame += latents.shape[1]
        return block

    def remember(self) -> None:
        """Remember the last block, unless that is done."""
        latents = self.pending_BFCHW
        if latents is None:
            return
        frames = latents.shape[1]
        with self._phase("remember"):
            self._before_remembering(latents, self.start_frame - frames)
            if self._recomputed_frames:
                recent = latents if self.recent_BFCHW is None else torch.cat([self.recent_BFCHW, latents], dim=1)
                self.recent_BFCHW = recent = recent[:, -self._recomputed_frames :]
                first = self.start_frame - recent.shape[1]
                remember_anew(self.model, recent, frames, self.text, self.memory, first, self._context_noise)
            else:
                remember_block(
                    self.model, latents, self.text, self.memory, self.start_frame - frames, self._context_noise
                )
        self.pending_BFCHW = None


def rollout(
    model: FlowModel,
    sampler: FewStepSampler,
    noise: Noise,
    text: TextKV,
    memory: Memory,
    blocks: int | None,
    start_frame: int = 0,
    context_noise: float = 0.0,
    phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    conditions: Conditions = NO_CONDITIONS,
    recomputed_frames: int = 0,
) -> Iterator[GeneratedBlock]:
    """Generate a video block by block; each block is yielded before it is remembered.

    Yielding first lets the decoding of a block start while its clean pass runs.

    Args:
        model, text, memory: as in `denoise_block`; the memory may already hold context.
        sampler: denoising steps, those of the first block included.
        noise: noise of every block and step.
        blocks: number of blocks; None for as many as the caller asks for.
        start_frame: absolute index of the first latent frame, after the context.
        context_noise: timestep of the clean pass.
        phase: context manager entered around "denoise" and "remember", to time them.
        conditions: latents that blocks are made from, and a hook after every step.
        recomputed_frames: latent frames before every block that the memory is made of anew, see `remember_anew`, a
            multiple of a block's; 0 to remember every block once.

    Yields:
        every block. The last one is not remembered, since nothing reads it. To extend a video, call `remember_block`;
        to stop, change the text or go on between blocks, take a `Rollout`.
    """
    video = Rollout(
        model,
        sampler,
        noise,
        text,
        memory,
        start_frame,
        context_noise,
        phase,
        conditions,
        recomputed_frames,
    )
    indices: Iterable[int] = count() if blocks is None else range(blocks)
    for _ in indices:
        yield video.next_block()
