"""The checkpoint that a run goes on from, checked before the model loads."""

from pathlib import Path

from arl2.distillation.checkpointing import Progress, require_same_run, require_within, stored_progress
from arl2.distillation.data import Samples
from arl2.distillation.trainer import CHECKPOINTS
from pipelines.cli import rank_and_world_size
from pipelines.training.config import TrainingConfig, resume_fingerprint
from wan.checkpoints.formats import transformer_config

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
