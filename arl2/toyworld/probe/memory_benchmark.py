"""Memory benchmark of the distillation study: deviation from the teacher's videos, and accuracy of the memory probe.

Every model generates the same videos from the same noise:

- `continued`: continues two given real blocks, with a caption that names nothing; the memory probe;
- `generated`: from such a caption alone;
- `obeyed`: from a caption that names colour and shape; measures prompt adherence;
- `long`: as `continued`, four times as long.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from arl2.evaluation.deviation import latent_deviation, pixel_deviation, psnr
from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridWanModel
from arl2.toyworld.probe.memory_probe import (
    BATCH,
    CONTINUED,
    FORMS,
    ProbeSet,
    ceilings,
    judge_form,
    make_probe_set,
    videos_of_form,
)
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, STANDARD_HIDDEN_FRAMES
from wan.text import TextEncoder
from wan.vae.wan_vae import WanVAE

LONG_TIMES = 4


@dataclass(frozen=True)
class MemoryBenchmarkSettings:
    """Size of a memory benchmark.

    Attributes:
        videos: number of videos of each form except the long one.
        long_videos: number of long videos; 0 for none.
        batch: videos per batch; affects only speed.
        seed: seed of scenes and noise.
    """

    videos: int = 256
    long_videos: int = 128
    batch: int = BATCH
    seed: int = 0


class MemoryBenchmark:
    """Scenes of a benchmark, with the teacher's videos of them.

    Args:
        vae, encoder: VAE and text encoder of the toy world.
        teacher: softmax model with full memory, to compare with.
        settings: see `MemoryBenchmarkSettings`.
    """

    def __init__(
        self, vae: WanVAE, encoder: TextEncoder, teacher: EvalSetup, settings: MemoryBenchmarkSettings
    ) -> None:
        self._vae, self._encoder, self._teacher, self.settings = vae, encoder, teacher, settings
        self._teachers: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def probe(self) -> ProbeSet:
        """Scenes of all forms except the long one."""
        settings = self.settings
        return make_probe_set(self._vae, self._encoder, settings.videos, settings.seed, STANDARD_HIDDEN_FRAMES)

    @cached_property
    def _long(self) -> ProbeSet:
        videos, seed = self.settings.long_videos, self.settings.seed
        probe = make_probe_set(self._vae, self._encoder, videos, seed, STANDARD_HIDDEN_FRAMES)
        return replace(probe, times=LONG_TIMES)

    def ceilings(self) -> dict[str, dict[str, object]]:
        """Accuracies of the probe on real videos, and on real videos through the VAE."""
        return ceilings(self._vae, self.probe)

    @torch.no_grad()
    def take(self, setup: EvalSetup, noise_seed: int = 0) -> dict[str, Any]:
        """Run the benchmark on a model; returns verdicts and deviations by form.

        Args:
            setup: model to measure; its softmax layers may have a window.
            noise_seed: seed of the noise. With another than the teacher's 0, deviations are those between independent
                videos of the same scenes.
        """
        result: dict[str, Any] = {}
        for form in FORMS if self.settings.long_videos else FORMS[:-1]:
            latents, pixels = self._videos(setup, form, noise_seed)
            result[form] = judge_form(form, pixels, self._probe_of(form).scenes)
            if form != "obeyed":
                if form not in self._teachers:
                    self._teachers[form] = self._videos(self._teacher, form, 0)
                given = self.probe.given_frames if form in CONTINUED else 0
                result[form]["deviation"] = _deviation((latents, pixels), self._teachers[form], given)
        return result

    def _videos(self, setup: EvalSetup, form: str, noise_seed: int) -> tuple[Tensor, Tensor]:
        probe = replace(self._probe_of(form), noise_seed=noise_seed)
        return videos_of_form(setup, self._vae, probe, form, self.settings.batch)

    def _probe_of(self, form: str) -> ProbeSet:
        return self._long if form == "long" else self.probe


def _deviation(videos: tuple[Tensor, Tensor], teachers: tuple[Tensor, Tensor], given_frames: int) -> dict[str, Any]:
    """Deviation over the generated blocks, and flicker of whole videos."""
    first = given_frames // FRAMES_PER_BLOCK
    latents = latent_deviation(videos[0].float(), teachers[0].float(), FRAMES_PER_BLOCK)
    pixels = pixel_deviation(videos[1], teachers[1], FRAMES_PER_BLOCK)
    by_block, made = latents.by_block[first:], pixels.mse_BN[:, first:]
    return {
        "latent_mse": sum(by_block) / len(by_block),
        "latent_mse_by_block": by_block,
        "psnr": psnr(float(made.mean())),
        "psnr_by_block": [psnr(error) for error in made.mean(dim=0).tolist()],
        "flicker": pixels.student_flicker,
        "teacher_flicker": pixels.teacher_flicker,
    }


def equal_memory_window(model: HybridWanModel, hybrid_layers: int, frames: int, tokens_per_frame: int) -> int:
    """Smallest window, in whole blocks, with at least the memory of a hybrid whose softmax layers have full memory.

    Args:
        model: model whose sizes are used; the window applies to all of its layers.
        hybrid_layers: number of hybrid layers, each with a state in float32.
        frames: latent frames of the video, whose keys and values the other layers keep in half precision.
        tokens_per_frame: tokens per latent frame.

    Returns:
        latent frames of the window.
    """
    layers, config = len(model.blocks), model.config
    frame = 2 * 2 * tokens_per_frame * config.dim
    state = 4 * config.num_heads * model.head_dim**2
    wanted = hybrid_layers * state + (layers - hybrid_layers) * frames * frame
    blocks = -(-wanted // (layers * frame * FRAMES_PER_BLOCK))
    return int(blocks) * FRAMES_PER_BLOCK
