"""Checkpoints of a training run: whole or not there, of what trains only, the same file on any number of ranks.

checkpoints/step-00000100/trainables.safetensors    official names
                          ema.safetensors           if there is an average
                          optimizer.safetensors     <name>.<what the optimiser keeps>
                          state.json                step, counters, fingerprint
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.checkpoints.loading import StateDict, as_state_dict, read_weights, summarize_names
from wan.utils.errors import CheckpointError
from wan.utils.files import atomic_folder
from wan.utils.settings import require_same_settings

TRAINABLES, EMA, OPTIMIZER, STATE = "trainables.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
Fingerprint = dict[str, Any]
FORMER_NAMES = {"path": "forward_mode", "read_clean": "loss_on_clean_pass"}
FORMER_VALUES = {("forward_mode", "loop"): "sequential", ("context", "student"): "self_rollout"}
"""What settings were called in runs of earlier versions."""


@dataclass
class Progress:
    """Where a run stands.

    Attributes:
        step: steps done.
        skipped: steps that were skipped because loss or gradient was not finite.
        skipped_in_row: the last of these in a row.
    """

    step: int = 0
    skipped: int = 0
    skipped_in_row: int = 0


@dataclass
class TrainingState:
    """All that changes while a run trains.

    Attributes:
        trainables: parameters by official name.
        optimizer: over the same, in the same order.
        ema: their average, if it is kept.
        progress: see there.
    """

    trainables: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    ema: dict[str, Tensor] | None
    progress: Progress


def save_state(state: TrainingState, folder: Path, fingerprint: Fingerprint, keep: int) -> None:
    """Write a checkpoint of the current step and drop all but the newest `keep`.

    Raises:
        InputError: the disk is full; the older checkpoints stay.
    """
    path = folder / f"step-{state.progress.step:08d}"
    kept = state.optimizer.state_dict()["state"]
    optimizer = {
        f"{name}.{key}": value
        for index, name in enumerate(state.trainables)
        for key, value in kept.get(index, {}).items()
    }
    with atomic_folder(path) as temporary:
        save_file({name: value.detach() for name, value in state.trainables.items()}, temporary / TRAINABLES)
        save_file(optimizer, temporary / OPTIMIZER)
        if state.ema is not None:
            save_file(state.ema, temporary / EMA)
        page = {"progress": asdict(state.progress), "fingerprint": fingerprint}
        (temporary / STATE).write_text(json.dumps(page, indent=1) + "\n")
    for old in complete_checkpoints(folder)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; what a killed writer left is none."""
    return sorted(path for path in folder.glob("step-*") if (path / STATE).is_file())


def require_same_run(folder: Path, fingerprint: Fingerprint) -> None:
    """Make sure that the checkpoints in a folder, if there are any, are of this very run.

    Raises:
        InputError: they are not.
        CheckpointError: the newest is damaged.
    """
    for checkpoint in complete_checkpoints(folder)[-1:]:
        _read_page(checkpoint, fingerprint)


def _read_page(checkpoint: Path, fingerprint: Fingerprint) -> Progress:
    try:
        page = json.loads((checkpoint / STATE).read_text())
        before, progress = page["fingerprint"], Progress(**page["progress"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"cannot read {checkpoint / STATE} ({error}): delete {checkpoint}") from error
    cure = "put them back, or choose another run_folder"
    require_same_settings(current_names(before), fingerprint, f"{checkpoint} was trained", cure)
    return progress


def current_names(fingerprint: Mapping[str, Any]) -> Fingerprint:
    """A fingerprint of an earlier version under the names and values of today."""
    renamed = {FORMER_NAMES.get(name, name): value for name, value in fingerprint.items()}
    return {
        name: FORMER_VALUES.get((name, value), value) if isinstance(value, str) else value
        for name, value in renamed.items()
    }


def load_state(state: TrainingState, checkpoint: Path, fingerprint: Fingerprint) -> None:
    """Continue from a checkpoint.

    Raises:
        InputError: it belongs to a run with other settings, data or weights; the message names them.
        CheckpointError: it is damaged.
    """
    progress = _read_page(checkpoint, fingerprint)
    copy_tensors_(state.trainables, _read(checkpoint / TRAINABLES), checkpoint / TRAINABLES)
    if state.ema is not None:
        copy_tensors_(state.ema, _read(checkpoint / EMA), checkpoint / EMA)
    _fill_optimizer(state, _read(checkpoint / OPTIMIZER))
    state.progress = progress


@torch.no_grad()
def copy_tensors_(targets: Mapping[str, Tensor], state: StateDict, source: Path) -> None:
    """Copy values into tensors, all names and shapes equal.

    Raises:
        CheckpointError: they are not.
    """
    differing = targets.keys() ^ state.keys()
    differing |= {name for name in targets.keys() & state.keys() if targets[name].shape != state[name].shape}
    if differing:
        raise CheckpointError(f"{source} does not fit the parameters to train: {summarize_names(differing)}")
    for name, target in targets.items():
        target.copy_(state[name])


def _read(path: Path) -> StateDict:
    return as_state_dict(read_weights(path), path)


def _fill_optimizer(state: TrainingState, values: StateDict) -> None:
    kept: dict[int, dict[str, Tensor]] = {}
    places = {name: index for index, name in enumerate(state.trainables)}
    for name, value in values.items():
        parameter, _, key = name.rpartition(".")
        kept.setdefault(places[parameter], {})[key] = value
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": kept})
