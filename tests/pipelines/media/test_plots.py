"""Charts: what a figure holds, what is left out of it, and what is read for it."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image

from pipelines.media.plots import (
    COLOUR_MAP,
    MAX_LINES,
    cell_label,
    fractions,
    heat_map,
    layer_map,
    line_chart,
    loss_chart,
    plot_layers,
    plot_losses,
    read_losses,
    save_png,
    smoothed,
)
from wan.utils.errors import InputError


def lines(figure: Figure) -> list[Line2D]:
    return [line for axes in figure.axes for line in axes.lines]


def cell_colours(figure: Figure) -> list[str]:
    """Colours of the cells of a map, row by row."""
    (axes,) = figure.axes
    (mesh,) = axes.collections
    return [to_hex(colour) for row in mesh.to_rgba(mesh.get_array()) for colour in row]


def test_labels_are_short() -> None:
    assert [cell_label(value) for value in (0, 0.12345, 999.7, 12345, 1e-7, math.nan)] == [
        "0",
        "0.123",
        "1000",
        "1.2e4",
        "1.0e-7",
        "n/a",
    ]
    assert all(len(cell_label(sign * m * 10.0**p)) <= 8 for sign in (1, -1) for m in (1, 9.996) for p in range(-12, 12))


def test_a_chart_holds_its_curves_and_labels() -> None:
    series = {"a": [(0, 1), (1, 4)], "b": [(0, 3), (2, 3)]}
    for log_y in (False, True):
        figure = line_chart(series, "title", "x", "y", log_y=log_y)
        (axes,) = figure.axes
        drawn = {line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True)) for line in lines(figure)}
        assert drawn == series and axes.get_yscale() == ("log" if log_y else "linear")
        labels = (axes.get_title(loc="left"), axes.get_xlabel(), axes.get_ylabel())
        assert labels == ("title", "x", "y (log scale)" if log_y else "y")
        assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b"]
    assert line_chart({"a": [(0, 1)]}, "t", "x", "y").axes[0].get_legend() is None, "one curve needs no legend"


@pytest.mark.parametrize("number", [1, 2, 10, 11, 25])
def test_curves_of_a_panel_are_told_apart(number: int) -> None:
    figure = line_chart({str(curve): [(0, curve), (1, curve)] for curve in range(number)}, "t", "x", "y")
    assert [line.get_label() for line in lines(figure)] == [str(curve) for curve in range(number)]
    sizes = [len(axes.lines) for axes in figure.axes]
    assert max(sizes) <= MAX_LINES and max(sizes) - min(sizes) <= 1
    for axes in figure.axes:
        styles = {(line.get_color(), line.get_linestyle(), line.get_marker()) for line in axes.lines}
        assert len(styles) == len(axes.lines)
        assert all(a.get_color() != b.get_color() for a, b in zip(axes.lines, axes.lines[1:], strict=False))
        assert axes.get_ylim() == figure.axes[0].get_ylim(), "panels have one scale"


def test_what_cannot_be_drawn_leaves_a_gap() -> None:
    series = {"a": [(0, 1), (1, math.nan), (2, 1)], "b": [(0, 2), (1, 0), (2, 2)], "c": [(0, 3), (1, math.inf), (2, 1)]}
    for line in lines(line_chart(series, "t", "x", "y", log_y=True)):
        ys = list(line.get_ydata())
        assert math.isnan(ys[1]) and math.isfinite(ys[0]) and math.isfinite(ys[2])
        assert line.get_markevery() == [0, 2], "points without a neighbour are seen"
    assert list(lines(line_chart(series, "t", "x", "y"))[1].get_ydata()) == [2, 0, 2], "zero is a number without a log"
    long = [(float(x), math.nan if x in (50, 52) else 1.0) for x in range(100)]
    assert lines(line_chart({"a": long}, "t", "x", "y"))[0].get_markevery() == [51]
    for nothing in ({}, {"a": [(0, math.inf)], "b": [(0, -1)]}):
        with pytest.raises(InputError, match="no number"):
            line_chart(nothing, "t", "x", "y", log_y=True)


def test_a_heat_map_is_darkest_where_it_is_largest() -> None:
    figure = heat_map({"low": [1.0, 2.0], "high": [3.0, 5.0]}, ["0", "1"], "title")
    (axes,) = figure.axes
    colours = cell_colours(figure)
    assert colours[0] == COLOUR_MAP[0] and colours[3] == COLOUR_MAP[1] and len(set(colours)) == 4
    assert [text.get_text() for text in axes.texts] == ["1", "2", "3", "5"]
    assert [text.get_text() for text in axes.get_yticklabels()] == ["low", "high"]
    assert axes.yaxis_inverted() and figure.get_suptitle() == "title"
    with pytest.raises(InputError, match="one number"):
        heat_map({"a": [1.0]}, ["0", "1"], "t")
    with pytest.raises(InputError, match="one number"):
        heat_map({}, ["0"], "t")


def test_fractions_of_a_range() -> None:
    assert fractions([[1.0, 3.0], [2.0, 5.0]]) == [[0.0, 0.5], [0.25, 1.0]]
    assert fractions([[7.0, 7.0]]) == [[0.0, 0.0]]
    assert str(fractions([[math.nan, 1.0, 2.0, math.inf]])) == "[[nan, 0.0, 1.0, nan]]"


def test_every_row_of_layers_has_a_scale_of_its_own() -> None:
    figure = layer_map({"small": {0: 0.001, 2: 0.002}, "large": {0: 500.0, 1: 400.0, 2: 100.0}})
    colours = cell_colours(figure)
    assert colours[2] == colours[3] == COLOUR_MAP[1] and colours[0] == colours[5] == COLOUR_MAP[0]
    assert [text.get_text() for text in figure.axes[0].texts] == ["0.001", "n/a", "0.002", "500", "400", "100"]


def test_losses_of_a_killed_and_resumed_run_are_read(tmp_path: Path) -> None:
    records = [{"step": step, "loss": 2.0 - step / 10, "lr": 1} for step in range(4)] + [{"step": 3, "loss": 9.0}]
    text = "\n".join(json.dumps(record) for record in [*records, {"step": 4, "loss": None}, {"step": 5, "loss": 3}])
    (tmp_path / "losses.jsonl").write_text(text + '\n{"step": 6, "lo')
    losses = read_losses(tmp_path / "losses.jsonl")
    assert losses[:4] == [(0, 2.0), (1, 1.9), (2, 1.8), (3, 9.0)]
    assert losses[4][0] == 4 and math.isnan(losses[4][1]) and losses[5:] == [(5, 3.0)]
    plot_losses(tmp_path / "losses.jsonl", tmp_path / "deep" / "losses.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["losses.png"]


@pytest.mark.parametrize("skipped", [math.nan, math.inf])
def test_skipped_steps_leave_a_gap_in_the_losses(skipped: float) -> None:
    figure = loss_chart([(0, 2.0), (1, 1.5), (2, skipped), (3, 1.0)])
    raw, smooth = lines(figure)
    assert [line.get_label() for line in (raw, smooth)] == ["loss", "smoothed"]
    assert list(raw.get_ydata())[:2] == [2.0, 1.5] and figure.axes[0].get_yscale() == "log"
    assert all(math.isnan(line.get_ydata()[2]) and math.isfinite(line.get_ydata()[3]) for line in (raw, smooth))
    assert loss_chart([(0, 2.0), (1, -1.0)]).axes[0].get_yscale() == "linear"


def test_nothing_to_draw_is_no_error(tmp_path: Path) -> None:
    plot_losses(tmp_path / "losses.jsonl", tmp_path / "losses.png")
    plot_layers({}, tmp_path / "layers.png")
    plot_layers({"nothing": {}}, tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "losses.jsonl").write_text('{"step": 0, "loss": null}\n')
    plot_losses(tmp_path / "losses.jsonl", tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()


def test_smoothing_keeps_lines_and_calms_noise() -> None:
    line = [(float(x), 3.0 + x) for x in range(1000)]
    assert [y for _, y in smoothed(line)[10:-10]] == pytest.approx([y for _, y in line[10:-10]])
    noisy = [(float(x), 1.0 + (-1) ** x) for x in range(1000)]
    assert all(abs(y - 1) < 0.1 for _, y in smoothed(noisy)[10:-10])
    assert smoothed([(0, 1.0), (1, math.nan), (2, 5.0)])[0] == (0, 1.0), "what is no number does not count"


def test_a_figure_is_the_same_file_each_time(tmp_path: Path) -> None:
    for name in "ab":
        save_png(line_chart({"σ²": [(0, 1), (1, 2)], "×": [(0, 2)]}, "t", "x", "y"), tmp_path / f"{name}.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    image = Image.open(tmp_path / "a.png")
    assert image.size == (900, 500) and "Software" not in image.info
    assert len(image.convert("RGB").getcolors(1 << 20) or []) > 10
    with pytest.raises(InputError, match="cannot write"):
        save_png(line_chart({"a": [(0, 1)]}, "t", "x", "y"), Path("/proc/a.png"))


def test_matplotlib_is_imported_by_a_chart_only_and_keeps_no_figures() -> None:
    code = (
        "import sys, pipelines.media.plots as plots; assert 'matplotlib' not in sys.modules; "
        "plots.line_chart({'a': [(0, 1)]}, 't', 'x', 'y'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
