"""Tables as Markdown, LaTeX or CSV."""

import csv
import io
import os
from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path

from pipelines.evaluation.tables.table import Cell, Row, Table

NONE = "–"
PUBLISHED = "published"
_LATEX = {
    **{char: f"\\{char}" for char in "&%$#_{}"},
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "–": "--",
    "×": r"$\times$",
    "²": "$^2$",
}


class Format(StrEnum):
    """How tables are written."""

    MARKDOWN = "md"
    LATEX = "latex"
    CSV = "csv"


def written(tables: Sequence[Table], form: Format, folder: Path) -> str:
    """Tables as text.

    Args:
        folder: of the page, which links are relative to.
    """
    writers: dict[Format, Callable[[Table, Path], str]] = {
        Format.MARKDOWN: _markdown,
        Format.LATEX: _latex,
        Format.CSV: _csv,
    }
    return "\n".join(writers[form](table, folder) for table in tables)


def _label(row: Row) -> str:
    return f"{row.label} ({PUBLISHED}: {row.published})" if row.published else row.label


def relative_link(source: Path, folder: Path) -> str:
    """A path as a page in a folder links to it."""
    return Path(os.path.relpath(source.resolve(), folder.resolve())).as_posix()


# Markdown: every measured value links to its file.


def _markdown(table: Table, folder: Path) -> str:
    def cell(value: Cell) -> str:
        if value.value is None:
            return NONE
        return value.text if value.source is None else f"[{value.text}](<{relative_link(value.source, folder)}>)"

    lines = [f"## {table.title}", ""]
    lines += _markdown_rows(["", *table.columns], [[_label(row), *map(cell, row.cells)] for row in table.rows])
    lines += ["", *(f"{note}\n" for note in table.notes)]
    if table.reasons:
        lines += ["Not measured:\n", *(f"- {_markdown_text(reason)}" for reason in table.reasons), ""]
    return "\n".join(lines)


def _markdown_rows(heads: list[str], rows: list[list[str]]) -> list[str]:
    texts = [[_markdown_text(name) for name in heads]]
    texts += [[_markdown_text(row[0]), *row[1:]] for row in rows]
    lines = [f"| {' | '.join(row)} |" for row in texts]
    return [lines[0], f"|{'---|' * len(heads)}", *lines[1:]]


def _markdown_text(text: str) -> str:
    """Text that cannot end a cell, a line or become a link or tag."""
    safe = " ".join(text.split())
    for char in "\\|[]<>`*":
        safe = safe.replace(char, f"\\{char}")
    return safe


# LaTeX: a booktabs table; comments name the files.


def _latex(table: Table, folder: Path) -> str:
    columns = "l" + "r" * len(table.columns)
    lines = [
        r"\begin{table}",
        rf"\caption{{{_latex_text(table.title)}. {_latex_text(' '.join(table.notes))}}}",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        " & ".join(["", *map(_latex_text, table.columns)]) + r" \\",
        r"\midrule",
    ]
    for row in table.rows:
        sources = sorted({relative_link(cell.source, folder) for cell in row.cells if cell.source is not None})
        values = [NONE if cell.value is None else cell.text for cell in row.cells]
        label = _latex_text(_label(row))
        line = " & ".join([rf"\textit{{{label}}}" if row.published else label, *map(_latex_text, values)])
        lines.append(rf"{line} \\" + (f" % {' '.join(map(_one_line, sources))}" if sources else ""))
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{table}"]
    lines += [f"% not measured: {_one_line(reason)}" for reason in table.reasons]
    return "\n".join(lines) + "\n"


def _latex_text(text: str) -> str:
    return "".join(_LATEX.get(char, char) for char in " ".join(text.split()))


def _one_line(text: str) -> str:
    return " ".join(text.split())


# CSV: one line per cell, which spreadsheets and pandas pivot.


def _csv(table: Table, folder: Path) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["table", "row", "column", "value", "low", "high", "published", "source", "not measured"])
    for row in table.rows:
        for column, cell in zip(table.columns, row.cells, strict=True):
            low, high = cell.interval or ("", "")
            source = "" if cell.source is None else relative_link(cell.source, folder)
            value = "" if cell.value is None else cell.value
            reason = "" if cell.value is not None or row.published else cell.reason or "not in its file"
            if cell.value is None and row.published:
                continue
            writer.writerow([table.name, row.label, column, value, low, high, row.published, source, reason])
    return out.getvalue()
