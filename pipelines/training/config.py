"""Settings of the two training stages: typed YAML files, checked before any model loads."""

import json
import logging
from dataclasses import asdict, dataclass, field, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any

from arl2.distillation.checkpointing import TRAINABLES, complete_checkpoints, newest_checkpoint
from arl2.distillation.data import LatentDataset, ResidentLatents, Samples
from arl2.distillation.objective import ForwardMode, ObjectiveSettings
from arl2.distillation.sampling import NoiseLevels
from arl2.distillation.stage1 import Stage1Settings
from arl2.distillation.stage2 import Context, ContextSigma, LossWeight, Stage2Settings, Target, Trainable
from arl2.distillation.trainer import CHECKPOINTS, TrainerSettings
from arl2.layer_selection.gates import Budget, BudgetWeight, GateSettings, Temperature
from arl2.model import DEFAULT_LORA_ALPHA, FFNLoRA, HybridSettings, check_layers
from arl2.rollout import num_blocks
from arl2.state_settings import PAPER_STATE, StateSettings
from pipelines.cli import choose_device, rank_and_world_size
from pipelines.config import Frames, FramesPerSecond, MemoryConfig, MemoryKind, Rank, SamplingConfig
from pipelines.feasibility import TransformerSizes
from pipelines.training.checks import check_data
from pipelines.yaml_files import read_mapping
from wan.checkpoints.formats import transformer_config
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import (
    Bounds,
    Choices,
    Count,
    Formerly,
    InputPath,
    LayerIndices,
    Length,
    PathText,
    Seed,
    Unique,
    check_ranges,
    typed,
)
from wan.vae.wan_vae import spatial_stride

log = logging.getLogger(__name__)

DEFAULT_SHARE = 75
"""Percent of the layers that are hybrid, of the sets of a layers file."""
TRAINING_DTYPES = ("bfloat16", "float32")
TRACKERS = {"auto": "", "tensorboard": "pip install tensorboard", "wandb": "pip install wandb", "none": ""}
"""Where figures go beside the run folder, and what has to be installed for it."""
FREE_TO_CHANGE = (
    *("model_folder", "checkpoint_path", "run_folder", "data", "init_from", "layers_file", "share"),
    *("batch", "accumulation", "device", "shard", "compile", "checkpointing", "resume", "save_every", "keep"),
    *("offload_checkpoints", "deterministic"),
    *("report_every", "sample_every", "sample_frames", "sample_fps", "tracker", "max_bad_steps"),
)
"""Settings that may differ between the sessions of a run; what they name is told by content where it matters."""


@dataclass
class TrainingConfig(TrainerSettings, SamplingConfig):
    """What both stages need; the denoising steps of `SamplingConfig` are the teacher's, `batch` is a rank's.

    Attributes, beside those of `SamplingConfig` and of `arl2.distillation.trainer.TrainerSettings`:
        model_folder: sizes, and with `checkpoint_path` null the weights too; the VAE, if samples are wanted.
        checkpoint_path, use_ema: the teacher's weights, as for inference.
        data: folders of latents, made by scripts/generate_latents.py or scripts/encode_videos.py; or one .safetensors
            file that stays in the device's memory whole, see `arl2.distillation.data.ResidentLatents`.
        run_folder: everything that the run leaves.
        resume: go on where an earlier session of the run stopped; without it, a folder that holds a run is an error.
        levels: see `arl2.distillation.sampling.NoiseLevels`.
        blocks_per_graph, forward_mode: see `arl2.distillation.objective.ObjectiveSettings`.
        compile: compile the frozen teacher's blocks; with forward_mode parallel, whose passes are all of one size.
        seed: of order, noise and initial values.
        sample_every: steps between sample videos, the teacher's beside the student's; 0 for none.
        sample_frames: latent frames of a sample; null for as many as the data has.
        sample_fps: frames a second of a sample.
        tracker: tensorboard, wandb or none; auto for tensorboard where it is installed, and none elsewhere.
        device, dtype: null for the GPU if there is one, and bfloat16 there; the dtype is that of the frozen weights.
        shard: divide the frozen weights over ranks (FSDP2).
        deterministic: use PyTorch's deterministic algorithms, so that a run repeats bit by bit on the same GPUs. In
            bfloat16 the attention's backward pass is not deterministic otherwise, and it is faster.
        state: variant of the recurrent state; what starts from a run must have the variant of that run.
    """

    model_folder: InputPath = "wan_models/Wan2.1-T2V-1.3B"
    checkpoint_path: InputPath | None = None
    use_ema: bool = False
    data: Annotated[list[PathText], Length(1, 1000), Unique()] = field(default_factory=lambda: ["data/rollouts"])
    run_folder: PathText = "runs/stage1"
    resume: bool = True
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    blocks_per_graph: Count | None = None
    forward_mode: Annotated[ForwardMode, Formerly("path")] = ForwardMode.SEQUENTIAL
    compile: bool = False
    seed: Seed = 0
    sample_every: Annotated[int, Bounds(0, 10**9)] = 0
    sample_frames: Frames | None = None
    sample_fps: FramesPerSecond = 16
    tracker: Annotated[str, Choices(tuple(TRACKERS))] = "auto"
    device: str | None = None
    dtype: Annotated[str, Choices(TRAINING_DTYPES)] | None = None
    shard: bool = False
    deterministic: bool = False
    state: StateSettings = field(default_factory=StateSettings)

    def active_tracker(self) -> str | None:
        """The tracker that figures go to; None for none."""
        if self.tracker == "auto":
            return "tensorboard" if find_spec("tensorboard") is not None else None
        return None if self.tracker == "none" else self.tracker

    def trainer(self) -> TrainerSettings:
        """As the trainer takes them."""
        return TrainerSettings(**{each.name: vars(self)[each.name] for each in fields(TrainerSettings)})

    def hybrid(self, num_layers: int) -> HybridSettings:
        """Where and how the model is made hybrid; differs by stage."""
        raise NotImplementedError

    def objective_settings(self) -> ObjectiveSettings:
        """As the objective takes them; differs by stage."""
        raise NotImplementedError


@dataclass
class Stage1Config(TrainingConfig):
    """Stage 1.

    Attributes:
        layers: to train; empty for all.
        loss_on_clean_pass, relative: see `arl2.distillation.stage1.Stage1Settings`.
    """

    layers: LayerIndices = field(default_factory=list)
    loss_on_clean_pass: Annotated[bool, Formerly("read_clean")] = True
    relative: bool = True

    def hybrid(self, num_layers: int) -> HybridSettings:
        """The layers named, or all; no adapters."""
        return HybridSettings(check_layers(self.layers or range(num_layers), num_layers), state=self.state)

    def objective_settings(self) -> Stage1Settings:
        """As `Stage1` takes them."""
        return Stage1Settings(
            self.frames_per_block,
            self.blocks_per_graph,
            self.forward_mode,
            loss_on_clean_pass=self.loss_on_clean_pass,
            relative=self.relative,
        )


@dataclass
class Stage2Config(TrainingConfig):
    """Stage 2.

    Attributes:
        hybrid_layers: the layers; or else
        layers_file, share: a file of scripts/select_layers.py, and which of its sets; null for 75.
        init_from: folder of a stage-1 run, or its trainables; null to start from untrained layers.
        lora, lora_rank, lora_alpha, ffn_lora: adapters, see `arl2.model.HybridSettings`.
        context, target, checkpointing, offload_checkpoints: see `arl2.distillation.stage2.Stage2Settings`.
        teacher_weight, data_weight, context_sigma: see `arl2.distillation.stage2.Stage2Settings`.
        resample_steps, resample_rounds, trainable: see `arl2.distillation.stage2.Stage2Settings`.
        memory: what the student's softmax layers see, as it will be at inference. A teacher says nothing of it, so kind
            trained is full.
        teacher_memory: what the teacher sees; with kind full its memory grows with the video.
    """

    run_folder: PathText = "runs/stage2"
    steps: Count = 12000
    hybrid_layers: LayerIndices = field(default_factory=list)
    layers_file: PathText | None = None
    share: Annotated[int, Bounds(1, 100)] | None = None
    init_from: InputPath | None = None
    lora: bool = True
    lora_rank: Rank = 16
    lora_alpha: Annotated[float, Bounds(0, 10**6, above=True)] = DEFAULT_LORA_ALPHA
    ffn_lora: FFNLoRA = FFNLoRA.HYBRID
    context: Context = Context.DATA
    target: Target = Target.FLOW
    checkpointing: bool = False
    offload_checkpoints: bool = False
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(MemoryKind.full))
    teacher_memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(MemoryKind.full))
    teacher_weight: LossWeight = 1.0
    data_weight: LossWeight = 0.0
    context_sigma: ContextSigma = 0.0
    resample_steps: Count = 1
    resample_rounds: Count = 1
    trainable: Trainable = Trainable.NEW

    def hybrid(self, num_layers: int) -> HybridSettings:
        """The layers named here or in the file, with adapters if they are wanted.

        Raises:
            InputError: no layers, or such as the model does not have.
        """
        if self.trainable is Trainable.ALL and not self.hybrid_layers and not self.layers_file:
            return HybridSettings()
        if bool(self.hybrid_layers) == bool(self.layers_file):
            raise InputError("give the hybrid layers in one way: hybrid_layers, or layers_file with share")
        if self.share is not None and not self.layers_file:
            raise InputError(f"share {self.share} would do nothing: it is a set of a layers_file; give one, or drop it")
        layers = self.hybrid_layers or read_layers(Path(str(self.layers_file)), self.share or DEFAULT_SHARE, num_layers)
        checked = check_layers(layers, num_layers)
        if not self.lora:
            return HybridSettings(checked, state=self.state)
        return HybridSettings(checked, self.lora_rank, self.lora_alpha, self.ffn_lora, self.state)

    def student_memory(self) -> MemoryConfig:
        """What the student's softmax layers see."""
        return self.memory.resolved(None)

    def objective_settings(self) -> Stage2Settings:
        """As `Stage2` takes them.

        Raises:
            InputError: a memory that is built for inference alone.
        """
        self.memory.refuse_variants("memory")
        self.teacher_memory.refuse_variants("teacher_memory")
        window_frames, sink_frames = self.student_memory().window
        teacher_window_frames, teacher_sink_frames = self.teacher_memory.resolved(None).window
        return Stage2Settings(
            self.frames_per_block,
            self.blocks_per_graph,
            self.forward_mode,
            context=self.context,
            target=self.target,
            checkpointing=self.checkpointing,
            offload_checkpoints=self.offload_checkpoints,
            window_frames=window_frames,
            sink_frames=sink_frames,
            teacher_window_frames=teacher_window_frames,
            teacher_sink_frames=teacher_sink_frames,
            teacher_weight=self.teacher_weight,
            data_weight=self.data_weight,
            context_sigma=self.context_sigma,
            resample_steps=self.resample_steps,
            resample_rounds=self.resample_rounds,
            trainable=self.trainable,
        )


@dataclass
class GatesConfig(TrainingConfig):
    """Layer gates, which choose the layers to convert.

    Attributes:
        init_from: folder of a stage-1 run with all layers, or its trainables.
        budget, budget_weight, temperature: see `arl2.layer_selection.gates.GateSettings`.
    """

    run_folder: PathText = "runs/gates"
    steps: Count = 500
    init_from: InputPath = "runs/stage1"
    budget: Budget = 0.5
    budget_weight: BudgetWeight = 10.0
    temperature: Temperature = 1.0

    def hybrid(self, num_layers: int) -> HybridSettings:
        """All layers, without adapters."""
        return HybridSettings(tuple(range(num_layers)), state=self.state)

    def objective_settings(self) -> GateSettings:
        """As `LayerGates` takes them."""
        return GateSettings(
            self.frames_per_block,
            self.blocks_per_graph,
            self.forward_mode,
            budget=self.budget,
            budget_weight=self.budget_weight,
            temperature=self.temperature,
        )


def read_layers(path: Path, share: int, num_layers: int) -> list[int]:
    """The layers that a file of scripts/select_layers.py names for a share in percent of a model's layers.

    Raises:
        InputError: no such file or set, or one that is not of that share, rounded up or down.
    """
    if not path.is_file():
        raise InputError(f"no layers file {path}: make one with scripts/select_layers.py")
    sets = read_mapping(path, "layers file")
    if str(share) not in sets:
        raise InputError(f"{path} names no layers for a share of {share}: see scripts/select_layers.py")
    layers: list[int] = typed(LayerIndices, sets[str(share)], f"{path}: layers of {share}")
    if not layers:
        raise InputError(f"{path} names an empty set for a share of {share}: nothing would train; take another share")
    if abs(len(layers) - num_layers * share / 100) >= 1:
        raise InputError(
            f"{path} names {len(layers)} of {num_layers} layers for a share of {share} %: make it for this model with "
            "scripts/select_layers.py, or name the layers with hybrid_layers"
        )
    return layers


def check_training(config: TrainingConfig, data: Samples | None = None) -> Samples:
    """Check everything that can be checked before models load; returns the data.

    Args:
        data: in the place of that of the config.

    Raises:
        InputError: the cause and the cure in one line.
    """
    check_ranges(config)
    _check_together(config)
    if TRACKERS[config.tracker] and find_spec(config.tracker) is None:
        raise InputError(f"{config.tracker} is not installed: {TRACKERS[config.tracker]}, or set tracker=none")
    folder = Path(config.model_folder)
    if config.checkpoint_path is not None and not Path(config.checkpoint_path).exists():
        raise InputError(f"no checkpoint at {config.checkpoint_path}: check the path")
    sizes = transformer_config(folder)
    config.hybrid(TransformerSizes.of(sizes).num_layers)
    if config.sample_every:
        spatial_stride(folder)
        if config.sample_every % config.report_every:
            raise InputError(f"sample_every {config.sample_every} must be a multiple of report_every")
    init_from(config)
    data = data or open_data(config)
    check_data(data, sizes, config.frames_per_block)
    check_writable(Path(config.run_folder))
    if not config.resume and complete_checkpoints(Path(config.run_folder) / CHECKPOINTS):
        raise InputError(f"{config.run_folder} holds a run: set resume=true, or choose another run_folder")
    return data


def open_data(config: TrainingConfig) -> Samples:
    """The data that a config names.

    Raises:
        InputError: there is none, or it is damaged.
    """
    paths = [Path(path) for path in config.data]
    places = [path.resolve() for path in paths]
    twice = next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None)
    if twice is not None:
        raise InputError(f"data names {twice} twice, its samples would count double: name every folder once")
    if len(paths) == 1 and paths[0].suffix == ".safetensors":
        return ResidentLatents(paths[0], choose_device(config.device))
    return LatentDataset(paths)


def _check_together(config: TrainingConfig) -> None:
    """Check settings against one another; each is in its own range."""
    mode, per_block = config.objective_settings().forward_mode, config.levels.per_block
    if mode is ForwardMode.PARALLEL and per_block != 1:
        raise InputError(
            f"forward_mode parallel takes one level per block, not levels.per_block={per_block}: take sequential"
        )
    if config.compile and mode is ForwardMode.SEQUENTIAL:
        raise InputError(
            "forward_mode sequential makes passes of many sizes, each compiled anew: set compile=false or "
            "forward_mode=parallel"
        )
    config.levels.check(len(config.sampler().sigmas))
    if config.optimizer.warmup_steps >= config.steps:
        log.warning(
            "optimizer.warmup_steps %d is not below steps %d: the learning rate does not reach optimizer.lr",
            config.optimizer.warmup_steps,
            config.steps,
        )
    if isinstance(config, Stage2Config) and config.trainable is Trainable.ALL:
        if config.shard:
            raise InputError("shard=true divides frozen weights, and with trainable=all none is frozen: drop one")
        if config.sample_every:
            raise InputError("samples compare with the teacher, which trainable=all changes: set sample_every=0")
    if config.shard and rank_and_world_size()[1] == 1:
        raise InputError("shard=true divides the weights over ranks: start with torchrun, or set shard=false")
    if config.sample_frames is not None:
        num_blocks(config.sample_frames, config.frames_per_block)


def init_from(config: TrainingConfig) -> Path | None:
    """The file that stage 2 or layer gates start from; None for nothing.

    Raises:
        InputError: there is none where the config says.
    """
    if not isinstance(config, Stage2Config | GatesConfig) or config.init_from is None:
        return None
    path = Path(config.init_from)
    newest = newest_checkpoint(path / CHECKPOINTS)
    file = path if newest is None else newest / TRAINABLES
    if not file.is_file():
        raise InputError(f"init_from {path} is neither a stage-1 run nor its trainables: run train_stage1.py first")
    return file


def resume_defaults() -> dict[str, Any]:
    """Defaults of the settings that a stage-2 run notes only if they differ."""
    default = Stage2Config()
    names = ("teacher_weight", "data_weight", "context_sigma", "resample_steps", "resample_rounds", "trainable")
    return {name: vars(default)[name] for name in names} | {
        "teacher_memory": default.teacher_memory.resolved(None).identity()
    }


def resume_fingerprint(config: TrainingConfig, global_batch: int) -> dict[str, Any]:
    """Flat settings that must not change between sessions, with the batch of all ranks in the place of a rank's."""
    kept = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    if config.optimizer.decay == "constant":
        del kept["steps"]  # nothing but the end depends on it
    del kept["state"]
    if config.state != PAPER_STATE:  # runs of earlier versions did not note it
        kept["state"] = config.state.as_plain()
    if isinstance(config, Stage2Config):
        kept["memory"] = config.student_memory().identity()
        kept["teacher_memory"] = config.teacher_memory.resolved(None).identity()
        # Runs of earlier versions did not note what does nothing by default.
        idle = resume_defaults()
        kept = {name: value for name, value in kept.items() if name not in idle or value != idle[name]}
    flat = {"global_batch": global_batch}
    for name, value in json.loads(json.dumps(kept)).items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
