"""Keeping a training run, so that a killed one goes on where it was."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import nn

from arl2.toyworld.training.muon import MuonWithAdam
from wan.checkpoints.saving import write_pickle
from wan.utils.errors import InputError
from wan.utils.files import parse_json
from wan.utils.settings import plain, require_same_settings

_SEED_STRIDE = 1_000_003


def step_seed(seed: int, step: int) -> int:
    """The seed of all that is random in one step: a resumed run draws what an unbroken one does."""
    return seed * _SEED_STRIDE + step


def is_reported(step: int, steps: int) -> bool:
    """Returns whether a run of `steps` reports step `step`, from 0: the first, every hundredth and the last."""
    return step == 0 or step % 100 == 99 or step + 1 == steps


@dataclass(frozen=True)
class Progress:
    """Writes weights and the optimiser's state to a file every so often.

    Attributes:
        file: where; None keeps nothing.
        every: steps from one writing to the next.
        of: what is trained, as JSON would say it; a file of something else is refused.
    """

    file: Path | None = None
    every: int = 500
    of: Mapping[str, Any] = field(default_factory=dict)

    def resume(self, module: nn.Module, optimizer: MuonWithAdam) -> int:
        """Load what is there; the number of steps that are done.

        Raises:
            InputError: it is of another training, or damaged.
        """
        if self.file is None or not self.file.exists():
            return 0
        cure = "go on with those, or delete it"
        try:
            saved = torch.load(self.file, weights_only=True, map_location=next(module.parameters()).device)
            made_with, done = parse_json(saved["of"]), int(saved["steps"])
            require_same_settings(made_with, self.of, f"{self.file} is of a killed training", cure)
            module.load_state_dict(saved["module"])
            optimizer.load_state_dict(saved["optimizer"])
        except InputError:
            raise
        except (RuntimeError, UnpicklingError, OSError, EOFError, ValueError, KeyError, TypeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"cannot read {self.file} ({reason}): it is damaged; delete it to begin again") from error
        return done

    def save(self, done: int, steps: int, module: nn.Module, optimizer: MuonWithAdam) -> None:
        """Write, if it is time; not after the last step, so that a resumed run has one to take and to report."""
        if self.file is not None and done % self.every == 0 and done < steps:
            content = {"steps": done, "module": module.state_dict(), "optimizer": optimizer.state_dict()}
            write_pickle(self.file, content | {"of": json.dumps(plain(self.of))})

    def finish(self) -> None:
        """Drop the file: the result is kept elsewhere."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)
