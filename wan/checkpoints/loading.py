"""Reading weights safely and loading them strictly.

Checkpoints are untrusted input: only safetensors, or ``torch.load(weights_only=True)``. Loading is
strict: every name in the file and every parameter of the model is accounted for, or nothing loads.
"""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.utils.errors import CheckpointError, InputError

StateDict = dict[str, Tensor]

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def read_weights(path: str | Path) -> dict[str, object]:
    """Read one weight file, or a folder's sharded safetensors, onto the CPU without running code.

    Args:
        path: a ``.safetensors`` file, a ``*.safetensors.index.json``, or a ``.pt``/``.pth`` file.

    Returns:
        What the file holds: names to tensors, or (``.pt`` only) nested dictionaries of these.

    Raises:
        CheckpointError: missing, truncated, or holding more than tensors and plain containers.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: check the path, or download it (see README, Weights)")
    try:
        if path.name.endswith(".index.json"):
            return _read_shards(path)
        if path.suffix == ".safetensors":
            return dict(load_file(path))
        if path.suffix in PICKLE_SUFFIXES:
            # Only the current (zip) format can be mapped instead of read; released files of the older one exist.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zipfile(path))
            if not isinstance(loaded, dict):
                raise CheckpointError(f"{path} holds a {type(loaded).__name__}, not a dictionary of tensors")
            return loaded
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, CheckpointError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"cannot read {path} as a weight file ({reason}): it is damaged, incomplete or holds more than tensors; "
            "download it again or convert it with scripts/convert_checkpoint.py"
        ) from error
    raise CheckpointError(f"{path} is no weight file: expected .safetensors, .pt or .pth")


def _read_shards(index_path: Path) -> dict[str, object]:
    weight_map: dict[str, str] = json.loads(index_path.read_text())["weight_map"]
    state: dict[str, object] = {}
    for shard in sorted(set(weight_map.values())):
        if Path(shard).name != shard:
            raise CheckpointError(f"{index_path} names a shard outside its folder: {shard!r}")
        state.update(read_weights(index_path.parent / shard))
    return state


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends well, and is removed if it does not.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): free space or choose another folder") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, page: object, default: Callable[[Any], object] | None = None) -> None:
    """Write a page, which is there whole or not at all.

    Args:
        default: turns what JSON does not know into something that it does.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(page, indent=1, default=default) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder: the new one takes the place of an old one.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    temporary = path.with_name(f".{path.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        yield temporary
        shutil.rmtree(path, ignore_errors=True)
        temporary.rename(path)
    except OSError as error:
        raise InputError(f"cannot write {path} ({error.strerror}): free space or choose another folder") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def read_folder(folder: Path, names: Sequence[str]) -> tuple[StateDict, Path]:
    """The weights of a folder, and the file that they are in (or their index).

    Args:
        names: what the file may be called, best first.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    for file in (folder / name for name in names):
        if file.is_file():
            return as_state_dict(read_weights(file), file), file
    raise CheckpointError(f"no weights in {folder}: expected {names[0]}, or its shards with an index")


def as_state_dict(weights: Mapping[str, object], source: str | Path) -> StateDict:
    """Check that `weights` maps names to tensors and nothing else."""
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(f"{source}: entry {name!r} is a {type(value).__name__}, not a tensor")
    return {name: value for name, value in weights.items() if isinstance(value, Tensor)}


def some(names: Iterable[str], most: int = 3) -> str:
    """A few names for a one-line message, with the count of the rest."""
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """A hash of weights: of names, shapes, and a few values of each."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(f"{name} {tuple(value.shape)} {value.flatten()[:8].tolist()}".encode())
    return digest.hexdigest()[:16]


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `model`, all names and shapes equal, or raise and change nothing.

    A model on the meta device takes the tensors themselves (no second copy); any other copies
    values into its own parameters and keeps their dtype.

    Raises:
        CheckpointError: names missing or unexpected, or shapes that differ; the message says which.
    """
    expected = model.state_dict()
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        parts = [f"missing {some(missing)}"] if missing else []
        parts += [f"unexpected {some(unexpected)}"] if unexpected else []
        raise CheckpointError(f"{source} does not fit {type(model).__name__}: {'; '.join(parts)}")
    wrong = {name for name, value in expected.items() if value.shape != state[name].shape}
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{source} does not fit {type(model).__name__}: {len(wrong)} tensors differ in shape, {name} is "
            f"{tuple(state[name].shape)}, the model has {tuple(expected[name].shape)}: check the model size"
        )
    on_meta = any(value.is_meta for value in expected.values())
    model.load_state_dict(dict(state), strict=True, assign=on_meta)
