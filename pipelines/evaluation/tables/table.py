"""A table of results, whose cells say where they come from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Cell:
    """A value of a table, or why there is none.

    Attributes:
        value: in the unit of the column; None where it was not measured.
        interval: bounds of the 95 % interval; None without one.
        source: JSON that it comes from; None for published values.
        reason: why there is no value.
        digits: decimal places.
    """

    value: float | None = None
    interval: tuple[float, float] | None = None
    source: Path | None = None
    reason: str = ""
    digits: int = 2

    @property
    def text(self) -> str:
        """Value and interval: "0.95 (0.94 to 0.96)"; empty without a value."""
        if self.value is None:
            return ""
        shown = f"{self.value:.{self.digits}f}"
        if self.interval is None:
            return shown
        low, high = (f"{bound:.{self.digits}f}" for bound in self.interval)
        return f"{shown} ({low} to {high})"


@dataclass(frozen=True)
class Row:
    """A line of a table.

    Attributes:
        label: what was measured.
        cells: one per column.
        published: whose published figures they are; empty for measured ones.
    """

    label: str
    cells: tuple[Cell, ...]
    published: str = ""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        name: as the command line has it.
        title: one line.
        columns: heads, with units.
        rows: measured ones first, then published ones.
        notes: what a reader must know.
    """

    name: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row.cells) != len(self.columns):
                raise ValueError(f"row {row.label!r} has {len(row.cells)} cells for {len(self.columns)} columns")

    @property
    def reasons(self) -> list[str]:
        """Why measured rows lack values, once each: "label, column: reason"."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            for column, cell in zip(self.columns, row.cells, strict=True):
                if cell.value is None and not row.published:
                    found.setdefault(cell.reason or "not in its file", []).append(f"{row.label}, {column}")
        return [f"{_some(places)}: {reason}" for reason, places in found.items()]


def _some(places: Sequence[str], most: int = 3) -> str:
    return "; ".join(places[:most]) + (f"; and {len(places) - most} more" if len(places) > most else "")
