"""The files that a run goes on from or starts from, checked before the model loads."""

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from arl2.distillation.checkpointing import Progress, check_fit, require_same_run, require_within, stored_progress
from arl2.distillation.data import Samples
from arl2.distillation.stage1 import stage1_parameters
from arl2.distillation.trainer import CHECKPOINTS
from arl2.model import HybridWanModel
from pipelines.cli import rank_and_world_size
from pipelines.training.config import TrainingConfig, init_from, resume_fingerprint
from wan.checkpoints.fields import SIZES
from wan.checkpoints.formats import stated_config, transformer_config
from wan.checkpoints.loading import StateDict, as_state_dict, read_header, read_weights, summarize_names
from wan.utils.errors import CheckpointError

KNOWN_LATER = ("teacher", "architecture", "data_values", "start")
"""Entries of a run's fingerprint that take the weights, or all of the data, to compute."""


def check_resume(config: TrainingConfig, data: Samples) -> Progress | None:
    """Hold the settings to those of the run's newest checkpoint, as far as no weights are needed.

    Returns:
        the progress of the run; None for a new one.

    Raises:
        InputError: the run has other settings or samples, or more steps.
        CheckpointError: the newest checkpoint is damaged.
    """
    folder = Path(config.run_folder) / CHECKPOINTS
    progress = stored_progress(folder)
    if progress is None:
        return None
    global_batch = config.batch * config.accumulation * rank_and_world_size()[1]
    layers = config.hybrid(transformer_config(Path(config.model_folder))["num_layers"]).layers
    now = resume_fingerprint(config, global_batch)
    now |= {"data_samples": data.fingerprint(), "trained_layers": sorted(layers)}
    require_same_run(folder, now, apart_from=KNOWN_LATER)
    require_within(progress, config.steps, folder)
    return progress


def check_start(config: TrainingConfig) -> None:
    """Hold what training starts from to the parameters that it will have.

    Raises:
        InputError: there is nothing where `init_from` says.
        CheckpointError: it is no weight file, lacks a layer, or does not fit; or a value is not finite.
    """
    file = init_from(config)
    if file is None:
        return
    said = transformer_config(Path(config.model_folder))
    if config.checkpoint_path is not None and Path(config.checkpoint_path).is_dir():
        said |= stated_config(Path(config.checkpoint_path))
    sizes = {name: value for name, value in said.items() if name in SIZES}
    layers = config.hybrid(sizes["num_layers"]).layers
    with torch.device("meta"):
        model = HybridWanModel(**sizes, hybrid_layers=list(layers))
    stage1_values(file, stage1_parameters(model))


def stage1_values(file: Path, wanted: Mapping[str, Tensor]) -> StateDict:
    """The values that stage 1 left for some parameters; further ones of the file are left out.

    Args:
        wanted: the parameters, whose values do not matter.

    Raises:
        CheckpointError: it is no weight file, lacks a parameter, or does not fit; or a value is not finite.
    """
    # The names first: a wrong file may be large.
    if file.suffix == ".safetensors":
        _require_names(wanted, read_header(file)[0], file)
    state = as_state_dict(read_weights(file), file)
    _require_names(wanted, state, file)
    values = {name: state[name] for name in wanted}
    check_fit(wanted, values, file)
    return values


def _require_names(wanted: Mapping[str, Tensor], names: Collection[str], file: Path) -> None:
    missing = wanted.keys() - set(names)
    if missing:
        raise CheckpointError(f"{file} lacks {summarize_names(missing)}: name layers that stage 1 trained")
