"""What stage 2 and layer gates start from: values of stage 1, and the run that left them."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from arl2.distillation.checkpointing import STATE, Progress, check_fit, newest_checkpoint, read_page
from arl2.distillation.stage1 import stage1_parameters
from arl2.distillation.trainer import CHECKPOINTS
from arl2.model import HybridWanModel
from pipelines.dtypes import DTYPES, choose_dtype
from pipelines.provenance import device_name
from pipelines.training.config import TrainingConfig, init_from
from pipelines.training.export import EXPORT
from wan.checkpoints.fields import SIZES
from wan.checkpoints.formats import has_config, stated_config, transformer_config
from wan.checkpoints.loading import StateDict, as_state_dict, read_header, read_weights, summarize_names
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import read_json

log = logging.getLogger(__name__)

RUN_PAGE = "run.json"
OTHER_STAGES = {"lora": "stage 2", "budget": "layer gates"}
"""Settings that runs of stage 1 do not have, and whose they are."""


@dataclass(frozen=True)
class StartingRun:
    """The run that left a file of trainables.

    Attributes:
        folder: of the run.
        progress, fingerprint: of the checkpoint that the file is in.
        page: its run.json; empty if it cannot be read.
    """

    folder: Path
    progress: Progress
    fingerprint: Mapping[str, Any]
    page: Mapping[str, Any]

    @classmethod
    def of(cls, file: Path) -> "StartingRun | None":
        """The run of a file; None for a file that is in no checkpoint.

        Raises:
            CheckpointError: the checkpoint's page is damaged.
        """
        checkpoint = file.resolve().parent
        if checkpoint.parent.name != CHECKPOINTS or not (checkpoint / STATE).exists():
            return None
        folder = checkpoint.parent.parent
        try:
            page = read_json(folder / RUN_PAGE)
        except InputError:
            page = {}
        return cls(folder, *read_page(checkpoint), page)

    def require_stage1(self) -> None:
        """Make sure that this is a run of stage 1; settings that an old run did not note say nothing.

        Raises:
            InputError: it is not.
        """
        stage = next((stage for name, stage in OTHER_STAGES.items() if name in self.fingerprint), None)
        if stage is not None:
            raise InputError(
                f"init_from {self.folder} is a run of {stage}, not of stage 1: name one of train_stage1.py"
            )

    def warn_if_unfinished(self) -> None:
        """Warn of a run that was stopped on its way."""
        config = self.page.get("config")
        steps = (config if isinstance(config, Mapping) else self.fingerprint).get("steps")
        if type(steps) is int and self.progress.step < steps and not (self.folder / EXPORT).exists():
            log.warning(
                "init_from %s is not finished, it is at step %d of %d: what it has learnt so far is taken",
                self.folder,
                self.progress.step,
                steps,
            )

    def teacher(self, dtype: torch.dtype, device: torch.device) -> str | None:
        """The fingerprint of its teacher's weights; None if it is unknown, or of another type than `dtype`.

        Args:
            dtype, device: of the weights to compare it with.
        """
        name = self.page.get("dtype") or self.fingerprint.get("dtype")
        if name is None and self.page.get("device") == device_name(device):
            is_same = choose_dtype(None, device) is dtype  # by default, on the same kind of device
        else:
            is_same = DTYPES.get(str(name)) is dtype
        teacher = self.fingerprint.get("teacher")
        return teacher if is_same and isinstance(teacher, str) else None


def has_begun(config: TrainingConfig) -> bool:
    """Whether a run has a checkpoint.

    Raises:
        CheckpointError: the newest is damaged.
    """
    return newest_checkpoint(Path(config.run_folder) / CHECKPOINTS) is not None


def teacher_of_start(config: TrainingConfig, dtype: torch.dtype, device: torch.device) -> str | None:
    """The fingerprint of the teacher of what a new run starts from; None where there is nothing to compare with.

    Raises:
        InputError: see `check_start`.
    """
    file = None if has_begun(config) else init_from(config)
    run = None if file is None else StartingRun.of(file)
    return None if run is None else run.teacher(dtype, device)


def backbone(model: HybridWanModel) -> StateDict:
    """The teacher's weights in a model, under the names that they have without adapters: as stage 1 hashes them."""
    new = set(model.hybrid_parameter_names())
    return {name.replace(".linear.", "."): value for name, value in model.state_dict().items() if name not in new}


def check_start(config: TrainingConfig) -> None:
    """Hold what training starts from to the parameters that it will have; warn of a stage 1 that is not finished.

    A run that has a checkpoint does not depend on it any more: then it may be of any run.

    Raises:
        InputError: there is nothing where `init_from` says, or a run of another stage.
        CheckpointError: it is no weight file, lacks a layer, or does not fit; or a value is not finite.
    """
    file = init_from(config)
    if file is None:
        return
    run = None if has_begun(config) else StartingRun.of(file)
    if run is not None:
        run.require_stage1()
        run.warn_if_unfinished()
    said = transformer_config(Path(config.model_folder))
    checkpoint = None if config.checkpoint_path is None else Path(config.checkpoint_path)
    if checkpoint is not None and checkpoint.is_dir() and has_config(checkpoint):
        said |= stated_config(checkpoint)
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
