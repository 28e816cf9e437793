"""What the study of distillation measures of a model: how far its videos are from the teacher's, and what it remembers.

Every model makes the same videos from the same noise:

- `continued`: from two given real blocks on, with a caption that names nothing; the memory probe;
- `generated`: from such a caption alone;
- `obeyed`: from a caption that names colour and shape;
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
    ProbeSet,
    ceilings,
    judge_continued,
    judge_every_pass,
    judge_generated,
    judge_obeyed,
    make_probe_set,
    make_videos,
)
from arl2.toyworld.world.reader import read_generated, read_video
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, STANDARD_HIDDEN_FRAMES
from wan.memory import MemorySpec
from wan.text import TextEncoder
from wan.vae.wan_vae import WanVAE

FORMS = ("continued", "generated", "obeyed", "long")
LONG_TIMES = 4


@dataclass(frozen=True)
class MemoryBenchmarkSettings:
    """How large an exam is.

    Attributes:
        videos: of every form but the long one.
        long_videos: of that; 0 for none.
        batch: videos at a time; changes nothing but speed.
        seed: of scenes and noise.
    """

    videos: int = 256
    long_videos: int = 128
    batch: int = BATCH
    seed: int = 0


class MemoryBenchmark:
    """Scenes, and what the teacher makes of them.

    Args:
        vae, encoder: of the toy world.
        teacher: the softmax model with full memory that others are compared with.
        settings: see there.
    """

    def __init__(
        self, vae: WanVAE, encoder: TextEncoder, teacher: EvalSetup, settings: MemoryBenchmarkSettings
    ) -> None:
        self._vae, self._encoder, self._teacher, self.settings = vae, encoder, teacher, settings
        self._teachers: dict[str, tuple[Tensor, Tensor]] = {}

    @cached_property
    def probe(self) -> ProbeSet:
        """The scenes of all forms but the long one."""
        settings = self.settings
        return make_probe_set(self._vae, self._encoder, settings.videos, settings.seed, STANDARD_HIDDEN_FRAMES)

    @cached_property
    def _long(self) -> ProbeSet:
        videos, seed = self.settings.long_videos, self.settings.seed
        probe = make_probe_set(self._vae, self._encoder, videos, seed, STANDARD_HIDDEN_FRAMES)
        return replace(probe, times=LONG_TIMES)

    def ceilings(self) -> dict[str, dict[str, object]]:
        """The probe on the videos themselves, and through the VAE."""
        return ceilings(self._vae, self.probe)

    @torch.no_grad()
    def take(self, setup: EvalSetup, noise_seed: int = 0) -> dict[str, Any]:
        """All figures of a model.

        Args:
            setup: the model, whose softmax layers may have a window.
            noise_seed: other noise than the teacher's shows how far videos are apart that are merely of one kind.
        """
        result: dict[str, Any] = {}
        for form in FORMS if self.settings.long_videos else FORMS[:-1]:
            latents, pixels = self._videos(setup, form, noise_seed)
            result[form] = self._judged(form, pixels)
            if form != "obeyed":
                if form not in self._teachers:
                    self._teachers[form] = self._videos(self._teacher, form, 0)
                continued = form in ("continued", "long")
                given = self.probe.given_frames if continued else 0
                result[form]["deviation"] = _deviation((latents, pixels), self._teachers[form], given)
        return result

    def _videos(self, setup: EvalSetup, form: str, noise_seed: int) -> tuple[Tensor, Tensor]:
        probe = replace(self._long if form == "long" else self.probe, noise_seed=noise_seed)
        text = probe.telling_text_BTD if form == "obeyed" else probe.text_BTD
        continued = form in ("continued", "long")
        return make_videos(setup, self._vae, probe, text, continued, self.settings.batch)

    def _judged(self, form: str, pixels: Tensor) -> dict[str, Any]:
        scenes = (self._long if form == "long" else self.probe).scenes
        if form == "continued":
            return judge_continued(read_video(pixels, scenes), scenes)
        if form == "long":
            return judge_every_pass(read_video(pixels, scenes), scenes)
        reading = read_generated(pixels, scenes.exists[:, 1])
        return judge_generated(reading, scenes) if form == "generated" else dict(judge_obeyed(reading, scenes))


def _deviation(videos: tuple[Tensor, Tensor], teachers: tuple[Tensor, Tensor], given_frames: int) -> dict[str, Any]:
    """Differences in the blocks that were made; frames and flicker of whole videos."""
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


def memory_bytes(model: HybridWanModel, latents_BFCHW: Tensor, setup: EvalSetup, times: int = 1) -> int:
    """Bytes that a model remembers of one video: keys and values in half precision, states in float32."""
    _, frames, _, height, width = latents_BFCHW.shape
    spec = MemorySpec(
        batch_size=1,
        tokens_per_frame=model.tokens_per_frame(height, width),
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        frames=frames * times,
        window_frames=setup.window_frames,
        sink_frames=setup.sink_frames,
    )
    return model.new_memory(spec).num_bytes


def equal_memory_window(model: HybridWanModel, hybrid_layers: int, frames: int, tokens_per_frame: int) -> int:
    """The smallest window in whole blocks that remembers no less, in all layers, than a hybrid of full softmax layers.

    Args:
        model: for its sizes.
        hybrid_layers: of the hybrid; each has a state in float32.
        frames: latent frames of the video whose keys and values the others keep, in half precision.
        tokens_per_frame: of a latent frame.
    """
    layers, config = len(model.blocks), model.config
    frame = 2 * 2 * tokens_per_frame * config.dim
    state = 4 * config.num_heads * model.head_dim**2
    wanted = hybrid_layers * state + (layers - hybrid_layers) * frames * frame
    blocks = -(-wanted // (layers * frame * FRAMES_PER_BLOCK))
    return int(blocks) * FRAMES_PER_BLOCK
