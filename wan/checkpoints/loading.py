"""Reading weights safely and loading them strictly.

Checkpoints are untrusted input: only safetensors, or ``torch.load(weights_only=True)``. Loading is
strict: every name in the file and every parameter of the model is accounted for, or nothing loads.
"""

import hashlib
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.utils.errors import CheckpointError

StateDict = dict[str, Tensor]

WORDS_AT_A_TIME = 1 << 22
CHECKSUM_FACTOR = 0x1E3779B97F4A7C16  # even, so that every weight is odd
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


def summarize_names(names: Iterable[str], most: int = 3) -> str:
    """A few names for a one-line message, with the count of the rest."""
    ordered = sorted(names)
    rest = len(ordered) - most
    return ", ".join(ordered[:most]) + (f" and {rest} more" if rest > 0 else "")


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """A hash of weights: of names, types, shapes and all values; the same on every device.

    Values enter by sums modulo 2⁶⁴ that weigh every place differently, at the speed of memory.
    """
    sums = [checksum(value) for value in state.values()]
    totals = [int(total) for total in torch.stack([total.cpu() for total in sums])] if sums else []
    digest = hashlib.sha256()
    for (name, value), total in zip(state.items(), totals, strict=True):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


@torch.no_grad()
def checksum(value: Tensor) -> Tensor:
    """The sum over 8-byte words of a tensor, each times an odd number of its own, modulo 2⁶⁴; a scalar int64.

    A tensor that differs in one word has another sum.
    """
    content = value.detach().contiguous().flatten().view(torch.uint8)
    rest = -len(content) % 8
    words = torch.nn.functional.pad(content, (0, rest)).view(torch.int64) if rest else content.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for number, chunk in enumerate(words.split(WORDS_AT_A_TIME)):
        places = torch.arange(len(chunk), device=value.device) + number * WORDS_AT_A_TIME
        total += (chunk * (places * CHECKSUM_FACTOR + 1)).sum()
    return total


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
        parts = [f"missing {summarize_names(missing)}"] if missing else []
        parts += [f"unexpected {summarize_names(unexpected)}"] if unexpected else []
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
