"""Commands of every table: that they parse, what they cost, and one table run from a checkpoint to pictures."""

import logging
import shlex
import sys
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from pipelines.evaluation.tables.recipes import ABLATIONS, RECIPES, Request, steps_of
from pipelines.provenance import ROOT
from pipelines.settings import load_config
from pipelines.training.config import Stage1Config, Stage2Config
from wan.utils.errors import InputError

reproduce = import_module("reproduce")
TOY = ROOT / "configs" / "toyworld" / "inference.yaml"
HYBRID = ROOT / "models" / "toyworld" / "hybrid_75.safetensors"
PARSERS = {
    "scripts/sample_suite.py": ("sample_suite", "suite_parser"),
    "scripts/evaluate.py": ("evaluate", "evaluate_parser"),
    "scripts/make_tables.py": ("make_tables", "tables_parser"),
}
"""Those whose parser can be had without a run."""


def request(table: str, **changes: object) -> Request:
    checkpoints = {"hybrid": HYBRID}
    return Request(**({"table": table, "config": TOY, "folder": Path("out"), "checkpoints": checkpoints} | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize("table", RECIPES)
def test_every_command_is_one_that_its_script_takes(table: str) -> None:
    steps = steps_of(request(table, limit=4, samples=2, device="cpu"))
    assert steps[-1].words[1] == "scripts/make_tables.py" and steps[-1].makes == Path(f"out/{table}.md")
    for step in steps:
        assert shlex.split(step.line) == list(step.words)
        scripts = [word for word in step.words if word.endswith(".py")]
        assert len(scripts) == 1 and (ROOT / scripts[0]).is_file()
        flags = list(step.words[step.words.index(scripts[0]) + 1 :])
        if scripts[0] in PARSERS:
            module, name = PARSERS[scripts[0]]
            getattr(import_module(module), name)().parse_args(flags)
        if scripts[0].startswith("train_stage"):
            kind = Stage1Config if scripts[0] == "train_stage1.py" else Stage2Config
            load_config(kind, ROOT / flags[1], flags[2:])


def test_ablations_train_every_row_and_score_the_stages_alone() -> None:
    steps = steps_of(request("ablations"))
    trainings = [step for step in steps if step.words[0] == "torchrun"]
    assert len(trainings) == 2 * len(ABLATIONS) + 1
    lines = [step.line for step in trainings]
    assert sum("state.writes=noisy" in line for line in lines) == 2
    assert sum("forward_mode=sequential" in line for line in lines) == 1, "in stage 2 alone"
    labels = [word for step in steps[-1:] for word in step.words if "=" in word]
    assert {label.split("=")[0] for label in labels} == {*ABLATIONS, "stage 1 alone", "stage 2 alone"}
    with pytest.raises(InputError, match="trained from one checkpoint"):
        steps_of(request("ablations", checkpoints={"a": HYBRID, "b": HYBRID}))
    with pytest.raises(InputError, match="on one stage-1 export"):
        steps_of(request("layers", checkpoints={"model": None}))


def test_layers_are_scored_one_by_one_and_by_deviation() -> None:
    steps = steps_of(request("layers"))
    sampled = [step.words for step in steps if step.words[1] == "scripts/sample_suite.py"]
    assert len(sampled) == 1 + 8 and "--checkpoint_path" not in sampled[0]
    assert [words[words.index("--hybrid_layers") + 1] for words in sampled[1:]] == [str(layer) for layer in range(8)]
    assert all(words[words.index("--suite") + 1] == "hundred" for words in sampled)
    scored, deviated, table = steps[-3:]
    assert scored.words[1] == deviated.words[1] == "scripts/select_layers.py"
    assert str(scored.makes) in table.words and str(deviated.makes) in table.words
    assert Path(scored.words[scored.words.index("--scores") + 1]) == sampled_folder(sampled[0]).parent


def sampled_folder(words: tuple[str, ...]) -> Path:
    return Path(words[words.index("--output_folder") + 1])


def test_hours_are_rates_times_counts() -> None:
    (sampling, *_) = steps_of(request("quality"))
    assert sampling.hours == pytest.approx(944 * 5 * 81 / 41.2 / 3600)
    (part, *_) = steps_of(request("quality", limit=32, samples=1))
    assert part.hours == pytest.approx(32 * 81 / 41.2 / 3600)
    (unknown, *_) = steps_of(request("quality", suite="moviegen"))
    assert unknown.hours is None, "the suite's own number is not known here"
    (long, *_) = steps_of(request("drift", suite="moviegen", limit=128))
    assert "num_output_frames=240" in long.words and long.hours == pytest.approx(128 * 957 / 41.2 / 3600)
    (own, *_) = steps_of(request("drift", limit=1, settings=("num_output_frames=21",)))
    assert own.words.count("num_output_frames=21") == 1 and own.hours is None


def run(monkeypatch: pytest.MonkeyPatch, line: str) -> int:
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *line.split()])
    status: int = reproduce.main()
    return status


def test_commands_are_printed_as_a_shell_takes_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"quality --config {TOY} --checkpoint_path softmax hybrid={HYBRID} --limit 32") == 0
    lines = capsys.readouterr().out.splitlines()
    commands = [line for line in lines if not line.startswith("#")]
    assert len(commands) == 5 and commands[-1].startswith("python scripts/make_tables.py softmax=output/quality/")
    assert lines[-1] == "# in all: 0.2 H100-hours, and 2 commands of unknown length"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (f"--config {TOY} --checkpoint_path a={HYBRID} a", "names a twice"),
        (f"--config {TOY} --checkpoint_path a=nowhere", "no file or folder nowhere"),
        (f"--config {TOY} --checkpoint_path a=", "give NAME=PATH"),
        ("--config nowhere.yaml", "no config nowhere.yaml"),
    ],
)
def test_what_cannot_be_reproduced_is_one_line(
    flags: str, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, f"quality {flags}") == 2
    error = capsys.readouterr().err
    assert reason in error and len(error.strip().splitlines()) == 1


def test_one_command_goes_from_checkpoints_to_a_table_with_pictures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    folder = tmp_path / "out"
    line = (
        f"quality --config {TOY} --suite hundred --limit 2 --metrics pixels --device cpu --run "
        f"--checkpoint_path softmax hybrid={HYBRID} --output_folder {folder} --set num_output_frames=3"
    )
    assert run(monkeypatch, line) == 0
    page = (folder / "quality.md").read_text()
    assert page.count("](<softmax/scores.json>)") == 1 and page.count("](<hybrid/scores.json>)") == 1
    assert "![frames by model](<pictures.png>)" in page and "Not measured:" in page
    with Image.open(folder / "pictures.png") as sheet:
        assert sheet.width > 7 * 2 * 96 and sheet.height > 4 * 2 * 64
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.mp4")}
    assert len(before) == 4
    assert run(monkeypatch, line) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before, "what is there is kept"
    (folder / "hybrid" / "manifest.json").write_text("{")
    assert run(monkeypatch, line) != 0
    assert "start the same command again" in caplog.text
