"""Settings that would do nothing, or count something twice, are refused instead of being ignored."""

from pathlib import Path

import pytest
import torch
from paths import ROOT
from tiny_models import HYBRID, TINY, tiny_model

from arl2.checkpoint import build_hybrid, read_generator
from arl2.model import FFNLoRA, HybridSettings
from pipelines.generation.arguments import inference_parser, plan_run
from pipelines.training.config import Stage1Config, open_data, read_layers
from wan.utils.errors import InputError

TOY = str(ROOT / "configs" / "toyworld" / "inference.yaml")


@pytest.mark.parametrize("given", [("--window_frames", "6"), ("memory.window_frames=6",), ("memory.sink_frames=0",)])
def test_frames_of_a_window_without_a_window(given: tuple[str, ...], tmp_path: Path) -> None:
    flags = ["--config", TOY, "--prompt", "x", "--output_folder", str(tmp_path), *given]
    with pytest.raises(InputError, match="needs a window"):
        plan_run(inference_parser().parse_args(flags))


@pytest.mark.parametrize("wanted", [HybridSettings(lora_rank=3), HybridSettings(ffn_lora=FFNLoRA.ALL)])
def test_adapters_without_a_hybrid_layer(tmp_path: Path, wanted: HybridSettings) -> None:
    tiny_model().save_pretrained(tmp_path)
    weights = read_generator(tmp_path, None)
    with pytest.raises(InputError, match="would do nothing"):
        build_hybrid(weights, dict(TINY), wanted, dtype=None, device=torch.device("cpu"))
    build_hybrid(weights, dict(TINY), HYBRID, dtype=None, device=torch.device("cpu"))


def test_a_set_without_layers(tmp_path: Path) -> None:
    (tmp_path / "layers.yaml").write_text("'10': []\n'50': [1]\n")
    with pytest.raises(InputError, match="empty set"):
        read_layers(tmp_path / "layers.yaml", 10)
    assert read_layers(tmp_path / "layers.yaml", 50) == [1]


def test_one_data_folder_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (f"{tmp_path}/", str(tmp_path / "link"), f"{tmp_path}/../{tmp_path.name}"):
        with pytest.raises(InputError, match="twice"):
            open_data(Stage1Config(data=[str(tmp_path), other]))
