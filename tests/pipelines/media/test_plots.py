"""Charts: ticks, scales, what is skipped, and what the pixels show."""

import json
import math
from pathlib import Path

import pytest
from PIL import Image

from pipelines.media.plots import (
    HIGH,
    LOW,
    PALE_BLUE,
    PALETTE,
    cell_label,
    heat_map,
    line_chart,
    log_ticks,
    plot_layers,
    plot_losses,
    read_losses,
    round_ticks,
    smoothed,
    tick_label,
)
from wan.utils.errors import InputError


def rows_of(image: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """Heights at which a colour stands."""
    pixels = image.load()
    return [y for y in range(image.height) if any(pixels[x, y] == colour for x in range(image.width))]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-3, 3, [-3, -2, -1, 0, 1, 2, 3]), (0, 6000, [1000 * i for i in range(7)])],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert round_ticks(low, high) == pytest.approx(expected)


def test_log_ticks_fit_the_range() -> None:
    assert log_ticks(0.005, 20) == pytest.approx([0.01, 0.1, 1, 10])
    assert log_ticks(0.4, 6) == pytest.approx([0.5, 1, 2, 5])
    assert log_ticks(1.01, 1.05) == pytest.approx([1.01, 1.02, 1.03, 1.04, 1.05])
    assert 3 <= len(log_ticks(1e-30, 1e30)) <= 12


def test_labels_are_short() -> None:
    assert [tick_label(value) for value in (0, 0.2, 6000, 0.30000000000000004, 2e-5)] == [
        "0",
        "0.2",
        "6000",
        "0.3",
        "2e-5",
    ]
    assert [cell_label(value) for value in (0, 0.12345, 999.7, 12345, 1e-7, math.nan)] == [
        "0",
        "0.123",
        "1000",
        "1.2e4",
        "1.0e-7",
        "n/a",
    ]
    assert all(len(cell_label(sign * m * 10.0**p)) <= 8 for sign in (1, -1) for m in (1, 9.996) for p in range(-12, 12))


def test_a_curve_goes_where_its_numbers_are() -> None:
    flat = line_chart({"a": [(0, 1), (1, 1)], "b": [(0, 3), (1, 3)], "c": [(0, 9), (1, 9)]}, "t", "x", "y")
    log = line_chart({"a": [(0, 1), (1, 1)], "b": [(0, 3), (1, 3)], "c": [(0, 9), (1, 9)]}, "t", "x", "y", log_y=True)
    for image, middle in ((flat, 0.25), (log, 0.5)):
        a, b, c = (sorted(curve_rows(image, colour))[0] for colour in PALETTE[:3])
        assert c < b < a and (a - b) / (a - c) == pytest.approx(middle, abs=0.02)


def curve_rows(image: Image.Image, colour: tuple[int, int, int]) -> list[int]:
    """Heights at which a colour stands at half the width of the axes: there is no legend there."""
    pixels = image.load()
    return [y for y in range(image.height) if pixels[400, y] == colour]


def test_what_cannot_be_drawn_leaves_a_gap() -> None:
    image = line_chart({"a": [(0, 1), (1, math.nan), (2, 1)], "b": [(0, 2), (1, 0), (2, 2)]}, "t", "x", "y", log_y=True)
    assert not any(curve_rows(image, colour) for colour in PALETTE[:2]) and rows_of(image, PALETTE[0])
    with pytest.raises(InputError, match="no number"):
        line_chart({"a": [(0, math.inf)], "b": [(0, -1)]}, "t", "x", "y", log_y=True)


def test_a_heat_map_is_darkest_where_it_is_largest() -> None:
    image = heat_map({"low": [1.0, 2.0], "high": [3.0, 5.0]}, ["0", "1"], "t")
    assert rows_of(image, HIGH) and max(rows_of(image, HIGH)) - min(rows_of(image, HIGH)) < 28
    with pytest.raises(InputError, match="one number"):
        heat_map({"a": [1.0]}, ["0", "1"], "t")
    with pytest.raises(InputError, match="one number"):
        heat_map({}, ["0"], "t")


def test_losses_of_a_killed_and_resumed_run_are_read(tmp_path: Path) -> None:
    lines = [{"step": step, "loss": 2.0 - step / 10, "lr": 1} for step in range(4)] + [{"step": 3, "loss": 9.0}]
    text = "\n".join(json.dumps(line) for line in [*lines, {"step": 4, "loss": None}, {"step": 5, "loss": math.nan}])
    (tmp_path / "losses.jsonl").write_text(text + '\n{"step": 6, "lo')
    assert read_losses(tmp_path / "losses.jsonl") == [(0, 2.0), (1, 1.9), (2, 1.8), (3, 9.0)]
    plot_losses(tmp_path / "losses.jsonl", tmp_path / "deep" / "losses.png")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["losses.png"]
    image = Image.open(tmp_path / "deep" / "losses.png").convert("RGB")
    assert rows_of(image, PALETTE[0]) and rows_of(image, PALE_BLUE)


def test_nothing_to_draw_is_no_error(tmp_path: Path) -> None:
    plot_losses(tmp_path / "losses.jsonl", tmp_path / "losses.png")
    plot_layers({}, tmp_path / "layers.png")
    assert not list(tmp_path.iterdir())


def test_smoothing_keeps_lines_and_calms_noise() -> None:
    line = [(float(x), 3.0 + x) for x in range(1000)]
    assert [y for _, y in smoothed(line)[10:-10]] == pytest.approx([y for _, y in line[10:-10]])
    noisy = [(float(x), 1.0 + (-1) ** x) for x in range(1000)]
    assert all(abs(y - 1) < 0.1 for _, y in smoothed(noisy)[10:-10])


def test_every_row_of_layers_has_a_scale_of_its_own(tmp_path: Path) -> None:
    plot_layers({"small": {0: 0.001, 2: 0.002}, "large": {0: 500.0, 1: 400.0, 2: 100.0}}, tmp_path / "layers.png")
    image = Image.open(tmp_path / "layers.png").convert("RGB")
    dark = rows_of(image, HIGH)
    assert max(dark) - min(dark) > 28 and LOW == (255, 255, 255)
