"""From a checked config to a finished run: model, processes, samples, plots, export."""

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from torch import nn

from arl2.checkpoint import LoadReport, build_hybrid, plan_hybrid
from arl2.distillation.checkpointing import Progress, copy_tensors_, require_same_run, stored_fingerprint
from arl2.distillation.data import LatentDataset, Samples
from arl2.distillation.objective import Objective
from arl2.distillation.sampling import Batches
from arl2.distillation.sharding import ShardedLoading, sharded_fingerprint
from arl2.distillation.stage1 import Stage1, Stage1Settings
from arl2.distillation.stage2 import Context, Stage2, Stage2Settings
from arl2.distillation.trainer import CHECKPOINTS, Trainer
from arl2.layer_selection.gates import GateSettings, LayerGates
from arl2.model import HybridSettings, HybridWanModel
from arl2.ops.compiling import compile_blocks
from arl2.statement import found_settings, state_of
from arl2.trained_memory import TrainedMemory
from pipelines.cli import choose_device, rank_and_world_size
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import TransformerSizes
from pipelines.flags import Parser
from pipelines.provenance import architecture_of, device_name, git_commit, versions
from pipelines.settings import given_names, load_config
from pipelines.training.config import (
    GatesConfig,
    Stage2Config,
    TrainingConfig,
    check_training,
    init_from,
    resume_fingerprint,
)
from pipelines.training.export import export
from pipelines.training.monitor import TrainingMonitor
from pipelines.training.peers import watching_peers
from pipelines.training.resume import check_resume, started_with
from pipelines.training.room import check_room
from pipelines.training.start import (
    RUN_PAGE,
    backbone,
    check_start,
    starting_parameters,
    starting_run,
    starting_values,
)
from wan.checkpoints.formats import TransformerWeights, read_transformer, transformer_config
from wan.checkpoints.loading import fingerprint_of, fingerprint_of_file
from wan.utils.device import use_deterministic_algorithms
from wan.utils.errors import InputError
from wan.utils.files import remove_all_abandoned, write_json, writing
from wan.utils.locks import exclusive
from wan.utils.ranks import raise_together, require_agreement, waiting_for_others

log = logging.getLogger(__name__)

Config = TypeVar("Config", bound=TrainingConfig)
ModelParts = tuple[TransformerWeights, dict[str, Any], HybridSettings]
PACKAGES = ("diffusers", "accelerate", "safetensors")
LOCK = ".lock"


def parse_config(kind: type[Config], description: str | None) -> Config:
    """The command line of a training stage: a config and `key=value` settings that go before its own."""
    parser = Parser(description, kind, reads_config=True)
    add = parser.add_setting
    add("--output_folder", "run_folder", "everything that the run leaves")
    add("--checkpoint_path", "checkpoint_path", "the teacher's weights")
    add("--use_ema", "use_ema", "take generator_ema of the checkpoint")
    add("--seed", "seed", "of order, noise and initial values")
    add("--device", "device", "cpu, cuda or cuda:N; by default the GPU if there is one")
    add("--dtype", "dtype", "of the frozen weights; by default bfloat16 on a GPU and float32 on a CPU")
    arguments = parser.parse_args()
    config = load_config(kind, arguments.config, arguments.settings, arguments.flags)
    if isinstance(config, Stage2Config):
        config.memory.refuse_idle(given_names(kind, arguments))
    return config


def train(config: TrainingConfig, stop: Callable[[], bool] = lambda: False) -> bool:
    """Train one stage or layer gates, and leave the run's folder.

    Args:
        stop: asked before every step whether to keep what there is and end early; for one process.

    Returns:
        whether training is complete; what it made is exported then.

    Raises:
        InputError: something in the config cannot work, or see `Trainer.run`.
    """
    data, accelerator = join(config)
    if not accelerator.is_main_process:
        logging.disable(logging.WARNING)  # one voice is enough
    with watching_peers(accelerator), exclusive_run(Path(config.run_folder), accelerator):
        is_complete = _train(config, data, accelerator, stop)
    gc.collect()  # what sharding leaves behind refers to the process group, which ends now
    with writing(Path(config.run_folder)):
        accelerator.end_training()
    return is_complete


def join(config: TrainingConfig) -> tuple[Samples, Accelerator]:
    """Check what can be checked before models load, and join the other processes of the run.

    A process that cannot go on joins them, too, and says so: those of other nodes would wait for it.

    Raises:
        InputError: the config cannot work, here or for another process.
    """
    data: Samples | None = None
    error: InputError | None = None
    try:
        data = check_training(config)
        sizes = TransformerSizes.of(transformer_config(Path(config.model_folder)))
        check_room(config, sizes, tuple(data[0][0].shape))
    except InputError as failure:
        if rank_and_world_size()[1] == 1:
            raise
        error = failure
    use_deterministic_algorithms(config.deterministic)
    accelerator = new_accelerator(config)
    raise_together(error, accelerator.device)
    assert data is not None
    return data, accelerator


@contextmanager
def exclusive_run(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Keep other trainings off a run's folder. All ranks must enter; one of them holds the lock.

    Raises:
        LockedError: another training is there, and who it is.
        InputError: the folder cannot be written.
    """
    with ExitStack() as held:
        with ending_together(accelerator):
            if accelerator.is_main_process:
                held.enter_context(exclusive(folder / LOCK, f"the run {folder}"))
                for part in (folder, *(path for path in folder.iterdir() if path.is_dir())):
                    remove_all_abandoned(part)
        yield


@contextmanager
def ending_together(accelerator: Accelerator) -> Iterator[None]:
    """Let an error that one rank meets inside end all of them. All ranks must enter, and must meet nowhere inside.

    Raises:
        InputError: this rank's, or another's.
    """
    error: InputError | None = None
    try:
        yield
    except InputError as failure:
        error = failure
    raise_together(error, accelerator.device)


def new_accelerator(config: TrainingConfig) -> Accelerator:
    """Device, precision, processes and trackers of a run."""
    device = choose_device(config.device)
    with waiting_for_others(rank_and_world_size()[1]):
        return Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision_of(weights_dtype(config, device)),
            log_with=config.active_tracker(),
            project_dir=config.run_folder,
        )


def _train(config: TrainingConfig, data: Samples, accelerator: Accelerator, stop: Callable[[], bool]) -> bool:
    progress: Progress | None = None
    with ending_together(accelerator):
        progress = check_resume(config, data)
        check_start(config)
    require_agreement(started_with(config, progress))
    parts: ModelParts | None = None
    with ending_together(accelerator):
        parts = model_parts(config)
    assert parts is not None
    if accelerator.is_main_process and not config.shard:  # where no rank reads the whole file
        warn_of_another_teacher(data, parts[0])
    loading: ShardedLoading | None = None
    built: tuple[HybridWanModel, LoadReport] | None = None
    with ending_together(accelerator):
        loading = begin_sharded_loading(config, accelerator.device, parts) if config.shard else None
        built = build_model(config, accelerator.device, parts) if loading is None else (loading.model, loading.report)
    assert built is not None
    model, report = built
    del parts, built
    if progress is None:
        log_new_parameters(config, model, report)
    trainer = new_trainer(config, data, accelerator, new_objective(config, model), loading)
    if progress is not None:
        log_progress(config, progress)
    if not trainer.run(stop):
        return False
    model.mark_trained(trained_memory(config, data))
    if not isinstance(config, GatesConfig):
        export(model, trainer.state.ema, Path(config.run_folder), accelerator)
    return True


def log_progress(config: TrainingConfig, progress: Progress) -> None:
    """Say where a run goes on, or that it is complete."""
    if progress.step < config.steps:
        log.info("the run in %s goes on after step %d of %d", config.run_folder, progress.step, config.steps)
    else:
        log.info(
            "the run in %s is complete at step %d: %s", config.run_folder, progress.step, how_to_go_further(config)
        )


def how_to_go_further(config: TrainingConfig) -> str:
    """The way to train longer than a run that is complete."""
    if config.optimizer.decay == "constant":
        return f"to train longer, give more steps, such as steps={2 * config.steps}"
    return (
        "its learning rate has come to its end; to train longer, start anew with more steps and another run_folder, "
        f"such as steps={2 * config.steps} run_folder={config.run_folder}-longer"
    )


def trained_memory(config: TrainingConfig, data: Samples) -> TrainedMemory:
    """The memory that the softmax layers have in a training; stage 1 learns from a teacher that sees everything."""
    window_frames, sink_frames = config.student_memory().window if isinstance(config, Stage2Config) else (None, 0)
    return TrainedMemory(window_frames, sink_frames, num_frames=data[0][0].shape[0])


def new_trainer(
    config: TrainingConfig,
    data: Samples,
    accelerator: Accelerator,
    objective: Objective,
    loading: ShardedLoading | None = None,
) -> Trainer:
    """What will train an objective as a config says; its model starts from stage 1 if that is wanted.

    Args:
        loading: of the objective's model, if its backbone is to be sharded and is not loaded yet.

    Raises:
        CheckpointError: what it should start from does not fit, or the newest checkpoint is damaged.
        InputError: the folder has checkpoints of another run.
    """
    folder, model = Path(config.run_folder), objective.model
    trainables = objective.parameters_to_train()
    enable_grad(trainables, accelerator.device)
    with ending_together(accelerator):
        start_from(config, model)
    if loading is not None:
        loading.shard()
    global_batch = config.batch * config.accumulation * accelerator.num_processes
    frozen = {name: value for name, value in model.state_dict().items() if name not in trainables}
    teacher = fingerprint_of(frozen) if loading is None else sharded_fingerprint(frozen, accelerator.device)
    fingerprint: dict[str, Any] = {}
    require_teacher_of_start(config, model, accelerator, loading)
    with ending_together(accelerator):
        fingerprint = run_fingerprint(config, data, objective, global_batch, teacher)
    require_agreement(fingerprint)
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
        own_rollout=isinstance(objective, Stage2) and objective.settings.context is Context.SELF_ROLLOUT,
        text_dtype=model.patch_embedding.weight.dtype,
    )
    with ending_together(accelerator):
        require_same_run(folder / CHECKPOINTS, fingerprint)
        monitor = TrainingMonitor(config, data, accelerator)
    begin = partial(describe_run, config, folder, fingerprint, accelerator)
    return Trainer(accelerator, objective, batches, config.trainer(), folder, fingerprint, monitor, begin)


def require_teacher_of_start(
    config: TrainingConfig, model: HybridWanModel, accelerator: Accelerator, loading: ShardedLoading | None
) -> None:
    """Hold the teacher to that of the run that this one starts from, where they can be compared. All ranks must call.

    Raises:
        InputError: it is another.
    """
    run, before = None, None
    with ending_together(accelerator):
        run = starting_run(config)
        before = run and run.teacher(weights_dtype(config, accelerator.device), accelerator.device)
    if run is None or before is None:
        return
    weights = backbone(model, run.stage)
    now = fingerprint_of(weights) if loading is None else sharded_fingerprint(weights, accelerator.device)
    if now != before:
        raise InputError(
            f"init_from {init_from(config)} was trained on another teacher ({before}, this one is {now}): give the "
            "checkpoint_path that it had, or train it anew with this one"
        )


def run_fingerprint(
    config: TrainingConfig, data: Samples, objective: Objective, global_batch: int, teacher: str
) -> dict[str, Any]:
    """Everything that makes a run what it is: settings, and what they name by content.

    What stage 2 started from counts until the first checkpoint: afterwards the run no longer depends on it.

    Raises:
        InputError: the data cannot be read, or the newest checkpoint is damaged.
    """
    model = objective.model
    fingerprint = resume_fingerprint(config, global_batch)
    fingerprint |= {"teacher": teacher, "data_samples": data.fingerprint()}
    details: dict[str, Any] = {"data_values": data.values_fingerprint(), "trained_layers": list(model.hybrid.layers)}
    details["architecture"] = architecture_of(model)
    before = stored_fingerprint(Path(config.run_folder) / CHECKPOINTS)
    if isinstance(config, Stage2Config):
        start = None if config.init_from is None else fingerprint_of(taken_over(config, model))
        if before is not None and before.get("start", start) != start:
            log.warning("init_from is not what this run started from: it goes on from its own checkpoint")
            start = before["start"]
        details["start"] = start
    # Runs of earlier versions did not note these.
    fingerprint |= {name: value for name, value in details.items() if before is None or name in before}
    return fingerprint


def weights_dtype(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """Of the frozen weights."""
    return choose_dtype(config.dtype, device)


def precision_of(dtype: torch.dtype) -> str:
    """Accelerate's name of the precision in which float32 trainables meet frozen weights of a dtype."""
    return "bf16" if dtype is torch.bfloat16 else "no"


def build_model(
    config: TrainingConfig, device: torch.device, parts: ModelParts | None = None
) -> tuple[HybridWanModel, LoadReport]:
    """The hybrid model on the teacher's weights, frozen, and what happened to them; `parts` if they are read."""
    weights, sizes, hybrid = parts or model_parts(config)
    dtype = weights_dtype(config, device)
    return build_hybrid(weights, sizes, hybrid, dtype=dtype, device=device, seed=config.seed, to_be_trained=True)


def begin_sharded_loading(config: TrainingConfig, device: torch.device, parts: ModelParts) -> ShardedLoading:
    """The same model, to be sharded over all ranks when its objective is made."""
    return ShardedLoading(plan_hybrid(*parts, config.seed), weights_dtype(config, device), device)


def model_parts(config: TrainingConfig) -> ModelParts:
    """Weights, sizes and hybrid layers of the model that a config trains."""
    sizes = transformer_config(Path(config.model_folder))
    weights = read_transformer(config.checkpoint_path or config.model_folder, config.use_ema)
    said = state_of(weights.record, weights.config, weights.state, weights.source)
    if found_settings(weights.state, weights.source).layers and said != config.state:
        raise InputError(f"{weights.source} has states of {said}, not of {config.state}: set state as it was")
    return weights, sizes, config.hybrid(sizes["num_layers"])


def warn_of_another_teacher(data: Samples, weights: TransformerWeights) -> None:
    """Warn of rollouts that these weights did not make, where the data says which did.

    Weights count as their file holds them: the same ones in another type cannot be told from others.
    """
    before = data.settings.get("weights") if isinstance(data, LatentDataset) else None
    now = fingerprint_of_file(weights.state) if isinstance(before, str) else None
    if now != before and now is not None:
        log.warning(
            "data was made by weights %s, those of %s are %s: another teacher, or the same in another type",
            before,
            weights.source,
            now,
        )


def log_new_parameters(config: TrainingConfig, model: HybridWanModel, report: LoadReport) -> None:
    """Log how many parameters start from their initial values."""
    number = len(set(report.untrained) - taken_over(config, model).keys())
    if number:
        log.info("%d parameters of %d hybrid layers are new", number, len(report.settings.layers))


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
    """Take over what stage 1 or 2 trained; layers that are not hybrid here are dropped.

    Raises:
        CheckpointError: a layer was not trained, or the sizes differ.
    """
    file = init_from(config)
    if file is not None:
        values = starting_values(file, model)
        copy_tensors_({name: model.get_parameter(name) for name in values}, values, file)


def taken_over(config: TrainingConfig, model: HybridWanModel) -> dict[str, nn.Parameter]:
    """Parameters that training does not start from initial values."""
    file = init_from(config)
    return {} if file is None else starting_parameters(file, model)


def describe_run(
    config: TrainingConfig, folder: Path, fingerprint: Mapping[str, Any], accelerator: Accelerator
) -> None:
    """Write the page of a session that can train, and begin its tracking; all ranks must call this."""
    if accelerator.is_main_process:
        write_run_page(config, folder, fingerprint, accelerator)
    if config.active_tracker() is not None:
        with writing(folder):
            accelerator.init_trackers(folder.name, config={name: str(value) for name, value in fingerprint.items()})


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
        "dtype": str(weights_dtype(config, device)).removeprefix("torch."),
    }
    write_json(folder / RUN_PAGE, page)
