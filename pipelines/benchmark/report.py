"""A benchmark's results as Markdown and charts."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.benchmark.cases import BLOCKS_PER_SAMPLE, SpeedOptions
from pipelines.benchmark.measure import ENDS
from pipelines.config import MemoryKind
from pipelines.media.plots import line_chart, save_png
from wan.utils.files import atomic_path

MARKDOWN_FILE = "benchmark.md"
GB = 1e9
NONE = "–"
Record = Mapping[str, Any]
Points = list[tuple[float, float]]

NOTES = f"""\
Weights are random and have the layout of real ones; speed and memory do not depend on them. The text encoder is a toy
one on the same device: text is encoded once, is not timed, and a real encoder is taken to be offloaded. Figures are
medians over repeats; the spread is (greatest - least) / median of the last time in the row. 1 GB is 10⁹ bytes.

- *DiT*: GPU time of all denoising and clean passes with their noise, between CUDA events (wall clock on a CPU). The
  last block of a video is not remembered, so it has no clean pass.
- *VAE*: GPU time of decoding. *mp4*: wall clock of encoding and writing, in a thread beside the rest. *total*: wall
  clock from the prompt's embeddings to the finished file. fps are frames of video over these seconds. With
  *overlap_decoding* the decoder works beside the transformer, and only the total can be told.
- *first frame*: from the prompt's embeddings until the first block's pixels are on the CPU.
- *first*, *last*: median / 90th percentile of DiT time a block, over the first and last {ENDS} remembered blocks.
- *peak*: most memory allocated; *steady*: allocated after the last block. *memory*: keys, values and states alone.
- *TFLOP/s*: operations of the model, counted from shapes, over DiT time; *of ceiling*: the time these operations take
  at the best rates measured here for matrix products and attention, over DiT time.
"""


def write_report(results: Mapping[str, Any], folder: Path) -> None:
    """Write the Markdown, and the charts beside it."""
    with atomic_path(folder / MARKDOWN_FILE) as temporary:
        temporary.write_text(markdown(results), encoding="utf-8")
    for name, (series, title, x_label, y_label) in charts(results["records"]).items():
        if series:
            save_png(line_chart(series, title, x_label, y_label), folder / f"{name}.png")


def markdown(results: Mapping[str, Any]) -> str:
    """All results as a page."""
    records = sorted(results["records"], key=_place)
    settings = ", ".join(f"{key} {value}" for key, value in results["settings"].items())
    parts = ["# Benchmark", settings, NOTES, "## Time", time_table(records)]
    parts += ["## Memory and rates", memory_table(records)]
    if ratios := ratio_table(records):
        parts += ["## Against softmax layers with full KV, in this same code", ratios]
    if results["published"]:
        columns = ("system", "figure", "card", "source")
        rows = [[figure[column] for column in columns] for figure in results["published"]]
        parts += ["## Figures of others: theirs, on their cards, not comparable line by line", table(columns, rows)]
    parts += ["## Where it ran", *(run_section(index, run) for index, run in enumerate(results["runs"]))]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _place(record: Record) -> tuple[Any, ...]:
    """Where a record stands in the tables."""
    case = record["case"]
    return case["frames"], case["hybrid_layers"], case["memory"]["kind"], _unusual_speed(case)


def name_of(record: Record) -> str:
    """The row's name, with what is unusual about how it was measured."""
    case, how = record["case"], []
    if case["blocks_sampled"]:
        how.append(f"sampled: {BLOCKS_PER_SAMPLE} blocks at each of {case['blocks_sampled']} places, integrated")
    elif not case["vae"]:
        how.append("DiT only")
    how += _several_ranks(case)
    return _marked(case["row"], how + _unusual_speed(case))


def _several_ranks(case: Mapping[str, Any]) -> list[str]:
    ranks = case["ranks"]
    return [f"{ranks} GPUs"] if ranks > 1 else []


def _unusual_speed(case: Mapping[str, Any]) -> list[str]:
    usual = asdict(SpeedOptions())
    return [f"{key} {value}" for key, value in case["speed"].items() if value != usual.get(key)]


def _marked(name: str, marks: Sequence[str]) -> str:
    return name + (f" ({'; '.join(marks)})" if marks else "")


def median(record: Record, column: str) -> float | None:
    """A column's median over repeats."""
    return record["summary"][column]["median"] if column in record["summary"] else None


def show(record: Record, column: str, form: str = ".2f", unit: float = 1.0) -> str:
    """A column's median as text."""
    value = median(record, column)
    return NONE if value is None else format(value / unit, form)


def failure(record: Record) -> str:
    """What to print in the place of a figure that there is not."""
    word = "OOM" if record["status"] == "oom" else "failed"
    return f"**{word}** after {record['reached_frames']} frames"


def spread(record: Record) -> str:
    """Repeats, and how far they lie apart."""
    column = next(name for name in ("total_seconds", "dit_seconds") if name in record["summary"])
    values = record["summary"][column]
    return f"{len(record['repeats'])}, {(values['greatest'] - values['least']) / values['median']:.1%}"


def _rows(records: Sequence[Record], cells: Callable[[Record], list[str]], columns: int) -> list[list[str]]:
    """A row a record: name, length, and its cells, or what went wrong."""
    rows = []
    for record in records:
        head = [name_of(record), str(record["case"]["frames"])]
        done = record["status"] == "ok"
        rows.append(head + (cells(record) if done else [failure(record), *[NONE] * (columns - 1)]))
    return rows


def time_table(records: Sequence[Record]) -> str:
    """Seconds and rates."""
    header = ["DiT s", "VAE s", "mp4 s", "total s", "DiT fps", "VAE fps", "fps", "first frame s"]
    header += ["first, ms", "last, ms", "last / first", "repeats, spread"]

    def cells(record: Record) -> list[str]:
        seconds = ("dit_seconds", "vae_seconds", "mp4_seconds", "total_seconds", "dit_fps", "vae_fps", "fps")
        first, last = median(record, "first_blocks_median"), median(record, "last_blocks_median")
        blocks = [
            f"{show(record, f'{end}_median', '.1f', 1e-3)} / {show(record, f'{end}_p90', '.1f', 1e-3)}"
            for end in ("first_blocks", "last_blocks")
        ]
        return [
            *(show(record, column) for column in seconds),
            show(record, "first_frame_seconds", ".3f"),
            *([*blocks, f"{last / first:.3f}"] if first and last else [NONE] * 3),
            spread(record),
        ]

    return table(["row", "frames", *header], _rows(records, cells, len(header)))


def memory_table(records: Sequence[Record]) -> str:
    """Bytes and operations."""
    header = ["peak GB", "steady GB", "memory GB", "TFLOP", "TFLOP/s", "of ceiling", "run"]

    def rest(record: Record) -> list[str]:
        return [
            f"{record['memory_bytes'] / GB:.3f}",
            f"{sum(record['flops'].values()) / 1e12:.4g}",
            show(record, "flops_per_second", ".4g", 1e12),
            show(record, "share_of_ceiling", ".1%"),
            str(record["run"]),
        ]

    rows = []
    for record in records:
        if record["status"] == "ok":
            used = [show(record, column, ".3f", GB) for column in ("peak_bytes", "steady_bytes")]
        else:
            used = [failure(record), NONE]
        rows.append([name_of(record), str(record["case"]["frames"]), *used, *rest(record)])
    return table(["row", "frames", *header], rows)


def ratio_table(records: Sequence[Record]) -> str | None:
    """Time and memory of every row over those of the softmax model with full KV, of the same length and speed options.

    Where that was measured in another way, which is said then, only what does not depend on the way is compared.
    """
    rows = []
    for record in records:
        baseline = _baseline(records, record)
        if baseline is None or baseline is record or record["status"] != "ok":
            continue
        alike = _way(baseline) == _way(record)
        cells = [
            _ratio(baseline, record, "dit_seconds", "{:.2f}×" if alike else f"{{:.2f}}× ({_how(baseline)})"),
            _ratio(baseline, record, "total_seconds", "{:.2f}×") if alike else NONE,
            _change(baseline, record, "peak_bytes") if alike else NONE,
            f"{record['memory_bytes'] / baseline['memory_bytes'] - 1:+.1%}",
        ]
        rows.append([name_of(record), str(record["case"]["frames"]), *cells])
    header = ["row", "frames", "DiT speed", "total speed", "peak memory", "keys, values and states"]
    return table(header, rows) if rows else None


def _baseline(records: Sequence[Record], record: Record) -> Record | None:
    """The softmax model with full KV that a record is compared with; if there is one, of the same way of measuring."""
    found = [
        other
        for other in records
        if other["case"]["hybrid_layers"] == 0
        and other["case"]["memory"]["kind"] == MemoryKind.full
        and all(other["case"][key] == record["case"][key] for key in ("frames", "speed", "ranks"))
    ]
    return min(found, key=lambda other: (_way(other) != _way(record), other["status"] != "ok"), default=None)


def _way(record: Record) -> tuple[Any, ...]:
    return record["case"]["vae"], record["case"]["blocks_sampled"]


def _how(record: Record) -> str:
    case = record["case"]
    return "sampled" if case["blocks_sampled"] else "with VAE" if case["vae"] else "DiT only"


def _ratio(baseline: Record, record: Record, column: str, form: str) -> str:
    if baseline["status"] != "ok":
        return f"full KV: {failure(baseline)}"
    ours, theirs = median(record, column), median(baseline, column)
    return form.format(theirs / ours) if ours and theirs else NONE


def _change(baseline: Record, record: Record, column: str) -> str:
    ours, theirs = median(record, column), median(baseline, column)
    return f"{ours / theirs - 1:+.1%}" if ours and theirs and baseline["status"] == "ok" else NONE


def run_section(index: int, run: Mapping[str, Any]) -> str:
    """The environment of one run, and the ceilings that it measured."""
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    smi = ", ".join(f"{name} {value}" for name, value in (run["nvidia_smi"] or {}).items())
    lines = [
        f"Run {index}: {run['device']}, started {run['started']}, commit {run['commit'] or 'unknown'}",
        f"{versions}, CUDA {run['cuda']}, cuDNN {run['cudnn']}",
        f"nvidia-smi after the ceilings: {smi or 'not there'}",
    ]
    rates = [
        [kind, shape, f"{rate / 1e12:.3f}"]
        for kind, key in (("matrix product", "gemm"), ("attention", "attention"))
        for shape, rate in run["ceilings"][key].items()
    ]
    return "\n".join(f"- {line}" for line in lines) + "\n\n" + table(["ceiling", "shape", "TFLOP/s"], rates)


def charts(records: Sequence[Record]) -> dict[str, tuple[dict[str, Points], str, str, str]]:
    """By file name: series, title and axis labels. A series that has no points is left out.

    What only the transformer decides is one curve a row, also where some lengths were sampled.
    """
    done = [record for record in records if record["status"] == "ok"]
    # Of several measurements of one length the most complete, which comes last.
    done.sort(
        key=lambda record: (record["case"]["frames"], not record["case"]["blocks_sampled"], record["case"]["vae"])
    )
    transformer = {(_curve(record), record["case"]["frames"]): record for record in done}
    apart = {(_curve(record), record["case"]["frames"], record["case"]["vae"]): record for record in done}
    longest = {_curve(record): record for record in done}
    latency = {
        f"{curve}, {record['case']['frames']} frames": [
            (float(block), 1000 * seconds) for block, seconds in record["repeats"][-1]["dit_block_seconds"]
        ]
        for curve, record in longest.items()
    }
    fps, peak = (
        _by_length(
            apart.values(), column, lambda record: _curve(record) + ", alone" * (not record["case"]["vae"]), unit
        )
        for column, unit in (("fps", 1.0), ("peak_bytes", GB))
    )
    dit = _by_length(transformer.values(), "dit_fps", _curve)
    return {
        "fps": (fps, "Frames a second, prompt to mp4", "frames of video", "fps"),
        "dit_fps": (dit, "Frames a second, transformer alone", "frames of video", "fps"),
        "memory": (peak, "Most memory allocated, with the VAE or the transformer alone", "frames of video", "GB"),
        "block_latency": ({k: v for k, v in latency.items() if v}, "Transformer, time a block", "block", "ms"),
    }


def _curve(record: Record) -> str:
    case = record["case"]
    return _marked(case["row"], _several_ranks(case) + _unusual_speed(case))


def _by_length(
    records: Iterable[Record], column: str, name: Callable[[Record], str], unit: float = 1.0
) -> dict[str, Points]:
    series: dict[str, Points] = {}
    for record in records:
        value = median(record, column)
        if value is not None:
            series.setdefault(name(record), []).append((float(record["case"]["frames"]), value / unit))
    return series
