"""The study of long training as Markdown tables and charts."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arl2.toyworld.probe.long_probe import Context
from arl2.toyworld.study.long_rows import PARTS
from arl2.toyworld.world.worlds import World
from pipelines.media.plots import line_chart, save_png
from pipelines.toyworld.long_study import EXAMS, Exam
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, read_json

Result = dict[str, Any]
MARKDOWN = "long_study.md"


def write_tables(work: Path) -> Path:
    """Write the tables of a study's results, and its charts, beside them; returns the page.

    Raises:
        InputError: there are no results, or one is damaged.
    """
    results = _read(work / "results")
    own = [exam for exam in EXAMS if exam.context is Context.OWN]
    true = [exam for exam in EXAMS if exam.context is Context.TRUE]
    parts = ["# Long training on the toy world\n", "Colour and shape right after the last time out of sight, %:\n"]
    parts.append(_table(results, own))
    parts.append("\nThe same with true frames in memory: what is wrong here is forgotten, not drifted.\n")
    parts.append(_table(results, true))
    curves = {path.stem: _exams(path) for path in sorted((work / "curves").glob("*.json"))}
    for world in World:
        points = {name: _points(exams.get(Exam(64, world).name)) for name, exams in curves.items()}
        points = {name: one for name, one in points.items() if one}
        if points:
            chart = line_chart(
                points, f"Right in the {world} world, videos of 64 times the length", "times out of sight", "right, %"
            )
            save_png(chart, work / f"passes_{world}.png")
            parts.append(f"\n![right by times out of sight](passes_{world}.png)\n")
    page = work / MARKDOWN
    with atomic_path(page) as temporary:
        temporary.write_text("\n".join(parts))
    return page


def _read(folder: Path) -> dict[str, Result]:
    """Results by the name of their file, in the order of the rows."""
    order = [row.name for rows in PARTS.values() for row in rows]
    paths = sorted(folder.glob("*.json"), key=lambda path: (order.index(path.name.split(".")[0]), path.name))
    results = {path.stem: read_json(path) for path in paths}
    if not results:
        raise InputError(f"no results in {folder}: run the other parts first")
    return results


def _exams(path: Path) -> Result:
    exams = read_json(path).get("exams")
    if not isinstance(exams, dict):
        raise InputError(f"{path} holds no exams: remove it, and run its part again")
    return exams


def _table(results: Mapping[str, Result], exams: Sequence[Exam]) -> str:
    """A row per model, a column per exam: percentage, interval, colour alone, number of objects."""
    heads = ["model", "steps", *(f"{exam.world} {exam.times}×" for exam in exams), "KB in the shortest, longest"]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    for name, result in results.items():
        taken, training = result.get("exams") or {}, result.get("training") or {}
        if taken:
            cells = [_cell(taken.get(exam.name)) for exam in exams]
            sizes = {int(times): size for times, size in taken["memory_bytes"].items()}
            kept = ", ".join(f"{sizes[times] / 1e3:.0f}" for times in (min(sizes), max(sizes)))
            lines.append(f"| {' | '.join([name, str(training.get('steps', '')), *cells, kept])} |")
    return "\n".join(lines) + "\n"


def _cell(figures: Result | None) -> str:
    """Such as "84.2 (78 to 89), colour 95, 139 objects"."""
    if figures is None:
        return ""
    last = figures["after_last"]
    both, colour = last["both"], last["colour"]
    if both["accuracy"] is None:
        return "no questions"
    low, high = (round(100 * bound) for bound in both["interval"])
    share = f"{100 * both['accuracy']:.1f} ({low} to {high})"
    return f"{share}, colour {100 * colour['accuracy']:.0f}, {both['objects']} objects"


def _points(figures: Result | None) -> list[tuple[float, float]]:
    """Percentage right by how often an object has been out of sight."""
    if figures is None:
        return []
    both = [one["both"] for one in figures["passes"]]
    return [(n + 1, 100 * one["accuracy"]) for n, one in enumerate(both) if one["accuracy"] is not None]
