"""Charts as pictures, drawn with Pillow: curves over steps, and maps of numbers over layers."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from wan.utils.errors import InputError
from wan.utils.files import atomic_path

Point = tuple[float, float]
Colour = tuple[int, int, int]

PAGE, INK, FAINT, GRID = (255, 255, 255), (36, 41, 47), (110, 119, 129), (225, 228, 232)
PALETTE: tuple[Colour, ...] = (
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (230, 159, 0),
    (86, 180, 233),
    INK,
)
"""Okabe and Ito's colours, which people with any kind of colour vision tell apart."""
PALE_BLUE = (166, 206, 232)
LOW, HIGH = (255, 255, 255), (0, 92, 150)
IN_FONT = str.maketrans({"×": "x", "²": "2", "–": "-", "σ": "sigma"})
"""Pillow's own font lacks what the project likes to write."""
SCALE = 2
"""Everything is drawn this much larger and then reduced: Pillow's lines have steps."""
WIDTH, HEIGHT = 900, 500
LEFT, RIGHT, TOP, BOTTOM = 80, 24, 72, 52
CELL_WIDTH, CELL_HEIGHT, PAD = 58, 28, 12


@dataclass(frozen=True)
class Curve:
    """One line of a chart.

    Attributes:
        points: (x, y) in order of x; the line is broken where y cannot be drawn.
        name: in the legend; empty for none.
    """

    name: str
    points: Sequence[Point]
    colour: Colour
    width: float = 2.0


class Page:
    """A picture being drawn, in points of the finished one."""

    def __init__(self, width: float, height: float) -> None:
        self._image = Image.new("RGB", (round(width) * SCALE, round(height) * SCALE), PAGE)
        self._draw = ImageDraw.Draw(self._image)

    def line(self, points: Sequence[Point], colour: Colour, width: float = 1.0) -> None:
        """Through all points; a single one becomes a dot."""
        scaled = [(x * SCALE, y * SCALE) for x, y in points]
        if len(scaled) > 1:
            self._draw.line(scaled, colour, round(width * SCALE), joint="curve")
        else:
            self._draw.circle(scaled[0], (width + 1) * SCALE, fill=colour)

    def box(self, left: float, top: float, right: float, bottom: float, colour: Colour) -> None:
        """A filled rectangle, its right and bottom edges not included."""
        self._draw.rectangle((left * SCALE, top * SCALE, right * SCALE - 1, bottom * SCALE - 1), colour)

    def text(self, x: float, y: float, text: str, size: int, colour: Colour = INK, anchor: str = "mm") -> None:
        """Anchored as Pillow's own; "mm" is centred."""
        font, written = ImageFont.load_default(size * SCALE), text.translate(IN_FONT)
        self._draw.text((x * SCALE, y * SCALE), written, colour, font, anchor=anchor)

    def finished(self) -> Image.Image:
        """The picture in its own size."""
        return self._image.reduce(SCALE)


def text_width(text: str, size: int) -> float:
    """Of a line of text, in points."""
    return ImageFont.load_default(size * SCALE).getlength(text.translate(IN_FONT)) / SCALE


def round_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between two numbers, about `most` of them."""
    least = (high - low) / most
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten between two positive numbers; in a narrow range also twice and five times these, or round ticks."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    sparse = max(1, len(powers) // 8)
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in powers[::sparse] for factor in factors]
        ticks = [tick for tick in ticks if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(ticks) >= 3:
            return ticks
    return round_ticks(low, high)


def tick_label(value: float) -> str:
    """A round number as people write it."""
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e6:
        return f"{value:.10g}"
    mantissa, power = f"{value:.3e}".split("e")
    return f"{float(mantissa):g}e{int(power)}"


def _axis_range(values: Sequence[float], log: bool) -> tuple[float, float]:
    """The least and largest value, with some air, so that no range is empty."""
    low, high = min(values), max(values)
    if log:
        air = max((math.log10(high) - math.log10(low)) * 0.04, 0.02)
        return low / 10**air, high * 10**air
    air = (high - low) * 0.04 or abs(low) * 0.05 or 1.0
    return low - air, high + air


def _runs(points: Sequence[Point], log_y: bool) -> list[list[Point]]:
    """Stretches of points that can be drawn."""
    runs: list[list[Point]] = [[]]
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y):
            runs[-1].append((x, y))
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _draw_axes(
    page: Page,
    place_x: Callable[[float], float],
    place_y: Callable[[float], float],
    ticks: tuple[Sequence[float], Sequence[float]],
    frame: tuple[float, float, float, float],
) -> None:
    left, top, right, bottom = frame
    for tick in ticks[1]:
        page.line([(left, place_y(tick)), (right, place_y(tick))], GRID)
        page.text(left - 8, place_y(tick), tick_label(tick), 12, FAINT, "rm")
    for tick in ticks[0]:
        page.line([(place_x(tick), bottom), (place_x(tick), bottom + 5)], FAINT)
        page.text(place_x(tick), bottom + 8, tick_label(tick), 12, FAINT, "mt")
    page.line([(left, top), (left, bottom), (right, bottom)], FAINT)


def _draw_legend(page: Page, curves: Sequence[Curve], left: float, top: float) -> None:
    for row, curve in enumerate(curves):
        y = top + 8 + 20 * row
        page.line([(left, y), (left + 20, y)], curve.colour, 3)
        page.text(left + 28, y, curve.name, 12, INK, "lm")


def draw_curves(curves: Sequence[Curve], title: str, x_label: str, y_label: str, log_y: bool) -> Image.Image:
    """A chart of some curves; see `line_chart`."""
    runs = [(curve, run) for curve in curves for run in _runs(curve.points, log_y)]
    points = [point for _, run in runs for point in run]
    if not points:
        raise InputError(f"chart {title!r}: no number that can be drawn{' on a log scale' if log_y else ''}")
    named = [curve for curve in curves if curve.name]
    legend = 52 + max(text_width(curve.name, 12) for curve in named) if len(named) > 1 else 0
    frame = (LEFT, TOP, WIDTH - RIGHT, HEIGHT - BOTTOM)
    left, top, right, bottom = frame
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low_x, high_x = (min(xs), max(xs)) if min(xs) < max(xs) else _axis_range(xs, False)
    low_y, high_y = _axis_range(ys, log_y)
    height: Callable[[float], float] = math.log10 if log_y else float

    def place_x(x: float) -> float:
        return left + (right - left) * (x - low_x) / (high_x - low_x)

    def place_y(y: float) -> float:
        return bottom - (bottom - top) * (height(y) - height(low_y)) / (height(high_y) - height(low_y))

    page = Page(WIDTH + legend, HEIGHT)
    page.text(PAD, 22, title, 18, INK, "lm")
    page.text(PAD, 52, y_label + (" (log scale)" if log_y else ""), 13, FAINT, "lm")
    page.text((left + right) / 2, HEIGHT - 16, x_label, 13, FAINT)
    ticks = (round_ticks(low_x, high_x, 8), log_ticks(low_y, high_y) if log_y else round_ticks(low_y, high_y))
    _draw_axes(page, place_x, place_y, ticks, frame)
    for curve, run in runs:
        page.line([(place_x(x), place_y(y)) for x, y in run], curve.colour, curve.width)
    if legend:
        _draw_legend(page, named, right + 20, top)
    return page.finished()


def line_chart(
    series: Mapping[str, Sequence[Point]], title: str, x_label: str, y_label: str, log_y: bool = False
) -> Image.Image:
    """Curves over a common axis, with a legend if there are several.

    Args:
        series: (x, y) points of every curve, in order of x. Numbers that are not finite (or, on a log scale, not
            positive) leave a gap.
        title, x_label, y_label: what is shown.
        log_y: whether equal ratios of y are equally high.

    Raises:
        InputError: no point can be drawn.
    """
    curves = [
        Curve(name, points, PALETTE[number % len(PALETTE)]) for number, (name, points) in enumerate(series.items())
    ]
    return draw_curves(curves, title, x_label, y_label, log_y)


def cell_label(value: float) -> str:
    """A number in at most 8 characters."""
    if not math.isfinite(value):
        return "n/a"
    magnitude = abs(value)
    if value == 0 or 1e-3 <= magnitude < 9999.5:
        return f"{value:.3g}" if magnitude < 999.5 else f"{value:.0f}"
    mantissa, power = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(power)}"


def _shade(value: float, low: float, high: float) -> tuple[Colour, Colour]:
    """Colours of a cell and of what is written on it; a row of equal numbers is pale."""
    if not math.isfinite(value):
        return PAGE, FAINT
    share = (value - low) / (high - low) if high > low else 0.0
    red, green, blue = (round(a + (b - a) * share) for a, b in zip(LOW, HIGH, strict=True))
    return (red, green, blue), PAGE if share > 0.55 else INK


def _finite_range(values: Sequence[float]) -> tuple[float, float]:
    finite = [value for value in values if math.isfinite(value)] or [0.0]
    return min(finite), max(finite)


def draw_map(values: Mapping[str, Sequence[float]], columns: Sequence[str], title: str, own_scale: bool) -> Image.Image:
    """A table whose cells are coloured by one scale for all rows, or by one for each; see `heat_map`."""
    wrong = [name for name, row in values.items() if len(row) != len(columns)]
    if wrong or not values or not columns:
        raise InputError(f"heat map {title!r}: every row needs one number for each of {len(columns)} columns {wrong}")
    left = PAD + max(text_width(name, 13) for name in values) + PAD
    width = max(left + CELL_WIDTH * len(columns) + PAD, text_width(title, 18) + 2 * PAD)
    page = Page(width, TOP + CELL_HEIGHT * len(values) + PAD)
    page.text(PAD, 22, title, 18, INK, "lm")
    for column, name in enumerate(columns):
        page.text(left + CELL_WIDTH * (column + 0.5), TOP - 12, name, 12, FAINT)
    common = _finite_range([value for row in values.values() for value in row])
    for number, (name, row) in enumerate(values.items()):
        top = TOP + CELL_HEIGHT * number
        page.text(left - PAD, top + CELL_HEIGHT / 2, name, 13, INK, "rm")
        scale = _finite_range(row) if own_scale else common
        for column, value in enumerate(row):
            x, (colour, ink) = left + CELL_WIDTH * column, _shade(value, *scale)
            page.box(x, top, x + CELL_WIDTH - 1, top + CELL_HEIGHT - 1, colour)
            page.text(x + CELL_WIDTH / 2, top + CELL_HEIGHT / 2, cell_label(value), 12, ink)
    return page.finished()


def heat_map(values: Mapping[str, Sequence[float]], columns: Sequence[str], title: str) -> Image.Image:
    """A table of numbers, each written in a cell that is the darker the larger it is.

    Args:
        values: one number a column for every row; "n/a" stands for one that is not finite.
        columns: their names.
        title: what is shown.

    Raises:
        InputError: nothing to show, or a row of another length.
    """
    return draw_map(values, columns, title, own_scale=False)


def save_png(image: Image.Image, path: Path) -> None:
    """Write a picture as PNG, whole or not at all.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    with atomic_path(path) as temporary:
        image.save(temporary, format="png")


def smoothed(points: Sequence[Point]) -> list[Point]:
    """The mean of every point and its neighbours, over a fiftieth of all; at the ends over those that there are."""
    reach = max(1, len(points) // 100)
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    windows = [(max(0, i - reach), min(len(points), i + reach + 1)) for i in range(len(points))]
    return [(points[i][0], (sums[stop] - sums[start]) / (stop - start)) for i, (start, stop) in enumerate(windows)]


def read_losses(jsonl: Path) -> list[Point]:
    """(step, loss) of all lines {"step": int, "loss": float, …} with a finite loss, in order of steps.

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
            page = json.loads(line)
            step, loss = int(page["step"]), float(page["loss"])
        except (ValueError, KeyError, TypeError):
            continue
        if math.isfinite(loss):
            losses[step] = loss
    return sorted(losses.items())


def plot_losses(jsonl: Path, png: Path) -> None:
    """Draw the losses of a run (see `read_losses`), raw and smoothed, on a log scale if they allow it.

    Nothing is drawn before the first finite loss.
    """
    raw = read_losses(jsonl)
    if not raw:
        return
    curves = [Curve("loss", raw, PALE_BLUE, 1.0), Curve("smoothed", smoothed(raw), PALETTE[0], 2.5)]
    log_y = all(loss > 0 for _, loss in raw)
    save_png(draw_curves(curves, "Training loss", "step", "loss", log_y), png)


def plot_layers(reports: Mapping[str, Mapping[int, float]], png: Path) -> None:
    """Draw what was measured in layers: a row a quantity, coloured by a scale of its own, and a column a layer.

    Nothing is drawn if nothing was measured.
    """
    layers = sorted({layer for row in reports.values() for layer in row})
    if not layers:
        return
    values = {name: [row.get(layer, math.nan) for layer in layers] for name, row in reports.items()}
    save_png(draw_map(values, [str(layer) for layer in layers], "By layer (each row scaled by itself)", True), png)
