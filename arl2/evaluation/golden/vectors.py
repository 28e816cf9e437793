"""Golden files, outputs of replays, and their comparison."""

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
from wan.utils.files import parse_json


@dataclass(frozen=True)
class Precision:
    """Device, dtype and attention backend of a replay.

    Attributes:
        device, dtype: those of weights and inputs. In float32 and float64 the tolerances of the files apply.
        backend: backend of softmax attention.
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
"""Tolerance in bfloat16, which keeps 8 bits: a relative rounding of 2⁻⁹ = 0.002 per operation.

Over the few layers of the golden models rounding adds up to 0.004 to 0.014 (H100, every backend). A wrong formula is
off by far more.
"""
BF16_VAE_TOLERANCE = Tolerance(max_abs=float("inf"), rms_rel=0.05)
"""Tolerance of the VAE in bfloat16: its thirty convolutions give 0.021 encoding and 0.029 decoding (H100)."""


@dataclass(frozen=True)
class Golden:
    """Golden file: the JSON and the tensors that it describes."""

    path: Path
    info: dict[str, Any]

    @classmethod
    def read(cls, path: Path) -> "Golden":
        """Read the JSON of a golden file; tensors are read when they are needed.

        Raises:
            InputError: the file is not a golden file.
        """
        try:
            info = parse_json(path.read_text())
        except (OSError, ValueError) as error:
            raise InputError(f"cannot read {path} as a golden file: {error}") from error
        if not isinstance(info, dict) or "kind" not in info:
            raise InputError(f"{path} is no golden file: it has no 'kind'")
        return cls(path, info)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Tensors of the file by name."""
        return load_file(self.path.with_name(self.info["file"]))

    def state(self, source: dict[str, str]) -> dict[str, Tensor]:
        """Read weights under their native names, from the file and prefix given by `source`."""
        tensors = load_file(self.path.with_name(source["file"]))
        prefix = source["prefix"]
        return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

    def get(self, name: str, precision: Precision) -> Tensor:
        """Get an input; floating tensors are cast to the replay's precision."""
        value = self.tensors[name].to(precision.device)
        return value.to(precision.dtype) if value.is_floating_point() else value


@dataclass(frozen=True)
class Output:
    """Computed tensor, to be compared with a reference.

    Attributes:
        name: name of the reference tensor in the file.
        value: computed value.
        group: tensor group whose tolerance applies.
        case: line of the report that it belongs to.
        exact: whether integers must be equal.
        fixed_precision: whether it is computed in float32 in every replay.
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
    """Result of one case.

    Attributes:
        compared: number of tensors compared.
        rms_rel, max_abs: largest errors among them.
        used: largest error as a fraction of its tolerance; the case passes up to 1.
        worst: name of the tensor with that error.
        tolerance: tolerance of that tensor.
        failure: reason why a comparison was not possible.
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
        """True if every tensor was compared and lies within its tolerance."""
        return self.failure is None and self.used <= 1

    def add(self, name: str, error: tuple[float, float], tolerance: Tolerance) -> None:
        """Add one comparison."""
        max_abs, rms_rel = error
        used = max(max_abs / tolerance.max_abs, rms_rel / tolerance.rms_rel)
        # NaN compares false with everything, and must fail.
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
    """Tolerance of an output: from the file in float32 and float64, else one of ours."""
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
    """Compare the outputs of a replay with the file, and check that no reference tensor is left out.

    Args:
        skipped: returns whether a reference tensor, by name, need not be reproduced.
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
