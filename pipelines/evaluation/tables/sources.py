"""JSON files that tables are made of: benchmarks, scores of videos, selections of layers, memory probes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from pipelines.prompts.names import shown
from pipelines.yaml_files import read_mapping
from wan.utils.errors import InputError
from wan.utils.files import read_json

MAX_BYTES = 2**28
CURE = "give a JSON of scripts/benchmark.py, evaluate.py or probe_memory.py, or a YAML of select_layers.py"


class Kind(StrEnum):
    """What a file holds."""

    BENCHMARK = "benchmark"
    SCORES = "scores"
    LAYERS = "layers"
    PROBE = "probe"


PARTS = {
    Kind.BENCHMARK: ("records", "runs", "settings"),
    Kind.SCORES: ("videos", "metrics", "settings"),
    Kind.LAYERS: ("method", "scores"),
    Kind.PROBE: ("models", "settings"),
}
"""Entries that a file of each kind has."""


@dataclass(frozen=True)
class Source:
    """A file of results.

    Attributes:
        label: name of its rows.
        path: where it is.
        kind: what it holds.
        page: its content.
    """

    label: str
    path: Path
    kind: Kind
    page: Mapping[str, Any]


def read_source(text: str) -> Source:
    """Read `PATH`, or `LABEL=PATH`; without a label it is the file's name, or that of the folder of a `scores.json`.

    Raises:
        InputError: no such file, a damaged one, or one of another form.
    """
    label, equals, name = text.rpartition("=")
    path = Path(name)
    if equals and not label.strip():
        raise InputError(f"{shown(text)} has an empty label: give LABEL=PATH")
    is_yaml = path.suffix in (".yaml", ".yml")
    page = read_mapping(path, "selection of layers") if is_yaml else read_json(path, cure=CURE, max_bytes=MAX_BYTES)
    kinds = [kind for kind, parts in PARTS.items() if all(part in page for part in parts)]
    if not kinds:
        raise InputError(f"{shown(path)} is no file of results: {CURE}")
    return Source(label.strip() or path.stem, path, kinds[0], page)


def read_sources(texts: Sequence[str]) -> list[Source]:
    """Read several files.

    Raises:
        InputError: as `read_source`; or two files of one kind have the same label.
    """
    sources = [read_source(text) for text in texts]
    seen: dict[tuple[Kind, str], Path] = {}
    for source in sources:
        other = seen.setdefault((source.kind, source.label), source.path)
        if other is not source.path:
            raise InputError(f"{other} and {source.path} are both called {source.label}: give LABEL=PATH")
    return sources
