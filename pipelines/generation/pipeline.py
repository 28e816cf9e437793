"""Text to video: prompt → block-autoregressive rollout → streamed decode, in the manner of a diffusers pipeline."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, nullcontext
from itertools import count

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from transformers import PreTrainedTokenizerBase, UMT5EncoderModel

from arl2.guidance import GuidedModel
from arl2.model import HybridWanModel
from arl2.rollout import Conditions, GeneratedBlock, Noise, SeededNoise, StepHook, remember_anew, rollout
from pipelines.config import GeneratorSampling, MemoryConfig, PipelineSettings
from pipelines.generation.blocks import GIVEN, TEXT, NonFiniteBlockError, VideoBlock
from pipelines.generation.decoding import BlockDecoder, Phase
from pipelines.generation.inputs.given import GivenFrames, GivenVideo, Video
from pipelines.generation.inputs.request import (
    CALLBACK_TENSORS,
    STORED,
    Generators,
    Prompts,
    StartingNoise,
    StepCallback,
    Stored,
    changed_latents,
)
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.mixins.calling import CallMixin
from pipelines.generation.mixins.loading import LoadingMixin
from pipelines.generation.mixins.planning import VideoPlan
from pipelines.generation.mixins.vae import DecodingMixin
from pipelines.generation.streaming import finished
from pipelines.media.images import Picture
from wan.memory import Memory, MemorySpec
from wan.model import FlowModel
from wan.ops.attention import AttentionBackend
from wan.utils.ranges import typed
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)


def no_phase(name: str) -> nullcontext[None]:
    """A phase that nobody times."""
    return nullcontext()


class CausalVideoPipeline(CallMixin, DecodingMixin, LoadingMixin):
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
        self._undo = ExitStack()

    def resolve_memory(self, memory: MemoryConfig) -> MemoryConfig:
        """The memory that a request means for this model; one that training did not meet is warned of, once."""
        trained = self.transformer.trained_memory
        warning = memory.warning(trained, bool(self.transformer.hybrid.layers))
        if warning is not None and warning not in self._warnings_of_memory:
            self._warnings_of_memory.add(warning)
            log.warning("%s", warning)
        return memory.resolved(trained)

    def new_memory(
        self, batch_size: int, height: int, width: int, latent_frames: int | None, memory: MemoryConfig
    ) -> Memory:
        """An empty memory for videos of this size.

        Args:
            latent_frames: of the whole video, to be allocated at once; None if it is not known.
            memory: of the softmax layers; another than the model was trained with is warned of once.
        """
        self.check_memory(memory)
        memory = self.resolve_memory(memory)
        window_frames, sink_frames = memory.window_for(latent_frames)
        spec = MemorySpec(
            batch_size=batch_size,
            tokens_per_frame=self.transformer.tokens_per_frame(*self.latent_size(height, width)),
            device=self._execution_device,
            dtype=self.transformer.dtype,
            frames=latent_frames or self.config.frames_per_block,
            window_frames=window_frames,
            sink_frames=sink_frames,
            head_shards=self.transformer.head_shards,
            sink_decay=memory.decay_for(latent_frames),
        )
        return (self._pool or self.transformer).new_memory(spec)

    def stream(
        self,
        prompt: Prompts | None = None,
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
        self.wan_vae.leave_float16()
        self.ready_form()
        try:
            yield from self._generate(plan, phase, lockstep)
        finally:
            self.maybe_free_model_hooks()

    def _generate(self, plan: VideoPlan, phase: Phase, lockstep: Lockstep | None) -> Iterator[VideoBlock]:
        device, size = self._execution_device, self.latent_size(plan.height, plan.width)
        frames_per_block, context_noise = self.config.frames_per_block, self.config.context_noise
        with phase("text"):
            embeds = self.encode_texts(plan.texts, plan.max_sequence_length)
        given = self._encode_given(plan, device)
        state = self.new_memory(len(embeds), plan.height, plan.width, plan.latent_frames, plan.memory)
        made_from = {TEXT: embeds.to(device, self.transformer.dtype)}
        self.bring(self.transformer)
        text = self.transformer.embed_text(made_from[TEXT])
        model: FlowModel = self.flow_model
        if plan.texts.is_guided:
            model = GuidedModel(model, plan.texts.guidance_scale)
        if given.all():
            made_from[GIVEN] = torch.cat(given.all(), dim=1)
        recomputed = plan.memory.recomputed_for(plan.latent_frames, frames_per_block)
        context = given.context_BFCHW
        if context is not None:
            context = context[:, -recomputed:]  # all of them for 0
            remember_anew(model, context, frames_per_block, text, state, given.context_frames - context.shape[1])
        generated: Iterator[GeneratedBlock] = rollout(
            model,
            plan.sampler,
            self._noise(plan, given.context_frames, size, device),
            text,
            state,
            plan.blocks,
            given.context_frames,
            context_noise,
            phase,
            Conditions(given.kept_BFCHW, given.source_BFCHW, plan.given.strength or 1.0, self._hook(plan), context),
            recomputed,
        )
        decode = BlockDecoder(self.wan_vae, size, self._side, given.context_BFCHW, made_from, phase, lockstep)
        if lockstep is not None:
            generated = lockstep.blocks(iter(generated))
        finish = lockstep.together(decode) if lockstep is not None and decode.divided else decode
        leads = lockstep is None or lockstep.leads
        for each in finished(finish, generated, device):
            broken = each.finite.first_broken() if leads else None
            if broken is not None:
                raise NonFiniteBlockError(each.index, broken)
            each.frames_BTHWC.join()
            if leads:
                yield each

    def _encode_given(self, plan: VideoPlan, device: torch.device) -> GivenFrames:
        """Latents of the frames that a call is given."""
        given, batch = plan.given, plan.texts.batch
        if given.pixels_BTCHW is not None:
            latents = self.wan_vae.encode(given.pixels_BTCHW.to(self.wan_vae.device, self.wan_vae.dtype))
        elif given.video is not None:
            frames = given.latent_frames if given.strength is None else plan.latent_frames or 0
            latents = given.video.encode(self.wan_vae, batch, given.first_frame, frames)
        else:
            return GivenFrames()
        latents = latents.to(device)
        if given.strength is not None:
            return GivenFrames(source_BFCHW=latents)
        return GivenFrames.to_continue(latents, self.config.frames_per_block)

    def _noise(self, plan: VideoPlan, first_frame: int, size: tuple[int, int], device: torch.device) -> Noise:
        drawn = SeededNoise(plan.seeds, (self.config.frames_per_block, self.transformer.config.in_dim, *size), device)
        return drawn if plan.latents is None else StartingNoise(plan.latents, drawn, first_frame)

    def _hook(self, plan: VideoPlan) -> StepHook | None:
        """The callback of a call, as the rollout takes it."""
        callback, steps = plan.callback, count()
        if callback is None:
            return None

        def hook(block: int, step: int, timestep: float, latents_BFCHW: Tensor) -> Tensor:
            return changed_latents(callback(self, next(steps), timestep, {"latents": latents_BFCHW}), latents_BFCHW)

        return hook

    def use_attention_backend(self, backend: AttentionBackend) -> None:
        """Let `backend` compute all softmax attention of the transformer."""
        self.transformer.use_attention_backend(backend)
