"""A whole video per call, with the arguments and results of diffusers' pipelines."""

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from diffusers.video_processor import VideoProcessor
from torch import Tensor

from pipelines.config import MemoryConfig
from pipelines.generation.blocks import VideoBlock, VideoOutput
from pipelines.generation.inputs.given import Video
from pipelines.generation.inputs.request import CALLBACK_TENSORS, STORED, Generators, Prompts, StepCallback
from pipelines.generation.inputs.schedule import Schedule
from pipelines.generation.mixins.planning import PlanningMixin, VideoPlan
from pipelines.media.images import Picture
from pipelines.prompts.schedules import OnSwitch
from wan.utils.errors import InputError

OUTPUT_TYPES = ("pt", "np", "pil", "latent")


class CallMixin(PlanningMixin):
    """Adds `__call__` to a pipeline that generates block by block."""

    def generate(self, plan: VideoPlan) -> Iterator[VideoBlock]:
        """See `CausalVideoPipeline`."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        prompt: Prompts | Schedule | None = None,
        num_frames: int | None = None,
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
        video: Video | None = None,
        strength: float | None = None,
        memory: MemoryConfig | str | None = None,
        on_switch: OnSwitch | str = OnSwitch.keep,
        max_sequence_length: int | None = None,
        callback_on_step_end: StepCallback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = CALLBACK_TENSORS,
        output_type: Literal["pt", "np", "pil", "latent"] = "np",
        return_dict: bool = True,
    ) -> VideoOutput | tuple[Any]:
        """Generate whole videos.

        Args:
            prompt: one, or one per video of the batch; or a schedule of several that follow one another in every video,
                `[(0, "…"), (40, "…")]`, each with the latent frame from which it holds. A block has one prompt: one
                that begins inside of a block holds for all of it.
            num_frames: frames of a video, given ones included, 1 plus a multiple of 4 (of the VAE's stride); by default
                those that the model's folder stores, else 81.
            height, width: pixels; by default those that the model's folder stores, else 480 and 832.
            negative_prompt: what guidance leads away from, nothing by default. Only with guidance.
            guidance_scale: scale of classifier-free guidance, above 1 for models that were trained with it
                (`guidance_distilled: false` in model_index.json); others are distilled, and refuse it.
            num_inference_steps: steps per block, evenly divided. By default the list that the model was distilled for.
            timesteps: the steps themselves, falling from at most 1000, counted as `denoising_steps`.
            num_videos_per_prompt: videos of every prompt; those of a prompt follow one another.
            generator: draws the seed of every video: one in order, or one per video.
            seeds: one per video, in place of a generator.
            latents: noise that blocks start from, [B, F, C, h, w] for all F latent frames of a video; by default drawn.
                What later steps add is drawn either way.
            prompt_embeds, negative_prompt_embeds: from `encode_prompt`, [B, T, text_dim], in place of words.
            image: what to start with: a PIL picture, uint8 array, path or tensor, or one per video; see `stream`.
            video: a file, list of pictures, uint8 array [T, H, W, 3] or tensor in [-1, 1] to continue, or to go through
                again, with `strength`; see `stream`.
            strength: fraction of the steps, in (0, 1], that a given video goes through again.
            memory: of the softmax layers, "trained", "full", "window" or a config.
            on_switch: what happens to the memory when the prompt changes: "keep", or "recompute" what softmax layers
                see under the new one; see docs/sessions.md.
            max_sequence_length: tokens after which prompts are cut.
            callback_on_step_end: called with (pipeline, step, timestep, tensors) after every step of every block, steps
                counted over the video; the "latents" that it returns, if any, take the place of the block's.
                To stop early, raise an exception in it, or leave a loop over `stream`; diffusers' `_interrupt` is not
                read.
            callback_on_step_end_tensor_inputs: tensors that it is given: "latents", [B, frames of the block, C, h, w].
            output_type: see `VideoOutput`.
            return_dict: whether to return a `VideoOutput`, else a tuple with the frames.

        Returns:
            the videos.

        Raises:
            InputError: arguments that do not fit the model or one another, before anything is computed.
            NonFiniteBlockError: text, given frames, latents or pixels hold NaN or infinity.
        """
        if output_type not in OUTPUT_TYPES:
            raise InputError(f"unknown output_type {output_type!r}: give pt, np, pil or latent")
        plan = self.plan(
            prompt,
            STORED if num_frames is None else num_frames,
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
        found = self._collect(plan, output_type)
        return VideoOutput(found) if return_dict else (found,)

    def _collect(self, plan: VideoPlan, output_type: str) -> Any:
        """Put the blocks of videos together, as `VideoOutput` says."""
        assert plan.latent_frames is not None
        pixels, latents = [], []
        with self.progress_bar(total=(plan.latent_frames - 1) * self.wan_vae.temporal_compression + 1) as bar:
            for block in self.generate(plan):
                # Frames wait on the CPU, so that the GPU's memory does not grow with the video.
                pixels.append(block.pixels_BTCHW.float().cpu())
                latents += (
                    [block.latents_BFCHW] if block.given_BFCHW is None else [block.given_BFCHW, block.latents_BFCHW]
                )
                bar.update(block.pixels_BTCHW.shape[1])
        if output_type == "latent":
            return torch.cat(latents, dim=1)
        processor = VideoProcessor(vae_scale_factor=self.wan_vae.spatial_compression)
        return processor.postprocess_video(torch.cat(pixels, dim=1).transpose(1, 2), output_type)
