"""The arguments of a call, held against one another and the model before anything is computed."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from arl2.rollout import FewStepSampler, SeededNoise
from pipelines.config import GeneratorSampling, MemoryConfig, MemoryKind, Strength
from pipelines.generation.inputs.given import GivenVideo, Video
from pipelines.media.images import Picture
from pipelines.prompts.files import check_prompt
from pipelines.prompts.schedules import OnSwitch
from wan.flow import NUM_TRAIN_TIMESTEPS
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, Seed, typed

Generators = torch.Generator | Sequence[torch.Generator]
Prompts = str | Sequence[str]
Stored = Literal["stored"]
STORED: Stored = "stored"
"""For a number of frames that the model's folder says."""
StepCallback = Callable[[Any, int, float, dict[str, Tensor]], Mapping[str, Tensor] | None]
"""(pipeline, step of the video, timestep, tensors) to tensors that take the place of those given, if any."""
CALLBACK_TENSORS = ("latents",)
"""Tensors that `callback_on_step_end` may ask for."""
MAX_GUIDANCE = 100.0
Guidance = Annotated[float, Bounds(0, MAX_GUIDANCE)]
NumSteps = Annotated[int, Bounds(1, NUM_TRAIN_TIMESTEPS)]
NumVideos = Annotated[int, Bounds(1)]


class CallArguments(TypedDict, total=False):
    """Arguments of a call beside prompt, length and size; see `CausalVideoPipeline.__call__` and `stream`."""

    negative_prompt: Prompts | None
    guidance_scale: float | None
    num_inference_steps: int | None
    timesteps: Sequence[int] | None
    num_videos_per_prompt: int
    generator: Generators | None
    seeds: Sequence[int] | None
    latents: Tensor | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    image: Picture | Sequence[Picture] | None
    video: Video | GivenVideo | None
    strength: float | None
    memory: MemoryConfig | str | None
    on_switch: OnSwitch | str
    max_sequence_length: int | None
    callback_on_step_end: StepCallback | None
    callback_on_step_end_tensor_inputs: Sequence[str]


@dataclass(frozen=True)
class Texts:
    """The texts of a call, by words or by embeddings.

    Attributes:
        prompts, negative_prompts: one per video; None where embeddings take their place, or without guidance.
        prompt_embeds, negative_prompt_embeds: [B, T, text_dim], likewise.
        guidance_scale: 1 for no guidance.
    """

    prompts: list[str] | None
    negative_prompts: list[str] | None
    prompt_embeds: Tensor | None
    negative_prompt_embeds: Tensor | None
    guidance_scale: float

    @property
    def is_guided(self) -> bool:
        """Whether negative prompts are computed too."""
        return self.guidance_scale > 1

    @property
    def batch(self) -> int:
        """Videos."""
        return len(self.prompts) if self.prompts is not None else len(self.prompt_embeds)  # type: ignore[arg-type]


def read_texts(
    prompt: Prompts | None,
    negative_prompt: Prompts | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    guidance_scale: float | None,
    num_videos_per_prompt: int,
    guidance_distilled: bool,
) -> Texts:
    """The texts of a call, repeated for the videos of every prompt.

    Raises:
        InputError: none or too many are given, they do not match, or guidance is asked of a model without it.
    """
    if (prompt is None) == (prompt_embeds is None):
        raise InputError("give a prompt or prompt_embeds" + (", not both" if prompt is not None else ""))
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise InputError("give negative_prompt or negative_prompt_embeds, not both")
    times: int = typed(NumVideos, num_videos_per_prompt, "num_videos_per_prompt")
    for name, embeds in {"prompt_embeds": prompt_embeds, "negative_prompt_embeds": negative_prompt_embeds}.items():
        if embeds is not None:
            require_floats(embeds, name, "embeddings from encode_prompt, [videos, tokens, channels]")
    scale = _guidance(guidance_scale, guidance_distilled)
    has_negative = negative_prompt is not None or negative_prompt_embeds is not None
    if has_negative and scale <= 1:
        why = "this model is distilled without guidance" if guidance_distilled else "guidance_scale is not above 1"
        raise InputError(f"a negative prompt would do nothing, since {why}: leave it out")
    prompts = None if prompt is None else as_list(prompt, "prompt")
    for one in prompts or ():
        check_prompt(one, "the prompt")
    batch = len(prompts) if prompts is not None else len(prompt_embeds)  # type: ignore[arg-type]
    if not batch:
        raise InputError("there are no prompts: give at least one")
    negative = None
    if scale > 1 and negative_prompt_embeds is None:
        given = "" if negative_prompt is None else negative_prompt
        negative = [given] * batch if isinstance(given, str) else as_list(given, "negative_prompt")
    count = batch if negative is None and negative_prompt_embeds is None else len(negative or negative_prompt_embeds)  # type: ignore[arg-type]
    if count != batch:
        raise InputError(f"{count} negative prompts for {batch} prompts: give one, or one per prompt")
    return Texts(
        None if prompts is None else [one for one in prompts for _ in range(times)],
        None if negative is None else [one for one in negative for _ in range(times)],
        None if prompt_embeds is None else prompt_embeds.repeat_interleave(times, dim=0),
        None if negative_prompt_embeds is None else negative_prompt_embeds.repeat_interleave(times, dim=0),
        scale,
    )


def as_list(prompt: Prompts, name: str) -> list[str]:
    """Prompts as a list.

    Raises:
        InputError: one is no text; the message says `name`.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt) if isinstance(prompt, Sequence) else [prompt]
    others = [type(one).__name__ for one in prompts if not isinstance(one, str)]
    if others:
        raise InputError(f"{name} is or holds a {others[0]}: give text, or a list of texts")
    return prompts


def _guidance(scale: float | None, distilled: bool) -> float:
    if scale is None:
        return 1.0
    scale = float(typed(Guidance, scale, "guidance_scale"))
    if scale > 1 and distilled:
        raise InputError(
            f"guidance_scale {scale:g} cannot be had: this model is distilled, it predicts what guidance would give, "
            "and was trained without dropped prompts; leave guidance_scale out (a model that was trained with it says "
            "guidance_distilled: false)"
        )
    return max(scale, 1.0)


def choose_sampler(
    settings: GeneratorSampling, num_inference_steps: int | None, timesteps: Sequence[int] | None
) -> FewStepSampler:
    """The steps of a call: the model's own, some evenly divided ones, or those given.

    Args:
        num_inference_steps: how many; n are 1000, 1000·(n - 1)/n, …, 1000/n.
        timesteps: themselves, whole numbers counted as `denoising_steps` are.

    Raises:
        InputError: both are given, or they are out of range.
    """
    if num_inference_steps is not None and timesteps is not None:
        raise InputError("give num_inference_steps or timesteps, not both")
    if num_inference_steps is None and timesteps is None:
        return settings.sampler()
    if timesteps is None:
        count = typed(NumSteps, num_inference_steps, "num_inference_steps")
        timesteps = [round(NUM_TRAIN_TIMESTEPS * (count - index) / count) for index in range(count)]
    steps = [_whole_step(step) for step in _as_values(timesteps, "timesteps", "falling whole numbers")]
    return FewStepSampler.from_steps(steps, settings.timestep_shift, settings.warp_denoising_steps)


def _whole_step(step: Any) -> int:
    """A timestep as a whole number: 1000.0, as a tensor has it, but not 999.5, which would be another step.

    Raises:
        InputError: it is none.
    """
    is_whole = isinstance(step, float | np.floating) and float(step).is_integer()
    return int(typed(int, int(step) if is_whole else step, "a timestep"))


def _as_values(given: Any, name: str, wanted: str) -> list[Any]:
    """The elements of a list, an array or a tensor of numbers.

    Raises:
        InputError: it is something else.
    """
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable):
        raise InputError(f"{name} is a {type(given).__name__}: give a list of {wanted}")
    if isinstance(given, Tensor | np.ndarray):
        if given.ndim != 1:
            raise InputError(f"{name} has the shape {list(given.shape)}: give a list of {wanted}")
        return list(given.tolist())
    return list(given)


def require_floats(value: Any, name: str, wanted: str) -> None:
    """Make sure that an argument is a dense tensor of floats.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(value, Tensor):
        raise InputError(f"{name} is a {type(value).__name__}: give a tensor, {wanted}")
    if not value.is_floating_point() or value.is_meta:
        what = "without values (meta device)" if value.is_meta else f"of {value.dtype}"
        raise InputError(f"{name} is a tensor {what}: give floats, {wanted}")


def check_strength(strength: float, sampler: FewStepSampler) -> None:
    """Make sure that some steps are taken.

    Args:
        strength: fraction of the steps that a video goes through again.

    Raises:
        InputError: it is out of range, or none of so few steps.
    """
    typed(Strength, strength, "strength")
    steps = min(len(each.timesteps) for each in (sampler, sampler.for_block(0)))
    if not int(steps * strength):
        raise InputError(f"strength {strength:g} of {steps} steps is no step: give at least {1 / steps:g}")


def choose_seeds(seeds: Sequence[int] | None, generator: Generators | None, batch: int) -> list[int]:
    """Seeds of the noise of every video: those given, or drawn from one generator in order, or from one per video.

    Raises:
        InputError: another number than videos, or seeds and generators.
    """
    if seeds is not None and generator is not None:
        raise InputError("give seeds or generator, not both")
    if seeds is None and isinstance(generator, Sequence):
        if len(generator) != batch:
            raise InputError(f"{len(generator)} generators for {batch} videos: give one, or one per video")
        return [_draw(1, one)[0] for one in generator]
    if seeds is None:
        return _draw(batch, generator)  # type: ignore[arg-type]
    found: list[int] = typed(list[Seed], _as_values(seeds, "seeds", "whole numbers, one per video"), "seeds")
    if len(found) != batch:
        raise InputError(f"{len(found)} seeds for {batch} videos: give one per video")
    return found


def _draw(count: int, generator: torch.Generator | None) -> list[int]:
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(f"generator is a {type(generator).__name__}: give a torch.Generator, or one per video")
    device = "cpu" if generator is None else generator.device
    drawn: list[int] = torch.randint(2**62, (count,), generator=generator, device=device).tolist()
    return drawn


class StartingNoise:
    """Noise of blocks whose starting point is given; before later steps it is drawn.

    Args:
        latents_BFCHW: noise of all frames of a video.
        drawn: noise of every block and step.
        first_frame: latent frames of the video before the first generated block.
    """

    def __init__(self, latents_BFCHW: Tensor, drawn: SeededNoise, first_frame: int) -> None:
        self._latents, self._drawn, self._first = latents_BFCHW, drawn, first_frame

    def __call__(self, block: int, step: int) -> Tensor:
        drawn = self._drawn(block, step)
        frames = drawn.shape[1]
        start = self._first + block * frames
        return drawn if step else self._latents[:, start : start + frames].to(drawn)


def check_latents(latents: Tensor | None, strength: float | None, shape: Sequence[int | None]) -> None:
    """Make sure that noise for a whole video is just that.

    Args:
        latents: None for none.
        strength: of a video that blocks start from, in their place.
        shape: that they must have, [B, F, C, h, w]; F is None where the video has no end.

    Raises:
        InputError: another shape, values that are not finite, or both are given.
    """
    if latents is None:
        return
    if strength is not None:
        raise InputError("latents and strength both say what blocks start from: leave one of them out")
    if shape[1] is None:
        raise InputError("latents need a number of frames: give num_frames")
    require_floats(latents, "latents", "[videos, latent frames, channels, height, width], such as torch.randn")
    if tuple(latents.shape) != tuple(shape):
        raise InputError(
            f"latents have the shape {list(latents.shape)}: give noise for all frames of the video, {list(shape)} "
            "([videos, latent frames, channels, height, width])"
        )
    if not torch.isfinite(latents).all():
        raise InputError("latents hold NaN or infinity: give noise, such as torch.randn")


def as_memory(memory: MemoryConfig | str | None) -> MemoryConfig:
    """A memory by its name, or as it is.

    Raises:
        InputError: an unknown name, or something else.
    """
    if memory is None:
        return MemoryConfig()
    if isinstance(memory, MemoryConfig):
        return typed(MemoryConfig, asdict(memory), "memory")
    kinds = [kind.value for kind in MemoryKind]
    if memory not in kinds:
        raise InputError(f"memory {memory!r} is unknown: give {', '.join(kinds)}, or a MemoryConfig")
    return MemoryConfig(MemoryKind(memory))


def with_tensors(callback: StepCallback | None, names: Sequence[str]) -> StepCallback | None:
    """A callback that is given the tensors that it asks for.

    Raises:
        InputError: it cannot have them, or is no function.
    """
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise InputError(
            f"callback_on_step_end_tensor_inputs is a {type(names).__name__}: give a list such as {[*CALLBACK_TENSORS]}"
        )
    unknown = [name for name in names if name not in CALLBACK_TENSORS]
    if unknown:
        raise InputError(
            f"callback_on_step_end_tensor_inputs names {unknown[0]!r}: a callback can have "
            f"{', '.join(CALLBACK_TENSORS)}"
        )
    if callback is None or (names and callable(callback)):
        return callback
    if not callable(callback):
        raise InputError(f"callback_on_step_end is a {type(callback).__name__}: give a function")
    return lambda pipeline, step, timestep, _: callback(pipeline, step, timestep, {})


def changed_latents(returned: Mapping[str, Tensor] | None, latents_BFCHW: Tensor) -> Tensor:
    """The latents to go on with after a callback.

    Args:
        returned: by the callback.
        latents_BFCHW: that it was given.

    Raises:
        InputError: it returned something else, further names, or latents of another shape.
    """
    if returned is None:
        return latents_BFCHW
    if not isinstance(returned, Mapping):
        raise InputError(
            f"callback_on_step_end returned a {type(returned).__name__}: return its tensors by name, or nothing"
        )
    if unknown := [name for name in returned if name not in CALLBACK_TENSORS]:
        raise InputError(
            f"callback_on_step_end returned {unknown[0]!r}, which would change nothing: return "
            f"{', '.join(CALLBACK_TENSORS)}, or nothing"
        )
    latents = returned.get("latents", latents_BFCHW)
    if not isinstance(latents, Tensor) or latents.shape != latents_BFCHW.shape:
        raise InputError(
            f"callback_on_step_end returned other latents than {list(latents_BFCHW.shape)}: keep the shape"
        )
    return latents.to(latents_BFCHW)
