"""Golden files, the outputs that a replay yields, and the comparison of the two."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from wan.ops.attention import AttentionBackend
from wan.utils.errors import InputError


@dataclass(frozen=True)
class Precision:
    """Where and how a replay computes.

    Attributes:
        device, dtype: of weights and inputs. In float32 and float64 the tolerances of the files apply.
        backend: who computes softmax attention.
    """

    device: torch.device
    dtype: torch.dtype = torch.float32
    backend: AttentionBackend = AttentionBackend.AUTO


@dataclass(frozen=True)
class Tolerance:
    """Bounds of a tensor group: largest absolute difference, and RMS difference over the RMS of the reference."""

    max_abs: float
    rms_rel: float = float("inf")


BF16_TOLERANCE = Tolerance(max_abs=float("inf"), rms_rel=0.02)
"""bfloat16 keeps 8 bits, a relative rounding of 2⁻⁹ = 0.002 an operation; over the few layers of the golden models
rounding adds up to 0.004 to 0.014 (H100, every backend). A wrong formula is off by far more."""
BF16_VAE_TOLERANCE = Tolerance(max_abs=float("inf"), rms_rel=0.05)
"""Thirty convolutions in a row, eight channels wide: 0.021 encoding and 0.029 decoding on an H100."""


@dataclass(frozen=True)
class Golden:
    """One golden file: the JSON, and the tensors it describes."""

    path: Path
    info: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        """Read the JSON; tensors are read when they are needed.

        Raises:
            InputError: the file is not a golden file.
        """
        try:
            info = json.loads(path.read_text())
        except (OSError, json.JSONDecodeError) as error:
            raise InputError(f"cannot read {path} as a golden file: {error}") from error
        if not isinstance(info, dict) or "kind" not in info:
            raise InputError(f"{path} is no golden file: it has no 'kind'")
        return cls(path, info)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file."""
        return load_file(self.path.with_name(self.info["file"]))

    def state(self, source: dict[str, str]) -> dict[str, Tensor]:
        """Weights under their native names, from the file and prefix that `source` names."""
        tensors = load_file(self.path.with_name(source["file"]))
        prefix = source["prefix"]
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def get(self, name: str, precision: Precision) -> Tensor:
        """An input; floating tensors in the replay's precision."""
        value = self.tensors[name].to(precision.device)
        return value.to(precision.dtype) if value.is_floating_point() else value


@dataclass(frozen=True)
class Output:
    """One computed tensor.

    Attributes:
        name: of the reference tensor in the file.
        value: what we computed.
        group: whose tolerance applies.
        case: the line of the report that it belongs to.
        exact: integers that must be equal.
        fixed_precision: computed in float32 whatever the precision of the replay.
    """

    name: str
    value: Tensor
    group: str
    case: str
    exact: bool = False
    fixed_precision: bool = False


Replay = Callable[[Golden, Precision], Iterator[Output]]


@dataclass
class CaseResult:
    """The verdict on one case.

    Attributes:
        compared: tensors compared.
        rms_rel, max_abs: largest errors among them.
        used: largest error as a fraction of its tolerance; the case passes up to 1.
        worst: the tensor with that error.
        tolerance: of that tensor.
        failure: why nothing could be compared, or was not.
    """

    file: str
    case: str
    compared: int = 0
    rms_rel: float = 0.0
    max_abs: float = 0.0
    used: float = 0.0
    worst: str = ""
    tolerance: Tolerance | None = None
    failure: str | None = None

    @property
    def passed(self) -> bool:
        """Whether every tensor was compared and lies within its tolerance."""
        return self.failure is None and self.used <= 1

    def add(self, name: str, error: tuple[float, float], tolerance: Tolerance) -> None:
        """Count one comparison in."""
        max_abs, rms_rel = error
        used = max(max_abs / tolerance.max_abs, rms_rel / tolerance.rms_rel)
        # A NaN compares false with everything: it must fail.
        if used > self.used or used != used or not self.worst:
            self.used, self.worst, self.tolerance = (used if used == used else float("inf")), name, tolerance
        self.compared += 1
        self.max_abs, self.rms_rel = max(self.max_abs, max_abs), max(self.rms_rel, rms_rel)


def difference(value: Tensor, reference: Tensor) -> tuple[float, float]:
    """Largest absolute difference, and RMS difference over the RMS of the reference."""
    value, reference = value.double().cpu(), reference.double()
    delta = value - reference
    scale = reference.square().mean().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    return delta.abs().max().item(), (delta.square().mean().sqrt() / scale).item()


def tolerance_of(golden: Golden, output: Output, precision: Precision) -> Tolerance:
    """The tolerance of an output: the file's in float32 and above, ours below."""
    if output.exact:
        return Tolerance(max_abs=0.5)
    if precision.dtype not in (torch.float32, torch.float64) and not output.fixed_precision:
        return BF16_VAE_TOLERANCE if output.group in ("encode", "decode") else BF16_TOLERANCE
    given = golden.info["tolerance"]
    if output.group not in given and f"{output.group}_max_abs" in given:
        return Tolerance(max_abs=given[f"{output.group}_max_abs"])
    if output.group not in given and f"{output.group}_relative" in given:
        return Tolerance(max_abs=float("inf"), rms_rel=given[f"{output.group}_relative"])
    bounds = given[output.group]
    return Tolerance(bounds["max_abs"], bounds["rms_rel"])


def compare(
    golden: Golden, outputs: Iterable[Output], precision: Precision, skipped: Callable[[str], bool]
) -> list[CaseResult]:
    """Compare what a replay yields with the file, and make sure that no reference tensor was left out.

    Args:
        skipped: names of reference tensors that are not ours to reproduce.
    """
    results: dict[str, CaseResult] = {}
    seen = set()
    for output in outputs:
        result = results.setdefault(output.case, CaseResult(golden.path.stem, output.case))
        seen.add(output.name)
        reference = golden.tensors.get(output.name)
        if reference is None or reference.shape != output.value.shape:
            found = "is not in the file" if reference is None else f"has shape {tuple(reference.shape)}"
            result.failure = f"{output.name} {found}, computed {tuple(output.value.shape)}"
            continue
        result.add(output.name, difference(output.value, reference), tolerance_of(golden, output, precision))
    expected = {name for name in golden.tensors if "out." in name and not skipped(name)}
    if expected - seen:
        left_out = CaseResult(golden.path.stem, "complete", failure=f"never computed: {sorted(expected - seen)[0]}")
        results["complete"] = left_out
    return list(results.values())
