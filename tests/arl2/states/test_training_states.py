"""Training takes variants of the state from its config, keeps them, and refuses to go on from another one."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from training_world import build_world, one_line, train

from arl2.checkpoint import build_hybrid, read_generator
from arl2.model import HybridSettings, HybridWanModel
from arl2.state_settings import PAPER_STATE, Rotation, StateSettings
from pipelines.settings import load_config
from pipelines.training.config import GatesConfig, Stage1Config, Stage2Config, resume_fingerprint
from wan.checkpoints.formats import transformer_config

CPU = torch.device("cpu")
SHORT = ("steps=2", "optimizer.warmup_steps=0")
WRAPPED = ("state.rotation=wrapped", "state.rotation_period=4")
WIDE = (*WRAPPED, "state.value_expansion=2", "state.num_states=2", "state.local_frames=2")
STATE = StateSettings(Rotation.WRAPPED, 4, value_expansion=2, num_states=2, local_frames=2)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A world with a run of stage 1 as in the paper, and one of each stage with a variant."""
    root = build_world(tmp_path_factory.mktemp("world"))
    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, stage, settings in (
            ("paper", 1, ()),
            ("one", 1, WIDE),
            ("two", 2, (*WIDE, f"init_from={root / 'one'}")),
        ):
            assert train(monkeypatch, root, stage, *SHORT, f"run_folder={root / name}", *settings) == 0
    return root


def test_a_variant_is_trained_and_exported(world: Path) -> None:
    for name in ("one", "two"):
        model = HybridWanModel.from_pretrained(world / name / "export")
        assert model.hybrid.state == STATE
        fingerprint = json.loads((world / name / "checkpoints/step-00000002/state.json").read_text())["fingerprint"]
        assert fingerprint["state.rotation"] == "wrapped" and fingerprint["state.num_states"] == 2
    stage1 = load_file(world / "one/export/diffusion_pytorch_model.safetensors")["blocks.0.self_attn.phi_o.weight"]
    assert (stage1.view(2, 12, 24)[..., 12:] != 0).any(), "stage 1 trains what reads the further values"


def test_runs_of_the_paper_say_nothing_of_it(world: Path) -> None:
    page = (world / "paper/checkpoints/step-00000002/state.json").read_text()
    assert not [name for name in json.loads(page)["fingerprint"] if name.startswith("state")]
    for kind in (Stage1Config, Stage2Config, GatesConfig):
        assert not [name for name in resume_fingerprint(kind(), 1) if name.startswith("state")]
        assert kind().state == PAPER_STATE


@pytest.mark.parametrize(
    ("start", "settings", "reason"),
    [
        (
            "one",
            (),
            "one was trained with states of rotation wrapped, .*, not of the paper's kind: set state as it was",
        ),
        ("one", WRAPPED, "local_frames 2, not of rotation wrapped, rotation_period 4: set state"),
        ("paper", WIDE, "paper was trained with states of the paper's kind, not of rotation wrapped"),
        ("two", WRAPPED, "was trained with states of"),
        (
            "one/export/diffusion_pytorch_model.safetensors",
            (),
            "has states of rotation wrapped, .*, not of the paper's",
        ),
        (
            "paper/export/diffusion_pytorch_model.safetensors",
            WRAPPED,
            "has states of the paper's kind, not of rotation",
        ),
    ],
)
def test_a_start_of_another_variant_is_refused(
    start: str,
    settings: tuple[str, ...],
    reason: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = (f"run_folder={tmp_path / 'run'}", f"init_from={world / start}")
    assert train(monkeypatch, world, 2, *SHORT, *run, *settings) == 2
    error = one_line(capsys)
    assert re.search(reason, error), error


def test_values_alone_of_another_shape_are_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "trainables.safetensors"
    shutil.copy(world / "one/checkpoints/step-00000002/trainables.safetensors", file)
    run = (f"run_folder={tmp_path / 'run'}", f"init_from={file}", *WRAPPED)
    assert train(monkeypatch, world, 2, *SHORT, *run) == 2
    assert "has states of rotation wrapped" in one_line(capsys)
    values = load_file(file)
    file.unlink()
    save_file(values, file)
    run = (f"run_folder={tmp_path / 'run'}", f"init_from={file}", *WRAPPED, "state.num_states=2")
    assert train(monkeypatch, world, 2, *SHORT, *run) == 2
    assert "does not fit the parameters to train: blocks." in one_line(capsys)


def test_trained_values_alone_load_as_their_variant(world: Path) -> None:
    file = world / "two/checkpoints/step-00000002/trainables.safetensors"
    weights = read_generator(world / "model", file)
    model, _ = build_hybrid(weights, transformer_config(world / "model"), HybridSettings(), dtype=None, device=CPU)
    assert model.hybrid.state == STATE
    header = (world / "paper/checkpoints/step-00000002/trainables.safetensors").read_bytes()[:200]
    assert b"__metadata__" not in header, "files of the paper's kind are as they were"


def test_a_run_does_not_go_on_as_another_variant(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for before, settings in (("paper", WRAPPED), ("one", ())):
        run = Path(shutil.copytree(world / before, tmp_path / before))
        assert train(monkeypatch, world, 1, *SHORT, f"run_folder={run}", *settings) == 2
        assert "state.rotation was" in one_line(capsys)


def test_a_model_folder_of_another_variant_is_refused(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = (f"run_folder={tmp_path / 'run'}", f"model_folder={world / 'two/export'}")
    assert train(monkeypatch, world, 2, *SHORT, *run) == 2
    assert "has states of rotation wrapped" in one_line(capsys)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (("state.rotation=wrapped",), "rotation wrapped needs state.rotation_period"),
        (("state.rotation=twisted",), "state.rotation 'twisted' does not fit: give one of absolute, none"),
        (("state.value_expansion=3",), "value_expansion 3 is above the model's 2 heads"),
        (("state.half_life=3",), "unknown setting 'state.half_life'"),
    ],
)
def test_a_config_that_cannot_be_is_refused(
    settings: tuple[str, ...],
    reason: str,
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for stage in (1, 2):
        assert train(monkeypatch, world, stage, *SHORT, f"run_folder={tmp_path / 'run'}", *settings) == 2
        assert reason in one_line(capsys)


def test_a_config_file_takes_a_nested_mapping(tmp_path: Path) -> None:
    text: dict[str, Any] = {
        "state": {"rotation": "wrapped", "rotation_period": 4, "value_expansion": 2, "num_states": 2, "local_frames": 2}
    }
    (tmp_path / "stage2.yaml").write_text(json.dumps(text | {"hybrid_layers": [0]}))
    assert load_config(Stage2Config, tmp_path / "stage2.yaml").hybrid(3).state == STATE
