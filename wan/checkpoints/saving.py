"""Writing weights: atomic, with the errors of a full disk in one line."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from wan.utils.files import atomic_path, cannot_write

METADATA = {"format": "pt"}


def write_safetensors(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] = METADATA) -> None:
    """Write tensors as safetensors; atomic, with the mode that the umask says.

    Args:
        state: names to tensors, which are made contiguous.
        metadata: strings for the file's header.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary, metadata=dict(metadata))


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write a `.pt` of tensors in dictionaries, as `torch.load(weights_only=True)` reads it; atomic.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:  # given a path, torch would write its name into the file
                torch.save(dict(content), file)
        except RuntimeError as error:  # PyTorch's writer reports a full disk so
            raise cannot_write(path, str(error).splitlines()[0]) from error
