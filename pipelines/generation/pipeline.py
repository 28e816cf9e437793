"""Text to video: prompt → block-autoregressive rollout → streamed decode, in the manner of a diffusers pipeline."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from arl2.model import HybridWanModel
from pipelines.config import GeneratorSampling, MemoryConfig, PipelineSettings
from pipelines.generation.blocks import VideoBlock
from pipelines.generation.decoding import Phase, no_phase
from pipelines.generation.inputs.given import GivenVideo, Video
from pipelines.generation.inputs.request import CALLBACK_TENSORS, STORED, Generators, Prompts, StepCallback, Stored
from pipelines.generation.inputs.schedule import Schedule
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.mixins.calling import CallMixin
from pipelines.generation.mixins.loading import LoadingMixin
from pipelines.generation.mixins.planning import VideoPlan
from pipelines.generation.mixins.sessions import SessionMixin
from pipelines.generation.mixins.vae import DecodingMixin
from pipelines.generation.sessions.session import Session
from pipelines.media.images import Picture
from pipelines.prompts.schedules import OnSwitch
from wan.ops.attention import AttentionBackend
from wan.utils.ranges import typed
from wan.vae.wan_vae import WanVAE


class CausalVideoPipeline(CallMixin, SessionMixin, DecodingMixin, LoadingMixin):
    """Text to video with a causal Wan transformer, hybrid or softmax.

    Args:
        transformer, vae, text_encoder, tokenizer: the parts. VAE and text encoder are cast out of float16, whose range
            their activations exceed, as `wan.utils.device.wide_range_dtype` says.
        frames_per_block: latent frames generated at a time.
        denoising_steps, warp_denoising_steps, timestep_shift: see `arl2.rollout.FewStepSampler`; 1000, 750, 500 and 250
            by default.
        context_noise: timestep of the clean pass.
        first_block_denoising_steps: steps of a video's first block, if it has its own.
        guidance_distilled: whether the model takes no guidance, see `pipelines.config.GeneratorSampling`.
        height, width, num_frames: of videos whose call does not say it.
    """

    def __init__(
        self,
        transformer: HybridWanModel,
        vae: AutoencoderKLWan,
        text_encoder: UMT5EncoderModel | None,
        tokenizer: PreTrainedTokenizerBase | None,
        frames_per_block: int = 3,
        denoising_steps: Sequence[int] | None = None,
        warp_denoising_steps: bool = True,
        timestep_shift: float = 5.0,
        context_noise: float = 0.0,
        first_block_denoising_steps: Sequence[int] | None = None,
        guidance_distilled: bool = True,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
    ) -> None:
        super().__init__()
        sampling = {
            "frames_per_block": frames_per_block,
            "denoising_steps": GeneratorSampling().denoising_steps
            if denoising_steps is None
            else list(denoising_steps),
            "warp_denoising_steps": warp_denoising_steps,
            "timestep_shift": timestep_shift,
            "context_noise": context_noise,
            "first_block_denoising_steps": first_block_denoising_steps and list(first_block_denoising_steps),
            "guidance_distilled": guidance_distilled,
            "height": height,
            "width": width,
            "num_frames": num_frames,
        }
        typed(PipelineSettings, sampling, "")
        self.register_modules(transformer=transformer, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer)
        self.register_to_config(**sampling)
        self.wan_vae = WanVAE(vae)
        self._known_cuts = set[str]()
        self._warnings_of_memory = set[str]()
        self._known_fingerprints = {}
        self._undo = ExitStack()

    def stream(
        self,
        prompt: Prompts | Schedule | None = None,
        num_frames: int | Stored | None = STORED,
        height: int | None = None,
        width: int | None = None,
        *,
        negative_prompt: Prompts | None = None,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        timesteps: Sequence[int] | None = None,
        num_videos_per_prompt: int = 1,
        generator: Generators | None = None,
        seeds: Sequence[int] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        image: Picture | Sequence[Picture] | None = None,
        video: Video | GivenVideo | None = None,
        strength: float | None = None,
        memory: MemoryConfig | str | None = None,
        on_switch: OnSwitch | str = OnSwitch.keep,
        max_sequence_length: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        phase: Phase = no_phase,
        lockstep: Lockstep | None = None,
    ) -> Iterator[VideoBlock]:
        """Generate a video and hand out its frames block by block.

        Arguments that are not named here are those of `__call__`.

        Args:
            num_frames: frames of the video, given ones included; by default those that the model's folder stores; None
                to go on for ever (give `memory` a window then).
            image: what to start with: a picture (PIL, uint8 [H, W, 3] or a file) or a list of one per video, which are
                scaled and cropped about their centre; or frames [B, T, 3, H, W] in [-1, 1], T = 1 + 4k. See
                `pipelines.media.images.first_frames`.
            video: what to start with, the whole of it, see `pipelines.generation.inputs.given`; or with `strength` what
                to go through again.
            strength: fraction of the steps that blocks of `video` take, the last ones.
            phase: entered around "text", "denoise", "remember" and "vae", to time them.
            lockstep: of processes that compute the video together. Each decodes a band of rows with the fast decoder;
                others work on the leading process alone. Those that follow hand out nothing.

        Yields:
            blocks in order; the first brings the given frames too. On a GPU the next block is computed meanwhile: take
            `frames_BTHWC`, since any other copy to the CPU would wait for that too.

        Raises:
            InputError: arguments that do not fit the model or one another, before anything is computed.
            NonFiniteBlockError: text, given frames, latents or pixels hold NaN or infinity.
        """
        plan = self.plan(
            prompt,
            num_frames,
            height,
            width,
            negative_prompt=negative_prompt,
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            timesteps=timesteps,
            num_videos_per_prompt=num_videos_per_prompt,
            generator=generator,
            seeds=seeds,
            latents=latents,
            prompt_embeds=prompt_embeds,
            negative_prompt_embeds=negative_prompt_embeds,
            image=image,
            video=video,
            strength=strength,
            memory=memory,
            on_switch=on_switch,
            max_sequence_length=max_sequence_length,
            callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        return self.generate(plan, phase, lockstep)

    @torch.no_grad()
    def generate(
        self, plan: VideoPlan, phase: Phase = no_phase, lockstep: Lockstep | None = None
    ) -> Iterator[VideoBlock]:
        """Generate what was planned; see `stream`."""
        self.ready()
        try:
            yield from Session.start(self, plan, phase, lockstep).blocks()
        finally:
            self.maybe_free_model_hooks()

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """Let `backend` compute all softmax attention of the transformer."""
        self.transformer.use_attention_backend(backend)
