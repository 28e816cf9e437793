"""Settings of the two training stages: typed YAML files, checked before any model loads."""

import json
from dataclasses import asdict, dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from arl2.distillation import objective
from arl2.distillation.checkpointing import complete_checkpoints
from arl2.distillation.data import LatentDataset, ResidentLatents, Samples
from arl2.distillation.sampling import NoiseLevels
from arl2.distillation.stage1 import Stage1Settings
from arl2.distillation.stage2 import Context, Stage2Settings, Target
from arl2.distillation.trainer import CHECKPOINTS, OptimizerSettings, TrainerSettings
from arl2.layer_selection.gates import GateSettings
from arl2.model import DEFAULT_LORA_ALPHA, FFNLoRA, HybridSettings, check_layers
from arl2.rollout import FewStepSampler, num_blocks
from pipelines.cli import choose_device, rank_and_world_size
from pipelines.config import MemoryConfig, MemoryKind, check_size
from pipelines.generation.arguments import check_writable
from wan.checkpoints.formats import transformer_config
from wan.utils.errors import InputError
from wan.vae.wan_vae import spatial_stride

TRAINING_DTYPES = ("bfloat16", "float32")
TRACKERS = {"tensorboard": "pip install -e .[train]", "wandb": "pip install wandb", "none": ""}
"""Where figures go, and what has to be installed for it."""
FREE_TO_CHANGE = (
    *("model_folder", "checkpoint_path", "run_folder", "data", "init_from", "layers_file", "share"),
    *("batch", "accumulation", "device", "shard", "compile", "checkpointing", "resume", "save_every", "keep"),
    *("report_every", "sample_every", "sample_frames", "sample_fps", "tracker", "max_bad_steps"),
)
"""Settings that may differ between the sessions of a run; what they name is told by content where it matters."""


@dataclass
class TrainingConfig:
    """What both stages need.

    Attributes:
        model_folder: sizes, and with `checkpoint_path` null the weights too; the VAE, if samples are wanted.
        checkpoint_path, use_ema: the teacher's weights, as for inference.
        data: folders of latents, made by scripts/generate_latents.py or scripts/encode_videos.py; or one .safetensors
            file that stays in the device's memory whole, see `arl2.distillation.data.ResidentLatents`.
        run_folder: everything that the run leaves.
        resume: go on where an earlier session of the run stopped; without it, a folder that holds a run is an error.
        frames_per_block, denoising_steps, warp_denoising_steps, timestep_shift: of the teacher, as for inference.
        levels: see `arl2.distillation.sampling.NoiseLevels`.
        blocks_per_graph, path: see `arl2.distillation.objective.ObjectiveSettings`.
        compile: compile the frozen teacher's blocks; with path parallel, whose passes are all of one size.
        steps, batch, accumulation, optimizer, ema_decay, save_every, keep, report_every, max_bad_steps: see
            `arl2.distillation.trainer.TrainerSettings`; `batch` is a rank's.
        seed: of order, noise and initial values.
        sample_every: steps between sample videos, the teacher's beside the student's; 0 for none.
        sample_frames: latent frames of a sample; null for as many as the data has.
        sample_fps: frames a second of a sample.
        tracker: tensorboard, wandb or none.
        device, dtype: null for the GPU if there is one, and bfloat16 there; the dtype is that of the frozen weights.
        shard: divide the frozen weights over ranks (FSDP2).
    """

    model_folder: str = "wan_models/Wan2.1-T2V-1.3B"
    checkpoint_path: str | None = None
    use_ema: bool = False
    data: list[str] = field(default_factory=lambda: ["data/rollouts"])
    run_folder: str = "runs/stage1"
    resume: bool = True
    frames_per_block: int = 3
    denoising_steps: list[int] = field(default_factory=lambda: [1000, 750, 500, 250])
    warp_denoising_steps: bool = True
    timestep_shift: float = 5.0
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    blocks_per_graph: int | None = None
    path: objective.Path = objective.Path.LOOP
    compile: bool = False
    steps: int = 6000
    batch: int = 1
    accumulation: int = 1
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    ema_decay: float | None = None
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    report_every: int = 100
    sample_every: int = 0
    sample_frames: int | None = None
    sample_fps: int = 16
    max_bad_steps: int = 10
    tracker: str = "tensorboard"
    device: str | None = None
    dtype: str | None = None
    shard: bool = False

    def sampler(self) -> FewStepSampler:
        """The teacher's steps."""
        return FewStepSampler.from_steps(self.denoising_steps, self.timestep_shift, self.warp_denoising_steps)

    def trainer(self) -> TrainerSettings:
        """As the trainer takes them."""
        return TrainerSettings(
            steps=self.steps,
            batch=self.batch,
            accumulation=self.accumulation,
            optimizer=self.optimizer,
            ema_decay=self.ema_decay,
            save_every=self.save_every,
            keep=self.keep,
            report_every=self.report_every,
            max_bad_steps=self.max_bad_steps,
        )

    def hybrid(self, num_layers: int) -> HybridSettings:
        """Where and how the model is made hybrid; differs by stage."""
        raise NotImplementedError

    def objective_settings(self) -> objective.ObjectiveSettings:
        """As the objective takes them; differs by stage."""
        raise NotImplementedError


@dataclass
class Stage1Config(TrainingConfig):
    """Stage 1.

    Attributes:
        layers: to train; empty for all.
        loss_on_clean_pass, relative: see `arl2.distillation.stage1.Stage1Settings`.
    """

    layers: list[int] = field(default_factory=list)
    loss_on_clean_pass: bool = True
    relative: bool = True

    def hybrid(self, num_layers: int) -> HybridSettings:
        """The layers named, or all; no adapters."""
        return HybridSettings(check_layers(self.layers or range(num_layers), num_layers))

    def objective_settings(self) -> Stage1Settings:
        """As `Stage1` takes them."""
        return Stage1Settings(
            self.frames_per_block,
            self.blocks_per_graph,
            self.path,
            loss_on_clean_pass=self.loss_on_clean_pass,
            relative=self.relative,
        )


@dataclass
class Stage2Config(TrainingConfig):
    """Stage 2.

    Attributes:
        hybrid_layers: the layers; or else
        layers_file, share: a file of scripts/select_layers.py, and which of its sets, such as 75.
        init_from: folder of a stage-1 run, or its trainables; null to start from untrained layers.
        lora, lora_rank, lora_alpha, ffn_lora: adapters, see `arl2.model.HybridSettings`.
        context, target, checkpointing: see `arl2.distillation.stage2.Stage2Settings`.
        memory: what the student's softmax layers see, as it will be at inference; the teacher's see everything. A
            teacher says nothing of it, so kind trained is full.
    """

    run_folder: str = "runs/stage2"
    steps: int = 12000
    hybrid_layers: list[int] = field(default_factory=list)
    layers_file: str | None = None
    share: int = 75
    init_from: str | None = None
    lora: bool = True
    lora_rank: int = 16
    lora_alpha: float = DEFAULT_LORA_ALPHA
    ffn_lora: FFNLoRA = FFNLoRA.HYBRID
    context: Context = Context.DATA
    target: Target = Target.FLOW
    checkpointing: bool = False
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(MemoryKind.full))

    def hybrid(self, num_layers: int) -> HybridSettings:
        """The layers named here or in the file, with adapters if they are wanted.

        Raises:
            InputError: no layers, or such as the model does not have.
        """
        if bool(self.hybrid_layers) == bool(self.layers_file):
            raise InputError("give the hybrid layers in one way: hybrid_layers, or layers_file with share")
        layers = self.hybrid_layers or read_layers(Path(str(self.layers_file)), self.share)
        rank = self.lora_rank if self.lora else None
        return HybridSettings(check_layers(layers, num_layers), rank, self.lora_alpha, self.ffn_lora)

    def objective_settings(self) -> Stage2Settings:
        """As `Stage2` takes them."""
        return Stage2Settings(
            self.frames_per_block,
            self.blocks_per_graph,
            self.path,
            context=self.context,
            target=self.target,
            checkpointing=self.checkpointing,
            window_frames=self.memory.window[0],
            sink_frames=self.memory.window[1],
        )


@dataclass
class GatesConfig(TrainingConfig):
    """Layer gates, which choose the layers to convert.

    Attributes:
        init_from: folder of a stage-1 run with all layers, or its trainables.
        budget, budget_weight, temperature: see `arl2.layer_selection.gates.GateSettings`.
    """

    run_folder: str = "runs/gates"
    steps: int = 500
    init_from: str = "runs/stage1"
    budget: float = 0.5
    budget_weight: float = 10.0
    temperature: float = 1.0

    def hybrid(self, num_layers: int) -> HybridSettings:
        """All layers, without adapters."""
        return HybridSettings(tuple(range(num_layers)))

    def objective_settings(self) -> GateSettings:
        """As `LayerGates` takes them."""
        return GateSettings(
            self.frames_per_block,
            self.blocks_per_graph,
            self.path,
            budget=self.budget,
            budget_weight=self.budget_weight,
            temperature=self.temperature,
        )


def read_layers(path: Path, share: int) -> list[int]:
    """The layers that a file of scripts/select_layers.py names for a share in percent.

    Raises:
        InputError: no such file or set.
    """
    try:
        sets = yaml.safe_load(path.read_text())
        return [int(layer) for layer in sets[str(share)]]
    except OSError as error:
        raise InputError(f"no layers file {path} ({error.strerror}): make one with scripts/select_layers.py") from error
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} names no layers for a share of {share}: see scripts/select_layers.py") from error


def check_training(config: TrainingConfig, data: Samples | None = None) -> Samples:
    """Check everything that can be checked before models load; returns the data.

    Args:
        data: in the place of that of the config.

    Raises:
        InputError: the cause and the cure in one line.
    """
    settings = config.objective_settings()
    _check_numbers(config)
    if settings.path is objective.Path.PARALLEL and config.levels.per_block != 1:
        raise InputError(f"path parallel takes one level a block, not {config.levels.per_block}: take path loop")
    if config.compile and settings.path is objective.Path.LOOP:
        raise InputError("path loop makes passes of many sizes, each compiled anew: set compile=false or path=parallel")
    config.levels.check(len(config.sampler().sigmas))
    config.optimizer.check()
    if config.tracker not in TRACKERS:
        raise InputError(f"tracker {config.tracker!r} is unknown: give {', '.join(TRACKERS)}")
    if config.tracker != "none" and find_spec(config.tracker) is None:
        raise InputError(f"{config.tracker} is not installed: {TRACKERS[config.tracker]}, or set tracker=none")
    if config.dtype not in (None, *TRAINING_DTYPES):
        raise InputError(f"dtype {config.dtype!r} does not train: give {' or '.join(TRAINING_DTYPES)}")
    folder = Path(config.model_folder)
    if config.checkpoint_path is not None and not Path(config.checkpoint_path).exists():
        raise InputError(f"no checkpoint at {config.checkpoint_path}: check the path")
    sizes = transformer_config(folder)
    config.hybrid(sizes["num_layers"])
    if config.sample_every:
        spatial_stride(folder)
        if config.sample_every % config.report_every:
            raise InputError(f"sample_every {config.sample_every} must be a multiple of report_every")
    init_from(config)
    data = data or open_data(config)
    _check_data(config, data, sizes)
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
    if len(paths) == 1 and paths[0].suffix == ".safetensors":
        return ResidentLatents(paths[0], choose_device(config.device))
    return LatentDataset(paths)


def _check_numbers(config: TrainingConfig) -> None:
    counts = ("frames_per_block", "steps", "batch", "accumulation", "keep", "max_bad_steps", "sample_fps")
    positive = (*counts, "save_every", "report_every")
    for name in positive:
        if vars(config)[name] < 1:
            raise InputError(f"{name} {vars(config)[name]} is not positive")
    if config.ema_decay is not None and not 0 < config.ema_decay < 1:
        raise InputError(f"ema_decay {config.ema_decay} must be between 0 and 1, or null for no average")
    if config.shard and rank_and_world_size()[1] == 1:
        raise InputError("shard=true divides the weights over ranks: start with torchrun, or set shard=false")
    if config.sample_frames is not None:
        num_blocks(config.sample_frames, config.frames_per_block)


def _check_data(config: TrainingConfig, data: Samples, sizes: dict[str, Any]) -> None:
    """Make sure that the first sample fits the model; all have one shape."""
    latents, text = data[0]
    frames, channels, height, width = latents.shape
    num_blocks(frames, config.frames_per_block)
    check_size(height, width, 1, sizes["patch_size"])
    if channels != sizes["in_dim"] or text.shape[1] != sizes["text_dim"] or text.shape[0] > sizes["text_len"]:
        raise InputError(
            f"data of {channels} channels and text {tuple(text.shape)} does not fit a model of {sizes['in_dim']} "
            f"channels and at most {sizes['text_len']} tokens of {sizes['text_dim']}: check data and model_folder"
        )


def init_from(config: TrainingConfig) -> Path | None:
    """The file that stage 2 or layer gates start from.

    Raises:
        InputError: there is none where the config says.
    """
    if not isinstance(config, Stage2Config | GatesConfig) or config.init_from is None:
        return None
    path = Path(config.init_from)
    found = complete_checkpoints(path / CHECKPOINTS)
    file = found[-1] / "trainables.safetensors" if found else path
    if not file.is_file():
        raise InputError(f"init_from {path} is neither a stage-1 run nor its trainables: run train_stage1.py first")
    return file


def resume_fingerprint(config: TrainingConfig, global_batch: int) -> dict[str, Any]:
    """Flat settings that must not change between sessions, with the batch of all ranks in the place of a rank's."""
    kept = {name: value for name, value in asdict(config).items() if name not in FREE_TO_CHANGE}
    if config.optimizer.decay == "constant":
        del kept["steps"]  # nothing but the end depends on it
    flat = {"global_batch": global_batch}
    for name, value in json.loads(json.dumps(kept)).items():
        flat |= {f"{name}.{key}": one for key, one in value.items()} if isinstance(value, dict) else {name: value}
    return flat
