"""Scores that processes beside the leading one have made: in files of their own, until they are in the common one."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipelines.records import SETTINGS, Records
from wan.utils.errors import InputError
from wan.utils.files import read_json, remove

log = logging.getLogger(__name__)

SCORES = "scores"


def share_path(json: Path, rank: int) -> Path:
    """Where a process keeps its scores."""
    return json.with_name(f".{json.name}.rank-{rank}")


def adopt_shares(records: Records, json: Path) -> None:
    """Add what processes of a killed run had measured, however many they were, and remove their files.

    What was made with other settings or weights than the common file is left out.
    """
    for path in sorted(json.parent.glob(f".{json.name}.rank-*")):
        if not path.name.removeprefix(share_path(json, 0).name[:-1]).isdecimal():
            continue
        try:
            page = read_json(path)
            same = page.get(SETTINGS) == records.page.get(SETTINGS)
            videos, metrics = page["videos"], page["metrics"]
            kept = {name for name in metrics if same and _is_same(metrics[name], records.page["metrics"].get(name))}
            found = {
                name: one | {SCORES: {m: one[SCORES][m] for m in one[SCORES] if m in kept}}
                for name, one in videos.items()
            }
        except (InputError, KeyError, TypeError, AttributeError) as error:
            log.warning("%s is damaged (%s): its videos are scored again", path, error)
        else:
            take_shares(records, [found])
        records.save()
        remove(path)


def _is_same(about: Mapping[str, Any], known: Mapping[str, Any] | None) -> bool:
    """Whether two entries of a metric were measured alike."""
    return known is not None and all(key in about and about[key] == known.get(key) for key in ("identity", "origin"))


def take_shares(records: Records, shares: Sequence[Mapping[str, Any]]) -> None:
    """Put scores of several processes together, by video and metric. Former scores of a video that changed go."""
    videos: dict[str, Any] = records.page["videos"]
    for share in shares:
        for name, entry in share.items():
            former = videos.get(name, {SCORES: {}})
            is_same = all(former.get(key) == value for key, value in entry.items() if key != SCORES)
            videos[name] = entry | {SCORES: (former[SCORES] if is_same else {}) | entry[SCORES]}
