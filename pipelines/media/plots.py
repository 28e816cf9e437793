"""Charts as PNG files, drawn by matplotlib: curves over steps, and maps of numbers over layers.

matplotlib is imported when a chart is drawn, and only its objects are used: no global figure, no display.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wan.utils.errors import InputError
from wan.utils.files import atomic_path, parse_json

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Point = tuple[float, float]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#24292f")
"""Colours of Okabe and Ito, which people with any kind of colour vision tell apart, and near-black."""
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v")
MAX_LINES = 10
"""Curves per panel. Each has a colour, a dash and a marker that no other has together."""
MAX_MARKED_POINTS = 60
"""Points up to which a curve has a marker at each; beyond, only points without a neighbour have one."""
PALE = "#a6cee8"
GRID = "#e1e4e8"
COLOUR_MAP = ("#ffffff", "#005c96")
"""Smallest and largest value of a map."""
DARK = 0.55
"""Fraction of a map's range from which text in a cell is white."""
PANEL_SIZE = (9.0, 5.0)
CELL_SIZE = (0.58, 0.32)
"""Inches."""
DPI = 100


def line_chart(
    series: Mapping[str, Sequence[Point]], title: str, x_label: str, y_label: str, log_y: bool = False
) -> "Figure":
    """Curves over a common axis, with a legend if there are several; more than `MAX_LINES` fill several panels.

    Args:
        series: (x, y) points of every curve, in order of x. Numbers that are not finite (or, on a log scale, not
            positive) leave a gap.
        title, x_label, y_label: labels of the chart.
        log_y: whether equal ratios of y are equally high.

    Raises:
        InputError: no point can be drawn.
    """
    drawable = {name: [_drawable(point, log_y) for point in points] for name, points in series.items()}
    if not any(math.isfinite(y) for points in drawable.values() for _, y in points):
        raise InputError(f"chart {title!r}: no number that can be drawn{' on a log scale' if log_y else ''}")
    panels = _panels(series)
    figure = _new_figure(PANEL_SIZE[0], PANEL_SIZE[1] * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)
    for axes, names in zip(grid[:, 0], panels, strict=True):
        for number, name in enumerate(names):
            _draw_curve(axes, name, drawable[name], number)
        _finish_axes(axes, y_label, log_y)
        if len(series) > 1:
            axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    grid[0, 0].set_title(title, loc="left")
    grid[-1, 0].set_xlabel(x_label)
    return figure


def _panels(series: Mapping[str, Sequence[Point]]) -> list[list[str]]:
    """Names of the curves of each panel, as evenly divided as whole panels allow."""
    names = iter(series)
    count = -(-len(series) // MAX_LINES)
    size, longer = divmod(len(series), count)
    return [list(islice(names, size + (number < longer))) for number in range(count)]


def _new_figure(width: float, height: float) -> "Figure":
    """Figure of a size in inches, which belongs to nobody else."""
    from matplotlib.figure import Figure  # a third of a second, which nothing but a chart needs

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _drawable(point: Point, log_y: bool) -> Point:
    """The point, with NaN as y if it cannot be drawn."""
    x, y = point
    return x, y if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y) else math.nan


def _draw_curve(axes: "Axes", name: str, points: Sequence[Point], number: int, **style: Any) -> None:
    """Add a curve in the style of its number; `style` replaces parts of it."""
    finite = [False, *(math.isfinite(y) for _, y in points), False]
    marked = [
        place
        for place in range(len(points))
        if finite[place + 1] and (len(points) <= MAX_MARKED_POINTS or not (finite[place] or finite[place + 2]))
    ]
    usual: dict[str, Any] = {
        "color": PALETTE[number % len(PALETTE)],
        "linestyle": DASHES[number % len(DASHES)],
        "marker": MARKERS[number % len(MARKERS)],
        "markersize": 4,
        "linewidth": 2.0,
    }
    xs, ys = [x for x, _ in points], [y for _, y in points]
    axes.plot(xs, ys, label=name, markevery=marked, **(usual | style))


def _finish_axes(axes: "Axes", y_label: str, log_y: bool) -> None:
    """Add scale, label and grid."""
    if log_y:
        axes.set_yscale("log")
    axes.set_ylabel(y_label + (" (log scale)" if log_y else ""))
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def cell_label(value: float) -> str:
    """A number in at most 8 characters."""
    if not math.isfinite(value):
        return "n/a"
    magnitude = abs(value)
    if value == 0 or 1e-3 <= magnitude < 9999.5:
        return f"{value:.3g}" if magnitude < 999.5 else f"{value:.0f}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(power)}"


def fractions(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Place of every number between the smallest and the largest finite one, 0 to 1; equal numbers are at 0."""
    finite = [value for row in values for value in row if math.isfinite(value)] or [0.0]
    low, span = min(finite), (max(finite) - min(finite)) or 1.0
    return [[(value - low) / span if math.isfinite(value) else math.nan for value in row] for row in values]


def draw_map(values: Mapping[str, Sequence[float]], columns: Sequence[str], title: str, own_scale: bool) -> "Figure":
    """Draw a table whose cells are coloured by one scale for all rows, or by one per row; see `heat_map`."""
    wrong = [name for name, row in values.items() if len(row) != len(columns)]
    if wrong or not values or not columns:
        raise InputError(f"heat map {title!r}: every row needs one number for each of {len(columns)} columns {wrong}")
    from matplotlib.colors import LinearSegmentedColormap

    rows = list(values.values())
    places = [fractions([row])[0] for row in rows] if own_scale else fractions(rows)
    width = CELL_SIZE[0] * len(columns) + 0.1 * max(len(name) for name in values) + 0.3
    figure = _new_figure(max(width, 0.1 * len(title) + 0.5), CELL_SIZE[1] * len(rows) + 0.8)
    axes = figure.subplots()
    colours = LinearSegmentedColormap.from_list("white to blue", COLOUR_MAP)
    axes.pcolormesh(places, cmap=colours, vmin=0.0, vmax=1.0, edgecolors="white", linewidth=1.0)
    for y, (row, places_of_row) in enumerate(zip(rows, places, strict=True)):
        for x, (value, place) in enumerate(zip(row, places_of_row, strict=True)):
            ink = "white" if place > DARK else PALETTE[-1]
            axes.text(x + 0.5, y + 0.5, cell_label(value), ha="center", va="center", color=ink, fontsize=8)
    axes.set_xticks([x + 0.5 for x in range(len(columns))], columns)
    axes.set_yticks([y + 0.5 for y in range(len(rows))], list(values))
    axes.tick_params(length=0, top=False, labeltop=True, bottom=False, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.invert_yaxis()
    figure.suptitle(title)
    return figure


def heat_map(values: Mapping[str, Sequence[float]], columns: Sequence[str], title: str) -> "Figure":
    """A table of numbers, each written in a cell that is the darker the larger it is.

    Args:
        values: one number per column for every row; "n/a" stands for one that is not finite.
        columns: their names.
        title: label of the table.

    Raises:
        InputError: nothing to show, or a row of another length.
    """
    return draw_map(values, columns, title, own_scale=False)


def save_png(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all; the same figure gives the same bytes.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Mean of every point and its finite neighbours, over a fiftieth of all; points that are not finite stay so."""
    reach = max(1, len(points) // 100)
    sums, counts = [0.0], [0]
    for _, y in points:
        finite = math.isfinite(y)
        sums.append(sums[-1] + (y if finite else 0.0))
        counts.append(counts[-1] + finite)
    result = []
    for place, (x, y) in enumerate(points):
        start, stop = max(0, place - reach), min(len(points), place + reach + 1)
        mean = (sums[stop] - sums[start]) / (counts[stop] - counts[start]) if math.isfinite(y) else math.nan
        result.append((x, mean))
    return result


def read_losses(jsonl: Path) -> list[Point]:
    """(step, loss) of all lines {"step": int, "loss": float or null, …}, in order of steps; NaN for skipped steps.

    Of lines of one step the last counts: a resumed run repeats some. What is no such line is skipped: a killed run
    may leave half a one. No file is an empty one.

    Raises:
        InputError: the file cannot be read.
    """
    losses: dict[int, float] = {}
    try:
        lines = jsonl.read_text().splitlines() if jsonl.exists() else []
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read losses from {jsonl}: {error}") from error
    for line in lines:
        try:
            record = parse_json(line)
            step, loss = int(record["step"]), record["loss"]
            losses[step] = float("nan" if loss is None else loss)
        except (ValueError, KeyError, TypeError):
            continue
    return sorted(losses.items())


def loss_chart(losses: Sequence[Point]) -> "Figure":
    """Losses of a run, raw and smoothed, on a log scale if they allow it; skipped steps leave a gap.

    Raises:
        InputError: no loss is finite.
    """
    log_y = all(loss > 0 for _, loss in losses if math.isfinite(loss))
    drawable = [_drawable(point, log_y) for point in losses]
    if not any(math.isfinite(loss) for _, loss in drawable):
        raise InputError("training loss: no number that can be drawn")
    figure = _new_figure(*PANEL_SIZE)
    axes = figure.subplots()
    _draw_curve(axes, "loss", drawable, 0, color=PALE, linewidth=1.0, markersize=2)
    _draw_curve(axes, "smoothed", smoothed(drawable), 0, linewidth=2.5, marker=None)
    _finish_axes(axes, "loss", log_y)
    axes.set_title("Training loss", loc="left")
    axes.set_xlabel("step")
    axes.legend(frameon=False)
    return figure


def plot_losses(jsonl: Path, png: Path) -> None:
    """Draw the losses of a run as `loss_chart` does, from what `read_losses` reads.

    Nothing is drawn before the first finite loss.
    """
    losses = read_losses(jsonl)
    if any(math.isfinite(loss) for _, loss in losses):
        save_png(loss_chart(losses), png)


def layer_map(reports: Mapping[str, Mapping[int, float]]) -> "Figure":
    """Map of measurements in layers: a row per quantity, coloured by a scale of its own, and a column per layer."""
    layers = sorted({layer for row in reports.values() for layer in row})
    values = {name: [row.get(layer, math.nan) for layer in layers] for name, row in reports.items()}
    return draw_map(values, [str(layer) for layer in layers], "By layer (each row scaled by itself)", own_scale=True)


def plot_layers(reports: Mapping[str, Mapping[int, float]], png: Path) -> None:
    """Draw what was measured in layers as `layer_map` does. Nothing is drawn if nothing was measured."""
    if any(reports.values()):
        save_png(layer_map(reports), png)
