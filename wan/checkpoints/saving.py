"""Writing weights: atomic, with the errors of a full disk in one line."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from wan.checkpoints.formats import WEIGHT_FILES
from wan.checkpoints.record import RECORD
from wan.utils.files import atomic_path, cannot_write, remove, temporary_path, write_json, write_text

METADATA = {"format": "pt"}
MAX_SHARD_SIZE = "10GB"
STORED_NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
"""Types as headers of safetensors files name them."""


def with_record(record: Mapping[str, Any]) -> dict[str, str]:
    """The header of a safetensors file that says how its weights were made, see `wan.checkpoints.record`."""
    return METADATA | {RECORD: json.dumps(record)}


def write_model_folder(
    folder: Path,
    config: str,
    state: Mapping[str, Tensor],
    record: Mapping[str, Any],
    max_shard_size: int | str = MAX_SHARD_SIZE,
) -> None:
    """Write a transformer's config.json and weights in diffusers' layout, each file atomic; old weights are removed.

    Args:
        folder: where; made if need be.
        config: the text of config.json.
        state: names to tensors.
        record: see `with_record`.
        max_shard_size: of a file, in bytes or as "10GB"; larger weights are divided over several, with an index.

    Raises:
        InputError: the disk is full, or the folder cannot be written.
    """
    file, index = WEIGHT_FILES
    stem = file.removesuffix(".safetensors")
    split = split_torch_state_dict_into_shards(
        dict(state), max_shard_size=max_shard_size, filename_pattern=f"{stem}{{suffix}}.safetensors"
    )
    write_text(folder / "config.json", config)
    for name, names in split.filename_to_tensors.items():
        write_safetensors(folder / name, {each: state[each] for each in names}, with_record(record))
    if split.is_sharded:
        write_json(folder / index, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    old = re.compile(rf"{stem}(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
    for path in folder.iterdir():
        current = path.name in split.filename_to_tensors or (split.is_sharded and path.name == index)
        if old.fullmatch(path.name) and not current:
            remove(path)


def give_umask_mode(folder: Path) -> None:
    """Give safetensors files, which their library makes readable for the owner alone, the mode of the umask."""
    probe = temporary_path(folder / "mode")
    probe.touch()
    mode = probe.stat().st_mode & 0o666
    remove(probe)
    for file in folder.rglob("*.safetensors"):
        file.chmod(mode)


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
        _sort_metadata(temporary)


def stored_hash(value: Tensor) -> str:
    """The SHA-256 of a tensor's type, shape and bytes, as a safetensors file holds them."""
    stored = value.detach().cpu().contiguous()
    digest = hashlib.sha256(json.dumps([STORED_NAMES.get(stored.dtype, "other"), list(stored.shape)]).encode())
    if stored.numel():
        digest.update(stored.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Put the strings of a header in order; the library's order is another in every process, and so is the file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same strings in another order"
        file.seek(8)
        file.write(text.ljust(size))


def write_pickle(path: Path, content: Mapping[str, Any]) -> None:
    """Write a `.pt` of tensors in dictionaries, as `torch.load(weights_only=True)` reads it; atomic.

    Raises:
        InputError: the file cannot be written.
    """
    with atomic_path(path) as temporary:
        try:
            with temporary.open("wb") as file:  # a path would give the archive inside its temporary name
                torch.save(dict(content), file)
        except RuntimeError as error:  # PyTorch's writer reports a full disk so, once Python's file has
            cause = error.__context__
            reason = cause.strerror if isinstance(cause, OSError) else str(error).splitlines()[0]
            raise cannot_write(path, str(reason)) from error
