"""What a benchmark measures: a typed YAML file, and the cases that it names."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch

from arl2.inference.parallel.sequence_parallel import check_divides
from arl2.model import HybridSettings, HybridWanModel
from arl2.ops.gated_delta import WriteBackend
from arl2.rollout import num_blocks
from pipelines.config import (
    Frames,
    FramesPerSecond,
    MemoryConfig,
    MemoryKind,
    Pixels,
    Rank,
    SamplingConfig,
    SpeedConfig,
    check_size,
)
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.config import WAN_SIZES, wan_size
from wan.ops.attention import require_backend
from wan.text import TOY_TEXT, UMT5_XXL
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, Choices, Formerly, Length, Seed, Unique, check_ranges
from wan.vae.wan_vae import TOY_VAE, WAN21_VAE

BLOCKS_PER_SAMPLE = 4
"""Blocks measured at every sampled place."""
Name = Annotated[str, Length(1, 100)]
PixelFrames = Annotated[int, Bounds(1, 4 * 10**6)]
Lengths = Annotated[list[PixelFrames], Unique()]
Repeats = Annotated[int, Bounds(1, 1000)]
"""Ranges of what is measured: names of rows, pixel frames of videos, runs of a case."""


@dataclass
class SpeedOptions(SpeedConfig):
    """How the same numbers are computed. Every switch of the fast path belongs here, and is thrown in `apply`.

    Attributes, beside those of `pipelines.config.SpeedConfig`:
        overlap_decoding: off, so that transformer and decoder are measured apart.
        attention_backend: implementation of softmax attention, see `wan.ops.attention.AttentionBackend`.
        write_backend: who computes the writes to states.
    """

    overlap_decoding: bool | None = False
    attention_backend: str = "auto"
    write_backend: WriteBackend = WriteBackend.AUTO

    def apply(self, pipeline: CausalVideoPipeline) -> None:
        """Set a pipeline to compute in this way.

        Raises:
            InputError: the device cannot.
        """
        model = pipeline.transformer
        pipeline.use_attention_backend(require_backend(self.attention_backend, model.device, model.dtype))
        model.use_write_backend(self.write_backend)
        pipeline.optimize_for_inference(self)


@dataclass
class RowConfig:
    """One model: how many of its first layers are hybrid, and what its softmax layers remember."""

    name: Name
    num_hybrid_layers: Annotated[int, Bounds(0, 10**5), Formerly("hybrid_layers")] = 0
    memory: MemoryKind = MemoryKind.full


@dataclass
class QuickConfig:
    """What --quick measures.

    Attributes:
        rows: names of the rows.
        lengths: pixel frames of the videos.
        repeats: measured runs per case.
    """

    rows: Annotated[list[Name], Unique()] = field(default_factory=list)
    lengths: Lengths = field(default_factory=list)
    repeats: Repeats = 1


@dataclass
class PublishedFigure:
    """What others state or was measured of their code: printed beside ours, never mixed with it."""

    system: str
    figure: str
    card: str
    source: str


@dataclass
class BenchmarkConfig(SamplingConfig):
    """Everything that a benchmark measures.

    Attributes, beside those of `pipelines.config.SamplingConfig`:
        size: of the transformer, see `wan.config.WAN_SIZES`; "toy" brings a toy VAE.
        height, width: pixels.
        fps: of the video files.
        window_frames, sink_frames: of softmax layers with a window.
        lora_rank: of the adapters of hybrid layers and their feed-forwards; null for none.
        rows, lengths: models, and pixel frames of the videos.
        repeats: measured runs of a case.
        warmup_blocks: length of the run before them, which is not measured.
        vae: decode and write videos; without it only the transformer runs.
        blocks_sampled: instead of whole videos, measure a few blocks at so many places over a memory filled to there,
            and integrate. Only the transformer; results are marked.
        seed: of weights and noise.
        speed: how to compute.
        quick: what --quick measures.
        published: figures of others.
    """

    size: Annotated[str, Choices(tuple(WAN_SIZES))] = "1.3B"
    height: Pixels = 480
    width: Pixels = 832
    fps: FramesPerSecond = 16
    window_frames: Frames = 9
    sink_frames: Annotated[int, Bounds(0, 10**6)] = 3
    lora_rank: Rank | None = None
    rows: list[RowConfig] = field(default_factory=list)
    lengths: Lengths = field(default_factory=list)
    repeats: Repeats = 3
    warmup_blocks: Annotated[int, Bounds(1, 1000)] = 4
    vae: bool = True
    blocks_sampled: Annotated[int, Bounds(2, 10**5)] | None = None
    seed: Seed = 0
    speed: SpeedOptions = field(default_factory=SpeedOptions)
    quick: QuickConfig = field(default_factory=QuickConfig)
    published: list[PublishedFigure] = field(default_factory=list)

    @property
    def vae_config(self) -> dict[str, Any]:
        """Sizes of the VAE."""
        return TOY_VAE if self.size == "toy" else WAN21_VAE

    @property
    def text_config(self) -> dict[str, Any]:
        """Sizes of the text encoder: a toy one, but with as many channels as the transformer takes."""
        return TOY_TEXT if self.size == "toy" else TOY_TEXT | {"dim": UMT5_XXL["dim"]}

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.vae_config["temperal_downsample"])

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of a latent."""
        stride = 2 ** len(self.vae_config["temperal_downsample"])
        return self.height // stride, self.width // stride

    def blocks(self, frames: int) -> int:
        """Blocks of a video of `frames` frames.

        Raises:
            InputError: no whole number.
        """
        stride = self.temporal_compression
        if frames < 1 or (frames - 1) % stride:
            raise InputError(f"{frames} frames cannot be decoded: lengths are 1 plus a multiple of {stride}")
        return num_blocks((frames - 1) // stride + 1, self.frames_per_block)

    def frames_after(self, blocks: int) -> int:
        """Frames of a video of `blocks` blocks."""
        return (blocks * self.frames_per_block - 1) * self.temporal_compression + 1


@dataclass(frozen=True)
class Case:
    """One model at one length. Cases that are equal are the same measurement; its fields are the JSON's.

    Attributes:
        row: name of the model.
        hybrid_layers: how many of its first layers are hybrid.
        memory: of its softmax layers.
        frames: pixel frames.
        vae, blocks_sampled, speed: see `BenchmarkConfig`.
        ranks: GPUs that compute the video together.
    """

    row: str
    hybrid_layers: int
    memory: MemoryConfig
    frames: int
    vae: bool
    blocks_sampled: int | None
    speed: SpeedOptions
    ranks: int = 1

    def settings(self, lora_rank: int | None) -> HybridSettings:
        """As the model takes them."""
        return HybridSettings(tuple(range(self.hybrid_layers)), lora_rank)


def select(config: BenchmarkConfig, rows: Sequence[str] | None, lengths: Sequence[int] | None) -> BenchmarkConfig:
    """The config with only the rows of these names, and with these lengths; None leaves them as they are.

    Raises:
        InputError: an unknown row.
    """
    known = {row.name: row for row in config.rows}
    unknown = [name for name in rows or () if name not in known]
    if unknown:
        raise InputError(f"no row {unknown[0]!r}: choose from {', '.join(known)}")
    return replace(
        config,
        rows=config.rows if rows is None else [known[name] for name in rows],
        lengths=config.lengths if lengths is None else list(lengths),
    )


def quick(config: BenchmarkConfig) -> BenchmarkConfig:
    """The config cut to what --quick measures."""
    return replace(select(config, config.quick.rows, config.quick.lengths), repeats=config.quick.repeats)


def plan_cases(config: BenchmarkConfig, ranks: int = 1) -> list[Case]:
    """All cases, row by row, checked before any weights are drawn.

    Args:
        ranks: GPUs that compute every video together.

    Raises:
        InputError: sizes, lengths, memories or numbers of ranks that cannot work.
    """
    check_ranges(config)
    if not config.rows or not config.lengths:
        raise InputError("nothing to measure: the config needs rows and lengths")
    if len({row.name for row in config.rows}) < len(config.rows):
        raise InputError("two rows have the same name: give every row its own")
    cases = []
    for row in config.rows:
        layers = wan_size(config.size)["num_layers"]
        if row.num_hybrid_layers > layers:
            raise InputError(f"row {row.name}: {row.num_hybrid_layers} hybrid layers, but the model has {layers}")
        memory = MemoryConfig(row.memory, config.window_frames, config.sink_frames)
        memory.check(config.frames_per_block)
        for frames in config.lengths:
            _check_sampling(config, frames)
            vae = config.vae and config.blocks_sampled is None
            sampled, speed = config.blocks_sampled, config.speed
            cases.append(Case(row.name, row.num_hybrid_layers, memory, frames, vae, sampled, speed, ranks))
    model = empty_model(config, cases[0])
    check_size(config.height, config.width, config.height // config.latent_size[0], model.patch_size)
    check_divides(model.config.num_heads, model.tokens_per_frame(*config.latent_size), ranks)
    return cases


def _check_sampling(config: BenchmarkConfig, frames: int) -> None:
    blocks = config.blocks(frames)
    if config.blocks_sampled is not None and config.blocks_sampled * (BLOCKS_PER_SAMPLE + 1) > blocks:
        raise InputError(
            f"{config.blocks_sampled} samples of {BLOCKS_PER_SAMPLE} blocks do not fit the {blocks} blocks of {frames} "
            "frames: measure it whole"
        )


def empty_model(config: BenchmarkConfig, case: Case) -> HybridWanModel:
    """The case's transformer without storage: its shapes tell what it costs."""
    settings = case.settings(config.lora_rank)
    with torch.device("meta"):
        return HybridWanModel(
            **wan_size(config.size),
            hybrid_layers=list(settings.layers),
            lora_rank=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            ffn_lora=settings.ffn_lora.value,
        )


def memory_bytes(config: BenchmarkConfig, case: Case, dtype: torch.dtype) -> int:
    """Bytes of a rank's memory of all layers at the end of the video."""
    frames = config.blocks(case.frames) * config.frames_per_block
    return empty_model(config, case).memory_bytes(frames, *config.latent_size, dtype, *case.memory.window) // case.ranks


def by_row(cases: Iterable[Case]) -> dict[str, list[Case]]:
    """Cases that share a model, in order."""
    rows: dict[str, list[Case]] = {}
    for case in cases:
        rows.setdefault(case.row, []).append(case)
    return rows
