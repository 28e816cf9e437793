"""The paper's tables from files of results; beside them the published figures of others."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pipelines.evaluation.scoring.metric import NOT_MEASURED
from pipelines.evaluation.scoring.metrics.read_back import VBENCH
from pipelines.evaluation.tables import vbench
from pipelines.evaluation.tables.sources import Kind, Source
from pipelines.evaluation.tables.table import Cell, Row, Table
from pipelines.yaml_files import read_mapping
from wan.utils.errors import InputError

PUBLISHED = Path(__file__).with_name("published.yaml")
GB = 1e9
SHARE = "75"
"""The share of hybrid layers, in %, whose set a table of layers shows."""
MARKED = {"fp8": "FP8", "overlap_decoding": "decoding beside", "tiny_vae": "tiny decoder"}
"""Settings of speed that a label names."""
Builder = Callable[[Sequence[Source]], Table]


@cache
def published() -> dict[str, Any]:
    """Figures of others, by table."""
    return read_mapping(PUBLISHED, "list of published figures")


def _theirs(table: str, *names: str) -> Iterator[Row]:
    """Rows of published figures; a name that an entry lacks is an empty cell."""
    for entry in published().get(table, ()):
        cells = tuple(Cell(entry.get(name), digits=2) for name in names)
        yield Row(entry["label"], cells, published=entry["by"])


def _of_kind(sources: Sequence[Source], kind: Kind, table: str) -> list[Source]:
    """Sources of a kind.

    Raises:
        InputError: there are none.
    """
    found = [source for source in sources if source.kind is kind]
    if not found:
        given = ", ".join(f"{source.path} ({source.kind})" for source in sources)
        raise InputError(f"the table {table} is made of files of {kind}; given: {given}")
    return found


# Speed and memory.


def _median(summary: Mapping[str, Any], name: str) -> float | None:
    value = summary.get(name)
    return value.get("median") if isinstance(value, Mapping) else value


def _measured(value: float | None, source: Source, reason: str, scale: float = 1.0, digits: int = 2) -> Cell:
    if value is None or not math.isfinite(value):
        return Cell(reason=reason)
    return Cell(value / scale, source=source.path, digits=digits)


def _cases(source: Source) -> Iterator[tuple[str, int, Mapping[str, Any]]]:
    """Label, frames and record of every case of a benchmark."""
    for record in source.page["records"]:
        case = record["case"]
        switched_on = [MARKED[name] for name, value in (case.get("speed") or {}).items() if value and name in MARKED]
        name = ", ".join([case["row"], *switched_on, *([] if case.get("vae", True) else ["no decoder"])])
        yield f"{source.label}: {name}, {case['frames']} frames", case["frames"], record


def _why_empty(record: Mapping[str, Any]) -> str:
    """Why a case of a benchmark lacks a figure: how it ended, or that its file does not have it."""
    status: str = record.get("status", "not measured")
    return "not in its file" if status == "ok" else status


def efficiency_table(sources: Sequence[Source]) -> Table:
    """Speed and memory of every case of the benchmarks, and ratios to full softmax attention of equal length."""
    rows = []
    for source in _of_kind(sources, Kind.BENCHMARK, "efficiency"):
        base = {
            (frames, decoder): record.get("summary", {})
            for _, frames, record in _cases(source)
            if record["case"].get("memory", {}).get("kind") == "full" and not record["case"].get("hybrid_layers")
            for decoder in (record["case"].get("vae"), None)
        }
        for label, frames, record in _cases(source):
            summary, full = record.get("summary", {}), base.get((frames, None), {})
            alike = base.get((frames, record["case"].get("vae")), {})  # the decoder takes memory
            why = _why_empty(record)
            fps, full_fps = _median(summary, "dit_fps"), _median(full, "dit_fps")
            peak, full_peak = _median(summary, "peak_bytes"), _median(alike, "peak_bytes")
            no_base = f"no row of full softmax attention over {frames} frames, measured alike, in its file"
            cells = (
                _measured(fps, source, why, digits=1),
                _measured(_median(summary, "fps"), source, why, digits=1),
                _measured(fps / full_fps if fps and full_fps else None, source, why if not fps else no_base),
                _measured(peak, source, why, GB, 1),
                _measured(peak / full_peak if peak and full_peak else None, source, why if not peak else no_base),
            )
            rows.append(Row(label, cells))
    columns = (
        *("transformer, fps", "to mp4, fps", "speed against full softmax"),
        *("peak, GB", "peak against full softmax"),
    )
    theirs = _theirs("efficiency", "", "fps", "speedup", "peak_gb", "memory_ratio")
    notes = ("Medians. Ratios are within one file, of equal numbers of frames.",)
    return Table("efficiency", "Speed and memory", columns, (*rows, *theirs), notes)


def memory_table(sources: Sequence[Source]) -> Table:
    """Bytes that models remember of a video, and peaks, by length."""
    rows = []
    for source in _of_kind(sources, Kind.BENCHMARK, "memory"):
        for label, _, record in _cases(source):
            why = _why_empty(record)
            summary = record.get("summary", {})
            values = (record.get("memory_bytes"), _median(summary, "steady_bytes"), _median(summary, "peak_bytes"))
            rows.append(Row(label, tuple(_measured(value, source, why, GB) for value in values)))
    columns = ("keys, values and states, GB", "after the last block, GB", "peak, GB")
    return Table("memory", "Memory of a video", columns, tuple(rows))


# Quality.


def _scored(source: Source, *names: str, part: str = "value", digits: int = 4) -> Cell:
    """The first of some metrics that a file has."""
    metrics, reason = source.page["metrics"], "was not asked for"
    for name in names:
        metric = metrics.get(name)
        if metric is None:
            continue
        found = metric if NOT_MEASURED in metric else metric[part]
        if NOT_MEASURED in found:
            reason = str(found[NOT_MEASURED])
            continue
        interval = found.get("interval")
        return Cell(found["mean"], None if interval is None else tuple(interval), source.path, digits=digits)
    return Cell(reason=reason)


def _totals(source: Source) -> tuple[Cell, Cell, Cell]:
    """VBench's quality, semantic and total score, from its own values alone."""
    cells = {name: _scored(source, VBENCH.prefix + name) for name in (*vbench.QUALITY, *vbench.SEMANTIC)}
    values = {name: cell.value for name, cell in cells.items() if cell.value is not None}
    totals = (
        (vbench.QUALITY, vbench.mean_of(vbench.QUALITY, values)),
        (vbench.SEMANTIC, vbench.mean_of(vbench.SEMANTIC, values)),
        ({**vbench.QUALITY, **vbench.SEMANTIC}, vbench.total_of(values)),
    )
    made = []
    for needed, value in totals:
        missing = [VBENCH.prefix + name for name in needed if name not in values]
        reason = f"needs {missing[0]} and {len(missing) - 1} more of VBench's own values" if missing else ""
        made.append(_measured(value, source, reason))
    return made[0], made[1], made[2]


def quality_table(sources: Sequence[Source]) -> Table:
    """Six dimensions and VBench's totals of every file of scores."""
    names = (*vbench.SHOWN, "temporal_flickering")
    rows = []
    for source in _of_kind(sources, Kind.SCORES, "quality"):
        dimensions = (_scored(source, VBENCH.prefix + name, name) for name in names)
        rows.append(Row(source.label, (*dimensions, *_totals(source))))
    columns = (*(name.replace("_", " ") for name in names), "quality, %", "semantic, %")
    empty = [""] * len(columns)
    theirs = _theirs("quality", *empty, "total")
    notes = (
        "Dimensions are VBench's own values where they were read back, else this project's measurement of the same "
        "definition. Totals need VBench's own values of all dimensions.",
        "Intervals: bootstrap over prompts, 95 %.",
    )
    return Table("quality", "Quality", (*columns, "total, %"), (*rows, *theirs), notes)


DRIFTING = (
    *("imaging_quality", "dynamic_degree", "aesthetic_quality", "text_alignment"),
    *("temporal_flickering", "sharpness", "dynamic_range"),
)


def drift_table(sources: Sequence[Source]) -> Table:
    """First seconds minus last seconds of every metric that can drift."""
    found = _of_kind(sources, Kind.SCORES, "drift")
    rows = [Row(source.label, tuple(_scored(source, name, part="drift") for name in DRIFTING)) for source in found]
    seconds = sorted({source.page["settings"].get("drift_seconds") for source in found} - {None})
    notes = (
        f"Value of the first {' or '.join(f'{each:g}' for each in seconds)} s minus that of the last ones; 0 is no "
        "drift. Intervals: bootstrap over prompts, 95 %.",
    )
    columns = tuple(name.replace("_", " ") for name in DRIFTING)
    return Table("drift", "Drift", columns, tuple(rows), notes)


def ablation_table(sources: Sequence[Source]) -> Table:
    """Quality and drift of runs that differ in one setting each, see docs/ablations.md."""
    quality, drift = quality_table(sources), drift_table(sources)
    measured = [row for row in quality.rows if not row.published]
    rows = tuple(Row(one.label, (*one.cells, other.cells[0])) for one, other in zip(measured, drift.rows, strict=True))
    columns = (*quality.columns, "drift of imaging quality")
    return Table("ablations", "Ablations", columns, rows, (*quality.notes, *drift.notes))


# Layers, and memory of the toy world.


def layers_table(sources: Sequence[Source]) -> Table:
    """Scores of every layer by each method, and the chosen sets."""
    found = _of_kind(sources, Kind.LAYERS, "layers")
    layers = sorted({int(layer) for source in found for layer in source.page["scores"]})
    rows = []
    for layer in layers:
        cells = []
        for source in found:
            scores = {int(name): value for name, value in source.page["scores"].items()}
            chosen = layer in (source.page.get(SHARE) or ())
            cells += [
                _measured(scores.get(layer), source, "no score", digits=4),
                Cell(float(chosen), source=source.path, digits=0),
            ]
        rows.append(Row(f"layer {layer}", tuple(cells)))
    columns = [part for source in found for part in (source.label, f"in the {SHARE} % of {source.label}")]
    notes = ("Scores of different methods have different units; low is chosen. 1: the layer is hybrid.",)
    return Table("layers", "Choice of layers", tuple(columns), tuple(rows), notes)


def recall_table(sources: Sequence[Source]) -> Table:
    """What models of the toy world remember, from scripts/probe_memory.py."""
    rows = []
    for source in _of_kind(sources, Kind.PROBE, "recall"):
        for name, model in source.page["models"].items():
            both = model["after_last"]["both"] if "after_last" in model else model
            interval = both.get("interval")
            cell = Cell(
                None if both.get("accuracy") is None else 100 * both["accuracy"],
                None if interval is None else (100 * interval[0], 100 * interval[1]),
                source.path,
                "no questions",
                1,
            )
            rows.append(Row(f"{source.label}: {name}", (cell, Cell(both.get("objects"), None, source.path, digits=0))))
    return Table("recall", "Right after the last time out of sight", ("colour and shape, %", "objects"), tuple(rows))


TABLES: dict[str, tuple[Kind, Builder]] = {
    "efficiency": (Kind.BENCHMARK, efficiency_table),
    "memory": (Kind.BENCHMARK, memory_table),
    "quality": (Kind.SCORES, quality_table),
    "drift": (Kind.SCORES, drift_table),
    "ablations": (Kind.SCORES, ablation_table),
    "layers": (Kind.LAYERS, layers_table),
    "recall": (Kind.PROBE, recall_table),
}
"""Tables by name: the files that each is made of, and how."""


def make_tables(sources: Sequence[Source], names: Sequence[str] = ()) -> list[Table]:
    """Make tables.

    Args:
        sources: files of results.
        names: of tables; without, all whose kind of file is given, but for ablations, which are asked for by name.

    Raises:
        InputError: a table whose files are not given, or a file without what its kind has.
    """
    kinds = {source.kind for source in sources}
    chosen = names or [name for name, (kind, _) in TABLES.items() if kind in kinds and name != "ablations"]
    tables = []
    for name in chosen:
        try:
            tables.append(TABLES[name][1](sources))
        except (KeyError, TypeError, AttributeError) as error:
            given = ", ".join(str(source.path) for source in sources if source.kind is TABLES[name][0])
            raise InputError(f"{given}: damaged, or of another version ({error!r}): make the file again") from error
    return tables
