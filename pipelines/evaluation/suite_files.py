"""Reads suites: those that are known by name, and files.

- `.json`: VBench's list of `{"prompt_en", "dimension", "auxiliary_info"}`, as in vbench 0.1.5.
- `.jsonl` with the field `prompts`: several prompts per video, see `pipelines.prompts.schedules`.
- Anything else is a prompt file (`pipelines.prompts.files`), of which `extended` and `dimensions` are used.

A second file may hold extended prompts, line by line, as Self Forcing's `prompts/vbench/all_dimension_extended.txt`
does for VBench's `prompts/all_dimension.txt`.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines.console.shipped import ROOT
from pipelines.evaluation.suites import DIMENSIONS, Suite, SuiteEntry
from pipelines.prompts.files import check_prompt, checked_dimensions, read_lines, read_prompt_file
from pipelines.prompts.names import shown
from pipelines.prompts.schedules import has_scripts, read_scripts
from wan.utils.errors import InputError
from wan.utils.files import parse_json

log = logging.getLogger(__name__)

CURE = "download it again with scripts/download_suites.py, or give another file"
OWN = ROOT / "prompts"
FLICKERING, FLICKERING_SAMPLES = "temporal_flickering", 25
"""VBench keeps only still videos of this dimension, and asks for more of them, so that enough are left
(prompts/README.md of Vchitect/VBench, state of 2024). Version 0.1.5 itself reads the first five."""


@dataclass(frozen=True)
class KnownSuite:
    """Files of a suite that has a name.

    Attributes:
        folder: below that of downloads; None for the project's own prompts.
        file: its prompts.
        samples: videos per prompt.
        extended: extended prompts, line by line.
        keys: the short prompts of these lines; None if they are the lines of `file`.
        count: prompts that `file` lists, if that is known.
    """

    folder: str | None
    file: str
    samples: int = 1
    extended: str | None = None
    keys: str | None = None
    count: int | None = None


_VBENCH = KnownSuite("vbench", "VBench_full_info.json", 5, "all_dimension_extended.txt", "all_dimension.txt", count=946)
KNOWN = {
    "vbench": _VBENCH,
    "vbench-long": _VBENCH,
    "moviegen": KnownSuite("moviegen", "MovieGenVideoBench.txt", 1, "MovieGenVideoBench_extended.txt", count=1003),
    "interactive": KnownSuite(None, "interactive.jsonl"),
    "hundred": KnownSuite(None, "hundred.jsonl"),
}
"""Suites by name. VBench-Long scores the prompts of VBench, in longer videos."""


def read_suite(name: str, downloads: Path, extended: Path | None = None) -> Suite:
    """A suite by its name, or a file.

    Args:
        name: a key of `KNOWN`, or a path.
        downloads: the folder that scripts/download_suites.py filled.
        extended: extended prompts in place of those that a known suite has.

    Raises:
        InputError: files that are missing, damaged or do not fit each other.
    """
    known = KNOWN.get(name)
    if known is None:
        path = Path(name)
        if not path.is_file():
            raise InputError(f"no suite {shown(name)}: give {', '.join(KNOWN)}, or a file")
        suite = read_suite_file(path)
        return suite if extended is None else with_extended(suite, extended, None)
    folder = OWN if known.folder is None else downloads / known.folder
    if known.folder is not None and not (folder / known.file).is_file():
        raise InputError(f"no {folder / known.file}: run scripts/download_suites.py --suite {known.folder}")
    suite = replace(read_suite_file(folder / known.file, repeats=known.folder is not None), name=name)
    if known.extended is not None:
        suite = with_extended(suite, extended or folder / known.extended, folder / (known.keys or known.file))
    elif extended is not None:
        suite = with_extended(suite, extended, None)
    samples = {FLICKERING: FLICKERING_SAMPLES} if known is _VBENCH else {}
    entries = (
        replace(entry, samples=max([known.samples, *(samples.get(each, 0) for each in entry.dimensions)]))
        for entry in suite.entries
    )
    return replace(suite, entries=tuple(entries))


def read_suite_file(path: Path, repeats: bool = False) -> Suite:
    """The suite of a file, see the module for the formats.

    Args:
        repeats: whether a list of lines may hold a prompt twice, which is then kept once, with a warning.

    Raises:
        InputError: the file cannot be read, is damaged, or names two videos alike.
    """
    if path.suffix.lower() == ".json" and (records := _vbench_records(path)) is not None:
        entries = _vbench_entries(path, records)
    elif path.suffix.lower() in (".jsonl", ".ndjson") and has_scripts(path):
        entries = _scripts(path)
    else:
        entries = _plain_entries(path)
        if repeats:
            entries = _without_repeats(path, entries)
    _check_distinct(entries)
    return Suite(path.stem, tuple(entries))


def num_listed(path: Path) -> int:
    """Prompts that a file lists, each as often as it comes.

    Raises:
        InputError: it cannot be read.
    """
    records = _vbench_records(path) if path.suffix.lower() == ".json" else None
    return len(read_lines(path, cure=CURE)) if records is None else len(records)


def with_extended(suite: Suite, path: Path, keys: Path | None) -> Suite:
    """A suite with the extended prompts of a file of lines.

    Args:
        keys: the file whose lines are the short prompts; None for the suite's own order.

    Raises:
        InputError: the files have different numbers of lines, or a prompt of the suite is not among them.
    """
    long = _checked_lines(path)
    short = [entry.prompt for entry in suite.entries] if keys is None else _checked_lines(keys)
    if len(long) != len(short):
        raise InputError(
            f"{shown(path)} has {len(long)} lines, {shown(keys or suite.name)} has {len(short)} prompts: line by line "
            "they must be the same prompts; take both files of one version"
        )
    # Of a prompt that comes twice, which is one file, the first line counts.
    found = dict(zip(reversed(short), reversed(long), strict=True))
    missing = next((entry for entry in suite.entries if entry.prompt not in found), None)
    if missing is not None:
        raise InputError(
            f"{missing.where}: '{shown(missing.prompt)[:60]}' is not among the prompts of {shown(keys or path)}: take "
            "both files of one version"
        )
    return replace(suite, entries=tuple(replace(entry, extended=found[entry.prompt]) for entry in suite.entries))


def _checked_lines(path: Path) -> list[str]:
    lines = read_lines(path, cure=CURE)
    for number, line in lines:
        check_prompt(line.strip(), f"{shown(path)} line {number}")
    return [line.strip() for _, line in lines]


def _vbench_records(path: Path) -> list[Any] | None:
    """The list in a file of VBench; None for a JSON file of another kind."""
    text = "\n".join(line for _, line in read_lines(path, cure=CURE))
    try:
        records = parse_json(text)
    except ValueError as error:
        raise InputError(f"{shown(path)} is not valid JSON ({str(error).splitlines()[0]}): {CURE}") from error
    is_list = isinstance(records, list) and records and all(isinstance(record, dict) for record in records)
    return records if is_list and any("prompt_en" in record for record in records) else None


def _vbench_entries(path: Path, records: Sequence[dict[str, Any]]) -> list[SuiteEntry]:
    """VBench's prompts. One that comes twice, with other dimensions, is one: its videos have the same names."""
    found: dict[str, SuiteEntry] = {}
    for number, record in enumerate(records, 1):
        where = f"{shown(path)} entry {number}"
        prompt = record.get("prompt_en")
        if not isinstance(prompt, str):
            raise InputError(f"{where} has no prompt_en: {CURE}")
        check_prompt(prompt, where)
        dimensions = checked_dimensions(record.get("dimension"), where)
        unknown = [name for name in dimensions if name not in DIMENSIONS]
        if unknown or not dimensions:
            raise InputError(f"{where} has the dimension {shown(', '.join(unknown))[:60] or 'none'}: {CURE}")
        former = found.get(prompt)
        if former is not None and set(former.dimensions) & set(dimensions):
            raise InputError(f"{where} has the prompt and a dimension of {former.where}: {CURE}")
        dimensions = (*(former.dimensions if former else ()), *dimensions)
        found[prompt] = SuiteEntry(prompt, dimensions=dimensions, where=former.where if former else where)
    return list(found.values())


def _scripts(path: Path) -> list[SuiteEntry]:
    return [
        SuiteEntry(script.prompts[0].prompt, dimensions=script.dimensions, prompts=script.prompts, where=script.where)
        for script in read_scripts(path, CURE)
    ]


def _plain_entries(path: Path) -> list[SuiteEntry]:
    entries = []
    for request in read_prompt_file(path):
        fields = {"seed": request.seed, "name": request.name, "image": request.image}
        given = [name for name, value in fields.items() if value is not None]
        if given:
            raise InputError(
                f"{request.where} has a {given[0]}: in a suite, prompts and --seed decide that; remove it, or sample "
                "with inference.py"
            )
        short, extended = (request.prompt, None) if request.short is None else (request.short, request.prompt)
        entries.append(SuiteEntry(short, extended, request.dimensions, where=request.where))
    return entries


def _without_repeats(path: Path, entries: Sequence[SuiteEntry]) -> list[SuiteEntry]:
    kept = {entry.prompt: entry for entry in reversed(entries)}
    if len(kept) < len(entries):
        log.warning("%s holds %d prompts twice: each is kept once", shown(path), len(entries) - len(kept))
    return [entry for entry in entries if kept[entry.prompt] is entry]


def _check_distinct(entries: Sequence[SuiteEntry]) -> None:
    first: dict[str, SuiteEntry] = {}
    for entry in entries:
        other = first.setdefault(entry.prompt, entry)
        if other is not entry:
            raise InputError(f"{entry.where} has the prompt of {other.where}: videos are named by it; remove one")
