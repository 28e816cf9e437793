"""What stage 2 starts from is a run of stage 1, of the same teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from training_world import build_world, one_line, train

from pipelines.training import run as training_run
from wan.checkpoints.loading import fingerprint_of_file

Page = dict[str, Any]
NEWEST = "checkpoints/step-00000002"
WEIGHTS = "diffusion_pytorch_model.safetensors"
SHORT = ("steps=2", "optimizer.warmup_steps=0")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a run of each stage, of two steps."""
    root = build_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        for stage in (1, 2):
            assert train(monkeypatch, root, stage, *SHORT, f"run_folder={root / f'run{stage}'}") == 0
    return root


@pytest.fixture
def start(world: Path, tmp_path: Path) -> Path:
    """A copy of the run of stage 1, to be changed."""
    return Path(shutil.copytree(world / "run1", tmp_path / "start"))


@pytest.fixture
def two(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Trains stage 2 from a run or file."""

    def call(init_from: Path, *settings: str) -> int:
        run = f"run_folder={tmp_path / 'two'}"
        return train(monkeypatch, world, 2, *SHORT, run, f"init_from={init_from}", *settings)

    return call


def change(file: Path, edit: Callable[[Page], object]) -> None:
    page = json.loads(file.read_text())
    edit(page)
    file.write_text(json.dumps(page))


def another_teacher(world: Path, tmp_path: Path) -> str:
    model = Path(shutil.copytree(world / "model", tmp_path / "model"))
    state = load_file(model / WEIGHTS)
    state["head.head.bias"][0] += 1
    save_file(state, model / WEIGHTS, metadata={"format": "pt"})
    return f"model_folder={model}"


def test_a_run_of_another_stage_is_refused_before_the_model_loads(
    two: Callable[..., int], start: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(training_run, "build_model", lambda *_, **__: pytest.fail("a model was built"))
    change(start / NEWEST / "state.json", lambda page: page["fingerprint"].update(budget=0.5))
    for path in (start, start / NEWEST / "trainables.safetensors"):
        assert two(path) == 2
        assert "start is a run of layer gates, not of stage 1" in one_line(capsys)


def test_stage_two_starts_from_stage_two_of_the_same_teacher(
    two: Callable[..., int], world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert two(world / "run2", another_teacher(world, tmp_path)) == 2
    assert "was trained on another teacher" in one_line(capsys)
    assert two(world / "run2") == 0


@pytest.mark.parametrize("file", ["", f"{NEWEST}/trainables.safetensors"])
def test_a_damaged_page_is_refused_before_the_model_loads(
    file: str,
    two: Callable[..., int],
    start: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(training_run, "build_model", lambda *_, **__: pytest.fail("a model was built"))
    (start / NEWEST / "state.json").write_text("{")
    assert two(start / file) == 2
    assert f"{start / NEWEST / 'state.json'} is damaged" in one_line(capsys)


def test_another_teacher_is_refused(
    two: Callable[..., int], world: Path, start: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert two(start, another_teacher(world, tmp_path)) == 2
    assert "was trained on another teacher" in one_line(capsys)
    assert not (tmp_path / "two" / "checkpoints").exists()
    assert two(start) == 0, "adapters and fewer layers are the same teacher"
    shutil.rmtree(start / "checkpoints")
    shutil.copytree(world / "run2" / "checkpoints", start / "checkpoints")
    assert two(start, "optimizer.lr=0.01") == 0, "a run that has begun does not depend on it"


UNKNOWN: dict[str, tuple[str, Callable[[Page], object]]] = {
    "old": (f"{NEWEST}/state.json", lambda page: page["fingerprint"].pop("teacher")),
    "of another type": ("run.json", lambda page: page.update(dtype="bfloat16")),
    "of an unknown device": ("run.json", lambda page: (page.pop("dtype"), page.update(device="a card"))),
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_cannot_be_compared_is_accepted(
    name: str, two: Callable[..., int], world: Path, start: Path, tmp_path: Path
) -> None:
    file, edit = UNKNOWN[name]
    change(start / file, edit)
    assert two(start, another_teacher(world, tmp_path)) == 0


def test_a_run_that_is_not_finished_is_warned_of(
    two: Callable[..., int], start: Path, caplog: pytest.LogCaptureFixture
) -> None:
    change(start / "run.json", lambda page: page["config"].update(steps=7))
    shutil.rmtree(start / "export")
    assert two(start) == 0
    said = [record.getMessage() for record in caplog.records if "is not finished" in record.getMessage()]
    assert said == [f"init_from {start} is not finished, it is at step 2 of 7: what it has learnt so far is taken"]


@pytest.mark.parametrize("who", ["this", "another", "unknown"])
def test_data_of_another_teacher_is_warned_of(
    who: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data = Path(shutil.copytree(world / "data", tmp_path / "data"))
    made_by = {
        "this": {"weights": fingerprint_of_file(load_file(world / "model" / WEIGHTS))},
        "another": {"weights": "0123456789abcdef"},
        "unknown": {},
    }
    change(data / "index.json", lambda page: page["settings"].update(made_by[who]))
    assert train(monkeypatch, world, 1, *SHORT, f"data=[{data}]", f"run_folder={tmp_path / 'run'}") == 0
    said = [record.getMessage() for record in caplog.records if "another teacher" in record.getMessage()]
    assert len(said) == (who == "another")
    assert not said or said[0].startswith("data was made by weights 0123456789abcdef")
