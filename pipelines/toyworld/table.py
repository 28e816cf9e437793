"""The study's results as a Markdown table and as pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from arl2.toyworld.study.rows import MAIN, PARTS
from pipelines.media.plots import heat_map, line_chart, save_png
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, parse_json

Result = dict[str, Any]
TEACHER = "teacher"
READ: dict[str, Callable[[Result], float | None]] = {
    "right": lambda exam: exam["continued"]["after"]["both"]["accuracy"],
    "colour": lambda exam: exam["continued"]["after"]["colour"]["accuracy"],
    "before": lambda exam: exam["continued"]["before"]["both"]["accuracy"],
    "same": lambda exam: exam["generated"]["same_object"]["both"]["accuracy"],
    "obeyed": lambda exam: exam["obeyed"]["both"]["accuracy"],
    "right 4×": lambda exam: exam["long"]["after_last"]["both"]["accuracy"] if "long" in exam else None,
    "MSE": lambda exam: exam["continued"]["deviation"]["latent_mse"],
    "PSNR": lambda exam: exam["continued"]["deviation"]["psnr"],
    "flicker": lambda exam: _flicker(exam["continued"]["deviation"]),
    "MSE 4×": lambda exam: exam["long"]["deviation"]["latent_mse"] if "long" in exam else None,
    "PSNR 4×": lambda exam: exam["long"]["deviation"]["psnr"] if "long" in exam else None,
    "flicker 4×": lambda exam: _flicker(exam["long"]["deviation"]) if "long" in exam else None,
}
ACCURACIES = ("right", "colour", "before", "same", "obeyed", "right 4×")


def _flicker(deviation: Mapping[str, float]) -> float:
    """Difference from the teacher's, in thousandths: positive where the video is stiller."""
    return 1000 * (deviation["flicker"] - deviation["teacher_flicker"])


def read_results(folder: Path) -> dict[str, list[Result]]:
    """All results by name, one a seed.

    Raises:
        InputError: there are none, or one is damaged.
    """
    results: dict[str, list[Result]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            page = parse_json(path.read_text())
            results.setdefault(page["name"], []).append(page)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"cannot read {path} ({error}): remove it, and run its part again") from error
    if not results:
        raise InputError(f"no results in {folder}: run the other parts first")
    return results


def ordered(results: Mapping[str, Sequence[Result]]) -> list[tuple[str, list[str]]]:
    """Names of the rows that there are, part by part; sets of layers last."""
    parts = [(part, [row.name for row in rows if row.name in results]) for part, rows in PARTS.items()]
    parts.append(("selection", sorted(name for name in results if name.startswith("layers_"))))
    return [(part, names) for part, names in parts if names]


def figure(pages: Sequence[Result], read: Callable[[Result], float | None]) -> list[float]:
    """A figure of every seed that has it."""
    values = [read(page["exam"]) for page in pages]
    return [value for value in values if value is not None]


def shown(values: Sequence[float], digits: int = 3) -> str:
    """A mean, and its range if there are several seeds."""
    if not values:
        return "–"
    spread = f" ({min(values):.{digits}f}–{max(values):.{digits}f})" if len(values) > 1 else ""
    return f"{mean(values):.{digits}f}{spread}"


def interval(pages: Sequence[Result]) -> str:
    """Of the first seed's memory probe."""
    low, high = pages[0]["exam"]["continued"]["after"]["both"]["interval"]
    return f"{max(low, 0):.2f}–{high:.2f}"


def kept_share(results: Mapping[str, Sequence[Result]], name: str, measure: str = "right") -> list[float]:
    """Accuracy above chance as a share of the teacher's."""
    if TEACHER not in results:
        return []
    chance = results[TEACHER][0]["exam"]["continued"]["after"]["both"]["chance"]
    teacher = mean(figure(results[TEACHER], READ[measure]) or [math.nan]) - chance
    return [(value - chance) / teacher for value in figure(results[name], READ[measure]) if teacher > 0]


def row_of(results: Mapping[str, Sequence[Result]], name: str) -> list[str]:
    """The cells of a row."""
    pages = results[name]
    first = pages[0]
    training = first["training"] or {}
    digits = {"PSNR": 1, "PSNR 4×": 1, "MSE": 4, "MSE 4×": 4, "flicker": 2, "flicker 4×": 2}
    cells = {key: shown(figure(pages, read), digits.get(key, 3)) for key, read in READ.items()}
    return [
        name,
        ", ".join(map(str, first["row"]["layers"])) or "–",
        f"{first['memory_bytes_1x'] / 1024:.0f} / {first['memory_bytes_4x'] / 1024:.0f}",
        str(training.get("steps", "–")),
        f"{training['seconds']:.0f}" if training else "–",
        cells["right"],
        interval(pages),
        shown(kept_share(results, name), 2),
        cells["right 4×"],
        shown(kept_share(results, name, "right 4×"), 2),
        *(cells[key] for key in ("colour", "before", "same", "obeyed")),
        *(cells[key] for key in ("MSE", "PSNR", "flicker", "MSE 4×", "PSNR 4×", "flicker 4×")),
    ]


HEADINGS = (
    *("row", "hybrid layers", "KiB at 1× / 4×", "steps", "seconds", "right", "95 %", "kept", "right 4×", "kept 4×"),
    *("colour", "before", "same", "obeyed", "MSE", "PSNR", "flicker", "MSE 4×", "PSNR 4×", "flicker 4×"),
)


def markdown(results: Mapping[str, Sequence[Result]]) -> str:
    """All tables."""
    lines: list[str] = []
    for part, names in ordered(results):
        lines += [f"### {part}", "", *_table(HEADINGS, [row_of(results, name) for name in names]), ""]
    if "selection" in results:
        lines += _selection(results)
    if "ceilings" in results:
        lines += ["### ceilings", ""]
        for name, page in results["ceilings"][0]["ceilings"].items():
            lines.append(f"- {name}: {page['accuracy']:.3f}")
        lines.append("")
    some = next(iter(results.values()))[0]
    return "\n".join([*lines, f"{some['device']}, torch {some['torch']}, commit {some['git_commit']}", ""])


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows)]


def _selection(results: Mapping[str, Sequence[Result]]) -> list[str]:
    """Which layers each method chose, and what came of it."""
    page = results["selection"][0]
    rows = []
    for method, layers in page["sets"].items():
        pages = results.get(page["rows"][method], [])
        cells = [shown(figure(pages, READ[key]), 4 if key == "MSE" else 3) for key in ("right", "right 4×", "MSE")]
        rows.append([method, ", ".join(map(str, layers)), *cells])
    title = f"### methods of selection, {page['share']} % of the layers"
    return [title, "", *_table(("method", "layers", "right", "right 4×", "MSE"), rows), ""]


def draw(results: Mapping[str, Sequence[Result]], folder: Path) -> None:
    """Accuracies of all rows as a map, and deviation by block of the ratios as curves."""
    names = [name for _, some in ordered(results) for name in some]
    values = {name: [mean(figure(results[name], READ[key]) or [math.nan]) for key in ACCURACIES] for name in names}
    save_png(heat_map(values, ACCURACIES, "Right colour and shape"), folder / "accuracies.png")
    curves = {}
    for name in names:
        if name in ("teacher_other_noise", "local_only", "hybrid_25", "hybrid_50", MAIN, "hybrid_100"):
            exam = results[name][0]["exam"]
            form = exam["long"] if "long" in exam else exam["generated"]
            curves[name] = [(float(block), mse) for block, mse in enumerate(form["deviation"]["latent_mse_by_block"])]
    if curves:
        title = "Squared difference of latents from the teacher's, same noise"
        save_png(line_chart(curves, title, "block that was made", "latent MSE", log_y=True), folder / "deviation.png")


def write_report(results_folder: Path, folder: Path) -> Path:
    """Write the tables and the pictures; returns the tables' file.

    Raises:
        InputError: there is nothing to report.
    """
    results = read_results(results_folder)
    draw(results, folder)
    path = folder / "tables.md"
    with atomic_path(path) as temporary:
        temporary.write_text(markdown(results))
    return path
