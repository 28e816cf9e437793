"""Deviation of a model's videos from its teacher's, for the same noise and text.

There are three measures, from expensive to cheap. The first compares the pixels of two rollouts. The second compares
their latents: each rollout uses its own context, so errors add up from block to block. The third compares single
predictions on a context that is given to both.
"""

import math
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from arl2.evaluation.eval_setup import EvalSetup
from arl2.rollout import Noise, num_blocks, predict_flow, remember_block, rollout
from wan.flow import add_noise
from wan.memory import Memory
from wan.model import TextKV
from wan.utils.errors import InputError


@dataclass(frozen=True)
class BlockErrors:
    """Squared differences between student and teacher.

    Attributes:
        mse_BN: mean squared difference of every video and block, float64 on the CPU.
    """

    mse_BN: Tensor

    @property
    def by_block(self) -> list[float]:
        """Mean over videos of each block."""
        return self.mse_BN.mean(dim=0).tolist()

    @property
    def by_video(self) -> list[float]:
        """Mean over blocks of each video."""
        return self.mse_BN.mean(dim=1).tolist()

    @property
    def mean(self) -> float:
        """Mean over videos and blocks."""
        return float(self.mse_BN.mean())


@dataclass(frozen=True)
class Deviation(BlockErrors):
    """Squared differences of the latents of two rollouts, and these latents.

    Attributes:
        student_BFCHW, teacher_BFCHW: latents, which can be decoded for `pixel_deviation`.
    """

    student_BFCHW: Tensor
    teacher_BFCHW: Tensor


@dataclass(frozen=True)
class PixelDeviation(BlockErrors):
    """Squared differences of two sets of videos in pixels from -1 to 1, and their flicker.

    Attributes:
        student_flicker, teacher_flicker: see `temporal_flicker`; mean over videos. Only their difference is meaningful,
            since motion lowers both.
    """

    student_flicker: float
    teacher_flicker: float

    @property
    def psnr(self) -> list[float]:
        """Peak signal-to-noise ratio in dB of every block, from the mean squared error over all videos.

        It is infinite where all videos are equal. (A mean of ratios would be infinite for a single equal pair.)
        """
        return [psnr(error) for error in self.by_block]


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio 10·log10(2² / mse) in dB of pixels from -1 to 1; infinite for 0."""
    return math.inf if mse == 0 else 10 * math.log10(4 / mse)


def temporal_flicker(pixels_BTCHW: Tensor) -> Tensor:
    """Temporal flicker (255 - MAE) / 255 of every video, [B]: 1 for a still video.

    MAE is the mean absolute difference of consecutive frames in bytes, over all pairs, pixels and channels, as in
    VBench's "temporal flickering".

    Raises:
        InputError: fewer than two frames.
    """
    frames = pixels_BTCHW.shape[1]
    if frames < 2:
        raise InputError(f"flicker of {frames} frames: give two at least")
    total = torch.zeros(len(pixels_BTCHW), dtype=torch.float64, device=pixels_BTCHW.device)
    before = _as_bytes(pixels_BTCHW[:, 0])
    for number in range(1, frames):
        now = _as_bytes(pixels_BTCHW[:, number])
        total += (now - before).abs().flatten(1).mean(dim=1, dtype=torch.float64)
        before = now
    return 1 - total.cpu() / (frames - 1) / 255


def _as_bytes(pixels: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to whole numbers from 0 to 255, in float32."""
    return ((pixels.float().clamp(-1, 1) + 1) * 127.5).round()


def _differences(student: Tensor, teacher: Tensor, sizes: list[int]) -> Tensor:
    """Mean squared difference [B, blocks] of two tensors [B, time, …], split along time into blocks of given sizes."""
    if student.shape != teacher.shape:
        raise InputError(f"{tuple(student.shape)} and {tuple(teacher.shape)} cannot be compared: give one shape")
    pairs = zip(student.split(sizes, dim=1), teacher.split(sizes, dim=1), strict=True)
    # Block by block: the difference of whole videos in double precision would take twice their memory.
    return torch.stack([(a.double() - b.double()).square().flatten(1).mean(dim=1).cpu() for a, b in pairs], dim=1)


def latent_deviation(student_BFCHW: Tensor, teacher_BFCHW: Tensor, frames_per_block: int) -> Deviation:
    """Compare two sets of latents block by block.

    Raises:
        InputError: different shapes, or frames that do not divide into blocks.
    """
    sizes = [frames_per_block] * num_blocks(student_BFCHW.shape[1], frames_per_block)
    return Deviation(_differences(student_BFCHW, teacher_BFCHW, sizes), student_BFCHW, teacher_BFCHW)


@torch.no_grad()
def pixel_deviation(
    student_pixels_BTCHW: Tensor, teacher_pixels_BTCHW: Tensor, frames_per_block: int, frames_per_latent: int = 4
) -> PixelDeviation:
    """Compare two sets of decoded videos block by block.

    Args:
        student_pixels_BTCHW, teacher_pixels_BTCHW: in [-1, 1]; the first latent frame is one frame.
        frames_per_block: latent frames per block.
        frames_per_latent: frames per later latent frame, the VAE's `temporal_compression`.

    Raises:
        InputError: different shapes, or frames that are not those of whole blocks.
    """
    frames = student_pixels_BTCHW.shape[1]
    if (frames - 1) % frames_per_latent:
        raise InputError(f"{frames} frames are not those of whole latents: expected 1 + {frames_per_latent}·k")
    blocks = num_blocks((frames - 1) // frames_per_latent + 1, frames_per_block)
    whole = frames_per_block * frames_per_latent
    sizes = [whole - frames_per_latent + 1] + [whole] * (blocks - 1)
    student, teacher = (pixels.clamp(-1, 1) for pixels in (student_pixels_BTCHW, teacher_pixels_BTCHW))
    errors = _differences(student, teacher, sizes)
    return PixelDeviation(errors, float(temporal_flicker(student).mean()), float(temporal_flicker(teacher).mean()))


def _memory_for(setup: EvalSetup, noise_BFCHW: Tensor, blocks: int) -> Memory:
    """Empty memory for videos of `blocks` blocks like the given one, allocated whole so that it need not grow."""
    batch, frames = noise_BFCHW.shape[:2]
    like = noise_BFCHW[:, :1].expand(batch, blocks * frames, *noise_BFCHW.shape[2:])
    return setup.transformer.memory_for(like, setup.window_frames, setup.sink_frames)


def _embedded(setup: EvalSetup, text_BTD: Tensor) -> TextKV:
    return setup.transformer.embed_text(text_BTD.to(setup.transformer.patch_embedding.weight))


@torch.no_grad()
def roll_out(
    setup: EvalSetup,
    text_BTD: Tensor,
    noise: Noise,
    blocks: int,
    *,
    as_teacher: bool = False,
    context_noise: float = 0.0,
) -> Tensor:
    """Generate latents of videos, each on its own context, [B, F, C, h, w].

    Args:
        setup: model in its current state, including layers that are switched off; the window is that of softmax layers.
        text_BTD: text embeddings.
        noise: noise of every block and step; a function, so that two models can share it.
        blocks: number of blocks; may exceed the length of training videos.
        as_teacher: whether to run the softmax model.
        context_noise: timestep of the clean pass.
    """
    with setup.transformer.as_teacher() if as_teacher else nullcontext():
        memory, text = _memory_for(setup, noise(0, 0), blocks), _embedded(setup, text_BTD)
        made = rollout(setup.transformer, setup.sampler, noise, text, memory, blocks, context_noise=context_noise)
        return torch.cat([block.latents_BFCHW for block in made], dim=1)


def teacher_of(student: EvalSetup) -> EvalSetup:
    """Setup of the softmax model behind a student, with full memory; run it with `as_teacher`."""
    return replace(student, window_frames=None, sink_frames=0)


def rollout_deviation(
    student: EvalSetup,
    text_BTD: Tensor,
    noise: Noise,
    blocks: int,
    *,
    teacher: EvalSetup | None = None,
    context_noise: float = 0.0,
) -> Deviation:
    """Generate the same videos by student and teacher, each on its own context, and compare the latents.

    Args:
        student, text_BTD, noise, blocks, context_noise: as in `roll_out`.
        teacher: softmax model to compare with; None for the student's own with full memory. Give it if adapters are
            merged.
    """
    wanted = roll_out(
        teacher or teacher_of(student), text_BTD, noise, blocks, as_teacher=True, context_noise=context_noise
    )
    got = roll_out(student, text_BTD, noise, blocks, context_noise=context_noise)
    return latent_deviation(got, wanted, wanted.shape[1] // blocks)


@torch.no_grad()
def _forced_flows(
    setup: EvalSetup, latents_BFCHW: Tensor, text_BTD: Tensor, noise: Noise, context_noise: float
) -> Iterator[list[Tensor]]:
    """Predict the velocities of every block at the sampler's noise levels, on the context of the given latents."""
    model, sampler = setup.transformer, setup.sampler
    frames = noise(0, 0).shape[1]
    blocks = num_blocks(latents_BFCHW.shape[1], frames)
    memory, text = _memory_for(setup, noise(0, 0), blocks), _embedded(setup, text_BTD)
    for number, clean in enumerate(latents_BFCHW.split(frames, dim=1)):
        flows = []
        for step, (time, level) in enumerate(zip(sampler.timesteps, sampler.sigmas, strict=True)):
            noisy = add_noise(clean, noise(number, step), torch.full((), level, device=clean.device))
            timestep = torch.full((), time, device=clean.device)
            flows.append(predict_flow(model, noisy, timestep, text, memory, number * frames))
        yield flows
        if number + 1 < blocks:
            remember_block(model, clean, text, memory, number * frames, context_noise)


@torch.no_grad()
def teacher_forced_deviation(
    student: EvalSetup,
    latents_BFCHW: Tensor,
    text_BTD: Tensor,
    noise: Noise,
    *,
    teacher: EvalSetup | None = None,
    context_noise: float = 0.0,
) -> BlockErrors:
    """Compare the clean latents predicted by student and teacher, while both remember the same given latents.

    Errors do not add up from block to block, and one pass per noise level is enough. Both see the same noisy latents.
    So a difference in x0 = x_t - σ·v is σ times the difference in velocity.

    Args:
        student, text_BTD, teacher, context_noise: as in `rollout_deviation`.
        latents_BFCHW: clean videos, generated or real.
        noise: added to a block at each of the sampler's noise levels.

    Returns:
        errors of x0, averaged over the sampler's noise levels.

    Raises:
        InputError: frames that do not divide into blocks.
    """
    original = teacher or teacher_of(student)
    with original.transformer.as_teacher():
        wanted = list(_forced_flows(original, latents_BFCHW, text_BTD, noise, context_noise))
    blocks = []
    got = _forced_flows(student, latents_BFCHW, text_BTD, noise, context_noise)
    for ours, theirs in zip(got, wanted, strict=True):
        levels = zip(ours, theirs, student.sampler.sigmas, strict=True)
        blocks.append(torch.stack([_differences(a * s, b * s, [a.shape[1]])[:, 0] for a, b, s in levels]).mean(dim=0))
    return BlockErrors(torch.stack(blocks, dim=1))
