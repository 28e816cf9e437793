"""From a checked config to a finished run: model, processes, samples, plots, export."""

import gc
import json
import logging
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn

from arl2.checkpoint import build_hybrid
from arl2.distillation.checkpointing import copy_tensors_, require_same_run
from arl2.distillation.data import Samples
from arl2.distillation.objective import LayerReports, Objective
from arl2.distillation.sampling import Batches
from arl2.distillation.sharding import gathered_state, shard_backbone
from arl2.distillation.stage1 import Stage1, Stage1Settings, stage1_parameters
from arl2.distillation.stage2 import Context, Stage2, Stage2Settings
from arl2.distillation.trainer import CHECKPOINTS, LOSSES, Trainer
from arl2.layer_selection.gates import GateSettings, LayerGates
from arl2.model import HybridWanModel
from arl2.ops.compiling import compile_blocks
from arl2.rollout import SeededNoise, num_blocks, rollout
from pipelines.cli import choose_device
from pipelines.config import MemoryConfig, load_config
from pipelines.generation.arguments import choose_dtype
from pipelines.media.plots import plot_layers, plot_losses
from pipelines.media.video import VideoWriter, to_uint8
from pipelines.provenance import device_name, git_commit, versions
from pipelines.training.config import (
    GatesConfig,
    Stage2Config,
    TrainingConfig,
    check_training,
    init_from,
    resume_fingerprint,
)
from wan.checkpoints.formats import WEIGHT_FILES, read_transformer, transformer_config
from wan.checkpoints.loading import StateDict, as_state_dict, fingerprint_of, read_weights, summarize_names
from wan.utils.errors import CheckpointError
from wan.utils.files import atomic_folder, write_json
from wan.vae.wan_vae import WanVAE, load_vae

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingConfig)
PACKAGES = ("diffusers", "accelerate", "safetensors")


def parse_config(kind: type[Config], description: str | None) -> Config:
    """The command line of a training stage: a config and `key=value` settings that go before its own."""
    parser = ArgumentParser(description=description, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see configs/")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="in the place of the config's own")
    arguments = parser.parse_args()
    return load_config(kind, arguments.config, arguments.settings)


def train(config: TrainingConfig) -> None:
    """Train one stage or layer gates, and leave the run's folder.

    Raises:
        InputError: something in the config cannot work, or see `Trainer.run`.
    """
    data = check_training(config)
    accelerator = new_accelerator(config)
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)  # one voice is enough
    _train(config, data, accelerator)
    accelerator.wait_for_everyone()
    gc.collect()  # what sharding leaves behind refers to the process group, which ends now
    accelerator.end_training()


def new_accelerator(config: TrainingConfig) -> Accelerator:
    """Device, precision, processes and trackers of a run."""
    device = choose_device(config.device)
    return Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=precision_of(weights_dtype(config, device)),
        log_with=None if config.tracker == "none" else config.tracker,
        project_dir=config.run_folder,
    )


def _train(config: TrainingConfig, data: Samples, accelerator: Accelerator) -> None:
    model = build_model(config, accelerator.device)
    trainer = new_trainer(config, data, accelerator, new_objective(config, model))
    trainer.run()
    if not isinstance(config, GatesConfig):
        export(model, trainer.state.ema, Path(config.run_folder), accelerator)


def new_trainer(config: TrainingConfig, data: Samples, accelerator: Accelerator, objective: Objective) -> Trainer:
    """What will train an objective as a config says; its model starts from stage 1 if that is wanted.

    Raises:
        CheckpointError: what it should start from does not fit, or the newest checkpoint is damaged.
        InputError: the folder has checkpoints of another run.
    """
    folder, model = Path(config.run_folder), objective.model
    trainables = objective.parameters_to_train()
    enable_grad(trainables, accelerator.device)
    start_from(config, model)
    global_batch = config.batch * config.accumulation * accelerator.num_processes
    fingerprint = resume_fingerprint(config, global_batch)
    frozen = {name: value for name, value in model.state_dict().items() if name not in trainables}
    fingerprint |= {"teacher": fingerprint_of(frozen), "data_samples": data.fingerprint()}
    if config.shard:
        shard_backbone(model, trainables.values())
    if config.compile:
        compile_blocks(model)
    batches = Batches(
        data,
        config.seed,
        global_batch,
        config.frames_per_block,
        config.levels,
        config.sampler(),
        config.timestep_shift,
        own_rollout=isinstance(objective, Stage2) and objective.settings.context is Context.STUDENT,
        text_dtype=model.patch_embedding.weight.dtype,
    )
    require_same_run(folder / CHECKPOINTS, fingerprint)
    if accelerator.is_main_process:
        write_run_page(config, folder, fingerprint, accelerator)
    if config.tracker != "none":
        accelerator.init_trackers(folder.name, config={name: str(value) for name, value in fingerprint.items()})
    monitor = TrainingMonitor(config, data, accelerator)
    return Trainer(accelerator, objective, batches, config.trainer(), folder, fingerprint, monitor)


def weights_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """Of the frozen weights."""
    return choose_dtype(config.dtype, device)


def precision_of(dtype: torch.dtype) -> str:
    """Accelerate's name of the precision in which float32 trainables meet frozen weights of a dtype."""
    return "bf16" if dtype is torch.bfloat16 else "no"


def build_model(config: TrainingConfig, device: torch.device) -> HybridWanModel:
    """The hybrid model on the teacher's weights; frozen. One that will be sharded stays on the CPU until then."""
    sizes = transformer_config(Path(config.model_folder))
    weights = read_transformer(config.checkpoint_path or config.model_folder, config.use_ema)
    dtype = weights_dtype(config, device)
    where = torch.device("cpu") if config.shard else device
    hybrid = config.hybrid(sizes["num_layers"])
    return build_hybrid(weights, sizes, hybrid, dtype=dtype, device=where, seed=config.seed)[0]


def new_objective(config: TrainingConfig, model: HybridWanModel) -> Objective:
    """The objective of the config's stage."""
    settings = config.objective_settings()
    if isinstance(settings, Stage1Settings):
        return Stage1(model, settings)
    if isinstance(settings, GateSettings):
        return LayerGates(model, settings)
    assert isinstance(settings, Stage2Settings)
    return Stage2(model, settings, config.sampler())


def enable_grad(trainables: Mapping[str, nn.Parameter], device: torch.device) -> None:
    """Move what trains to the device, in float32 at least, and let it require gradients."""
    for parameter in trainables.values():
        parameter.data = parameter.data.to(device, torch.promote_types(parameter.dtype, torch.float32))
        parameter.requires_grad_(True)


def start_from(config: TrainingConfig, model: HybridWanModel) -> None:
    """Take over what stage 1 trained; layers that are not hybrid here are dropped.

    Raises:
        CheckpointError: a layer was not trained, or the sizes differ.
    """
    file = init_from(config)
    if file is None:
        return
    state = as_state_dict(read_weights(file), file)
    wanted = stage1_parameters(model)
    missing = wanted.keys() - state.keys()
    if missing:
        raise CheckpointError(f"{file} lacks {summarize_names(missing)}: name layers that stage 1 trained")
    copy_tensors_(wanted, {name: state[name] for name in wanted}, file)


def write_run_page(
    config: TrainingConfig, folder: Path, fingerprint: Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Say in run.json what was run, with what, from which commit and on what."""
    device = accelerator.device
    page = {
        "stage": type(config).__name__,
        "config": asdict(config),
        "fingerprint": fingerprint,
        "git_commit": git_commit(),
        "versions": versions(PACKAGES),
        "world_size": accelerator.num_processes,
        "device": device_name(device),
    }
    write_json(folder / "run.json", page)


def export(model: HybridWanModel, ema: StateDict | None, folder: Path, accelerator: Accelerator) -> None:
    """Write the model whole, as `checkpoint_path` takes it: `export`, and `export_ema` with the average's weights."""
    state = gathered_state(model, accelerator.is_main_process)
    if not accelerator.is_main_process:
        return
    averaged = None if ema is None else state | {name: value.cpu() for name, value in ema.items()}
    for name, weights in (("export", state), ("export_ema", averaged)):
        if weights is not None:
            write_model_folder(model, weights, folder / name)
    log.info("the trained model is in %s: give it to inference.py as --checkpoint_path", folder / "export")


def write_model_folder(model: HybridWanModel, weights: StateDict, folder: Path) -> None:
    """Write a model's config beside some weights of it, as `checkpoint_path` takes them; atomic.

    Raises:
        InputError: the disk is full.
    """
    # Not `save_config`: a sharded model's class has another name.
    config = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with atomic_folder(folder) as temporary:
        page = json.dumps({"_class_name": HybridWanModel.__name__} | config, indent=2)
        (temporary / "config.json").write_text(page + "\n")
        save_file(weights, temporary / WEIGHT_FILES[0], metadata={"format": "pt"})


class TrainingMonitor:
    """What people look at while a run trains: plots, and videos of teacher and student from the same noise."""

    def __init__(self, config: TrainingConfig, data: Samples, accelerator: Accelerator) -> None:
        self._config, self._data = config, data
        self._device, self._main = accelerator.device, accelerator.is_main_process
        self._vae: WanVAE | None = None
        if config.sample_every and self._main:
            dtype = torch.bfloat16 if self._device.type == "cuda" else torch.float32
            self._vae = load_vae(Path(config.model_folder), dtype=dtype, device=self._device)

    def __call__(self, step: int, model: HybridWanModel, reports: LayerReports) -> None:
        """Called by the trainer on every rank."""
        folder, every = Path(self._config.run_folder), self._config.sample_every
        if self._main:
            plot_losses(folder / LOSSES, folder / "losses.png")
            plot_layers(reports, folder / "reports" / f"step-{step:08d}.png")
        # Ranks that share the weights must all run the model.
        if every and step % every == 0 and (self._main or self._config.shard):
            self._sample(model, folder / "samples" / f"step-{step:08d}.mp4")

    @torch.no_grad()
    def _sample(self, model: HybridWanModel, path: Path) -> None:
        with model.as_teacher():
            teacher = self._rollout(model)
        memory = self._config.memory if isinstance(self._config, Stage2Config) else MemoryConfig()
        videos = [teacher, self._rollout(model, *memory.window)]
        if self._vae is None:
            return
        pixels = [self._vae.decode(latents.to(self._vae.dtype)).float() for latents in videos]
        frames = to_uint8(torch.cat(pixels, dim=-1)[0])
        height, width = frames.shape[1:3]
        with VideoWriter(path, height, width, fps=self._config.sample_fps) as video:
            video.write(frames)

    def _rollout(self, model: HybridWanModel, window_frames: int | None = None, sink_frames: int = 0) -> Tensor:
        """Latents of a video for the first prompt of the data, [1, F, C, h, w]."""
        config = self._config
        latents, text_TD = self._data[0]
        frames = config.sample_frames or latents.shape[0]
        text = model.embed_text(text_TD[None].to(self._device, model.patch_embedding.weight.dtype))
        memory = model.memory_for(latents[None, :1].to(self._device), window_frames, sink_frames)
        noise = SeededNoise([config.seed], (config.frames_per_block, *latents.shape[1:]), self._device)
        blocks = num_blocks(frames, config.frames_per_block)
        parts = rollout(model, config.sampler(), noise, text, memory, blocks)
        half = model.patch_embedding.weight.dtype is torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=half):
            return torch.cat([block.latents_BFCHW for block in parts], dim=1)
