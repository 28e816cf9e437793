"""Checkpoints of a training run: whole or not there, of what trains only, the same file on any number of ranks.

checkpoints/step-00000100/trainables.safetensors    official names
                          ema.safetensors           if there is an average
                          optimizer.safetensors     <name>.<what the optimiser keeps>
                          state.json                step, counters, fingerprint
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from wan.checkpoints.loading import StateDict, as_state_dict, read_weights, summarize_names
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import atomic_folder, read_json, remove, temporary_path, write_json, write_text
from wan.utils.json_lines import read_json_lines
from wan.utils.settings import require_same_settings

TRAINABLES, EMA, OPTIMIZER, STATE = "trainables.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of every parameter, beside the number of its steps."""
_NAME = re.compile(r"step-(\d{8,})")
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

    @property
    def learned(self) -> int:
        """Steps done that changed the parameters."""
        return self.step - self.skipped


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


def save_state(
    state: TrainingState, folder: Path, fingerprint: Fingerprint, keep: int, header: dict[str, str] | None = None
) -> None:
    """Write a checkpoint of the current step and drop all but the newest `keep`.

    Args:
        header: of the files of parameters and of their average.

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
        save_file({name: value.detach() for name, value in state.trainables.items()}, temporary / TRAINABLES, header)
        save_file(optimizer, temporary / OPTIMIZER)
        if state.ema is not None:
            save_file(state.ema, temporary / EMA, header)
        write_json(temporary / STATE, {"progress": asdict(state.progress), "fingerprint": fingerprint})
    for old in complete_checkpoints(folder)[:-keep]:
        _remove_at_once(old)


def _remove_at_once(path: Path) -> None:
    """Remove a checkpoint so that a kill on the way leaves no part of it under its name."""
    hidden = temporary_path(path)
    with suppress(OSError):
        path.rename(hidden)
        remove(hidden)


def complete_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first. They are written whole: one that lacks a file was damaged later.

    Raises:
        CheckpointError: there is a file in the place of the folder.
    """
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, not the folder of a run's checkpoints: remove it")
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_step_of)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint of a run; None if there is none.

    Raises:
        CheckpointError: it lacks a file.
    """
    found = complete_checkpoints(folder)
    if not found:
        return None
    for name in (STATE, TRAINABLES, OPTIMIZER):
        if not (found[-1] / name).is_file():
            raise damaged(found[-1], name, "there is no such file")
    return found[-1]


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def damaged(checkpoint: Path, file: str, reason: str) -> CheckpointError:
    """The error of a damaged checkpoint, which says what to go on from instead."""
    older = [path for path in complete_checkpoints(checkpoint.parent) if _step_of(path) < _step_of(checkpoint)]
    whole = [path for path in older if all((path / name).is_file() for name in (STATE, TRAINABLES, OPTIMIZER))]
    instead = f"go on from step {_step_of(whole[-1])}" if whole else "start from the first step"
    return CheckpointError(f"{checkpoint / file} is damaged ({reason}): delete {checkpoint} to {instead}")


def _reason(error: InputError) -> str:
    """Why a file could not be read, without the cure that is for other files."""
    cause = error.__cause__
    return (str(cause).splitlines() or [type(cause).__name__])[0] if cause is not None else "it is of another kind"


def require_same_run(folder: Path, fingerprint: Fingerprint, apart_from: Collection[str] = ()) -> None:
    """Make sure that the checkpoints in a folder, if there are any, are of this very run.

    Args:
        apart_from: names that are not compared; neither are others that runs of earlier versions did not note.

    Raises:
        InputError: they are not.
        CheckpointError: the newest is damaged.
    """
    newest = newest_checkpoint(folder)
    if newest is not None:
        before = read_page(newest)[1]
        known = {name: value for name, value in current_names(before).items() if name not in apart_from}
        if apart_from:
            fingerprint = {name: value for name, value in fingerprint.items() if name in known}
        _require_same(newest, known, fingerprint)


def stored_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint of the run whose checkpoints are in a folder; None without checkpoints.

    Raises:
        CheckpointError: the newest is damaged.
    """
    newest = newest_checkpoint(folder)
    return None if newest is None else read_page(newest)[1]


def stored_progress(folder: Path) -> Progress | None:
    """The progress of the run whose checkpoints are in a folder; None without checkpoints.

    Raises:
        CheckpointError: the newest is damaged.
    """
    newest = newest_checkpoint(folder)
    return None if newest is None else read_page(newest)[0]


def require_within(progress: Progress, steps: int, checkpoints: Path) -> None:
    """Make sure that a run is not longer than it is to be.

    Raises:
        InputError: it is.
    """
    if progress.step > steps:
        newest = newest_checkpoint(checkpoints)
        raise InputError(f"{newest} is beyond steps {steps}: give more steps, or delete it")


def _require_same(checkpoint: Path, before: Fingerprint, now: Fingerprint) -> None:
    before, cure = current_names(before), "put them back, or choose another run_folder"
    if before.get("global_batch") != now.get("global_batch"):
        cure += " (global_batch is batch × accumulation × processes)"
    require_same_settings(before, now, f"{checkpoint} was trained", cure)


def read_page(checkpoint: Path) -> tuple[Progress, Fingerprint]:
    """Progress and fingerprint of a checkpoint, checked.

    Raises:
        CheckpointError: its page is damaged.
    """
    try:
        page = read_json(checkpoint / STATE)
    except InputError as error:
        raise damaged(checkpoint, STATE, _reason(error)) from error
    for name, kind in (("progress", dict), ("fingerprint", dict)):
        if not isinstance(page.get(name), kind):
            raise damaged(checkpoint, STATE, f"its {name} is missing or no object")
    counters = page["progress"]
    differing = counters.keys() ^ {field.name for field in fields(Progress)}
    differing |= {name for name, value in counters.items() if type(value) is not int}
    if differing or page.keys() != {"progress", "fingerprint"}:
        unknown = differing or page.keys() - {"progress", "fingerprint"}
        raise damaged(checkpoint, STATE, f"{summarize_names(unknown)} should not be there, is missing or no integer")
    progress = Progress(**counters)
    if not 0 <= progress.skipped_in_row <= progress.skipped <= progress.step:
        raise damaged(checkpoint, STATE, f"{counters} cannot be")
    if progress.step != _step_of(checkpoint):
        raise damaged(checkpoint, STATE, f"step is {progress.step}")
    return progress, page["fingerprint"]


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
        CheckpointError: it is damaged; the message says which file, and what to do.
    """
    progress, before = read_page(checkpoint)
    _require_same(checkpoint, before, fingerprint)
    if (checkpoint / EMA).exists() != (state.ema is not None):
        is_there = "it does not belong there" if state.ema is None else "there is no such file"
        raise damaged(checkpoint, EMA, is_there)
    parts: dict[str, Mapping[str, Tensor]] = {TRAINABLES: state.trainables}
    if state.ema is not None:
        parts[EMA] = state.ema
    values = {name: _read(checkpoint, name, targets) for name, targets in parts.items()}
    steps = torch.zeros((), dtype=torch.float32)
    wanted = {f"{name}.step": steps for name in state.trainables}
    wanted |= {f"{name}.{key}": value.detach() for name, value in state.trainables.items() for key in MOMENTS}
    optimizer = _read(checkpoint, OPTIMIZER, wanted if progress.learned else {})
    for name, value in optimizer.items():
        if name.endswith(".step") and value != progress.learned:
            raise damaged(checkpoint, OPTIMIZER, f"{name} is {float(value)}, not {progress.learned}")
        if name.endswith(".exp_avg_sq") and (value < 0).any():
            raise damaged(checkpoint, OPTIMIZER, f"{name} is negative")
    with torch.no_grad():
        for file, targets in parts.items():
            for name, target in targets.items():
                target.copy_(values[file][name])
    _fill_optimizer(state, optimizer)
    state.progress = progress


def _read(checkpoint: Path, file: str, wanted: Mapping[str, Tensor]) -> StateDict:
    """A file of a checkpoint, whose names, shapes and types are those of `wanted`, and whose values are finite."""
    path = checkpoint / file
    try:
        state = as_state_dict(read_weights(path), path)
    except CheckpointError as error:
        raise damaged(checkpoint, file, _reason(error)) from error
    differing = _differing(wanted, state)
    differing |= {name for name in wanted.keys() & state.keys() if wanted[name].dtype != state[name].dtype}
    if differing:
        other = "" if wanted.keys() ^ state.keys() else ", unless the model's config.json was changed: then put it back"
        raise damaged(checkpoint, file, f"{summarize_names(differing)} does not fit the parameters to train{other}")
    name = first_not_finite(state)
    if name is not None:
        raise damaged(checkpoint, file, f"{name} is not finite")
    return state


def first_not_finite(state: Mapping[str, Tensor]) -> str | None:
    """The name of a tensor that holds a value which is not finite; None if there is none."""
    if not state:
        return None
    by_device: dict[torch.device, list[str]] = {}
    for name, value in state.items():
        by_device.setdefault(value.device, []).append(name)
    for names in by_device.values():
        # One answer for all of a device: it is waited for once.
        finite = torch.stack([torch.isfinite(state[name].detach()).all() for name in names]).tolist()
        for name, is_finite in zip(names, finite, strict=True):
            if not is_finite:
                return name
    return None


def check_fit(targets: Mapping[str, Tensor], state: StateDict, source: Path) -> None:
    """Hold values to the tensors that they are for, all names and shapes equal.

    Raises:
        CheckpointError: they differ, or the values are not finite numbers.
    """
    differing = _differing(targets, state)
    if differing:
        raise CheckpointError(
            f"{source} does not fit the parameters to train: {summarize_names(differing)}: give weights of a model of "
            "the same size and layers"
        )
    name = next((name for name, value in state.items() if not value.is_floating_point()), None)
    if name is None:
        name = first_not_finite(state)
    if name is not None:
        raise CheckpointError(f"{source} is damaged: {name} holds values that are no finite numbers; make it again")


@torch.no_grad()
def copy_tensors_(targets: Mapping[str, Tensor], state: StateDict, source: Path) -> None:
    """Copy values into tensors, all names and shapes equal.

    Raises:
        CheckpointError: they are not, or the values are not finite numbers.
    """
    check_fit(targets, state, source)
    for name, target in targets.items():
        target.copy_(state[name])


def _differing(targets: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> set[str]:
    """Names that only one of two has, or whose shapes differ."""
    common: Iterable[str] = targets.keys() & state.keys()
    return (targets.keys() ^ state.keys()) | {name for name in common if targets[name].shape != state[name].shape}


def _fill_optimizer(state: TrainingState, values: StateDict) -> None:
    kept: dict[int, dict[str, Tensor]] = {}
    places = {name: index for index, name in enumerate(state.trainables)}
    for name, value in values.items():
        parameter, _, key = name.rpartition(".")
        kept.setdefault(places[parameter], {})[key] = value
    state.optimizer.load_state_dict(state.optimizer.state_dict() | {"state": kept})


def truncate_losses(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which are computed again, and half a line that a killed run left.

    Raises:
        InputError: the file is damaged: a line is no JSON, or steps before `step` are missing or out of order.
    """
    if not path.exists():
        return
    cure = "delete it to go on without the curve so far"
    kept: list[dict[str, Any]] = []
    if step > 0:
        try:
            lines = read_json_lines(path)
        except InputError as error:
            raise InputError(f"{path} is damaged ({error}): {cure}") from error
        if any(type(line.get("step")) is not int for line in lines):
            raise InputError(f"{path} is damaged (a line has no step): {cure}")
        kept = [line for line in lines if line["step"] <= step]
        steps = [line["step"] for line in kept]
        if steps != list(range(step - len(steps) + 1, step + 1)):
            raise InputError(f"{path} is damaged (steps up to {step} are missing or out of order): {cure}")
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
