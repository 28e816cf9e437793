"""Reading weights safely and loading them strictly.

Checkpoints are untrusted input: only safetensors, or ``torch.load(weights_only=True)``. Loading is
strict: every name in the file and every parameter of the model is accounted for, or nothing loads.
"""

import hashlib
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from wan.checkpoints.configs import read_config
from wan.checkpoints.identify import SHARD, impostor
from wan.checkpoints.pickles import SUFFIXES, damaged, read_pickle
from wan.checkpoints.tensors import printable, require_finite, require_floating
from wan.checkpoints.tensors import summarize_names as summarize_names
from wan.utils.errors import CheckpointError
from wan.utils.files import RepeatedNameError, parse_json

log = logging.getLogger(__name__)

StateDict = dict[str, Tensor]

WORDS_AT_A_TIME = 1 << 22
CHECKSUM_FACTOR = 0x1E3779B97F4A7C16  # even, so that every weight is odd
INDEX_SUFFIX = ".safetensors.index.json"


def read_weights(path: str | Path) -> dict[Any, Any]:
    """Read one weight file, or a folder's sharded safetensors, onto the CPU without running code.

    Args:
        path: a ``.safetensors`` file, a ``*.safetensors.index.json``, or a ``.pt``/``.pth`` file.

    Returns:
        What the file holds: names to tensors, or (``.pt`` only) whatever else a dictionary may hold.

    Raises:
        CheckpointError: missing, truncated, or holding more than tensors and plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}: check the path, or download it (see README, Weights)")
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return _read_shards(path)
        if path.suffix == ".safetensors" or path.suffix in SUFFIXES:
            require_weight_file(path)
            return read_pickle(path) if path.suffix in SUFFIXES else dict(load_file(path))
        require_weight_file(path)  # says more of a GGUF file than that its name ends otherwise
    except (SafetensorError, RuntimeError, OSError, OverflowError, KeyError, AttributeError, TypeError) as error:
        raise damaged(path, str(error)) from error
    raise CheckpointError(f"{path} is no weight file: give one that ends in .safetensors, .pt or .pth")


def require_weight_file(path: Path) -> None:
    """Make sure that a file can be read and is not something else under a weight file's name.

    Raises:
        CheckpointError: it is; the message says what.
    """
    try:
        what = impostor(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
    if what is not None:
        raise CheckpointError(f"{path} is {what}")


def read_header(path: Path) -> tuple[list[str], dict[str, str]]:
    """Names and metadata of a safetensors file; the values are not read.

    Raises:
        CheckpointError: it is damaged or no such file, or its header gives a name twice.
    """
    require_weight_file(path)
    try:
        with safe_open(path, "pt") as file:
            names, metadata = list(file.keys()), dict(file.metadata() or {})
        with path.open("rb") as stream:  # the library takes the last of several values
            parse_json(stream.read(int.from_bytes(stream.read(8), "little")))
    except RepeatedNameError as error:
        raise CheckpointError(
            f"{path}: in its header {error}: the file is damaged or was tampered with; convert or download it again"
        ) from error
    except (SafetensorError, OSError, ValueError) as error:
        raise damaged(path, str(error)) from error
    return names, metadata


def weight_map(index_path: Path) -> dict[str, str]:
    """An index's names and the shard that each is in.

    Raises:
        CheckpointError: malformed, without names, or naming files elsewhere.
    """
    shards = read_config(index_path).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(shard, str) for shard in shards.values()):
        raise CheckpointError(f"{index_path} has no weight_map of names to files: download it again")
    for shard in shards.values():
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index_path} names a shard outside its folder, {printable(shard)}: download it again"
            )
    return shards


def _warn_of_more(index_path: Path, shards: Collection[str]) -> None:
    """Say what an index does not account for: entries that nobody knows, and shards beside those that it names."""
    unknown = read_config(index_path).keys() - {"metadata", "weight_map"}
    if unknown:
        log.warning("%s has unknown entries %s: they are not read", index_path, summarize_names(unknown))
    stem = index_path.name.removesuffix(INDEX_SUFFIX)
    beside = {path.name for path in index_path.parent.glob("*-of-*.safetensors") if path.name.startswith(f"{stem}-")}
    if beside - set(shards):
        log.warning(
            "%s does not name %s beside it: not read; remove what is old, or download the folder again",
            index_path,
            summarize_names(beside - set(shards)),
        )


def _read_shards(index_path: Path) -> dict[str, object]:
    shard_of = weight_map(index_path)
    _warn_of_more(index_path, shard_of.values())
    state: dict[str, object] = {}
    for shard in sorted(set(shard_of.values())):
        path = index_path.parent / shard
        if not path.is_file():
            raise CheckpointError(f"{index_path.parent} lacks the shard {printable(shard)}: download it again, whole")
        part = read_weights(path)
        listed = {name for name, of in shard_of.items() if of == shard}
        for names, fault in ((listed - part.keys(), "lacks"), (part.keys() - listed, "holds, against the index,")):
            if names:
                raise CheckpointError(f"{path} {fault} {summarize_names(names)}: download the folder again, whole")
        state |= part
    return state


def read_folder(folder: Path, names: Sequence[str]) -> tuple[StateDict, Path]:
    """The weights of a folder, and the file that they are in (or their index).

    Args:
        names: what the file may be called.

    Raises:
        CheckpointError: there is none, there are several, or it cannot be read.
    """
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files and (shards := _shards_without_index(folder)):
        return _read_all(shards), shards[0]
    if not files:
        raise CheckpointError(f"no weights in {folder}: put {names[0]} there, or its shards with their index")
    if len(files) > 1:
        raise CheckpointError(f"{folder} holds both {files[0].name} and {files[1].name}: remove the one that is old")
    return as_state_dict(read_weights(files[0]), files[0]), files[0]


def _shards_without_index(folder: Path) -> list[Path]:
    """All shards of the one model that a folder holds in shards, in order; none if there are no shards.

    Raises:
        CheckpointError: one is missing, or they are of several models.
    """
    shards = sorted(path for path in folder.glob("*.safetensors") if SHARD.search(path.name))
    models = {(path.name[: match.start()], int(match[2])) for path in shards if (match := SHARD.search(path.name))}
    if len(models) > 1:
        names = summarize_names(path.name for path in shards)
        raise CheckpointError(f"{folder} holds shards of several models without an index, {names}: keep one's")
    for stem, count in models:
        wanted = {f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)}
        if missing := wanted - {path.name for path in shards}:
            raise CheckpointError(f"{folder} lacks the shard {summarize_names(missing)}: download it again, whole")
    return shards


def _read_all(shards: Sequence[Path]) -> StateDict:
    """The weights of all shards, each name once.

    Raises:
        CheckpointError: a shard cannot be read, or repeats a name.
    """
    state: StateDict = {}
    for shard in shards:
        part = as_state_dict(read_weights(shard), shard)
        if repeated := state.keys() & part.keys():
            raise CheckpointError(f"{shard} repeats {summarize_names(repeated)} of another shard: download it again")
        state |= part
    return state


def as_state_dict(weights: Mapping[Any, Any], source: str | Path) -> StateDict:
    """Check that `weights` maps names to tensors and nothing else.

    Raises:
        CheckpointError: a name is no text, or a value no tensor.
    """
    for name, value in weights.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{source}: the name {printable(name)} is of type {type(name).__name__}, not text: give names "
                "to tensors and nothing else"
            )
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise CheckpointError(
                f"{source}: entry '{printable(name)}' is a {kind}, not a tensor: give names to tensors and nothing else"
            )
    return dict(weights)


def fingerprint_of(state: Mapping[str, Tensor]) -> str:
    """A hash of weights: of names, types, shapes and all values; the same on every device.

    Values enter by sums modulo 2⁶⁴ that weigh every place differently, at the speed of memory. Names enter in their
    order: a module's own for what is taken from a module, and what is stored of earlier versions was hashed so. Files
    hold weights in any order; for those there is `fingerprint_of_file`.
    """
    sums = [checksum(value) for value in state.values()]
    return digest_of(state, [int(total) for total in torch.stack([total.cpu() for total in sums])] if sums else [])


def digest_of(state: Mapping[str, Tensor], checksums: Sequence[int]) -> str:
    """The hash of weights whose checksums are known; see `fingerprint_of`."""
    digest = hashlib.sha256()
    for (name, value), total in zip(state.items(), checksums, strict=True):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} {total}\n".encode())
    return digest.hexdigest()[:16]


def fingerprint_of_file(state: Mapping[str, Tensor]) -> str:
    """As `fingerprint_of`, whatever order a file has its weights in."""
    return fingerprint_of(dict(sorted(state.items())))


@torch.no_grad()
def checksum(value: Tensor, first_byte: int = 0) -> Tensor:
    """The sum over 8-byte words of a tensor, each times an odd number of its own, modulo 2⁶⁴; a scalar int64.

    A tensor that differs in one word has another sum. The sums of the parts of a tensor, modulo 2⁶⁴, make its own.

    Args:
        value: a whole tensor, or a part of one that lies in one piece.
        first_byte: where the part begins in the whole.
    """
    content = value.detach().contiguous().flatten().view(torch.uint8)
    before = first_byte % 8
    after = -(before + len(content)) % 8
    words = torch.nn.functional.pad(content, (before, after)) if before or after else content
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for number, chunk in enumerate(words.view(torch.int64).split(WORDS_AT_A_TIME)):
        places = torch.arange(len(chunk), device=value.device) + (number * WORDS_AT_A_TIME + first_byte // 8)
        total += (chunk * (places * CHECKSUM_FACTOR + 1)).sum()
    return total


def load_strict(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Load `state` into `model`, all names and shapes equal, or raise and change nothing.

    A model on the meta device takes the tensors themselves (no second copy); any other copies
    values into its own parameters and keeps their dtype.

    Raises:
        CheckpointError: names missing or unexpected, shapes that differ, values that are no dense finite floats; the
            message says which.
    """
    expected = model.state_dict()
    require_fit(expected, state, type(model).__name__, source)
    require_finite(state, source)
    on_meta = any(value.is_meta for value in expected.values())
    model.load_state_dict(dict(state), strict=True, assign=on_meta)


def require_fit(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], what: str, source: str | Path) -> None:
    """Make sure that weights have the names and shapes expected, and are dense tensors of floats.

    Args:
        expected: the parameters, whose values do not matter.
        what: the class of the model, for messages.

    Raises:
        CheckpointError: they have not; the message says which.
    """
    missing, unexpected = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or unexpected:
        parts = [f"missing {summarize_names(missing)}"] if missing else []
        parts += [f"unexpected {summarize_names(unexpected)}"] if unexpected else []
        raise CheckpointError(
            f"{source} does not fit {what}: {'; '.join(parts)}: it is damaged or of another model or size; download "
            "it again, or check the model folder"
        )
    require_floating(state, source)
    wrong = {name for name, value in expected.items() if value.shape != state[name].shape}
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{source} does not fit {what}: {len(wrong)} tensors differ in shape, {name} is "
            f"{tuple(state[name].shape)}, the model has {tuple(expected[name].shape)}: check the model size"
        )
