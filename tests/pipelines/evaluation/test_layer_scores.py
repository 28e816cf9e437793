"""Scores of layers from evaluations of single replacements."""

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.evaluation.layer_scores import BASELINE, SCORES, layer_folder, read_layer_scores
from pipelines.evaluation.scoring.metric import NOT_MEASURED
from pipelines.evaluation.tables.vbench import SHOWN
from pipelines.provenance import ROOT
from wan.utils.errors import InputError

script = import_module("select_layers")
TOY = ROOT / "configs" / "toyworld" / "inference.yaml"


def write(folder: Path, name: str, values: dict[str, float | None], videos: tuple[str, ...] = ("a-0.mp4",)) -> None:
    metrics: dict[str, Any] = {
        metric: {"direction": "higher", NOT_MEASURED: "no weights"}
        if value is None
        else {"direction": "higher", "value": {"mean": value, "interval": None}}
        for metric, value in values.items()
    }
    page = {"videos": {video: {} for video in videos}, "settings": {}, "metrics": metrics}
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / SCORES).write_text(json.dumps(page))


@pytest.fixture
def evaluations(tmp_path: Path) -> Path:
    """Layer 0 loses nothing, layer 1 in dynamic degree, layer 2 in all; of VBench's own values only one dimension."""
    base = dict.fromkeys(SHOWN, 0.9) | {"vbench_imaging_quality": 0.6}
    write(tmp_path, BASELINE, base)
    write(tmp_path, layer_folder(0), base | {"imaging_quality": 0.0})  # not read: VBench's own is there
    write(tmp_path, layer_folder(1), base | {"dynamic_degree": 0.8})
    write(tmp_path, layer_folder(2), {name: value - 0.05 for name, value in base.items()})
    return tmp_path


def test_what_a_layer_loses_is_weighted_as_by_vbench(evaluations: Path) -> None:
    scores = read_layer_scores(evaluations, 3)
    # Weights: five dimensions count once, dynamic degree half.
    assert scores[0] == 0.0
    assert scores[1] == pytest.approx(100 * 0.5 * 0.1 / 5.5)
    ranges = {
        "subject_consistency": 1 - 0.1462,
        "background_consistency": 1 - 0.2615,
        "motion_smoothness": 0.9975 - 0.706,
    }
    parts = [0.05 / ranges.get(name, 1.0) * (0.5 if name == "dynamic_degree" else 1) for name in SHOWN]
    assert scores[2] == pytest.approx(100 * sum(parts) / 5.5)
    assert read_layer_scores(evaluations, 3, ["dynamic_degree"])[1] == pytest.approx(10)


def test_what_is_missing_is_refused(evaluations: Path) -> None:
    with pytest.raises(InputError, match="layer_03"):
        read_layer_scores(evaluations, 4)
    with pytest.raises(InputError, match="no dimension color: choose from"):
        read_layer_scores(evaluations, 3, ["color"])
    base = dict.fromkeys(SHOWN, 0.9) | {"vbench_imaging_quality": 0.6}
    write(evaluations, layer_folder(2), base | {"aesthetic_quality": None})
    with pytest.raises(InputError, match=r"layer_02/scores.json has no aesthetic_quality \(no weights\)"):
        read_layer_scores(evaluations, 3)
    write(evaluations, layer_folder(2), base, ("b-0.mp4",))
    with pytest.raises(InputError, match="are of other videos"):
        read_layer_scores(evaluations, 3)


def test_the_script_chooses_layers_from_a_folder_of_evaluations(
    evaluations: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"dynamic_degree": 0.9}
    for layer in range(8):
        write(evaluations, layer_folder(layer), {"dynamic_degree": 0.9 - 0.1 * (layer in (3, 5))})
    write(evaluations, BASELINE, base)
    chosen = evaluations / "layers.yaml"
    line = f"--config {TOY} --method vbench --scores {evaluations} --dimensions dynamic_degree --yaml {chosen}"
    monkeypatch.setattr(sys, "argv", ["select_layers.py", *line.split()])
    assert script.main() == 0
    page = yaml.safe_load(chosen.read_text())
    assert page["75"] == [0, 1, 2, 4, 6, 7] and page["scores"][3] == pytest.approx(10)
