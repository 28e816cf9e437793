"""A trained model written whole, as `checkpoint_path` takes it."""

import json
import logging
from pathlib import Path

from accelerate import Accelerator

from arl2.distillation.checkpointing import first_not_finite
from arl2.distillation.sharding import gathered_state
from arl2.distillation.trainer import TrainingError
from arl2.model import HybridWanModel
from wan.checkpoints.formats import WEIGHT_FILES
from wan.checkpoints.loading import StateDict
from wan.checkpoints.saving import with_record, write_safetensors
from wan.utils.errors import InputError
from wan.utils.files import atomic_folder
from wan.utils.ranks import raise_together

log = logging.getLogger(__name__)

EXPORT = "export"
"""Folder of the trained model in a run's."""


def export(model: HybridWanModel, ema: StateDict | None, folder: Path, accelerator: Accelerator) -> None:
    """Write the model whole: `export`, and `export_ema` with the average's weights. All ranks must call this.

    Raises:
        TrainingError: a weight is not finite; nothing is written.
        InputError: the disk is full.
    """
    state = gathered_state(model, accelerator.is_main_process)
    error: InputError | None = None
    if accelerator.is_main_process:
        try:
            _export(model, state, ema, folder)
        except InputError as failure:
            error = failure
    raise_together(error, accelerator.device)


def _export(model: HybridWanModel, state: StateDict, ema: StateDict | None, folder: Path) -> None:
    averaged = {} if ema is None else {name: value.cpu() for name, value in ema.items()}
    bad = first_not_finite(state) or first_not_finite(averaged)
    if bad is not None:
        raise TrainingError(f"{bad} is not finite: nothing is exported; check the teacher's weights, or train anew")
    write_model_folder(model, state, folder / EXPORT)
    if averaged:
        write_model_folder(model, state | averaged, folder / "export_ema")
    log.info("the trained model is in %s: give it to inference.py as --checkpoint_path", folder / EXPORT)


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
        write_safetensors(temporary / WEIGHT_FILES[0], weights, with_record(model.record()))
