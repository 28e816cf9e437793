"""The memory of training: kept by every format, the default at inference, and another one is warned of."""

import json
import logging
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from paths import ROOT
from safetensors import safe_open
from tiny_models import HYBRID, TINY, tiny_model

from arl2.checkpoint import build_hybrid, read_generator, save_hybrid_weights
from arl2.model import HybridSettings, HybridWanModel
from arl2.trained_memory import TrainedMemory
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from wan.checkpoints.formats import read_transformer, transformer_config
from wan.utils.errors import CheckpointError
from wan.vae.wan_vae import TOY_VAE

WINDOW = TrainedMemory(6, 3, 21)
FULL = TrainedMemory(num_frames=21)
CPU = torch.device("cpu")
convert_checkpoint = import_module("convert_checkpoint")


def built(weights: object, config: dict[str, object]) -> HybridWanModel:
    return build_hybrid(weights, config, HybridSettings(), dtype=torch.float32, device=CPU)[0]


def test_every_conversion_keeps_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(HYBRID, torch.float32)
    model.set_trained_memory(WINDOW)
    model.save_pretrained(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["trained_memory"] == WINDOW.as_plain()
    path = tmp_path / "a"
    for target in ("b.pt", "c.safetensors", "d", "e.pt", "f", "g.safetensors"):
        merge = ["--merge_ffn_lora"] if target == "e.pt" else []
        sizes = [] if path.is_dir() else ["--config", str(tmp_path / "a")]
        monkeypatch.setattr(sys, "argv", ["convert", str(path), str(tmp_path / target), *sizes, *merge])
        assert convert_checkpoint.main() == 0
        path = tmp_path / target
        again = built(read_transformer(path), dict(TINY))
        assert again.trained_memory == WINDOW and again.hybrid.lora_alpha == HYBRID.lora_alpha, target
    stored = torch.load(tmp_path / "b.pt", weights_only=True)
    assert stored.keys() == {"generator", "arl2"} and stored["arl2"]["trained_memory"] == WINDOW.as_plain()
    assert HybridWanModel.from_pretrained(tmp_path / "d").trained_memory == WINDOW


def test_hybrid_weights_alone_keep_it_and_their_base_does_not_lend_its_own(tmp_path: Path) -> None:
    base, model = tiny_model(dtype=torch.float32), tiny_model(HYBRID, torch.float32)
    base.set_trained_memory(TrainedMemory(9, 0, 9))
    base.save_pretrained(tmp_path / "base")
    save_hybrid_weights(model, tmp_path / "h.safetensors")
    weights = read_generator(tmp_path / "base", tmp_path / "h.safetensors")
    assert built(weights, dict(TINY)).trained_memory is None
    model.set_trained_memory(WINDOW)
    save_hybrid_weights(model, tmp_path / "h.safetensors")
    weights = read_generator(tmp_path / "base", tmp_path / "h.safetensors")
    assert built(weights, dict(TINY)).trained_memory == WINDOW
    assert built(read_transformer(tmp_path / "base"), {}).trained_memory == TrainedMemory(9, 0, 9)


@pytest.mark.parametrize(
    "settings",
    [
        {"window_frames": 3, "sink_frames": 3, "num_frames": None},
        {"window_frames": None, "sink_frames": 3, "num_frames": None},
        {"window_frames": 0, "sink_frames": 0, "num_frames": None},
        {"window_frames": 3, "sink_frames": 0},
        {"window_frames": 3, "sink_frames": 0, "num_frames": 2.5},
    ],
)
def test_a_record_that_cannot_be_is_refused(settings: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match="trained_memory"):
        HybridWanModel(**TINY, trained_memory=settings)


def test_the_hybrid_that_ships_says_what_it_was_trained_with() -> None:
    """docs/results/distillation.md: full memory in the softmax layers, videos of 21 latent frames."""
    folder = ROOT / "models" / "toyworld"
    with safe_open(folder / "hybrid_75.safetensors", "pt") as file:
        assert json.loads(file.metadata()["arl2"])["trained_memory"] == FULL.as_plain()
    model = built(read_generator(folder, folder / "hybrid_75.safetensors"), transformer_config(folder))
    assert model.trained_memory == FULL


@pytest.mark.parametrize(
    ("trained", "asked", "window", "words"),
    [
        (None, MemoryConfig(), (None, 0), None),
        (FULL, MemoryConfig(), (None, 0), None),
        (WINDOW, MemoryConfig(), (6, 3), None),
        (FULL, MemoryConfig(MemoryKind.full), (None, 0), None),
        (WINDOW, MemoryConfig(MemoryKind.window, 6, 3), (6, 3), None),
        (FULL, MemoryConfig(MemoryKind.window, 21, 0), (21, 0), None),
        (
            FULL,
            MemoryConfig(MemoryKind.window, 6, 0),
            (6, 0),
            "trained with full memory, on videos of 21 latent frames",
        ),
        (TrainedMemory(), MemoryConfig(MemoryKind.window, 99, 0), (99, 0), "trained with full memory"),
        (
            WINDOW,
            MemoryConfig(MemoryKind.full),
            (None, 0),
            "trained with a window of 6 latent frames, 3 of them a sink",
        ),
        (WINDOW, MemoryConfig(MemoryKind.window, 6, 0), (6, 0), "with a window of 6 latent frames in its softmax"),
        (None, MemoryConfig(MemoryKind.window, 6, 0), (6, 0), "does not say which memory"),
    ],
)
def test_the_memory_of_a_run(
    trained: TrainedMemory | None,
    asked: MemoryConfig,
    window: tuple[int | None, int],
    words: str | None,
    pipeline: CausalVideoPipeline,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pipeline.transformer.register_to_config(trained_memory=None if trained is None else trained.as_plain())
    pipeline._warnings_of_memory.clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):  # and one warning
            pipeline.new_memory(1, 16, 16, 3, asked)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == (words is not None) and all(words in warning for warning in warnings)
    assert pipeline.resolve_memory(asked).window == window


@pytest.fixture(scope="module")
def pipeline() -> CausalVideoPipeline:
    return random_pipeline("toy", HybridSettings((0,)), vae_config=TOY_VAE | {"dim": 4})


def test_a_softmax_model_with_a_record_is_warned_of(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    pipeline = random_pipeline("toy", HybridSettings(), vae_config=TOY_VAE | {"dim": 4})
    pipeline.transformer.set_trained_memory(FULL)
    pipeline.save_pretrained(tmp_path)
    again = CausalVideoPipeline.from_pretrained(tmp_path)
    again.resolve_memory(MemoryConfig(MemoryKind.window, 21, 0))
    assert not caplog.records
    again.resolve_memory(MemoryConfig(MemoryKind.window, 6, 0))
    assert "this model was trained with full memory, on videos of 21 latent frames" in caplog.text


def test_the_softmax_model_that_ships_says_what_it_was_trained_with() -> None:
    config = transformer_config(ROOT / "models" / "toyworld")
    assert config["trained_memory"] == FULL.as_plain()


def test_a_softmax_model_without_a_record_is_not_warned_of() -> None:
    assert MemoryConfig(MemoryKind.window, 6, 0).warning(None, is_hybrid=False) is None
    assert "trained with a window" in str(MemoryConfig(MemoryKind.full).warning(WINDOW, is_hybrid=False))
