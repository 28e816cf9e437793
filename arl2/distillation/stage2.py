"""Stage 2: the hybrid model learns to predict what the frozen original predicts, end to end.

Student and teacher share one trunk; the teacher is the same model with its softmax layers and without adapters, and has
a memory of its own. Both remember the same latents: those of the data, or those that the student makes itself. Source:
ARL², arXiv 2605.16579; what it leaves open is in `Stage2Settings`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from arl2.distillation.batch import ObjectiveSettings, VideoBatch, video_blocks
from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler, denoise_block, predict_flow, remember_block
from wan.flow import NUM_TRAIN_TIMESTEPS, add_noise
from wan.memory import Memory
from wan.model import TextKV


class Context(StrEnum):
    """Which latents are remembered."""

    DATA = "data"
    STUDENT = "student"


class Target(StrEnum):
    """What is compared: the velocity, or the clean latents that it implies."""

    FLOW = "flow"
    X0 = "x0"


@dataclass(frozen=True)
class Stage2Settings(ObjectiveSettings):
    """What the method leaves open.

    Attributes:
        context: see `Context`.
        target: see `Target`.
    """

    context: Context = Context.DATA
    target: Target = Target.FLOW


def stage2_parameters(model: HybridWanModel) -> dict[str, nn.Parameter]:
    """Names and parameters that stage 2 trains: everything that the softmax model does not have."""
    names = set(model.hybrid_parameter_names())
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def stage2_loss(
    model: HybridWanModel,
    batch: VideoBatch,
    settings: Stage2Settings,
    noise: Callable[[int, int], Tensor],
    sampler: FewStepSampler | None = None,
) -> Tensor:
    """Mean squared difference of student and teacher over all blocks and noise levels.

    Args:
        model: `stage2_parameters` must require gradients, nothing else.
        batch: clean videos; with the student's own context only their text and size are used for what is remembered.
        settings: see there.
        noise: of a block (its index) and a comparison (its place among the noise levels), [B, F, C, h, w]; further
            places are drawn for the student's rollout.
        sampler: the student's steps, needed for its own context.
    """
    with torch.no_grad(), model.as_teacher():
        text, teacher_memory = model.embed_text(batch.text_BTD), model.memory_for(batch.latents_BFCHW)
    memory, differences = model.memory_for(batch.latents_BFCHW, differentiable=True), []
    for block in video_blocks(batch, settings.frames_per_block):
        remembered = block.clean
        if settings.context is Context.STUDENT:
            assert sampler is not None
            remembered = _own_block(model, sampler, noise, block.number, settings, text, memory, block.start)
        for place, sigma in enumerate(settings.noise_levels):
            level = torch.full((), sigma, device=remembered.device)
            noisy = add_noise(remembered, noise(block.number, place), level)
            timestep = level * NUM_TRAIN_TIMESTEPS
            with torch.no_grad(), model.as_teacher():
                wanted = predict_flow(model, noisy, timestep, text, teacher_memory, block.start)
            flow = predict_flow(model, noisy, timestep, text, memory, block.start)
            # x0 = x_t - σ·v: the difference in x0 is σ times that in v.
            scale = sigma if settings.target is Target.X0 else 1.0
            differences.append((scale * (flow.float() - wanted.float())).square().mean())
        with torch.no_grad(), model.as_teacher():
            remember_block(model, remembered, text, teacher_memory, block.start)
        if settings.starts_graph(block.number):
            memory.detach()
        remember_block(model, remembered, text, memory, block.start)
    return torch.stack(differences).mean()


@torch.no_grad()
def _own_block(
    model: HybridWanModel,
    sampler: FewStepSampler,
    noise: Callable[[int, int], Tensor],
    index: int,
    settings: Stage2Settings,
    text: TextKV,
    memory: Memory,
    start: int,
) -> Tensor:
    """The student's own block, as inference would make it."""
    first = len(settings.noise_levels)
    return denoise_block(model, sampler, lambda step: noise(index, first + step), text, memory, start)
