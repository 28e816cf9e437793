"""From the arguments of a call to a plan of its videos, before anything is computed."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, fields

from diffusers import DiffusionPipeline
from torch import Tensor

from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler, num_blocks
from pipelines.config import Frames, GeneratorSampling, MemoryConfig, Pixels, check_size
from pipelines.generation.inputs.given import GivenVideo, Video, frames_to_continue
from pipelines.generation.inputs.request import (
    CALLBACK_TENSORS,
    STORED,
    Generators,
    Prompts,
    StepCallback,
    Stored,
    Texts,
    as_memory,
    check_latents,
    check_strength,
    choose_sampler,
    choose_seeds,
    read_texts,
    with_tensors,
)
from pipelines.generation.inputs.schedule import Schedule, check_on_switch, split_schedule, with_prompt
from pipelines.generation.mixins.prompts import PromptMixin
from pipelines.media.images import Picture, first_frames
from pipelines.prompts.schedules import OnSwitch, Switch, Timeline
from wan.utils.errors import InputError
from wan.utils.ranges import typed

log = logging.getLogger(__name__)

DEFAULTS = {"height": 480, "width": 832, "num_frames": 81}
"""Sizes of videos where neither a call nor the model's folder says them: those that Wan 2.1 T2V 1.3B was trained on."""


@dataclass(frozen=True)
class Given:
    """Frames that a call is given.

    Attributes:
        pixels_BTCHW: to start with.
        video: to start with or to go through again, from frame `first_frame`.
        strength: fraction of the steps that the video goes through again; None for frames to start with.
        latent_frames: of the frames to start with; 0 for none.
    """

    pixels_BTCHW: Tensor | None = None
    video: GivenVideo | None = None
    first_frame: int = 0
    strength: float | None = None
    latent_frames: int = 0


@dataclass(frozen=True)
class VideoPlan:
    """A call that was checked.

    Attributes:
        latent_frames: of a whole video, given ones included; None for no end.
        blocks: to be generated; None for no end.
        sampler: steps of every block.
        seeds: of the noise of every video.
        latents: noise that blocks start from; None for drawn.
        callback: called after every step.
        max_sequence_length: tokens of a prompt.
        switches: later texts, each with the latent frame of the block from which it holds.
        on_switch: what happens to the memory then.
    """

    texts: Texts
    height: int
    width: int
    latent_frames: int | None
    blocks: int | None
    sampler: FewStepSampler
    seeds: list[int]
    memory: MemoryConfig
    given: Given
    latents: Tensor | None
    callback: StepCallback | None
    max_sequence_length: int | None
    switches: tuple[tuple[int, Texts], ...] = ()
    on_switch: OnSwitch = OnSwitch.keep


class PlanningMixin(PromptMixin, DiffusionPipeline):
    """Adds the checking of a call's arguments to a pipeline."""

    transformer: HybridWanModel

    def check_memory(self, memory: MemoryConfig) -> None:
        """Make sure that this model's layers can have a memory.

        Raises:
            InputError: a block does not fit, or settings do not go with one another or the layers.
        """
        transformer = self.transformer
        memory.fitting(transformer.trained_memory, self.config.frames_per_block, "this model")
        memory.refuse_for_layers(transformer.hybrid.layers, transformer.config.num_layers)

    def latent_frames(self, num_frames: int) -> int:
        """Latent frames of a video of `num_frames` frames.

        Raises:
            InputError: the VAE cannot make that number.
        """
        stride = self.wan_vae.temporal_compression
        if num_frames < 1 or (num_frames - 1) % stride:
            raise InputError(f"{num_frames} frames cannot be decoded: give 1 plus a multiple of {stride}")
        return (num_frames - 1) // stride + 1

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of the latents of videos of a size in pixels.

        Raises:
            InputError: the size does not divide into patches.
        """
        stride = self.wan_vae.spatial_compression
        check_size(height, width, stride, self.transformer.patch_size)
        return height // stride, width // stride

    def default_of(self, name: str) -> int:
        """The height, width or num_frames of a video where a call does not say it."""
        stored = self.config[name]
        return DEFAULTS[name] if stored is None else int(stored)

    def sampling_settings(self) -> GeneratorSampling:
        """How this pipeline generates."""
        settings = {each.name: self.config[each.name] for each in fields(GeneratorSampling)}
        return GeneratorSampling(**settings)

    @property
    def sampler(self) -> FewStepSampler:
        """Steps of every block, where a call does not say others."""
        return self.sampling_settings().sampler()

    def plan(
        self,
        prompt: Prompts | Schedule | None,
        num_frames: int | Stored | None,
        height: int | None,
        width: int | None,
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
    ) -> VideoPlan:
        """Check the arguments of a call, which are those of `CausalVideoPipeline.__call__`.

        Args:
            num_frames: None for a video without an end, "stored" for the folder's number.

        Raises:
            InputError: they do not fit the model or one another.
        """
        height = self.default_of("height") if height is None else typed(Pixels, height, "height")
        width = self.default_of("width") if width is None else typed(Pixels, width, "width")
        size, settings = self.latent_size(height, width), self.sampling_settings()
        first, later = split_schedule(prompt)
        words = negative_prompt, prompt_embeds, negative_prompt_embeds, guidance_scale, num_videos_per_prompt
        texts = read_texts(first, *words, settings.guidance_distilled)
        self.check_text(texts, max_sequence_length)
        remembered = self._read_memory(memory)
        sampler = choose_sampler(settings, num_inference_steps, timesteps)
        given = self._read_given(image, video, strength, texts.batch, height, width, sampler)
        frames, blocks = self._length(num_frames, given)
        check_latents(latents, strength, (texts.batch, frames, self.transformer.config.in_dim, *size))
        return VideoPlan(
            texts=texts,
            height=height,
            width=width,
            latent_frames=frames,
            blocks=blocks,
            sampler=sampler,
            seeds=choose_seeds(seeds, generator, texts.batch),
            memory=remembered,
            given=given,
            latents=latents,
            callback=with_tensors(callback_on_step_end, callback_on_step_end_tensor_inputs),
            max_sequence_length=max_sequence_length,
            switches=self._read_switches(texts, later, frames, given, max_sequence_length),
            on_switch=check_on_switch(on_switch, remembered),
        )

    def _read_memory(self, memory: MemoryConfig | str | None) -> MemoryConfig:
        remembered = as_memory(memory)
        self.check_memory(remembered)
        return remembered

    def _read_switches(
        self,
        texts: Texts,
        later: Sequence[tuple[int, Prompts]],
        frames: int | None,
        given: Given,
        max_sequence_length: int | None,
    ) -> tuple[tuple[int, Texts], ...]:
        """Later texts of a video, by the latent frame of the block from which they hold."""
        if not later:
            return ()
        per_block: int = self.config.frames_per_block
        context = given.latent_frames // per_block * per_block
        timeline = Timeline(per_block, frames, context, self.wan_vae.temporal_compression)
        starts = timeline.starts([Switch("", frame) for frame in (0, *(frame for frame, _ in later))], "the schedule")
        found = tuple((start, with_prompt(texts, prompt)) for start, (_, prompt) in zip(starts[1:], later, strict=True))
        for _, each in found:
            self.check_text(each, max_sequence_length)
        return found

    def _read_given(
        self,
        image: Picture | Sequence[Picture] | None,
        video: Video | GivenVideo | None,
        strength: float | None,
        batch: int,
        height: int,
        width: int,
        sampler: FewStepSampler,
    ) -> Given:
        if strength is not None and video is None:
            raise InputError("strength is of a video that goes through the steps again: give video too")
        if image is not None and video is not None:
            raise InputError("give an image or a video to start with, not both")
        stride = self.wan_vae.temporal_compression
        if image is not None:
            pixels = first_frames(image, batch, height, width, stride)
            return Given(pixels, latent_frames=(pixels.shape[1] - 1) // stride + 1)
        if video is None:
            return Given()
        known = video if isinstance(video, GivenVideo) else GivenVideo(video, height, width)
        if strength is None:
            first, count = frames_to_continue(known.num_frames, stride)
            return Given(video=known, first_frame=first, latent_frames=count)
        check_strength(strength, sampler)
        return Given(video=known, strength=strength)

    def _length(self, num_frames: int | Stored | None, given: Given) -> tuple[int | None, int | None]:
        """Latent frames of a video, and blocks to be generated; None for no end."""
        frames, per_block = self._latent_frames_of(num_frames, given), self.config.frames_per_block
        if frames is None:
            return None, None
        if given.strength is not None:
            self._require_long_enough(given, frames)
        if given.latent_frames >= frames:
            raise InputError(
                f"{given.latent_frames} latent frames are given for a video of {frames}: give more frames to generate"
            )
        return frames, num_blocks(frames - given.latent_frames // per_block * per_block, per_block)

    def _latent_frames_of(self, num_frames: int | Stored | None, given: Given) -> int | None:
        if given.strength is not None and num_frames == STORED:
            assert given.video is not None
            whole = (given.video.num_frames - 1) // self.wan_vae.temporal_compression + 1
            per_block: int = self.config.frames_per_block
            taken = max(whole // per_block, 1) * per_block
            count = (taken - 1) * self.wan_vae.temporal_compression + 1
            if count < given.video.num_frames:
                log.warning(
                    "of the given video the last %d of %d frames are left out: blocks hold %d latent frames each",
                    given.video.num_frames - count,
                    given.video.num_frames,
                    per_block,
                )
            return taken
        if num_frames is None:
            if given.strength is not None:
                raise InputError("a video that goes through the steps again has an end: give num_frames")
            return None
        # A text beside "stored" would be a negative prompt that is given by position, as other pipelines take it.
        frames = self.default_of("num_frames") if num_frames == STORED else typed(Frames, num_frames, "num_frames")
        return self.latent_frames(frames)

    def _require_long_enough(self, given: Given, latent_frames: int) -> None:
        assert given.video is not None
        needed = (latent_frames - 1) * self.wan_vae.temporal_compression + 1
        if (count := given.video.num_frames) < needed:
            raise InputError(
                f"the given video has {count} frames, {needed} are needed: give a longer one, or a smaller num_frames"
            )
