"""Records in our weight files of how their weights were made: the arguments that the model was built with.

Weights do not show the number of heads, the epsilon of norms, the scale of adapters or the memory that the model was
trained with. Files record them where other loaders do not look, and loading compares the record with the config.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wan.checkpoints.configs import check_settings
from wan.checkpoints.fields import HYBRID, OPTIONAL_HYBRID, SIZES
from wan.checkpoints.loading import INDEX_SUFFIX, read_header, weight_map
from wan.checkpoints.pickles import SUFFIXES
from wan.utils.errors import CheckpointError
from wan.utils.files import parse_json
from wan.utils.ranges import shown

RECORD = "arl2"
"""The entry of a `.pt`, or the key of a safetensors header, that holds the record."""
ALPHA = "lora_alpha"
_RECORDED = SIZES | HYBRID | OPTIONAL_HYBRID


def read_record(path: Path, weights: Mapping[Any, Any]) -> dict[str, Any]:
    """The record of a weight file; nothing for files of other origin.

    Args:
        path: the file, or the index of its shards.
        weights: what was read from it; only a `.pt` needs it.

    Raises:
        CheckpointError: it says something malformed.
    """
    if path.suffix in SUFFIXES:
        record = weights.get(RECORD, {})
        is_settings = isinstance(record, dict) and all(isinstance(name, str) for name in record)
        if not is_settings or (RECORD in weights and not record):
            raise CheckpointError(f"{path}: its entry {RECORD!r} is no dictionary of settings: convert it again")
        _require_more_than_alpha(record, path)
        return dict(record)
    if path.name.endswith(INDEX_SUFFIX):
        path = path.parent / min(weight_map(path).values())
    _, metadata = read_header(path)
    try:
        return _record_in(metadata, path)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{path}: the settings in its header are malformed: convert it again") from error


def _record_in(metadata: Mapping[str, str], path: Path) -> dict[str, Any]:
    """The record in a safetensors header, whose two places for alpha must agree.

    Raises:
        ValueError: it is no JSON object of settings, or alpha is no number.
        CheckpointError: the header says two values of alpha.
    """
    record: dict[str, Any] = {}
    if RECORD in metadata:
        record = parse_json(metadata[RECORD])
        if not isinstance(record, dict) or not record:
            raise ValueError(f"{RECORD} is no object of settings")
        _require_more_than_alpha(record, path)
    if ALPHA in metadata:
        alpha = float(metadata[ALPHA])
        if not record:  # files written before there was a record hold this alone
            return {ALPHA: alpha}
        said = record.get(ALPHA)
        if said != alpha:
            raise CheckpointError(
                f"{path}: its header says {ALPHA} {shown(alpha)}, and {shown(said)} in {RECORD}: convert it again"
            )
    return record


def _require_more_than_alpha(record: Mapping[str, Any], path: Path) -> None:
    """Make sure that a record is whole enough to be compared with anything; files without one say alpha elsewhere.

    Raises:
        CheckpointError: alpha is all that it holds.
    """
    if record and record.keys() <= {ALPHA}:
        raise CheckpointError(f"{path}: its record {RECORD!r} holds {ALPHA} alone and lacks all else: convert it again")


def check_record(record: Mapping[str, Any], source: str | Path) -> None:
    """Make sure that what a weight file records of itself is complete and in range.

    Raises:
        CheckpointError: it is not.
    """
    # Files written before there was a record say alpha alone.
    needed = () if record.keys() <= {ALPHA} else SIZES.keys() | HYBRID.keys()
    check_settings(record, _RECORDED, f"the record in {source}", needed=sorted(needed))


def require_record(record: Mapping[str, Any], config: Mapping[str, Any], source: str | Path) -> None:
    """Make sure that what a weight file records of itself agrees with the config.

    Raises:
        CheckpointError: it does not; the message names the setting and both values.
    """
    for name in sorted(record.keys() & config.keys()):
        one, other = (list(value) if isinstance(value, tuple) else value for value in (record[name], config[name]))
        if one != other:
            raise CheckpointError(
                f"{source} was made with {name} {shown(one)}, the config says {shown(other)}: use the config of these "
                "weights, or correct it"
            )
