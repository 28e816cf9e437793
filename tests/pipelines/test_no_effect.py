"""Settings that would do nothing, or count something twice, are refused instead of being ignored."""

import sys
from dataclasses import asdict, replace
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from paths import ROOT
from tiny_models import HYBRID, TINY, tiny_model

from arl2.checkpoint import build_hybrid, read_generator
from arl2.model import FFNLoRA, HybridSettings
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.arguments import inference_parser, plan_run
from pipelines.training.config import Stage1Config, Stage2Config, open_data, read_layers, resume_fingerprint
from wan.utils.errors import InputError
from wan.utils.settings import differences

TOY = str(ROOT / "configs" / "toyworld" / "inference.yaml")


@pytest.mark.parametrize("given", [("--window_frames", "6"), ("memory.window_frames=6",), ("memory.sink_frames=0",)])
def test_frames_of_a_window_without_a_window(given: tuple[str, ...], tmp_path: Path) -> None:
    flags = ["--config", TOY, "--prompt", "x", "--output_folder", str(tmp_path), *given]
    with pytest.raises(InputError, match="needs a window"):
        plan_run(inference_parser().parse_args(flags))


@pytest.mark.parametrize("given", ["memory.window_frames=6", "memory.sink_frames=0"])
@pytest.mark.parametrize("script", ["train_stage2", "generate_latents"])
def test_frames_of_a_window_without_a_window_anywhere(
    script: str, given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    config = ROOT / "configs" / "stage2.yaml" if script == "train_stage2" else TOY
    flags = [] if script == "train_stage2" else ["--data_path", "p.txt"]
    arguments = ["--config", str(config), "--output_folder", str(tmp_path / "o"), *flags, "memory.kind=full", given]
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    assert import_module(script).main() == 2
    error = capsys.readouterr().err
    assert "needs a window" in error and error.count("\n") == 1


def test_idle_frames_are_no_part_of_an_identity() -> None:
    one, other = (MemoryConfig(MemoryKind.full, frames) for frames in (5, 7))
    assert one.identity() == other.identity() and not differences({"memory": asdict(one)}, {"memory": asdict(other)})
    first, second = (
        resume_fingerprint(Stage2Config(memory=memory), 1) for memory in (one, replace(other, kind=MemoryKind.trained))
    )
    assert first == second
    windows = [{"memory": MemoryConfig(MemoryKind.window, frames).identity()} for frames in (5, 7)]
    assert differences(*windows) == ["memory.window_frames was 5, is 7"]


ADAPTERS_OF_NOTHING = [
    HybridSettings(lora_rank=3),
    HybridSettings(ffn_lora=FFNLoRA.ALL),
    HybridSettings(lora_alpha=3.0),
    HybridSettings((0,), lora_alpha=3.0),
]


@pytest.mark.parametrize("wanted", ADAPTERS_OF_NOTHING)
def test_adapters_without_a_hybrid_layer(tmp_path: Path, wanted: HybridSettings) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = read_generator(tmp_path, None)
    with pytest.raises(InputError, match="would do nothing"):
        build_hybrid(weights, dict(TINY), wanted, dtype=None, device=torch.device("cpu"))
    build_hybrid(weights, dict(TINY), HYBRID, dtype=None, device=torch.device("cpu"))


def test_a_set_without_layers(tmp_path: Path) -> None:
    (tmp_path / "layers.yaml").write_text("'10': []\n'50': [1]\n")
    with pytest.raises(InputError, match="empty set"):
        read_layers(tmp_path / "layers.yaml", 10, 3)
    assert read_layers(tmp_path / "layers.yaml", 50, 3) == [1]


@pytest.mark.parametrize(("num_layers", "fits"), [(2, True), (3, True), (4, False), (8, False), (1, False)])
def test_a_set_that_is_not_of_its_share(num_layers: int, fits: bool, tmp_path: Path) -> None:
    (tmp_path / "layers.yaml").write_text("'75': [0, 1]\n")
    if fits:
        assert read_layers(tmp_path / "layers.yaml", 75, num_layers) == [0, 1]
        return
    with pytest.raises(InputError, match=f"names 2 of {num_layers} layers for a share of 75 %"):
        read_layers(tmp_path / "layers.yaml", 75, num_layers)


def test_a_share_without_a_file_of_sets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="share 50 would do nothing"):
        Stage2Config(hybrid_layers=[0], share=50).hybrid(3)
    assert Stage2Config(hybrid_layers=[0]).hybrid(3).layers == (0,)
    (tmp_path / "layers.yaml").write_text("'75': [0, 1]\n'50': [2]\n")
    named = partial(Stage2Config, layers_file=str(tmp_path / "layers.yaml"))
    assert named().hybrid(3).layers == (0, 1) and named(share=50).hybrid(3).layers == (2,)


def test_an_alpha_beside_adapters_that_are_switched_off() -> None:
    assert Stage2Config(hybrid_layers=[0], lora=False, lora_alpha=6.0).hybrid(3) == HybridSettings((0,))


def test_one_data_folder_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (f"{tmp_path}/", str(tmp_path / "link"), f"{tmp_path}/../{tmp_path.name}"):
        with pytest.raises(InputError, match="twice"):
            open_data(Stage1Config(data=[str(tmp_path), other]))


@pytest.mark.parametrize("exchange", ["peer", "collective", "auto"])
def test_an_exchange_between_no_processes_is_warned_of(
    exchange: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ["--config", TOY, "--prompt", "x", "--output_folder", str(tmp_path), "--exchange", exchange]
    plan_run(inference_parser().parse_args([*flags, "--device", "cpu"]))
    assert (f"exchange {exchange} does nothing" in caplog.text) == (exchange != "auto")
