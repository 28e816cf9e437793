"""What stage 2 and layer gates start from: values of stage 1 or 2, and the run that left them."""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from arl2.distillation.checkpointing import STATE, Progress, check_fit, newest_checkpoint, read_page
from arl2.distillation.stage1 import stage1_parameters
from arl2.distillation.stage2 import Trainable, stage2_parameters
from arl2.distillation.trainer import CHECKPOINTS
from arl2.model import HybridWanModel
from arl2.state_settings import StateSettings, stated_state
from pipelines.dtypes import DTYPES, choose_dtype
from pipelines.provenance import device_name
from pipelines.training.config import Stage2Config, TrainingConfig, init_from, resume_fingerprint
from pipelines.training.export import EXPORT
from wan.checkpoints.fields import SIZES, STATE_VARIANT
from wan.checkpoints.formats import has_config, stated_config, transformer_config
from wan.checkpoints.loading import StateDict, as_state_dict, read_header, read_weights, summarize_names
from wan.checkpoints.record import ALPHA, read_record
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import read_json

log = logging.getLogger(__name__)

RUN_PAGE = "run.json"
STAGE1, STAGE2, GATES = "stage 1", "stage 2", "layer gates"
OTHER_STAGES = {"lora": STAGE2, "budget": GATES}
"""Settings that runs of stage 1 do not have, and whose they are."""
KEPT_SETTINGS = ("lora", "lora_rank", "lora_alpha", "ffn_lora")
"""Settings of stage 2 that must not change from a run to one that starts from it."""


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

    @property
    def stage(self) -> str:
        """The stage that it is a run of; settings that an old run did not note say nothing."""
        return next((stage for name, stage in OTHER_STAGES.items() if name in self.fingerprint), STAGE1)

    def require_fit(self, config: TrainingConfig) -> None:
        """Make sure that a run may start from this one: from stage 1, or stage 2 from stage 2 with the same adapters.

        Both must have the same variant of the state.

        Raises:
            InputError: it may not.
        """
        before, now = (
            {name: value for name, value in settings.items() if name.startswith(f"{STATE_VARIANT}.")}
            for settings in (self.fingerprint, resume_fingerprint(config, 1))
        )
        if before != now:
            plain = {name.partition(".")[2]: value for name, value in before.items()}
            said = StateSettings.from_plain(plain, self.folder)
            raise InputError(
                f"init_from {self.folder} was trained with states of {said}, not of {config.state}: set state as it was"
            )
        if self.stage is STAGE1:
            return
        if self.stage is not STAGE2 or not isinstance(config, Stage2Config):
            raise InputError(
                f"init_from {self.folder} is a run of {self.stage}, not of stage 1: name one of train_stage1.py"
            )
        if self.fingerprint.get("trainable", Trainable.NEW) != Trainable.NEW:
            raise InputError(
                f"init_from {self.folder} trained all parameters: give its {EXPORT} as checkpoint_path instead"
            )
        now = resume_fingerprint(config, 1)
        for name in KEPT_SETTINGS:
            if name in self.fingerprint and self.fingerprint[name] != now[name]:
                raise InputError(
                    f"init_from {self.folder} was trained with {name} {self.fingerprint[name]}, not {now[name]}: set "
                    f"{name}={self.fingerprint[name]}"
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


def starting_run(config: TrainingConfig) -> StartingRun | None:
    """The run that a new run starts from; None if there is none, or none that is known.

    Raises:
        InputError: see `check_start`.
    """
    file = None if has_begun(config) else init_from(config)
    return None if file is None else StartingRun.of(file)


def backbone(model: HybridWanModel, stage: str) -> StateDict:
    """The teacher's weights in a model, under the names by which a run of some stage hashes them.

    Stage 1 knows no adapters on feed-forwards, which put `linear` into names.
    """
    new = set(model.hybrid_parameter_names())
    frozen = {name: value for name, value in model.state_dict().items() if name not in new}
    return frozen if stage is STAGE2 else {name.replace(".linear.", "."): value for name, value in frozen.items()}


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
        run.require_fit(config)
        run.warn_if_unfinished()
    said = transformer_config(Path(config.model_folder))
    checkpoint = None if config.checkpoint_path is None else Path(config.checkpoint_path)
    if checkpoint is not None and checkpoint.is_dir() and has_config(checkpoint):
        said |= stated_config(checkpoint)
    sizes = {name: value for name, value in said.items() if name in SIZES}
    hybrid = config.hybrid(sizes["num_layers"])
    with torch.device("meta"):
        model = HybridWanModel(
            **sizes,
            hybrid_layers=list(hybrid.layers),
            lora_rank=hybrid.lora_rank,
            lora_alpha=hybrid.lora_alpha,
            ffn_lora=hybrid.ffn_lora.value,
            state=hybrid.state.as_plain(),
        )
    starting_values(file, model)


def starting_values(file: Path, model: HybridWanModel) -> StateDict:
    """The values that a file has for the parameters that the teacher does not have, by name.

    Those of adapters are taken if the file has any; layers that are not hybrid in the model are left out.

    Args:
        model: its values do not matter.

    Raises:
        CheckpointError: it is no weight file, lacks a parameter, or does not fit; a value is not finite; or it has
            adapters of another scale, or such that the model has no place for, or another variant of the state.
    """
    # The names first: a wrong file may be large.
    if file.suffix == ".safetensors":
        _wanted(model, read_header(file)[0], file)
    read = read_weights(file)
    state = as_state_dict(read, file)
    wanted = _wanted(model, state, file)
    record = read_record(file, read)
    _require_scale(model, record, file)
    _require_state(model, record, file)
    values = {name: state[name] for name in wanted}
    check_fit(wanted, values, file)
    return values


def starting_parameters(file: Path, model: HybridWanModel) -> dict[str, nn.Parameter]:
    """The parameters of a model that a file sets; see `starting_values`.

    Raises:
        CheckpointError: see there.
    """
    names = read_header(file)[0] if file.suffix == ".safetensors" else as_state_dict(read_weights(file), file)
    return _wanted(model, names, file)


def _wanted(model: HybridWanModel, names: Collection[str], file: Path) -> dict[str, nn.Parameter]:
    """The parameters of a model that a file with these names sets."""
    adapters = {name for name in names if "lora_" in name}
    if not adapters:
        wanted = stage1_parameters(model)
    else:
        wanted = stage2_parameters(model)
        dropped = adapters - wanted.keys()
        if dropped:
            raise CheckpointError(
                f"{file} has adapters that this model has not, they would be dropped: {summarize_names(dropped)}; "
                "name a stage-1 run, or in stage 2 set hybrid_layers, lora and ffn_lora as they were"
            )
    _require_names(wanted, names, file)
    return wanted


def _require_scale(model: HybridWanModel, record: Mapping[str, Any], file: Path) -> None:
    """Make sure that adapters count as they did where they were trained, where the file says how."""
    alpha = record.get(ALPHA) if record.get("lora_rank") else None
    if alpha is not None and model.hybrid.lora_rank is not None and alpha != model.hybrid.lora_alpha:
        raise CheckpointError(
            f"{file} has adapters of lora_alpha {alpha:g}, not {model.hybrid.lora_alpha:g}: set lora_alpha={alpha:g}"
        )


def _require_state(model: HybridWanModel, record: Mapping[str, Any], file: Path) -> None:
    """Make sure that states work as they did where they were trained, where the file says how."""
    state = stated_state(record, {}, file)
    if record and not record.keys() <= {ALPHA} and state != model.hybrid.state:
        raise CheckpointError(f"{file} has states of {state}, not of {model.hybrid.state}: set state as it was")


def _require_names(wanted: Collection[str], names: Collection[str], file: Path) -> None:
    missing = set(wanted) - set(names)
    if missing:
        raise CheckpointError(f"{file} lacks {summarize_names(missing)}: name layers that were trained")
