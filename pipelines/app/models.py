"""Models that the page offers: a pipeline, and the memory that it has in a video."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from pipelines.app.limits import Request
from pipelines.config import InferenceConfig, MemoryConfig, MemoryKind
from pipelines.generation.inputs.given import frames_to_continue
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.sessions.session import Session
from pipelines.prompts.schedules import OnSwitch
from wan.utils.errors import InputError

FULL, WINDOW, EQUAL_WINDOW, HYBRID = "full memory", "window", "equal window", "hybrid"


@dataclass(frozen=True)
class AppModel:
    """A model by its name in the page.

    Attributes:
        about: what it remembers, in a few words.
        choose_memory: the memory for a request; raises InputError for a request that it cannot have.
    """

    name: str
    about: str
    pipeline: CausalVideoPipeline
    choose_memory: Callable[[Request], MemoryConfig]

    def begin(self, request: Request) -> Session:
        """A session for a request; equal seeds give all models the same noise.

        Raises:
            InputError: a request that does not fit the model.
        """
        return self.pipeline.session(
            request.prompt,
            num_frames(self.pipeline, latent_frames(self.pipeline, request)),
            request.height,
            request.width,
            seeds=[request.seed],
            num_inference_steps=request.steps,
            memory=self.choose_memory(request),
            on_switch=request.on_switch,
            image=request.image,
            video=request.video,
        )

    @property
    def frames_per_block(self) -> int:
        """Frames that a block adds to a video, after the first, which may have fewer."""
        return int(self.pipeline.config.frames_per_block) * self.pipeline.wan_vae.temporal_compression

    def bytes_remembered(self, request: Request, latent_frames: int | None) -> int:
        """Bytes that the memory of a video takes after some latent frames, see `memory_bytes`."""
        return memory_bytes(self.pipeline, request, latent_frames, self.choose_memory(request))


def latent_frames(pipeline: CausalVideoPipeline, request: Request) -> int | None:
    """Latent frames of a video: its given blocks, and those that are generated; None for no end."""
    if request.blocks is None:
        return None
    per_block, given = int(pipeline.config.frames_per_block), 0
    if request.given_frames:
        given = frames_to_continue(request.given_frames, pipeline.wan_vae.temporal_compression, quiet=True)[1]
    # What does not fill a block begins the first generated one.
    return (request.blocks + given // per_block) * per_block


def num_frames(pipeline: CausalVideoPipeline, latents: int | None) -> int | None:
    """Frames of a video of so many latent frames; None for no end."""
    return None if latents is None else (latents - 1) * pipeline.wan_vae.temporal_compression + 1


def memory_bytes(
    pipeline: CausalVideoPipeline, request: Request, latent_frames: int | None, memory: MemoryConfig
) -> int:
    """Bytes of a memory that holds so many latent frames of a video; nothing is allocated.

    Args:
        latent_frames: None for a window that is full.
    """
    spec = pipeline.memory_spec(1, request.height, request.width, latent_frames, memory)
    return pipeline.transformer.new_memory(replace(spec, device=torch.device("meta"))).num_bytes


def models_of(
    config: InferenceConfig, pipeline: CausalVideoPipeline, hybrid: CausalVideoPipeline | None = None
) -> dict[str, AppModel]:
    """The models that pipelines offer, by name.

    Args:
        config: its memory is that of the hybrid; its window is for videos without an end.
        pipeline: of the config; softmax or hybrid.
        hybrid: a second one, to be compared with `pipeline`, which must be a softmax model then.

    Raises:
        InputError: two pipelines that are not a softmax model and a hybrid.
    """
    if hybrid is not None and (pipeline.transformer.hybrid.layers or not hybrid.transformer.hybrid.layers):
        raise InputError(
            "side by side, the first checkpoint must be a softmax model and the second a hybrid: give the hybrid as "
            "--hybrid_checkpoint, and the softmax model as --checkpoint_path or by the config"
        )
    if pipeline.transformer.hybrid.layers:
        return _by_name([_hybrid_model(config, pipeline)])
    full = AppModel(FULL, "all keys and values of all frames", pipeline, _everything)
    if hybrid is None:
        window = _endless(config)
        about = f"keys and values of {window.window_frames} latent frames"
        return _by_name([full, AppModel(WINDOW, about, pipeline, lambda _: window)])
    state = _hybrid_model(config, hybrid)
    about = "keys and values of as many last frames as the hybrid's memory would hold"
    equal = AppModel(EQUAL_WINDOW, about, pipeline, lambda request: equal_window(pipeline, state, request))
    return _by_name([full, equal, state])


def _by_name(models: list[AppModel]) -> dict[str, AppModel]:
    return {model.name: model for model in models}


def _everything(request: Request) -> MemoryConfig:
    if request.blocks is None:
        raise InputError(
            f"'{FULL}' grows with the video, which has no end: give a number of blocks, or leave that model out"
        )
    return MemoryConfig(MemoryKind.full)


def _endless(config: InferenceConfig) -> MemoryConfig:
    """The window of a config, whose kind may be another."""
    return replace(config.memory, kind=MemoryKind.window)


def _hybrid_model(config: InferenceConfig, pipeline: CausalVideoPipeline) -> AppModel:
    trained = config.memory.resolved(pipeline.transformer.trained_memory)

    def choose(request: Request) -> MemoryConfig:
        grows = trained.kind is MemoryKind.full
        return _endless(config) if request.blocks is None and grows else config.memory

    count, total = len(pipeline.transformer.hybrid.layers), int(pipeline.transformer.config.num_layers)
    return AppModel(HYBRID, f"a state of fixed size in {count} of {total} layers", pipeline, choose)


def equal_window(pipeline: CausalVideoPipeline, hybrid: AppModel, request: Request) -> MemoryConfig:
    """The largest window whose bytes are no more than those of the hybrid's memory at the end of the video.

    It has no sink, and at least the block itself. It is of whole latent frames; where a switch computes the memory
    anew, of whole blocks.
    """
    per_block = int(pipeline.config.frames_per_block)
    full = MemoryConfig(MemoryKind.full)
    per_frame = memory_bytes(pipeline, request, per_block, full) // per_block
    frames = hybrid.bytes_remembered(request, latent_frames(pipeline, request)) // per_frame
    if request.on_switch is OnSwitch.recompute:
        frames -= frames % per_block
    return MemoryConfig(MemoryKind.window, max(frames, per_block), 0)
