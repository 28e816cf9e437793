"""Snapshots: what a memory or a decoder holds between two blocks, as tensors and whole numbers by name.

A snapshot is a plain value. It can be cloned, written to a file, and restored into another object of the same sizes,
which then goes on to the same numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan.utils.errors import InputError

MAX_COUNT = 2**62
"""Larger numbers are no counts of tokens or frames."""


@dataclass(frozen=True)
class Snapshot:
    """Tensors and whole numbers by name; parts are told apart by dots.

    Attributes:
        tensors: often views of what they are a snapshot of: `clone` before that changes.
        counters: from 0.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    counters: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def joined(cls, parts: Mapping[str, "Snapshot"]) -> "Snapshot":
        """One snapshot of several, each under a name."""
        return cls(
            {f"{part}.{name}": value for part, one in parts.items() for name, value in one.tensors.items()},
            {f"{part}.{name}": value for part, one in parts.items() for name, value in one.counters.items()},
        )

    def part(self, name: str) -> "Snapshot":
        """The part that `joined` put under a name; empty if there is none."""
        begin = f"{name}."
        return Snapshot(
            {key.removeprefix(begin): value for key, value in self.tensors.items() if key.startswith(begin)},
            {key.removeprefix(begin): value for key, value in self.counters.items() if key.startswith(begin)},
        )

    def clone(self, device: torch.device | None = None) -> "Snapshot":
        """The snapshot in tensors of its own, on another device if one is named."""
        tensors = {name: value.detach().to(device, copy=True) for name, value in self.tensors.items()}
        return Snapshot(tensors, dict(self.counters))

    def counter(self, name: str, most: int = MAX_COUNT) -> int:
        """A whole number from 0 to `most`.

        Raises:
            InputError: there is none, or it is out of range.
        """
        value = self.counters.get(name)
        if value is None or not 0 <= value <= most:
            raise InputError(f"{name} is {value}: it must be from 0 to {most}")
        return value

    def tensor(self, name: str) -> Tensor:
        """A tensor.

        Raises:
            InputError: there is none.
        """
        if name not in self.tensors:
            raise InputError(f"{name} is missing")
        return self.tensors[name]

    def copy_to(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy all tensors into others of the same names, shapes and types.

        Raises:
            InputError: they do not match; nothing has been copied then.
        """
        require_alike(self.tensors, tensors)
        for name, value in tensors.items():
            value.copy_(self.tensors[name])


def require_alike(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Make sure that tensors have the names, shapes and types of others.

    Raises:
        InputError: they have not; the message names the first that differs.
    """
    for name in sorted(found.keys() ^ wanted.keys()):
        raise InputError(f"{name} is {'missing' if name in wanted else 'unknown'}")
    for name, value in wanted.items():
        other = found[name]
        if other.shape != value.shape or other.dtype != value.dtype:
            raise InputError(
                f"{name} is {list(other.shape)} in {other.dtype}: it must be {list(value.shape)} in {value.dtype}"
            )
