"""Stage 2: the hybrid model learns the predictions of the frozen original model, end to end.

Student and teacher share one backbone. The teacher is the same model with its softmax layers and without adapters, and
has its own memory. Both remember the same latents: those of the data, or those of the self-rollout.

Source: ARL², arXiv 2605.16579; `Stage2Settings` holds what the paper leaves open.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Annotated

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, TrainingBlock, VideoBatch, noisy_video, video_blocks
from arl2.distillation.diagnostics import measured
from arl2.distillation.objective import ForwardMode, LayerReports, Objective, ObjectiveSettings, frozen_teacher
from arl2.model import HybridWanModel
from arl2.ops.offload import checkpoint_on_host
from arl2.rollout import FewStepSampler, denoise_block, num_blocks, predict_flow, remember_block
from wan.memory import Memory, check_window
from wan.model import TextKV
from wan.teacher_forcing import teacher_forced_flow
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, Count


class Context(StrEnum):
    """Source of the latents that are remembered: the data, or the student's self-rollout."""

    DATA = "data"
    SELF_ROLLOUT = "self_rollout"

    @classmethod
    def _missing_(cls, value: object) -> "Context | None":
        """The member that a former value stands for."""
        return cls.SELF_ROLLOUT if value == "student" else None


class Target(StrEnum):
    """Target of the loss: the velocity, or the clean latents that it implies."""

    FLOW = "flow"
    X0 = "x0"


@dataclass(frozen=True)
class Stage2Settings(ObjectiveSettings):
    """Settings of stage 2 that the paper leaves open.

    Attributes:
        context: see `Context`.
        target: see `Target`.
        checkpointing: recompute every transformer block in the backward pass instead of keeping its activations.
        offload_checkpoints: keep the inputs of the blocks in host memory until they are recomputed. At 14B that is
            27 GB per video of 21 latent frames of 480×832.
        window_frames, sink_frames: window of the student's softmax layers, as in `wan.memory.MemorySpec`; the teacher
            has full memory. A hybrid trained without a window forgets nearly everything when run with one.
    """

    context: Context = Context.DATA
    target: Target = Target.FLOW
    checkpointing: bool = False
    offload_checkpoints: bool = False
    window_frames: Count | None = None
    sink_frames: Annotated[int, Bounds(0)] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(*self.window, self.frames_per_block)
        if self.offload_checkpoints and not self.checkpointing:
            raise InputError(
                "offload_checkpoints would do nothing without checkpointing: set checkpointing=true, or drop it"
            )

    @property
    def window(self) -> tuple[int | None, int]:
        """Frames of the window (None for full memory) and of the sink."""
        return self.window_frames, self.sink_frames


def stage2_parameters(model: HybridWanModel) -> dict[str, nn.Parameter]:
    """Parameters that stage 2 trains, by name: all that the softmax model does not have."""
    names = set(model.hybrid_parameter_names())
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _nothing_cached(device: str) -> torch.autocast:
    """Autocast without its cache: weights cast without a graph must not be reused where gradients flow."""
    return torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)


class Stage2(Objective):
    """Objective of stage 2.

    Args:
        model: the student; with hybrid layers and adapters switched off, the teacher.
        settings: see `Stage2Settings`.
        sampler: denoising steps of the student, needed for the self-rollout.
    """

    def __init__(self, model: HybridWanModel, settings: Stage2Settings, sampler: FewStepSampler | None = None) -> None:
        self.model = model
        self.settings = settings
        self._sampler = sampler
        self._error: list[Tensor] = []
        self._target_mean_square: list[Tensor] = []
        if settings.context is Context.SELF_ROLLOUT and sampler is None:
            raise InputError("context self_rollout needs the steps of the student's sampler")
        if settings.checkpointing:
            model.enable_gradient_checkpointing(checkpoint_on_host if settings.offload_checkpoints else None)

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """See `stage2_parameters`."""
        return stage2_parameters(self.model)

    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """Iterate over the errors of each graph; their sum is the mean over comparisons with the teacher."""
        parallel = self.settings.forward_mode is ForwardMode.PARALLEL
        yield from self._parallel(batch, noise) if parallel else self._loop(batch, noise)

    def metrics(self) -> dict[str, float]:
        """Relative RMS error of the student with respect to the teacher: 0 is perfect."""
        error, scale = (torch.stack(parts).sum() for parts in (self._error, self._target_mean_square))
        return {"relative_error": float((error / scale).sqrt())}

    @torch.no_grad()
    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """See `measured`."""
        height, width = batch.latents_BFCHW.shape[-2:]
        with measured(self.model, self.model.tokens_per_frame(height, width)) as figures:
            for _ in self._loop(batch, noise):
                pass
        return figures

    def _loop(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        self._error, self._target_mean_square = [], []
        settings, model = self.settings, self.model
        with frozen_teacher(model):
            text, teacher_memory = model.embed_text(batch.text_BTD), self.new_memory(batch)
        memory = self.new_memory(batch, *settings.window, differentiable=True)
        errors: list[Tensor] = []
        weight = 1 / (num_blocks(batch.latents_BFCHW.shape[1], settings.frames_per_block) * noise.num_noise_levels)
        for block in video_blocks(batch, settings.frames_per_block):
            if settings.context is Context.SELF_ROLLOUT:
                block = block._replace(clean=self._own_block(block, noise, text, memory))
            errors += self._comparisons(block, noise, text, memory, teacher_memory)
            if block.last:
                break
            with frozen_teacher(model):
                remember_block(model, block.clean, text, teacher_memory, block.start)
            if settings.starts_graph(block.number):
                yield weight * torch.stack(errors).sum()
                errors = []
                memory.detach()
            remember_block(model, block.clean, text, memory, block.start)
        yield weight * torch.stack(errors).sum()

    def _comparisons(
        self, block: TrainingBlock, noise: BatchNoise, text: TextKV, memory: Memory, teacher_memory: Memory
    ) -> Iterator[Tensor]:
        """Iterate over the errors of a block at its noise levels."""
        for place in range(noise.num_noise_levels):
            noisy, timestep = noise.applied(block.clean, block.number, place)
            with frozen_teacher(self.model):
                target_flow = predict_flow(self.model, noisy, timestep, text, teacher_memory, block.start)
            flow = predict_flow(self.model, noisy, timestep, text, memory, block.start)
            yield self._passes_error(flow, target_flow, noise.levels_BNP[:, block.number, place, None])

    @torch.no_grad()
    def _own_block(self, block: TrainingBlock, noise: BatchNoise, text: TextKV, memory: Memory) -> Tensor:
        """Generate a block by self-rollout, as in inference."""
        assert self._sampler is not None
        of_step = partial(noise.of_rollout, block.number)
        with _nothing_cached(block.clean.device.type):
            return denoise_block(self.model, self._sampler, of_step, text, memory, block.start)

    @torch.no_grad()
    def _own_video(self, batch: VideoBatch, noise: BatchNoise) -> Tensor:
        """Generate a whole video by self-rollout, for the parallel path, which needs all latents beforehand."""
        model, made = self.model, []
        with _nothing_cached(batch.latents_BFCHW.device.type):
            text = model.embed_text(batch.text_BTD)
            memory = self.new_memory(batch, *self.settings.window)
            for block in video_blocks(batch, self.settings.frames_per_block):
                made.append(self._own_block(block, noise, text, memory))
                if not block.last:
                    remember_block(model, made[-1], text, memory, block.start)
        return torch.cat(made, dim=1)

    def _parallel(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        self._error, self._target_mean_square = [], []
        if self.settings.context is Context.SELF_ROLLOUT:
            batch = replace(batch, latents_BFCHW=self._own_video(batch, noise))
        size, clean = self.settings.frames_per_block, batch.latents_BFCHW
        noisy, times = noisy_video(batch, noise, size)
        with frozen_teacher(self.model, compiled=True):
            text = self.model.embed_text(batch.text_BTD)
            target_flow = teacher_forced_flow(self.model, noisy, times, text, size, clean)
        flow = teacher_forced_flow(self.model, noisy, times, text, size, clean, *self.settings.window)
        yield self._passes_error(flow, target_flow, noise.levels_BNP[..., 0]) / noise.levels_BNP.shape[1]

    def _passes_error(self, flow_BFCHW: Tensor, target_BFCHW: Tensor, levels_BP: Tensor) -> Tensor:
        """Sum over the P blocks of a sequence of their squared errors, averaged over videos; also kept for metrics."""
        flow, target_flow = (x.float().unflatten(1, (levels_BP.shape[1], -1)) for x in (flow_BFCHW, target_BFCHW))
        error_BP = (flow - target_flow).square().flatten(2).mean(2)
        self._error.append(error_BP.detach().sum())
        self._target_mean_square.append(target_flow.square().flatten(2).mean(2).sum())
        # x0 = x_t - σ·v: the difference in x0 is σ times that in v.
        scale = levels_BP.square() if self.settings.target is Target.X0 else 1.0
        return (scale * error_BP).mean(0).sum()
