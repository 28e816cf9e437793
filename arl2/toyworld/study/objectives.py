"""Objectives used only in the study: noisy writes, and softmax models with a window."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, VideoBatch, noisy_video
from arl2.distillation.objective import LayerReports, frozen_teacher
from arl2.distillation.stage2 import Stage2, Stage2Settings
from arl2.model import HybridWanModel
from wan.parallel import ParallelLayout
from wan.teacher_forcing import teacher_forced_flow


class WindowStudent(Stage2):
    """Objective of a softmax model that learns, with a window, the predictions of the original with full memory.

    All of its parameters train, so that it has no less freedom than a hybrid.

    Args:
        model: the student, with the original's weights.
        teacher: the original model.
        settings: settings of stage 2, with path parallel.
        window_frames, sink_frames: see `wan.memory.MemorySpec`.
    """

    def __init__(
        self,
        model: HybridWanModel,
        teacher: HybridWanModel,
        settings: Stage2Settings,
        window_frames: int,
        sink_frames: int,
    ) -> None:
        super().__init__(model, settings)
        self._teacher, self._window, self._sink = teacher, window_frames, sink_frames

    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """All parameters by name."""
        return dict(self.model.named_parameters())

    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """Empty reports: no layer is hybrid."""
        return {}

    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """Squared error of the student with respect to the teacher, averaged over comparisons; a single part."""
        self._error, self._target_mean_square = [], []
        size, clean = self.settings.frames_per_block, batch.latents_BFCHW
        noisy, times = noisy_video(batch, noise, size)
        with frozen_teacher(self._teacher):
            text = batch.text_BTD.to(self._teacher.patch_embedding.weight.dtype)
            target_flow = teacher_forced_flow(self._teacher, noisy, times, text, size, clean)
        flow = teacher_forced_flow(self.model, noisy, times, batch.text_BTD, size, clean, self._window, self._sink)
        yield self._passes_error(flow, target_flow, noise.levels_BNP[..., 0]) / noise.levels_BNP.shape[1]


class NoisyWriteStage2(Stage2):
    """Stage 2 of `arl2.toyworld.study.ablations.NoisyWrites` over all blocks at once.

    The sequence holds the clean video and one noisy video per denoising step, from most to least noise, since all of
    them write. One random level per block is compared with the teacher, as in every other run. Batches must have all
    noise levels of the sampler.
    """

    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """Empty reports: the block loop would run the passes in another order."""
        return {}

    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """See `Stage2.losses`."""
        self._error, self._target_mean_square = [], []
        size, clean = self.settings.frames_per_block, batch.latents_BFCHW
        frames, _, height, width = clean.shape[1:]
        order_BNP = noise.levels_BNP.argsort(dim=2, descending=True)
        falling = replace(noise, levels_BNP=noise.levels_BNP.gather(2, order_BNP))
        passes = [_noisy_at(batch, falling, place, size) for place in range(noise.num_noise_levels)]
        layout = ParallelLayout(
            frames, size, self.model.tokens_per_frame(height, width), 1 + noise.num_noise_levels, clean.device
        )
        latents = torch.cat([clean, *(noisy for noisy, _ in passes)], dim=1)
        times = torch.cat([torch.zeros_like(passes[0][1]), *(timesteps for _, timesteps in passes)], dim=1)
        # Index of the level that was drawn first, among the decreasing ones.
        place_BN = order_BNP.argsort(dim=2)[..., 0]
        with frozen_teacher(self.model):
            text = self.model.embed_text(batch.text_BTD)
            noisy, timesteps = (_picked(torch.stack([one[i] for one in passes], 1), place_BN, size) for i in (0, 1))
            target_flow = teacher_forced_flow(self.model, noisy, timesteps, text, size, clean)
        positions = torch.arange(frames, device=clean.device).repeat(layout.halves)
        flow = self.model(latents, times, text, self.model.parallel_views(layout), positions).flow
        student = _picked(flow[:, frames:].unflatten(1, (noise.num_noise_levels, frames)), place_BN, size)
        levels = noise.levels_BNP[..., 0]
        yield self._passes_error(student, target_flow, levels) / levels.shape[1]


def _noisy_at(batch: VideoBatch, noise: BatchNoise, place: int, frames_per_block: int) -> tuple[Tensor, Tensor]:
    """Noisy latents of all blocks at one of their levels, [B, F, C, h, w], and timesteps of all frames, [B, F]."""
    levels, drawn = noise.levels_BNP[:, :, place, None], noise.noise_BNPFCHW[:, :, place, None]
    one = replace(noise, levels_BNP=levels, noise_BNPFCHW=drawn)
    return noisy_video(batch, one, frames_per_block)


def _picked(videos_BPF: Tensor, place_BN: Tensor, frames_per_block: int) -> Tensor:
    """Select one of P versions of each block: [B, P, F, …] to [B, F, …]."""
    place = place_BN.repeat_interleave(frames_per_block, dim=1)[:, None]
    index = place.reshape(*place.shape, *(1,) * (videos_BPF.ndim - 3)).expand(-1, 1, *videos_BPF.shape[2:])
    return videos_BPF.gather(1, index)[:, 0]
