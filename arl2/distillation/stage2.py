"""Stage 2: the hybrid model learns the predictions of the frozen original model, end to end.

Student and teacher share one backbone. The teacher is the same model with its softmax layers and without adapters, and
has its own memory. Both remember the same latents: those of the data, or those of the self-rollout.

Source: ARL², arXiv 2605.16579; `Stage2Settings` holds what the paper leaves open.

Training on long videos is the same objective with gradients cut after some blocks (`blocks_per_graph`), windows in the
softmax layers of both, and the velocity of the data as the target (`data_weight`), which needs no teacher that
remembers. What it takes in memory does not grow with the video.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Annotated, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, TrainingBlock, VideoBatch, noisy_video, video_blocks
from arl2.distillation.diagnostics import measured
from arl2.distillation.objective import ForwardMode, LayerReports, Objective, ObjectiveSettings, frozen_teacher
from arl2.model import HybridWanModel
from arl2.ops.offload import checkpoint_on_host
from arl2.rollout import FewStepSampler, denoise_block, num_blocks, predict_flow, remember_block
from arl2.state_settings import Writes
from wan.memory import Memory, check_window
from wan.model import TextKV
from wan.teacher_forcing import teacher_forced_flow, teacher_forced_segment
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, Count


class Context(StrEnum):
    """Source of the latents that are remembered: the data, the data with the student's errors, or its self-rollout.

    For `RESAMPLED`, the data are made noisy at one of the last steps of the student's sampler, and the student denoises
    them from there, each block after the data's blocks before it. So content is the data's, and errors are those of
    inference. The first block stays the data's: nothing before it tells what it shows. Source: Resampling Forcing,
    arXiv 2512.15702, which lets errors add up over blocks; here all blocks are denoised at once.
    """

    DATA = "data"
    RESAMPLED = "resampled"
    SELF_ROLLOUT = "self_rollout"

    @classmethod
    def _missing_(cls, value: object) -> "Context | None":
        """The member that a former value stands for."""
        return cls.SELF_ROLLOUT if value == "student" else None


class Target(StrEnum):
    """Target of the loss: the velocity, or the clean latents that it implies."""

    FLOW = "flow"
    X0 = "x0"


class Trainable(StrEnum):
    """Parameters that train: those that the softmax model does not have, or all."""

    NEW = "new"
    ALL = "all"


LossWeight = Annotated[float, Bounds(0, 1000)]
"""Range of the weight of an error."""
ContextSigma = Annotated[float, Bounds(0, 1)]
"""Range of the noise level of remembered latents."""


@dataclass(frozen=True)
class Stage2Settings(ObjectiveSettings):
    """Settings of stage 2 that the paper leaves open.

    Attributes:
        context: source of the latents that are remembered: data, resampled or self_rollout; see `Context`.
        target: target of the loss: flow for the velocity, x0 for the clean latents that it implies.
        checkpointing: recompute every transformer block in the backward pass instead of keeping its activations.
        offload_checkpoints: keep the inputs of the blocks in host memory until they are recomputed. At 14B that is
            27 GB per video of 21 latent frames of 480×832.
        window_frames, sink_frames: window of the student's softmax layers, as in `wan.memory.MemorySpec`. A hybrid
            trained without a window forgets nearly everything when run with one.
        teacher_window_frames, teacher_sink_frames: those of the teacher; by default it has full memory.
        teacher_weight: weight of the error with respect to the teacher; with 0 it is not computed.
        data_weight: weight of the error with respect to the velocity noise - x0 of the data. With it, the blocks that
            are denoised are those of the data, also if the context is the self-rollout.
        context_sigma: upper bound of the noise level σ of what is remembered, drawn per block and video; the clean
            pass keeps its timestep, so that the model learns to remember frames that are not quite right.
        resample_steps: how many of the last steps of the student's sampler make what is remembered, with the context
            `RESAMPLED`.
        resample_rounds: how often what is remembered is made, each time after the blocks of the time before. So errors
            add up over as many blocks; with all steps of the sampler and a round for every block but the first, blocks
            are those of a rollout from the data's first.
        trainable: new for the parameters that the softmax model does not have, all for every parameter. All train on
            the data alone, since the teacher has them, too. Without hybrid layers, that makes the softmax model that a
            hybrid is compared with.
    """

    takes_segments: ClassVar[bool] = True

    context: Context = Context.DATA
    target: Target = Target.FLOW
    checkpointing: bool = False
    offload_checkpoints: bool = False
    window_frames: Count | None = None
    sink_frames: Annotated[int, Bounds(0)] = 0
    teacher_window_frames: Count | None = None
    teacher_sink_frames: Annotated[int, Bounds(0)] = 0
    teacher_weight: LossWeight = 1.0
    data_weight: LossWeight = 0.0
    context_sigma: ContextSigma = 0.0
    resample_steps: Count = 1
    resample_rounds: Count = 1
    trainable: Trainable = Trainable.NEW

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(*self.window, self.frames_per_block)
        check_window(*self.teacher_window, self.frames_per_block)
        if not self.teacher_weight + self.data_weight:
            raise InputError("teacher_weight and data_weight are both 0: nothing would train; set one of them")
        if self.context_sigma and self.context is not Context.DATA:
            raise InputError(f"context_sigma is for context data: {self.context} has errors of its own; drop one")
        for name in ("resample_steps", "resample_rounds"):
            if vars(self)[name] > 1 and self.context is not Context.RESAMPLED:
                raise InputError(
                    f"{name} would do nothing with context {self.context}: set context=resampled, or drop it"
                )
        if self.trainable is Trainable.ALL and self.teacher_weight:
            raise InputError(
                "trainable all changes the weights that the teacher shares: set teacher_weight=0 and data_weight=1"
            )
        if self.trainable is Trainable.ALL and self.forward_mode is not ForwardMode.PARALLEL:
            raise InputError("trainable all is for forward_mode parallel: set it")
        if self.offload_checkpoints and not self.checkpointing:
            raise InputError(
                "offload_checkpoints would do nothing without checkpointing: set checkpointing=true, or drop it"
            )

    @property
    def window(self) -> tuple[int | None, int]:
        """Frames of the window (None for full memory) and of the sink."""
        return self.window_frames, self.sink_frames

    @property
    def teacher_window(self) -> tuple[int | None, int]:
        """Frames of the teacher's window (None for full memory) and of its sink."""
        return self.teacher_window_frames, self.teacher_sink_frames


class Targets(NamedTuple):
    """What the student's velocity is compared with.

    Attributes:
        teacher_BFCHW: the teacher's; None without one.
        data_BFCHW: that of the data.
    """

    teacher_BFCHW: Tensor | None
    data_BFCHW: Tensor


class _Latents(NamedTuple):
    """A video in the parallel path: noisy latents, timesteps, what is remembered, and the velocity of the data."""

    noisy_BFCHW: Tensor
    times_BF: Tensor
    context_BFCHW: Tensor
    true_flow_BFCHW: Tensor


def stage2_parameters(model: HybridWanModel) -> dict[str, nn.Parameter]:
    """Parameters that stage 2 trains, by name: all that the softmax model does not have."""
    names = set(model.hybrid_parameter_names())
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def _nothing_cached(device: str) -> torch.autocast:
    """Autocast without its cache: weights cast without a graph must not be reused where gradients flow."""
    return torch.autocast(device, enabled=torch.is_autocast_enabled(device), cache_enabled=False)


def _require_passes_in_order(settings: Stage2Settings) -> None:
    """Make sure that noisy passes can be written as in inference: one after the other, and the data's clean pass last.

    Raises:
        InputError: blocks are computed at once, or what is remembered is not the data.
    """
    if settings.forward_mode is not ForwardMode.SEQUENTIAL or settings.context is not Context.DATA:
        raise InputError(
            "state.writes noisy trains block by block on the data: set forward_mode=sequential and context=data, or "
            "state.writes=clean"
        )


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
        if model.hybrid.layers and model.hybrid.state.writes is Writes.NOISY:
            _require_passes_in_order(settings)
        if settings.context is not Context.DATA and sampler is None:
            raise InputError(f"context {settings.context} needs the steps of the student's sampler")
        if sampler is not None and settings.resample_steps > len(sampler.sigmas):
            raise InputError(
                f"resample_steps {settings.resample_steps} of a sampler of {len(sampler.sigmas)}: give at most as many"
            )
        if settings.checkpointing:
            model.enable_gradient_checkpointing(checkpoint_on_host if settings.offload_checkpoints else None)

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """See `Trainable`."""
        if self.settings.trainable is Trainable.ALL:
            return dict(self.model.named_parameters())
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
        """See `measured`; without hybrid layers there is nothing to measure."""
        if not self.model.hybrid_attentions():
            return {}
        height, width = batch.latents_BFCHW.shape[-2:]
        with measured(self.model, self.model.tokens_per_frame(height, width)) as figures:
            for _ in self._loop(batch, noise):
                pass
        return figures

    def _loop(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        self._error, self._target_mean_square = [], []
        settings, model = self.settings, self.model
        if model.hybrid.state.writes is Writes.NOISY:
            noise = noise.in_order_of_sampling()
        teacher_memory = None
        with frozen_teacher(model):
            text = model.embed_text(batch.text_BTD)
            if settings.teacher_weight:
                teacher_memory = self.new_memory(batch, *settings.teacher_window)
        memory = self.new_memory(batch, *settings.window, differentiable=True)
        resampled_BFCHW = self._resampled_video(batch, noise) if settings.context is Context.RESAMPLED else None
        errors: list[Tensor] = []
        weight = 1 / (num_blocks(batch.latents_BFCHW.shape[1], settings.frames_per_block) * noise.num_noise_levels)
        for block in video_blocks(batch, settings.frames_per_block):
            context = block.clean
            if settings.context is Context.SELF_ROLLOUT:
                context = self._own_block(block, noise, text, memory)
            elif resampled_BFCHW is not None:
                context = resampled_BFCHW[:, block.start : block.start + settings.frames_per_block]
            elif settings.context_sigma:
                context = noise.disturbed(block.clean, block.number, settings.context_sigma)
            if settings.context is Context.SELF_ROLLOUT and not settings.data_weight:
                block = block._replace(clean=context)
            errors += self._comparisons(block, noise, text, memory, teacher_memory)
            if block.last:
                break
            if teacher_memory is not None:
                with frozen_teacher(model):
                    remember_block(model, context, text, teacher_memory, block.start)
            if settings.starts_graph(block.number):
                yield weight * torch.stack(errors).sum()
                errors = []
                memory.detach()
            remember_block(model, context, text, memory, block.start)
        yield weight * torch.stack(errors).sum()

    def _comparisons(
        self, block: TrainingBlock, noise: BatchNoise, text: TextKV, memory: Memory, teacher_memory: Memory | None
    ) -> Iterator[Tensor]:
        """Iterate over the errors of a block at its noise levels."""
        for place in range(noise.num_noise_levels):
            noisy, timestep = noise.applied(block.clean, block.number, place)
            teachers = None
            if teacher_memory is not None:
                with frozen_teacher(self.model):
                    teachers = predict_flow(self.model, noisy, timestep, text, teacher_memory, block.start)
            flow = predict_flow(self.model, noisy, timestep, text, memory, block.start)
            targets = Targets(teachers, noise.noise_BNPFCHW[:, block.number, place] - block.clean)
            yield self._errors(flow, targets, noise.levels_BNP[:, block.number, place, None])

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

    @torch.no_grad()
    def _resampled_video(self, batch: VideoBatch, noise: BatchNoise) -> Tensor:
        """The data with the student's errors, see `Context.RESAMPLED`, [B, F, C, h, w]."""
        context = batch.latents_BFCHW
        with _nothing_cached(context.device.type):
            text = self.model.embed_text(batch.text_BTD)
            for _ in range(self.settings.resample_rounds):
                context = self._resampled_after(context, batch, noise, text)
        return context

    def _resampled_after(self, context_BFCHW: Tensor, batch: VideoBatch, noise: BatchNoise, text: TextKV) -> Tensor:
        """The data's blocks as the student denoises them, each after the context's blocks before it."""
        assert self._sampler is not None
        size, count = self.settings.frames_per_block, self.settings.resample_steps
        made = batch.latents_BFCHW
        steps = zip(self._sampler.sigmas[-count:], self._sampler.timesteps[-count:], strict=True)
        for step, (sigma, timestep) in enumerate(steps):
            noisy = noise.resampled(made, size, step, sigma)
            times = noisy.new_full(noisy.shape[:2], timestep)
            made = noisy - sigma * self._flow_after(context_BFCHW, batch, noisy, times, text).to(noisy)
        return torch.cat([context_BFCHW[:, :size], made[:, size:]], dim=1)

    def _flow_after(
        self, clean: Tensor, batch: VideoBatch, noisy_BFCHW: Tensor, times_BF: Tensor, text: TextKV
    ) -> Tensor:
        """The student's velocity in all blocks, each after the clean blocks before it, in segments as in training."""
        settings, size, flows = self.settings, self.settings.frames_per_block, []
        frames = size * (settings.blocks_per_graph or clean.shape[1] // size)
        memory = self.new_memory(batch, *settings.window, differentiable=True)  # which keeps its frames in order
        for first in range(0, clean.shape[1], frames):
            of_segment = slice(first, first + frames)
            flow, updates = teacher_forced_segment(
                self.model,
                noisy_BFCHW[:, of_segment],
                times_BF[:, of_segment],
                text,
                size,
                clean[:, of_segment],
                memory,
                first,
                *settings.window,
                remember=first + frames < clean.shape[1],
            )
            assert flow is not None
            flows.append(flow)
            if updates is not None:
                memory.commit(updates)
        return torch.cat(flows, dim=1)

    def _parallel(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        self._error, self._target_mean_square = [], []
        settings, size, context = self.settings, self.settings.frames_per_block, batch.latents_BFCHW
        if settings.context is Context.SELF_ROLLOUT:
            context = self._own_video(batch, noise)
            if not settings.data_weight:
                batch = replace(batch, latents_BFCHW=context)
        elif settings.context is Context.RESAMPLED:
            context = self._resampled_video(batch, noise)
        elif settings.context_sigma:
            blocks = video_blocks(batch, size)
            disturbed = [noise.disturbed(block.clean, block.number, settings.context_sigma) for block in blocks]
            context = torch.cat(disturbed, dim=1)
        noisy, times = noisy_video(batch, noise, size)
        true_flow = noise.noise_BNPFCHW[:, : context.shape[1] // size, 0].flatten(1, 2) - batch.latents_BFCHW
        video = _Latents(noisy, times, context, true_flow)
        yield from (
            self._whole(batch, noise, video)
            if settings.blocks_per_graph is None
            else self._segments(batch, noise, video, settings.blocks_per_graph)
        )

    def _text(self, batch: VideoBatch) -> Tensor | TextKV:
        """The text as passes take it: embedded once, unless the embedding trains, too."""
        if self.settings.trainable is Trainable.ALL:
            return batch.text_BTD
        with frozen_teacher(self.model):
            return self.model.embed_text(batch.text_BTD)

    def _whole(self, batch: VideoBatch, noise: BatchNoise, video: _Latents) -> Iterator[Tensor]:
        """All blocks in one forward."""
        settings, size = self.settings, self.settings.frames_per_block
        noisy, times, context, true_flow = video
        text, teachers = self._text(batch), None
        if settings.teacher_weight:
            with frozen_teacher(self.model, compiled=True):
                teachers = teacher_forced_flow(self.model, noisy, times, text, size, context, *settings.teacher_window)
        flow = teacher_forced_flow(self.model, noisy, times, text, size, context, *settings.window)
        yield self._errors(flow, Targets(teachers, true_flow), noise.levels_BNP[..., 0]) / noise.levels_BNP.shape[1]

    def _segments(
        self, batch: VideoBatch, noise: BatchNoise, video: _Latents, blocks_per_segment: int
    ) -> Iterator[Tensor]:
        """Some blocks per forward, with memories from one to the next through which no gradient flows.

        The last write of a segment has no gradient: what reads it is in the next one.
        """
        settings, size, model = self.settings, self.settings.frames_per_block, self.model
        blocks = noise.levels_BNP.shape[1]
        text, teacher_memory = self._text(batch), None
        if settings.teacher_weight:
            with frozen_teacher(model):
                # Differentiable ones keep their frames in order.
                teacher_memory = self.new_memory(batch, *settings.teacher_window, differentiable=True, of_student=False)
        memory = self.new_memory(batch, *settings.window, differentiable=True)
        for first in range(0, blocks, blocks_per_segment):
            end = min(first + blocks_per_segment, blocks)
            noisy, times, context, true_flow = (x[:, first * size : end * size] for x in video)
            given = (noisy, times, text, size, context)
            teachers = None
            if teacher_memory is not None:
                with frozen_teacher(model, compiled=True):
                    teachers, updates = teacher_forced_segment(
                        model, *given, teacher_memory, first * size, *settings.teacher_window, remember=end < blocks
                    )
                    if updates is not None:
                        teacher_memory.commit(updates)
            flow, updates = teacher_forced_segment(
                model, *given, memory, first * size, *settings.window, remember=end < blocks
            )
            assert flow is not None
            yield self._errors(flow, Targets(teachers, true_flow), noise.levels_BNP[:, first:end, 0]) / blocks
            if updates is not None:
                memory.commit(updates)
                memory.detach()

    def _errors(self, flow_BFCHW: Tensor, targets: Targets, levels_BP: Tensor) -> Tensor:
        """Weighted sum of the errors with respect to teacher and data; metrics are of the teacher if there is one."""
        settings, errors = self.settings, []
        if settings.data_weight:
            errors.append(settings.data_weight * self._passes_error(flow_BFCHW, targets.data_BFCHW, levels_BP))
        if targets.teacher_BFCHW is not None:
            for metric in (self._error, self._target_mean_square):
                del metric[len(metric) - len(errors) :]
            error = self._passes_error(flow_BFCHW, targets.teacher_BFCHW, levels_BP)
            errors.append(settings.teacher_weight * error)
        return sum(errors[1:], errors[0])

    def _passes_error(self, flow_BFCHW: Tensor, target_BFCHW: Tensor, levels_BP: Tensor) -> Tensor:
        """Sum over the P blocks of a sequence of their squared errors, averaged over videos; also kept for metrics."""
        flow, target_flow = (x.float().unflatten(1, (levels_BP.shape[1], -1)) for x in (flow_BFCHW, target_BFCHW))
        error_BP = (flow - target_flow).square().flatten(2).mean(2)
        self._error.append(error_BP.detach().sum())
        self._target_mean_square.append(target_flow.square().flatten(2).mean(2).sum())
        # x0 = x_t - σ·v: the difference in x0 is σ times that in v.
        scale = levels_BP.square() if self.settings.target is Target.X0 else 1.0
        return (scale * error_BP).mean(0).sum()
