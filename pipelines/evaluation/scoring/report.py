"""Scores and comparisons as tables of text."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Column, Table

from pipelines.evaluation.scoring.compare import Comparison
from pipelines.evaluation.scoring.metric import NOT_MEASURED
from pipelines.evaluation.scoring.statistics import Estimate

SIGNS = {"higher": "↑", "lower": "↓", "same": "="}
NONE = "–"


def score_table(page: Mapping[str, Any]) -> Table:
    """The means of a run, with intervals; the log and the file say why others are not measured."""
    table = Table(
        Column("metric", no_wrap=True),
        "",
        "mean",
        "95 %",
        "drift",
        "videos",
        "prompts",
        "frames/s",
        title=escape(page["folder"]),
    )
    timing = page.get("timing", {})
    for name, metric in page["metrics"].items():
        sign = SIGNS[metric["direction"]]
        if NOT_MEASURED in metric:
            table.add_row(name, sign, "not measured", *[NONE] * 5)
            continue
        value = metric["value"]
        drift = metric["drift"]
        shown_drift = NONE if NOT_MEASURED in drift else _number(drift["mean"])
        interval = NONE if value["interval"] is None else _range(*value["interval"])
        rate = _number(timing[name]["frames_per_second"]) if name in timing else NONE
        counts = str(value["videos"]), str(value["prompts"]), rate
        table.add_row(name, sign, _number(value["mean"]), interval, shown_drift, *counts)
    return table


def comparison_table(rows: Sequence[Comparison]) -> Table:
    """Two runs side by side; `left_out` says why metrics are not compared."""
    table = Table(Column("metric", no_wrap=True), "", "first", "second", "difference", "95 %", "verdict", "")
    for row in rows:
        sign, mark = SIGNS[row.direction], "FAILS" if row.fails else ""
        if row.difference is None:
            table.add_row(row.name, sign, *[NONE] * 4, row.verdict, mark)
            continue
        means = _number(row.first), _number(row.second), _number(row.difference.mean)
        table.add_row(row.name, sign, *means, _interval(row.difference), row.verdict, mark)
    return table


def left_out(rows: Sequence[Comparison]) -> list[str]:
    """Lines that say which metrics or videos were not compared, and the reason."""
    return [f"{row.name}: {row.verdict}, {row.reason}" for row in rows if row.reason is not None]


def _interval(found: Estimate) -> str:
    return NONE if found.low is None or found.high is None else _range(found.low, found.high)


def _range(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}"


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4g}" if abs(value) < 100 else f"{value:.1f}"
