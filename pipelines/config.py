"""Settings of an inference run, each with its range; `pipelines.settings` reads them."""

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Self

import torch

from arl2.inference.parallel.factory import Exchange
from arl2.model import DEFAULT_LORA_ALPHA, FFNLoRA, HybridSettings
from arl2.rollout import FewStepSampler
from arl2.trained_memory import TrainedMemory, describe_memory
from pipelines.prompts.schedules import OnSwitch
from pipelines.settings import load_config as load_config
from wan.checkpoints.configs import read_config
from wan.checkpoints.fields import LoRAAlpha
from wan.checkpoints.lora import LoRASource, require_distinct
from wan.flow import NUM_TRAIN_TIMESTEPS, Shift
from wan.memory import check_window
from wan.utils.device import HALF, triton_installed
from wan.utils.errors import CheckpointError, InputError
from wan.utils.ranges import Bounds, Falling, InputPath, IsDevice, LayerIndices, Length, PathText, declarations, typed

Frames = Annotated[int, Bounds(1, 10**6)]
"""Latent frames of a video."""
Pixels = Annotated[int, Bounds(1, 16384)]
"""Height or width of a video; encoders of mp4 take no larger ones."""
FramesPerSecond = Annotated[int, Bounds(1, 1000)]
"""Rate of a video file."""
Rank = Annotated[int, Bounds(1, 10**6)]
"""Rank of adapters."""
Steps = Annotated[list[Annotated[int, Bounds(1, NUM_TRAIN_TIMESTEPS)]], Length(1, NUM_TRAIN_TIMESTEPS), Falling()]
"""Timesteps of a few-step generator."""
ContextNoise = Annotated[float, Bounds(0, NUM_TRAIN_TIMESTEPS)]
"""Timestep of the clean pass."""
Strength = Annotated[float, Bounds(0, 1, above=True)]
"""Fraction of the steps that a video is taken through again, for video to video."""
NOT_OF_VIDEOS = ("model_folder", "checkpoint_path", "lora", "caveat", "guidance_distilled")
"""Settings of `InferenceConfig` that videos do not depend on; weights count by their content."""
NOT_OF_LATENTS = ("hybrid", "speed", "fps")
"""With `NOT_OF_VIDEOS`, settings that a softmax model's latents do not depend on."""


class MemoryKind(StrEnum):
    """How much softmax layers remember."""

    trained = "trained"
    full = "full"
    window = "window"


class SinkKind(StrEnum):
    """What the sink of a window holds."""

    first = "first"
    average = "average"


@dataclass
class MemoryConfig:
    """Memory of the softmax layers; hybrid layers have their state.

    Attributes:
        kind: trained for what the checkpoint was trained with, which is everything where it does not say; full for
            everything; window for a sink and a sliding window, whose size does not grow with the video.
        window_frames: latent frames that a query sees, its own block and the sink included.
        sink_frames: latent frames of the sink, which is never dropped.
        sink: first for the first frames as they were; average for a moving average of them and of all frames that have
            left the window, see `wan.averaged_sink.AveragedSinkMemory`.
        sink_decay: weight of the sink in that average when a frame leaves.
        recompute: compute a window's keys and values anew before every block, see `arl2.rollout.remember_anew`.
    """

    kind: MemoryKind = MemoryKind.trained
    window_frames: Frames = 9
    sink_frames: Annotated[int, Bounds(0, 10**6)] = 3
    sink: SinkKind = SinkKind.first
    sink_decay: Annotated[float, Bounds(0, 1, above=True)] = 0.999
    recompute: bool = False

    @property
    def window(self) -> tuple[int | None, int]:
        """Frames of the window, None for everything, and of the sink.

        Raises:
            ValueError: the kind is not resolved: only a model says what it means.
        """
        if self.kind is MemoryKind.trained:
            raise ValueError("memory of kind trained has no window: resolve it first")
        return (self.window_frames, self.sink_frames) if self.kind is MemoryKind.window else (None, 0)

    def window_for(self, frames: int | None) -> tuple[int | None, int]:
        """As `window`, for a video of some frames, None for no end: one beyond the video is as long as the video."""
        window_frames, sink_frames = self.window
        if window_frames is not None and frames is not None and frames < window_frames:
            return frames, 0  # nothing is dropped, so there is no sink to keep
        return window_frames, sink_frames

    def decay_for(self, frames: int | None) -> float | None:
        """Decay of the sink's moving average for a video of some frames, None for no end; None for no average."""
        is_average = self.sink is SinkKind.average and self.window_for(frames)[1] > 0
        return self.sink_decay if is_average else None

    def recomputed_for(self, frames: int | None, frames_per_block: int) -> int:
        """Latent frames to compute anew before a block of a video of some frames, None for no end.

        It is 0 where no frame ever leaves the window, since nothing would change.
        """
        if not self.recompute or (frames is not None and frames <= self.window_frames):
            return 0
        return self.window_frames - frames_per_block

    def resolved(self, trained: TrainedMemory | None) -> "MemoryConfig":
        """The memory of a model: `trained` replaced by what the model was trained with.

        Args:
            trained: the model's record; None for everything.
        """
        if self.kind is not MemoryKind.trained:
            return self
        if trained is None or trained.window_frames is None:
            return replace(self, kind=MemoryKind.full)
        return MemoryConfig(MemoryKind.window, trained.window_frames, trained.sink_frames)

    def identity(self) -> dict[str, Any]:
        """As it is noted of what was made with it: frames of a window that there is not are as by default."""
        noted = asdict(self if self.kind is MemoryKind.window else MemoryConfig(self.kind))
        # Records of earlier versions lack these: they are left out where they do nothing.
        idle = {"sink", "sink_decay"} if noted["sink"] is SinkKind.first else set()
        idle |= set() if noted["recompute"] else {"recompute"}
        return {name: value for name, value in noted.items() if name not in idle}

    def refuse_idle(self, given: Collection[str]) -> None:
        """Make sure that no setting of the command line would do nothing.

        Args:
            given: dotted names of the command line's settings.

        Raises:
            InputError: settings of a window or of an average that there is not.
        """
        for each in fields(self)[1:]:
            if self.kind is not MemoryKind.window and f"memory.{each.name}" in given:
                raise InputError(_needs_window(each.name, self.kind))
        if self.sink is not SinkKind.average and "memory.sink_decay" in given:
            raise InputError("sink_decay is of a moving average: give memory.sink=average too, or drop it")

    def refuse_variants(self, name: str) -> None:
        """Make sure that this is a plain memory, for training and probes, which have no other.

        Args:
            name: of the setting, for the message.

        Raises:
            InputError: its sink is an average, or it is computed anew.
        """
        for setting, value in (("sink", self.sink is SinkKind.average), ("recompute", self.recompute)):
            if value:
                raise InputError(f"{name}.{setting} is built for generating videos alone: drop it here")

    def refuse_for_layers(self, hybrid_layers: Collection[int], num_layers: int) -> None:
        """Make sure that a model's layers can have this memory.

        Args:
            hybrid_layers: indices of the hybrid ones.
            num_layers: of the model.

        Raises:
            InputError: there is no softmax layer for a sink, or a hybrid layer whose state cannot be computed anew.
        """
        if self.sink is SinkKind.average and len(hybrid_layers) == num_layers:
            raise InputError("memory.sink=average would do nothing: no layer of this model is a softmax layer, drop it")
        if self.recompute and hybrid_layers:
            raise InputError(
                f"memory.recompute forgets all but the window, {len(hybrid_layers)} layers of this model are hybrid: "
                "their state is of the whole video, drop it"
            )

    def fitting(self, trained: TrainedMemory | None, frames_per_block: int, source: str | Path) -> "MemoryConfig":
        """As `resolved`, and checked.

        Args:
            source: of the record, for messages.

        Raises:
            InputError: the window cannot hold a block.
        """
        self.check(frames_per_block)
        memory = self.resolved(trained)
        try:
            memory.check(frames_per_block)
        except InputError as error:
            raise CheckpointError(
                f"{source} was trained with {trained}, says its trained_memory, which cannot hold a block of "
                f"{frames_per_block} frames: correct that, or give frames_per_block or memory.kind"
            ) from error
        return memory

    def warning(self, trained: TrainedMemory | None, is_hybrid: bool) -> str | None:
        """What to say of running a model with this memory; None where it is what the model was trained with.

        Args:
            trained: the model's record of its training; None if it has none.
            is_hybrid: whether it has hybrid layers.
        """
        if self.kind is MemoryKind.trained:
            return None
        asked = describe_memory(*self.window)
        asked += f", a moving average of decay {self.sink_decay:g}" if self.sink is SinkKind.average else ""
        asked += ", computed anew before every block" if self.recompute else ""
        is_new = self.sink is SinkKind.average or self.recompute
        if trained is not None and (is_new or not trained.covers(*self.window)):
            return (
                f"this model was trained with {trained}; with {asked} in its softmax layers, which training did not "
                "meet, it is less accurate: memory kind trained takes what it was trained with"
            )
        if trained is None and is_hybrid and self.kind is MemoryKind.window:
            return (
                f"this hybrid does not say which memory it was trained with; with {asked} in its softmax layers it is "
                "less accurate unless that is what training had"
            )
        return None

    def check(self, frames_per_block: int) -> None:
        """Make sure that a block fits, and that all settings go together; a block fits a kind that is not resolved.

        Raises:
            InputError: the window is too small, or a setting needs another one.
        """
        for name, value in (("sink", self.sink is SinkKind.average), ("recompute", self.recompute)):
            if value and self.kind is not MemoryKind.window:
                raise InputError(_needs_window(name, self.kind))
        if self.kind is MemoryKind.trained:
            return
        check_window(*self.window, frames_per_block)
        if self.sink is SinkKind.average and (not self.sink_frames or self.sink_decay == 1):
            raise InputError(
                f"memory.sink=average of {self.sink_frames} frames and decay {self.sink_decay:g} averages nothing: "
                "give memory.sink_frames of at least 1 and memory.sink_decay below 1, or memory.sink=first"
            )
        before = self.window_frames - frames_per_block
        if self.recompute and (self.sink_frames or not before or before % frames_per_block):
            raise InputError(
                f"memory.recompute needs a window of two or more whole blocks of {frames_per_block} without a sink, "
                f"not {self.window_frames} frames with a sink of {self.sink_frames}: change memory.window_frames or "
                "memory.sink_frames"
            )


def _needs_window(name: str, kind: MemoryKind) -> str:
    return f"{name} needs a window, the memory is {kind.value}: give memory.kind=window too, or drop it"


@dataclass
class SpeedConfig:
    """How the same numbers are computed; see `CausalVideoPipeline.optimize_for_inference`.

    Attributes:
        compile: compile the transformer's blocks; null for where it pays, which is on a GPU with Triton.
        cuda_graphs: record passes as CUDA graphs; null for on a GPU.
        fast_vae: decode by `wan.vae.fast`.
        overlap_decoding: decode a block while the next is denoised, on a stream of its own; null for on a GPU. What is
            measured of either then includes waiting for the other.
        fp8: linear layers of the blocks in FP8: faster, less exact, only on GPUs that have it.
        tiny_vae: weights of a tiny decoder in TAEHV's format, such as taew2_1.pth, to decode with: quicker, less exact.
        exchange: how GPUs that compute one video together exchange tokens for heads: "peer" writes into the memory of
            other GPUs of the host, "collective" uses NCCL, without CUDA graphs; "auto" is "peer" where it can be.
        shard_weights: of GPUs that compute one video together with the "peer" exchange, each keeps a part of the large
            weights, and fetches those of the next layer while one computes.
        vae_device: where the VAE is, and decodes beside the transformer's work; null for the transformer's device.
        kernels: what lies between products by Triton kernels of our own; null for with CUDA graphs, on a GPU with
            Triton, in half precision. Passes that are not recorded leave it to compiled blocks, if blocks are compiled.
    """

    compile: bool | None = None
    cuda_graphs: bool | None = None
    fast_vae: bool = True
    overlap_decoding: bool | None = None
    fp8: bool = False
    kernels: bool | None = None
    tiny_vae: PathText | None = None
    exchange: Exchange = Exchange.AUTO
    shard_weights: bool = False
    vae_device: Annotated[str, IsDevice()] | None = None

    def on(self, device: torch.device, dtype: torch.dtype) -> Self:
        """With every switch that was left open thrown as it pays on a device for weights of a type."""
        gpu = device.type == "cuda"
        triton = gpu and triton_installed()
        graphs = gpu if self.cuda_graphs is None else self.cuda_graphs
        return replace(
            self,
            compile=triton if self.compile is None else self.compile,
            cuda_graphs=graphs,
            overlap_decoding=gpu if self.overlap_decoding is None else self.overlap_decoding,
            kernels=triton and dtype in HALF and graphs if self.kernels is None else self.kernels,
        )

    def vae_on(self, device: torch.device) -> torch.device:
        """The VAE's device for a transformer on `device`; cuda without a number is the current GPU.

        Raises:
            InputError: this machine has no such device.
        """
        if self.vae_device is None:
            return device
        found = torch.device(self.vae_device)
        if found.type != "cuda":
            return found
        gpus = torch.cuda.device_count()
        if gpus and found.index is None:
            return torch.device("cuda", torch.cuda.current_device())
        if found.index is None or found.index >= gpus:
            raise InputError(
                f"vae_device: no GPU for {found}, {gpus} found: give another one, or leave it out to decode on {device}"
            )
        return found


@dataclass
class HybridConfig:
    """Hybrid layers of the model.

    Attributes:
        layers: indices of the hybrid layers; empty for those of the checkpoint.
        lora_rank: rank of the adapters; null for that of the checkpoint.
        lora_alpha: scale of the adapters times their rank, where the checkpoint does not say it.
        ffn_lora: feed-forward networks with adapters: none, those of hybrid layers, or all.
    """

    layers: LayerIndices = field(default_factory=list)
    lora_rank: Rank | None = None
    lora_alpha: LoRAAlpha = DEFAULT_LORA_ALPHA
    ffn_lora: FFNLoRA = FFNLoRA.HYBRID

    def settings(self) -> HybridSettings:
        """As the model takes them."""
        return HybridSettings(tuple(self.layers), self.lora_rank, self.lora_alpha, self.ffn_lora)


@dataclass
class SamplingConfig:
    """Blocks and steps of a few-step generator.

    Attributes:
        frames_per_block: latent frames generated at a time, 3 for chunk-wise and 1 for frame-wise checkpoints.
        denoising_steps: timesteps of the denoising steps, before warping.
        warp_denoising_steps: whether the steps are mapped through the timestep shift, as the published configs do.
        timestep_shift: shift of the flow schedule, s·σ / (1 + (s - 1)·σ) for a noise level σ.
    """

    frames_per_block: Annotated[int, Bounds(1, 1000)] = 3
    denoising_steps: Steps = field(default_factory=lambda: [1000, 750, 500, 250])
    warp_denoising_steps: bool = True
    timestep_shift: Shift = 5.0

    def sampler(self) -> FewStepSampler:
        """The steps."""
        return FewStepSampler.from_steps(self.denoising_steps, self.timestep_shift, self.warp_denoising_steps)


@dataclass
class GeneratorSampling(SamplingConfig):
    """How a pipeline generates.

    Attributes, beside those of `SamplingConfig`:
        context_noise: timestep of the clean pass.
        first_block_denoising_steps: steps of a video's first block, for models that are trained to take more of them
            there; null for those of the other blocks.
        guidance_distilled: whether the model predicts what guidance would make of it, as few-step models do; false for
            one that was trained with dropped prompts, for classifier-free guidance.
    """

    context_noise: ContextNoise = 0.0
    first_block_denoising_steps: Steps | None = None
    guidance_distilled: bool = True

    def sampler(self) -> FewStepSampler:
        """The steps."""
        return FewStepSampler.from_steps(
            self.denoising_steps, self.timestep_shift, self.warp_denoising_steps, self.first_block_denoising_steps
        )

    def sampling(self) -> dict[str, Any]:
        """All settings of this class, as arguments of `CausalVideoPipeline`."""
        return {each.name: getattr(self, each.name) for each in fields(GeneratorSampling)}


@dataclass
class PipelineSettings(GeneratorSampling):
    """What a pipeline stores beside its parts.

    Attributes, beside those of `GeneratorSampling`:
        height, width: pixels of a video where a call names none; null for 480 and 832.
        num_frames: frames of a video, likewise; null for 81.
    """

    height: Pixels | None = None
    width: Pixels | None = None
    num_frames: Frames | None = None


def stored_sampling(folder: Path) -> dict[str, Any]:
    """Settings that `save_pretrained` left in a folder; none in a folder of other origin.

    Raises:
        CheckpointError: they are malformed or out of range.
    """
    index = folder / "model_index.json"
    if not index.exists():
        return {}
    found = {key: value for key, value in read_config(index).items() if key in declarations(PipelineSettings)}
    try:
        typed(PipelineSettings, found, "")
    except InputError as error:
        raise CheckpointError(f"{index}: {error}") from error
    return found


@dataclass
class InferenceConfig(GeneratorSampling):
    """Everything that shapes a video, but the prompt and the seed.

    Attributes, beside those of `GeneratorSampling`:
        model_folder: native Wan 2.1 or diffusers folder with text encoder, tokenizer, VAE and transformer sizes.
        checkpoint_path: transformer weights; null for those in the folder.
        num_output_frames: latent frames of a video; F of them decode to 4F - 3 frames.
        height, width: pixels.
        fps: of the video file.
        attention_backend: implementation of softmax attention, such as cudnn; see `wan.ops.attention.AttentionBackend`.
        speed: of the transformer.
        strength: with a given video, the fraction of the steps that it is taken through again; null to continue it.
        lora: LoRAs that are added to the weights, each FILE or FILE:SCALE; see `wan.checkpoints.lora`.
        on_switch: what happens to the memory when the prompt of a video changes.
        caveat: what a preset needs that this code lacks, and its effect; warned of when the model is loaded.
    """

    model_folder: InputPath = "wan_models/Wan2.1-T2V-1.3B"
    checkpoint_path: InputPath | None = None
    num_output_frames: Frames = 21
    height: Pixels = 480
    width: Pixels = 832
    fps: FramesPerSecond = 16
    attention_backend: str = "auto"
    hybrid: HybridConfig = field(default_factory=HybridConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    speed: SpeedConfig = field(default_factory=SpeedConfig)
    strength: Strength | None = None
    lora: list[PathText] = field(default_factory=list)
    on_switch: OnSwitch = OnSwitch.keep
    caveat: str | None = None

    def lora_sources(self) -> list[LoRASource]:
        """The LoRAs.

        Raises:
            InputError: a scale is out of range, or a file is given twice.
        """
        sources = [LoRASource.from_text(text) for text in self.lora]
        require_distinct(sources)
        return sources

    def refuse_lora(self) -> None:
        """Make sure that there are no LoRAs, for programs whose results are told by the hash of one checkpoint.

        Raises:
            InputError: there are some.
        """
        if self.lora:
            raise InputError(
                f"lora {', '.join(self.lora)} is not taken here: write model and LoRA as one checkpoint, with "
                "scripts/convert_checkpoint.py and its --lora, and give that with lora=[]"
            )

    def identity(self) -> dict[str, Any]:
        """All settings that a video depends on, beside its weights.

        What records of earlier versions lack is left out where it does nothing.
        """
        idle = {name for name in ("first_block_denoising_steps", "strength") if getattr(self, name) is None}
        idle |= {"on_switch"} if self.on_switch is OnSwitch.keep else set()
        noted = asdict(self) | {"memory": self.memory.identity()}
        return {name: value for name, value in noted.items() if name not in (*NOT_OF_VIDEOS, *idle)}


def check_size(height: int, width: int, stride: int, patch_size: Sequence[int]) -> None:
    """Make sure that a picture divides into latents and these into patches.

    Raises:
        InputError: it does not.
    """
    rows, columns = stride * patch_size[1], stride * patch_size[2]
    if height < 1 or width < 1 or height % rows or width % columns:
        raise InputError(
            f"{height}×{width} pixels do not divide into patches: height must be a multiple of {rows}, "
            f"width of {columns}"
        )
