"""What people look at while a run trains: plots, and videos of teacher and student from the same noise."""

from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from arl2.distillation.data import Samples
from arl2.distillation.objective import LayerReports
from arl2.distillation.trainer import LOSSES
from arl2.model import HybridWanModel
from arl2.rollout import SeededNoise, num_blocks, rollout
from pipelines.media.plots import plot_layers, plot_losses
from pipelines.media.video import VideoWriter, to_uint8
from pipelines.training.config import Stage2Config, TrainingConfig
from wan.vae.wan_vae import WanVAE, load_vae


class TrainingMonitor:
    """Draws plots of a run, and makes sample videos.

    Args:
        config: of the run.
        data: whose first sample gives the prompt and the size of videos.
        accelerator: of the run; its main process writes.

    Raises:
        CheckpointError: the VAE cannot be loaded.
    """

    def __init__(self, config: TrainingConfig, data: Samples, accelerator: Accelerator) -> None:
        self._config, self._data = config, data
        self._device, self._main = accelerator.device, accelerator.is_main_process
        self._vae: WanVAE | None = None
        if config.sample_every and self._main:
            dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
            self._vae = load_vae(Path(config.model_folder), dtype=dtype, device=self._device)

    def __call__(self, step: int, model: HybridWanModel, reports: LayerReports) -> None:
        """Called by the trainer on every rank."""
        folder, every = Path(self._config.run_folder), self._config.sample_every
        # Ranks that share the weights must all run the model: nothing that can fail on one of them comes before.
        if every and step % every == 0 and (self._main or self._config.shard):
            self._sample(model, folder / "samples" / f"step-{step:08d}.mp4")
        if self._main:
            plot_losses(folder / LOSSES, folder / "losses.png")
            plot_layers(reports, folder / "reports" / f"step-{step:08d}.png")

    @torch.no_grad()
    def _sample(self, model: HybridWanModel, path: Path) -> None:
        with model.as_teacher():
            teacher = self._rollout(model)
        window = self._config.student_memory().window if isinstance(self._config, Stage2Config) else ()
        videos = [teacher, self._rollout(model, *window)]
        if self._vae is None:
            return
        pixels = [self._vae.decode(latents.to(self._vae.dtype)).float() for latents in videos]
        frames = to_uint8(torch.cat(pixels, dim=-1)[0])
        height, width = frames.shape[1:3]
        with VideoWriter(path, height, width, fps=self._config.sample_fps) as video:
            video.write(frames)

    def _rollout(self, model: HybridWanModel, window_frames: int | None = None, sink_frames: int = 0) -> Tensor:
        """Latents of a video for the first prompt of the data, [1, F, C, h, w]."""
        config = self._config
        latents, text_TD = self._data[0]
        frames = config.sample_frames or latents.shape[0]
        text = model.embed_text(text_TD[None].to(self._device, model.patch_embedding.weight.dtype))
        memory = model.memory_for(latents[None, :1].to(self._device), window_frames, sink_frames)
        noise = SeededNoise([config.seed], (config.frames_per_block, *latents.shape[1:]), self._device)
        blocks = num_blocks(frames, config.frames_per_block)
        parts = rollout(model, config.sampler(), noise, text, memory, blocks)
        half = model.patch_embedding.weight.dtype is torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            return torch.cat([block.latents_BFCHW for block in parts], dim=1)
