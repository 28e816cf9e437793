"""Settings that would do nothing, or count something twice, are refused instead of being ignored."""

from functools import partial
from pathlib import Path

import pytest
import torch
from paths import ROOT
from tiny_models import HYBRID, TINY, tiny_model

from arl2.checkpoint import build_hybrid, read_generator
from arl2.model import FFNLoRA, HybridSettings
from pipelines.generation.arguments import inference_parser, plan_run
from pipelines.training.config import Stage1Config, Stage2Config, open_data, read_layers
from wan.utils.errors import InputError

TOY = str(ROOT / "configs" / "toyworld" / "inference.yaml")


@pytest.mark.parametrize("given", [("--window_frames", "6"), ("memory.window_frames=6",), ("memory.sink_frames=0",)])
def test_frames_of_a_window_without_a_window(given: tuple[str, ...], tmp_path: Path) -> None:
    flags = ["--config", TOY, "--prompt", "x", "--output_folder", str(tmp_path), *given]
    with pytest.raises(InputError, match="needs a window"):
        plan_run(inference_parser().parse_args(flags))


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
        read_layers(tmp_path / "layers.yaml", 10)
    assert read_layers(tmp_path / "layers.yaml", 50) == [1]


def test_a_share_without_a_file_of_sets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="share 50 would do nothing"):
        Stage2Config(hybrid_layers=[0], share=50).hybrid(3)
    assert Stage2Config(hybrid_layers=[0]).hybrid(3).layers == (0,)
    (tmp_path / "layers.yaml").write_text("'75': [1]\n'50': [2]\n")
    named = partial(Stage2Config, layers_file=str(tmp_path / "layers.yaml"))
    assert named().hybrid(3).layers == (1,) and named(share=50).hybrid(3).layers == (2,)


def test_an_alpha_beside_adapters_that_are_switched_off() -> None:
    assert Stage2Config(hybrid_layers=[0], lora=False, lora_alpha=6.0).hybrid(3) == HybridSettings((0,))


def test_one_data_folder_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    for other in (f"{tmp_path}/", str(tmp_path / "link"), f"{tmp_path}/../{tmp_path.name}"):
        with pytest.raises(InputError, match="twice"):
            open_data(Stage1Config(data=[str(tmp_path), other]))
