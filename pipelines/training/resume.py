"""The checkpoint that a run goes on from, checked before the model loads, by all of its processes alike."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from arl2.distillation.checkpointing import Progress, require_same_run, require_within, stored_progress
from arl2.distillation.data import Samples
from arl2.distillation.trainer import CHECKPOINTS
from pipelines.cli import rank_and_world_size
from pipelines.provenance import source_fingerprint
from pipelines.training.config import TrainingConfig, resume_fingerprint
from wan.checkpoints.formats import transformer_config

KNOWN_LATER = ("teacher", "architecture", "data_values", "start")
"""Entries of a run's fingerprint that take the weights, or all of the data, to compute."""
OWN_OF_A_RANK = ("model_folder", "checkpoint_path", "run_folder", "data", "init_from", "layers_file", "device")
"""Settings that may differ between the processes of a run: what they name is told by content."""


def started_with(config: TrainingConfig, progress: Progress | None) -> dict[str, Any]:
    """Code, settings and progress of a run, which must be the same for all of its processes.

    Args:
        progress: of the newest checkpoint that this process sees.
    """
    settings = {name: value for name, value in asdict(config).items() if name not in OWN_OF_A_RANK}
    step = None if progress is None else progress.step
    return settings | {"the step of the newest checkpoint": step, "the code": source_fingerprint()}


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
