"""Scripts that move weights: converting between formats, and drawing random models."""

import os
import resource
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image
from tiny_models import HYBRID, tiny_model

from arl2.checkpoint import save_generator, save_hybrid_weights
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.checkpoints.formats import read_transformer

convert_checkpoint = import_module("convert_checkpoint")
make_random_model = import_module("make_random_model")


def call(monkeypatch: pytest.MonkeyPatch, script: object, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["script", *map(str, arguments)])
    return script.main()


def test_a_checkpoint_goes_round_the_formats(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(HYBRID, torch.float32)
    model.save_pretrained(tmp_path / "a")
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / "b.pt") == 0
    flags = ("--config", tmp_path / "a", "--lora_alpha", HYBRID.lora_alpha)
    assert call(monkeypatch, convert_checkpoint, tmp_path / "b.pt", tmp_path / "c.safetensors", *flags) == 0
    assert call(monkeypatch, convert_checkpoint, tmp_path / "c.safetensors", tmp_path / "d", *flags) == 0
    names = torch.load(tmp_path / "b.pt", weights_only=True)["generator"]
    assert "model.blocks.0.self_attn.lora_q_A" in names and "model.blocks.0.ffn.0.linear.weight" in names
    again = HybridWanModel.from_pretrained(tmp_path / "d")
    assert again.hybrid == model.hybrid
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / "e.pt", "--merge_ffn_lora") == 0
    merged = read_transformer(tmp_path / "e.pt").state
    assert "blocks.0.ffn.0.weight" in merged and not any("ffn.0.lora" in name for name in merged)


def test_a_conversion_says_in_words_what_it_wrote(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name, settings, words in (
        ("a", HYBRID, "hybrid layers 0, 2 with adapters of rank 3 (alpha 6), also on the feed-forwards there"),
        ("b", replace(HYBRID, ffn_lora=FFNLoRA.ALL), "(alpha 6), also on the feed-forwards of all blocks"),
        ("c", HybridSettings((1,)), "hybrid layers 1"),
        ("d", HybridSettings(), "softmax in all layers"),
    ):
        tiny_model(settings, torch.float32).save_pretrained(tmp_path / name)
        assert call(monkeypatch, convert_checkpoint, tmp_path / name, tmp_path / f"{name}.pt") == 0
        assert f"{words}" in caplog.records[-1].getMessage() and "HybridSettings" not in caplog.text
    for name, words in (("a", "of rank 3 (alpha 6)"), ("b", "of rank 3 (alpha 6)")):
        assert call(monkeypatch, convert_checkpoint, tmp_path / name, tmp_path / f"{name}2.pt", "--merge_ffn_lora") == 0
        assert caplog.records[-1].getMessage().endswith(words)  # the adapters of feed-forwards are no longer there


def test_what_would_do_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "softmax")
    tiny_model(replace(HYBRID, ffn_lora=FFNLoRA.NONE), torch.float32).save_pretrained(tmp_path / "hybrid")
    for name in ("softmax", "hybrid"):
        for flags in (["--merge_ffn_lora"], ["--seed", "3"]):
            assert call(monkeypatch, convert_checkpoint, tmp_path / name, tmp_path / "x.pt", *flags) == 2
            message = capsys.readouterr().err
            assert f"{flags[0]} would do nothing" in message and len(message.splitlines()) == 1
    assert not (tmp_path / "x.pt").exists()
    conversion = ("--hybrid_layers", "1", "--seed", "3")
    assert call(monkeypatch, convert_checkpoint, tmp_path / "softmax", tmp_path / "x.pt", *conversion) == 0


def test_conversions_that_cannot_be(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_generator(tiny_model(dtype=torch.float32), tmp_path / "a.pt")
    for arguments, message in (
        ((tmp_path / "a.pt", tmp_path / "b.pt"), "--model_folder or --size"),
        ((tmp_path / "a.pt", tmp_path / "a.pt"), "exists"),
        ((tmp_path / "none.pt", tmp_path / "b.pt"), "no checkpoint"),
        ((tmp_path / "a.pt", tmp_path / "b.bin", "--size", "toy"), "written as .pt or .safetensors"),
        ((tmp_path / "a.pt", tmp_path / "b.pt", "--size", "1.3B"), "does not fit"),
    ):
        assert call(monkeypatch, convert_checkpoint, *arguments) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "b.pt").exists()


@pytest.mark.parametrize(
    "target", ["x.SAFETENSORS", "x.Safetensors", "a.PT", "a.pth", "a.CKPT", "a.safetensors.index.json"]
)
def test_a_folder_is_not_named_as_a_weight_file_is(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "a")
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / target) == 2
    message = capsys.readouterr().err
    assert "written as .pt or .safetensors, spelled so" in message and len(message.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_hybrid_weights_alone_are_converted_on_their_softmax_model(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_model(HYBRID, torch.float32)
    softmax = tiny_model(dtype=torch.float32)
    state = {name.replace(".linear.", "."): value for name, value in model.state_dict().items()}
    softmax.load_state_dict({name: state[name] for name in softmax.state_dict()})
    softmax.save_pretrained(tmp_path / "softmax")
    save_hybrid_weights(model, tmp_path / "hybrid.safetensors")
    source, target = tmp_path / "hybrid.safetensors", tmp_path / "whole.pt"
    assert call(monkeypatch, convert_checkpoint, source, target) == 2
    assert "as --model_folder" in capsys.readouterr().err
    assert call(monkeypatch, convert_checkpoint, source, target, "--model_folder", tmp_path / "softmax") == 0
    whole = read_transformer(target).state
    assert whole.keys() == model.state_dict().keys()
    assert all(torch.equal(value, whole[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "b"])
def test_a_conversion_gets_the_umask_s_mode_and_is_whole_or_absent(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(HYBRID, torch.float32).save_pretrained(tmp_path / "a")
    umask, limits = os.umask(0o027), resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
        assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / target) == 2
        message = capsys.readouterr().err
        assert "cannot write" in message and len(message.splitlines()) == 1
        assert [path.name for path in tmp_path.iterdir()] == ["a"]
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / target) == 0
    finally:
        os.umask(umask)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    written = [tmp_path / target, *(tmp_path / target).rglob("*")]
    assert {path.stat().st_mode & 0o777 for path in written} <= {0o640, 0o750}


@pytest.mark.parametrize("target", ["b.pt", "b.safetensors", "new/b"])
def test_one_conversion_at_a_time_writes_a_target(
    target: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(HYBRID, torch.float32).save_pretrained(tmp_path / "a")
    path, inner = tmp_path / target, []
    honest = convert_checkpoint.save

    def meet(model: HybridWanModel, where: Path) -> None:
        """Start a second conversion while the first writes."""
        inner.append(call(monkeypatch, convert_checkpoint, tmp_path / "a", path))
        honest(model, where)

    monkeypatch.setattr(convert_checkpoint, "save", meet)
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", path) == 0 and inner == [2]
    error = capsys.readouterr().err
    assert f"{path} is in use by process {os.getpid()}" in error and error.count("error: ") == 1
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", path) == 2 and "exists" in capsys.readouterr().err
    assert not list(path.parent.glob(".*")), "nor is a lock left"
    assert call(monkeypatch, convert_checkpoint, tmp_path / "none", tmp_path / "other" / "b") == 2
    assert not (tmp_path / "other").exists()


def test_sizes_that_contradict_the_source_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model(dtype=torch.float32).save_pretrained(tmp_path / "a")
    assert call(monkeypatch, convert_checkpoint, tmp_path / "a", tmp_path / "b", "--size", "toy") == 2
    assert "says dim 24, --size says dim 192" in capsys.readouterr().err


def test_random_models_load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    flags = ("--size", "toy", "--folder", tmp_path / "m", "--layout", "diffusers", "--device", "cpu")
    assert call(monkeypatch, make_random_model, *flags, "--hybrid_layers", 1, 2) == 0
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "m").rglob("*.safetensors")}
    assert modes == {(tmp_path / "m" / "model_index.json").stat().st_mode & 0o777}
    assert CausalVideoPipeline.from_pretrained(tmp_path / "m").transformer.hybrid.layers == (1, 2)
    assert call(monkeypatch, make_random_model, "--size", "toy", "--folder", tmp_path / "n") == 2


def test_kernels_are_timed_on_a_gpu_only(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = import_module("benchmark_kernels")
    assert call(monkeypatch, script, "--json", tmp_path / "x.json", "--device", "cpu") == 2
    assert "kernels need a GPU" in capsys.readouterr().err and not (tmp_path / "x.json").exists()


def test_the_demo_makes_a_video_with_both_models(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    demo = import_module("demo")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red ring bounces off the sides\n")
    monkeypatch.setattr(demo, "PROMPTS", prompts)
    monkeypatch.setattr(demo, "OUTPUT_FOLDER", tmp_path / "demo")
    monkeypatch.setattr(demo, "SCENES", (1,))
    monkeypatch.setattr("pipelines.toyworld.memory_demo.TIMES", 1)
    monkeypatch.setattr(sys, "argv", ["demo.py"])
    assert demo.main() == 0
    printed = capsys.readouterr().out
    written = [Path(line.removeprefix("wrote ")) for line in printed.splitlines() if line.startswith("wrote ")]
    assert [path.parent.name for path in written] == [*demo.MODELS, "demo", "demo", "demo"]
    assert [path.suffix for path in written] == [".mp4", ".mp4", ".png", ".png", ".webp"]
    with Image.open(written[4]) as animation:
        assert animation.n_frames == 27 and animation.size == (2 * (2 * 96 + 8) + 8, 2 * (2 * 64 + 30) + 8)
    assert Image.open(written[2]).size == (9 * (2 * 96 + 8) + 8, 2 * (30 + 2 * 64 + 30) + 8)
