"""The study of long training: its rows' configs, its files, what goes on after a break, and its table."""

import shutil
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch

from arl2.distillation.stage2 import Context, Trainable
from arl2.model import HybridWanModel
from arl2.state_settings import PAPER_STATE
from arl2.toyworld.probe.long_report import report
from arl2.toyworld.probe.passes import Answer
from arl2.toyworld.study.long_rows import PARTS, Layers, Stage
from arl2.toyworld.world.worlds import World
from pipelines.config import MemoryKind
from pipelines.provenance import ROOT
from pipelines.toyworld import long_study
from pipelines.toyworld.draw import DrawSettings, draw_latents
from pipelines.toyworld.long_memory import read_model
from pipelines.toyworld.long_study import Exam, LongStudy, LongStudySettings
from pipelines.toyworld.long_table import write_tables
from pipelines.toyworld.study import OutOfTimeError
from pipelines.training.config import Stage1Config, Stage2Config
from wan.utils.errors import InputError
from wan.utils.files import read_json

script = import_module("long_study")
BUNDLE = ROOT / "models" / "toyworld"
ROWS = {row.name: row for rows in PARTS.values() for row in rows}
TINY = ("batch=1", "optimizer.warmup_steps=1", "save_every=1")


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four videos of two blocks."""
    folder = tmp_path_factory.mktemp("drawn")
    draw_latents(DrawSettings(tuple(World), 4, 6), BUNDLE, folder, torch.device("cpu"), torch.float32)
    return folder


@pytest.fixture
def study(tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch) -> LongStudy:
    """A study of videos of two blocks, which are drawn already."""
    monkeypatch.setattr(LongStudy, "data", lambda self, world, is_short=False: [drawn])
    return LongStudy(LongStudySettings(tmp_path, BUNDLE, torch.device("cpu"), steps=2, overrides=TINY))


def test_every_row_has_a_config_that_can_be_trained(study: LongStudy) -> None:
    for row in ROWS.values():
        if row.after:
            weights = study.path("weights", row.after, ".safetensors")
            weights.parent.mkdir(exist_ok=True)
            source = BUNDLE / (
                "transformer/diffusion_pytorch_model.safetensors" if row.trains_all else "hybrid_75.safetensors"
            )
            weights.write_bytes(source.read_bytes())
        config = study.config(row)
        assert (config.state != PAPER_STATE) == any(setting.startswith("state.") for setting in row.settings)
        if row.stage is Stage.ONE:
            assert isinstance(config, Stage1Config)
            continue
        assert isinstance(config, Stage2Config)
        assert row.window_frames in (None, config.memory.window_frames)
        assert config.hybrid_layers == {Layers.NONE: [], Layers.SHIPPED: [0, 2, 4, 5, 6, 7]}.get(
            row.layers, list(range(8))
        )
        assert (config.trainable is Trainable.ALL) == row.trains_all
        assert (config.context is Context.RESAMPLED) == ("resampled" in row.name)
        assert (config.memory.kind is MemoryKind.full) == ("softmax_full" in row.name or row.is_short)
        assert (config.checkpoint_path is not None) == (bool(row.after) and row.trains_all)
        config.objective_settings()
    equal = study.config(ROWS["softmax_equal_sink"])
    assert isinstance(equal, Stage2Config) and equal.memory.window == (9, 3)


def test_videos_are_drawn_in_pieces_that_do_not_overlap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted: list[DrawSettings] = []
    monkeypatch.setattr(
        long_study, "draw_latents", lambda settings, model, folder, device, dtype: note(settings, folder)
    )

    def note(settings: DrawSettings, folder: Path) -> None:
        folder.mkdir(parents=True)
        wanted.append(settings)

    study = LongStudy(LongStudySettings(tmp_path, BUNDLE, torch.device("cpu"), 5, 4, pieces=2))
    for _ in range(2):
        assert [folder.name for folder in study.data(World.LONG)] == ["0", "1"]
    study.data(World.STANDARD, is_short=True)
    assert [(one.seed, one.num_videos, one.latent_frames, one.world) for one in wanted] == [
        *((0, 3, 84, (World.LONG,)), (3, 3, 84, (World.LONG,))),
        *((0, 2, 21, (World.STANDARD,)), (2, 2, 21, (World.STANDARD,))),
    ]


def test_a_row_whose_start_is_missing_says_so(study: LongStudy) -> None:
    with pytest.raises(InputError, match="run the row hybrid_75 first"):
        study.config(ROWS["hybrid_75_resampled"])


def test_a_variant_begins_with_nothing_and_all_take_about_the_same_bytes(study: LongStudy) -> None:
    first, second = ROWS["stage1_two_states"], ROWS["state_two_states"]
    study.train(first)
    assert study.train(second)["steps"] == 2
    sizes = {}
    for row in (ROWS["hybrid_75"], second):
        file = BUNDLE / "hybrid_75.safetensors" if row.after == "" else study.path("weights", row.name, ".safetensors")
        model = read_model(BUNDLE, file, torch.device("cpu"))
        assert model.hybrid.state.num_states == (2 if row is second else 1)
        sizes[row.name] = study.memory_bytes(model, row, (Exam(16, World.STANDARD),))["16"]
    assert sizes["state_two_states"] == pytest.approx(sizes["hybrid_75"], rel=0.1)


@pytest.mark.parametrize("name", ["hybrid_75", "hybrid_75_all"])
def test_weights_are_kept_whole_and_a_broken_training_goes_on(name: str, study: LongStudy) -> None:
    row = ROWS[name]
    stopped = LongStudy(vars_of(study, deadline=0.0))
    with pytest.raises(OutOfTimeError):
        stopped.train(row)
    assert study.train(row)["steps"] == 2
    weights = study.path("weights", name, ".safetensors")
    model = read_model(BUNDLE, weights, torch.device("cpu"))
    trained = HybridWanModel.from_pretrained(study.path("runs", name) / "export_ema")
    assert model.hybrid == trained.hybrid and model.trained_memory == trained.trained_memory
    for key, value in trained.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=2e-3, atol=1e-6, msg=key)
    before = weights.stat().st_mtime_ns
    study.train(row)
    assert weights.stat().st_mtime_ns == before


def vars_of(study: LongStudy, **changes: object) -> LongStudySettings:
    return LongStudySettings(**(vars(study.settings) | changes))


def test_results_become_a_table(study: LongStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Examining is in place of a real one, which has tests of its own."""
    answers = [[Answer(0, 1, 8, 9, 1, True, True), Answer(0, 2, 60, 9, 1, True, False)]]
    figures = report(answers) | {"answers": {}}
    monkeypatch.setattr(long_study, "run_rows", lambda rows, *arguments: dict.fromkeys(rows, figures))
    (study.settings.work / "weights").mkdir()
    shutil.copy(BUNDLE / "hybrid_75.safetensors", study.settings.work / "weights")
    for _ in range(2):
        study.run_row(ROWS["hybrid_75"])
        study.run_curves(ROWS["hybrid_75"])
    page = read_json(study.settings.work / "results" / "hybrid_75.json")
    assert page["exams"]["standard_16x_own"]["after_last"]["both"]["objects"] == 1
    text = write_tables(study.settings.work).read_text()
    assert text.count("| hybrid_75 |") == 2 and "0.0 (0 to 79), colour 100, 1 objects" in text
    assert (study.settings.work / "passes_standard.png").is_file()


def test_an_unknown_row_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["long_study.py", "--work", str(tmp_path), "--device", "cpu", "--part", "hybrids", "--only", "nothing"]
    monkeypatch.setattr(sys, "argv", line)
    assert script.main() == 2
    assert "choose from hybrid_75" in capsys.readouterr().err
