"""Tables of results: their values and links, published rows, what is missing, and the three formats."""

import csv
import io
import json
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.evaluation.scoring.metric import NOT_MEASURED
from pipelines.evaluation.suites import DIMENSIONS
from pipelines.evaluation.tables.build import TABLES, make_tables
from pipelines.evaluation.tables.formats import Format, written
from pipelines.evaluation.tables.sources import Kind, read_source, read_sources
from pipelines.evaluation.tables.table import Cell, Row, Table
from pipelines.evaluation.tables.vbench import QUALITY, SEMANTIC, total_of
from pipelines.provenance import ROOT
from wan.utils.errors import InputError

script = import_module("make_tables")
BENCHMARK = ROOT / "docs" / "results" / "benchmark" / "benchmark.json"
PROBE = ROOT / "docs" / "results" / "long_training" / "hybrid_75_4x.json"


def metric(mean: float, drift: float | None = None) -> dict[str, Any]:
    gone = {NOT_MEASURED: "the videos last 2 s"}
    about = {"direction": "higher", "value": {"mean": mean, "interval": [mean - 0.01, mean + 0.01]}}
    return about | {"drift": gone if drift is None else {"mean": drift, "interval": None}}


def scores(folder: Path, name: str, **metrics: dict[str, Any]) -> Path:
    page = {"videos": {}, "settings": {"drift_seconds": 5.0}, "metrics": metrics}
    path = folder / name
    path.write_text(json.dumps(page))
    return path


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """Scores of this project alone: nothing of VBench's."""
    flow = {"direction": "higher", NOT_MEASURED: "no weights of raft: see docs/evaluation.md"}
    metrics = {"subject_consistency": metric(0.9), "dynamic_degree": flow, "imaging_quality": metric(0.7, 0.05)}
    return scores(tmp_path, "own.json", **metrics)


@pytest.fixture
def read_back(tmp_path: Path) -> Path:
    values = {f"vbench_{name}": metric(0.2 + 0.01 * place) for place, name in enumerate(DIMENSIONS)}
    return scores(tmp_path, "vbench.json", **values, subject_consistency=metric(0.5))


def cells_of(table: Table, label: str) -> dict[str, Cell]:
    (row,) = [row for row in table.rows if row.label == label]
    return dict(zip(table.columns, row.cells, strict=True))


def test_speed_and_memory_are_those_of_the_benchmark() -> None:
    records = json.loads(BENCHMARK.read_text())["records"]
    efficiency, memory = make_tables([read_source(f"h100={BENCHMARK}")])
    measured = [row for row in efficiency.rows if not row.published]
    assert len(measured) == len(records) == len(memory.rows)
    assert len({row.label for row in measured}) == len(records), "labels tell all cases apart"

    def record(row: str, frames: int) -> dict[str, Any]:
        (found,) = [
            one
            for one in records
            if (one["case"]["row"], one["case"]["frames"]) == (row, frames)
            and not any(one["case"]["speed"][name] for name in ("fp8", "overlap_decoding"))
        ]
        return found["summary"]

    fast, full = record("hybrid-75-window", 249), record("softmax-full", 249)
    cells = cells_of(efficiency, "h100: hybrid-75-window, 249 frames")
    assert cells["transformer, fps"].value == fast["dit_fps"]["median"]
    ratio = fast["dit_fps"]["median"] / full["dit_fps"]["median"]
    assert cells["speed against full softmax"].value == pytest.approx(ratio) and ratio > 2
    apart = cells_of(efficiency, "h100: hybrid-75-window, 921 frames")
    assert apart["speed against full softmax"].value is not None
    assert apart["peak against full softmax"].value is None, "one with a decoder, one without"
    assert any("measured alike" in reason for reason in efficiency.reasons)
    theirs = [row for row in efficiency.rows if row.published]
    assert theirs and all("arXiv" in row.published for row in theirs)
    assert all(cell.source is None for row in theirs for cell in row.cells)
    assert all(cell.source == BENCHMARK for row in measured for cell in row.cells if cell.value is not None)


def test_own_values_have_no_totals_and_say_why(own: Path) -> None:
    (quality,) = make_tables([read_source(str(own))], ["quality"])
    cells = cells_of(quality, "own")
    assert cells["subject consistency"].text == "0.9000 (0.8900 to 0.9100)"
    assert cells["dynamic degree"].value is None and "raft" in cells["dynamic degree"].reason
    assert cells["aesthetic quality"].reason == "was not asked for"
    for total in ("quality, %", "semantic, %", "total, %"):
        assert cells[total].value is None and "more of VBench's own values" in cells[total].reason
    published = {row.label: row.cells[-1].value for row in quality.rows if row.published}
    assert published["Self Forcing"] == 84.31


def test_totals_are_those_of_vbench(read_back: Path) -> None:
    (quality,) = make_tables([read_source(str(read_back))], ["quality"])
    cells = cells_of(quality, "vbench")
    raw = {name: 0.2 + 0.01 * place for place, name in enumerate(DIMENSIONS)}
    assert cells["subject consistency"].value == raw["subject_consistency"], "VBench's own comes before ours"
    # Written out as VBench's scripts/cal_final_score.py does it.
    bounds = {name: (each.low, each.high, each.weight) for name, each in (QUALITY | SEMANTIC).items()}
    scaled = {name: (raw[name] - low) / (high - low) * weight for name, (low, high, weight) in bounds.items()}
    quality_score = sum(scaled[name] for name in QUALITY) / 6.5
    semantic_score = sum(scaled[name] for name in SEMANTIC) / 9
    expected = 100 * (4 * quality_score + semantic_score) / 5
    assert cells["total, %"].value == pytest.approx(expected)
    assert cells["quality, %"].value == pytest.approx(100 * quality_score)
    assert total_of({name: value for name, value in raw.items() if name != "color"}) is None
    assert set(QUALITY) | set(SEMANTIC) == set(DIMENSIONS)


def test_drift_and_ablations(own: Path, tmp_path: Path) -> None:
    other = scores(tmp_path, "no_gate.json", imaging_quality=metric(0.6, 0.2))
    sources = read_sources([f"the method={own}", f"no gate={other}"])
    assert [table.name for table in make_tables(sources)] == ["quality", "drift"]
    drift, ablations = make_tables(sources, ["drift", "ablations"])
    assert cells_of(drift, "no gate")["imaging quality"].value == 0.2
    assert cells_of(drift, "the method")["text alignment"].reason == "was not asked for"
    assert "first 5 s" in drift.notes[0]
    assert [row.label for row in ablations.rows] == ["the method", "no gate"]
    assert cells_of(ablations, "the method")["drift of imaging quality"].value == 0.05


def test_layers_of_several_methods_stand_side_by_side(tmp_path: Path) -> None:
    for name, order in (("replacement", 1), ("vbench", -1)):
        layers = {str(layer): float(order * layer) for layer in range(4)}
        page = {"method": name, "scores": {int(k): v for k, v in layers.items()}, "75": [0, 1, 2][::order] or []}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(page))
    sources = read_sources([str(tmp_path / "replacement.yaml"), str(tmp_path / "vbench.yaml")])
    (layers_page,) = make_tables(sources)
    assert len(layers_page.rows) == 4
    cells = cells_of(layers_page, "layer 3")
    assert cells["replacement"].value == 3 and cells["vbench"].value == -3
    assert cells["in the 75 % of replacement"].value == 0


def test_the_toy_worlds_memory_is_a_table() -> None:
    (recall,) = make_tables([read_source(f"4x={PROBE}")])
    cell = recall.rows[0].cells[0]
    assert recall.rows[0].label == "4x: t1" and cell.text == "75.5 (67.8 to 81.9)"


def markup(folder: Path) -> Table:
    file = folder / "a | b" / "x_1.json"
    file.parent.mkdir()
    file.touch()
    cell = Cell(0.5, (0.4, 0.6), file)
    rows = (
        Row("a|b_<i>&%[x](y)\nz", (cell, Cell(reason="no weights | none"))),
        Row("theirs", (Cell(84.31), Cell()), published="its authors"),
    )
    return Table("quality", "Quality", ("50 %", "x_y"), rows, ("A note.",))


def test_markdown_links_every_cell_and_keeps_markup_out(tmp_path: Path) -> None:
    text = written([markup(tmp_path)], Format.MARKDOWN, tmp_path)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 4
    assert all(len(re.findall(r"(?<!\\)\|", line.split("](<")[0])) >= 2 for line in lines)
    assert "[0.50 (0.40 to 0.60)](<a | b/x_1.json>)" in text or "(<a \\| b/x_1.json>)" in text
    assert "\\<i\\>" in text and "theirs (published: its authors)" in text and "84.31" in text
    assert "no weights" in text.split("Not measured:")[1]


def test_latex_and_csv_hold_the_same(tmp_path: Path) -> None:
    table = markup(tmp_path)
    latex = written([table], Format.LATEX, tmp_path)
    assert r"a|b\_<i>\&\%[x](y) z & 0.50 (0.40 to 0.60) & --" in latex and "% a | b/x_1.json" in latex
    assert latex.count(r"\\") == 3 and r"\textit{theirs (published: its authors)} & 84.31" in latex
    rows = list(csv.DictReader(io.StringIO(written([table], Format.CSV, tmp_path))))
    assert [row["value"] for row in rows] == ["0.5", "", "84.31"]
    assert rows[0]["source"] == "a | b/x_1.json" and rows[1]["not measured"] == "no weights | none"
    assert rows[2]["published"] == "its authors" and rows[0]["row"].endswith("\nz")


def test_what_is_no_file_of_results_is_refused_in_one_line(own: Path, tmp_path: Path) -> None:
    damaged = scores(tmp_path, "damaged.json", imaging_quality={"direction": "higher", "value": {"no": 1}})
    (tmp_path / "other.json").write_text('{"a": 1}')
    (tmp_path / "half.json").write_text('{"a": ')
    refusals = {
        "is no file of results": lambda: read_source(str(tmp_path / "other.json")),
        "half.json": lambda: read_source(str(tmp_path / "half.json")),
        "missing.json": lambda: read_source(str(tmp_path / "missing.json")),
        "empty label": lambda: read_source(f" ={own}"),
        "are both called a: give LABEL=PATH": lambda: read_sources([f"a={own}", f"a={damaged}"]),
        "damaged, or of another version": lambda: make_tables([read_source(str(damaged))], ["quality"]),
        "made of files of benchmark; given": lambda: make_tables([read_source(str(own))], ["efficiency"]),
    }
    for reason, call in refusals.items():
        with pytest.raises(InputError, match=re.escape(reason)) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_every_kind_of_file_has_a_table() -> None:
    assert {kind for kind, _ in TABLES.values()} == set(Kind)


def test_the_command_writes_a_page(
    own: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = own.parent / "sub" / "tables.md"
    page.parent.mkdir()
    monkeypatch.setattr(sys, "argv", ["make_tables.py", f"ours={own}", "--output_file", str(page)])
    assert script.main() == 0
    assert "(<../own.json>)" in page.read_text()
    monkeypatch.setattr(sys, "argv", ["make_tables.py", str(own), "--table", "quality", "--format", "csv"])
    assert script.main() == 0
    assert capsys.readouterr().out.startswith("table,row,column,value")
    monkeypatch.setattr(sys, "argv", ["make_tables.py", str(own), "--table", "layers"])
    assert script.main() == 2
