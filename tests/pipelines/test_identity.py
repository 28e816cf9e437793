"""What made a data set or scores is all that they depend on: another memory, setting or tokenizer is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from arl2.distillation.data import LatentDataset
from arl2.distillation.latent_writer import INDEX, LatentWriter
from arl2.model import HybridSettings
from pipelines import provenance
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.random_model import random_pipeline
from pipelines.provenance import text_fingerprints, tokenizer_fingerprint
from wan.text import load_text_encoder, word_tokenizer
from wan.utils.settings import differences
from wan.vae.wan_vae import TOY_VAE

generate_latents = import_module("generate_latents")
select_layers = import_module("select_layers")
Call = Callable[..., int]
Edit = Callable[[dict[str, Any]], object]
TOKENIZER, TOKENIZER_CONFIG = "tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json"
TRANSFORMER = "transformer/config.json"
CHANGES: dict[str, tuple[str, Edit, str]] = {
    "eps": (TRANSFORMER, lambda page: page.update(eps=1e-2), "architecture.eps was 1e-06, is 0.01"),
    "normalizer": (TOKENIZER, lambda page: page.update(normalizer={"type": "Lowercase"}), "tokenizer was"),
    "words": (TOKENIZER, lambda page: page.update(pre_tokenizer={"type": "WhitespaceSplit"}), "tokenizer was"),
    "end mark": (TOKENIZER, lambda page: page.update(post_processor=None), "tokenizer was"),
    "cut": (TOKENIZER_CONFIG, lambda page: page.update(truncation_side="left"), "tokenizer was"),
    "padding": (TOKENIZER_CONFIG, lambda page: page.update(padding_side="left"), "tokenizer was"),
    "special": (TOKENIZER_CONFIG, lambda page: page.update(eos_token="<unk>"), "tokenizer was"),
}


def edit(file: Path, change: Edit) -> None:
    page = json.loads(file.read_text())
    change(page)
    file.write_text(json.dumps(page))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A softmax model and one that is hybrid in all layers."""
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("softmax", ()), ("hybrid", range(8))):
        pipeline = random_pipeline("toy", HybridSettings(tuple(layers)), vae_config=TOY_VAE | {"dim": 4})
        pipeline.save_pretrained(folder / name)
        file = next((folder / name / "transformer").glob("*.safetensors"))
        save_file(load_file(file), file, metadata={"format": "pt"})  # as released weights: config.json alone says
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, models: Path) -> Call:
    """Calls a script on two prompts, and a model of its own; what it makes is in made/ or scores.json."""
    for name in ("softmax", "hybrid"):
        shutil.copytree(models / name, tmp_path / name)
    for name in ("softmax", "hybrid"):
        sizes = "height: 32\nwidth: 48\nnum_output_frames: 6\ndenoising_steps: [1000]\n"
        (tmp_path / f"{name}.yaml").write_text(f"model_folder: {name}\n{sizes}")
    (tmp_path / "prompts.txt").write_text("a red shape\nblue\n")
    monkeypatch.chdir(tmp_path)
    flags = {
        generate_latents: ["--config", "softmax.yaml", "--output_folder", "made"],
        select_layers: ["--config", "hybrid.yaml", "--method", "replacement", "--yaml", "layers.yaml"],
    }
    flags[select_layers] += ["--checkpoint_path", "hybrid/transformer", "--json", "scores.json", "--num_videos", "1"]

    def run(script: Any, *others: object) -> int:
        fixed = ["--data_path", "prompts.txt", "--device", "cpu", *flags[script]]
        monkeypatch.setattr(sys, "argv", ["script", *fixed, *map(str, others)])
        return int(script.main())

    return run


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1, error
    return error


def latents(folder: str) -> list[torch.Tensor]:
    data = LatentDataset([Path(folder)])
    return [data[place][0] for place in range(len(data))]


def test_a_teacher_rolls_out_with_the_memory_of_its_training(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    trained = {"window_frames": 3, "sink_frames": 0, "num_frames": 21}
    assert call(generate_latents, "memory.kind=full", "--output_folder", "full") == 0
    window = ("memory.kind=window", "memory.window_frames=3", "memory.sink_frames=0")
    assert call(generate_latents, *window, "--output_folder", "window") == 0
    assert call(generate_latents) == 0
    edit(Path("softmax", TRANSFORMER), lambda page: page.update(trained_memory=trained))
    capsys.readouterr()
    assert call(generate_latents) == 2 and "memory.kind was full, is window" in one_line(capsys)
    assert call(generate_latents, "--output_folder", "trained") == 0
    assert call(generate_latents, *window, "--output_folder", "trained") == 0, "the same in other words"
    settings = json.loads(Path("trained", INDEX).read_text())["settings"]
    assert settings["memory"] == {"kind": "window", "window_frames": 3, "sink_frames": 0}
    full, windowed, made = latents("full"), latents("window"), latents("trained")
    assert all(map(torch.equal, made, windowed)) and not any(map(torch.equal, made, full))


def test_a_memory_that_is_not_resolved_has_no_window() -> None:
    with pytest.raises(ValueError, match="resolve it first"):
        _ = MemoryConfig().window
    MemoryConfig(MemoryKind.trained, window_frames=2, sink_frames=5).check(3)
    assert MemoryConfig().resolved(None).window == (None, 0)


@pytest.mark.parametrize("script", [generate_latents, select_layers], ids=lambda script: script.__name__)
def test_other_settings_of_the_model_are_another_model(
    script: Any, call: Call, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / ("softmax" if script is generate_latents else "hybrid")
    assert call(script) == 0
    before = {path: path.read_bytes() for path in [*tmp_path.glob("made/**/*.*"), *tmp_path.glob("*.json")]}
    for name, (file, change, message) in CHANGES.items():
        content = (model / file).read_bytes()
        edit(model / file, change)
        capsys.readouterr()
        assert call(script) == 2, name
        assert message in one_line(capsys), name
        (model / file).write_bytes(content)
    edit(model / TRANSFORMER, lambda page: page.update(lora_alpha=5.0))
    assert call(script) == 0, "there are no adapters"
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("script", [generate_latents, select_layers], ids=lambda script: script.__name__)
def test_what_earlier_versions_made_is_gone_on_with(
    script: Any, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert call(script) == 0
    file = tmp_path / ("made/index.json" if script is generate_latents else "scores.json")

    def age(page: dict[str, Any]) -> None:
        settings = page["settings"]
        del settings["architecture"], settings["tokenizer"]
        settings["memory"]["kind"] = "trained"

    edit(file, age)
    if script is generate_latents:  # texts have their names by the settings
        writer = LatentWriter(file.parent, json.loads(file.read_text())["settings"])
        index = json.loads(file.read_text())
        for sample in index["samples"]:
            (file.parent / "text" / sample["text"]).rename(file.parent / "text" / writer._text_name(sample["prompt"]))
            sample["text"] = writer._text_name(sample["prompt"])
        file.write_text(json.dumps(index))
    content = json.loads(file.read_text())
    for name, owner in (("rollout", generate_latents), ("replacement_scores", select_layers)):
        monkeypatch.setattr(owner, name, lambda *a, **b: pytest.fail("it is there"))
    assert call(script) == 0 and call(script, "memory.kind=full") == 0
    assert json.loads(file.read_text()) == content, "what is not known stays so"


@pytest.mark.parametrize("script", [generate_latents, select_layers], ids=lambda script: script.__name__)
def test_a_backend_is_looked_up_before_it_is_compared(
    script: Any, call: Call, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call(script) == 0
    capsys.readouterr()
    assert call(script, "attention_backend=sdpa") == 2
    assert "attention backend 'sdpa' is not available on cpu" in one_line(capsys)


def test_a_tokenizer_is_known_by_all_that_it_does() -> None:
    words = ["red", "blue"]
    usual = tokenizer_fingerprint(word_tokenizer(words))
    assert usual == "e73eafa4f6bb1c3e", "fingerprints that results hold stay valid"
    found = {usual}
    for name, value in (
        ("truncation_side", "left"),
        ("padding_side", "left"),
        ("pad_token", "<unk>"),
        ("split_special_tokens", True),
    ):
        tokenizer = word_tokenizer(words)
        setattr(tokenizer, name, value)
        found.add(tokenizer_fingerprint(tokenizer))
    assert len(found) == 5


def test_a_text_encoder_and_its_tokenizer_have_a_fingerprint_each(models: Path) -> None:
    encoder = load_text_encoder(models / "softmax", text_len=8)
    both = text_fingerprints(encoder)
    assert both.keys() == {"text_encoder", "tokenizer"}
    encoder.tokenizer.truncation_side = "left"
    assert text_fingerprints(encoder)["text_encoder"] == both["text_encoder"]
    assert text_fingerprints(encoder)["tokenizer"] != both["tokenizer"]


def test_what_one_side_does_not_know_is_accepted_as_a_whole_alone() -> None:
    known = {"models": {"tokenizer": "a", "architecture": {"eps": 1.0, "heads": 2}}, "x": 1}
    assert not differences({"models": {}, "x": 1}, known) and not differences(known, {"x": 1})
    partly = {"models": {"tokenizer": "b", "architecture": {"eps": 1.0}}, "x": 1}
    assert differences(partly, known) == [
        "models.architecture.heads was nothing, is 2",
        "models.tokenizer was b, is a",
    ]
    assert differences({"memory": {"kind": "trained"}}, {"memory": {"kind": "full"}}) == []


def test_videos_of_one_block_cannot_be_scored(call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(select_layers, "num_output_frames=3") == 2
    assert "a single block of 3" in one_line(capsys)
    assert not Path("layers.yaml").exists() and not Path("scores.json").exists()


def test_scores_that_are_all_alike_are_said(
    call: Call, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select_layers, "replacement_scores", lambda *a: {layer: [0.5] for layer in range(8)})
    assert call(select_layers) == 0
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["all layers score 0.5: the sets are the first layers, and no choice"]


def test_rollouts_that_were_interrupted_have_the_values_of_an_unbroken_run(
    call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert call(generate_latents, "--output_folder", "whole") == 0
    honest, rolled = generate_latents.Teacher.roll_out, []

    def stop_at_the_second(*arguments: Any) -> torch.Tensor:
        rolled.append(arguments)
        if len(rolled) == 2:
            raise KeyboardInterrupt
        return honest(*arguments)

    monkeypatch.setattr(generate_latents.Teacher, "roll_out", stop_at_the_second)
    assert call(generate_latents) == 130 and len(LatentDataset([Path("made")])) == 1
    assert call(generate_latents) == 0 and len(rolled) == 3
    assert len(list(Path("made").glob("shard-*"))) == 2, "what was there when it stopped has a shard of its own"
    whole, made = LatentDataset([Path("whole")]), LatentDataset([Path("made")])
    assert len(made) == len(whole) == 2
    assert all(torch.equal(*pair) for place in range(2) for pair in zip(whole[place], made[place], strict=True))


def test_code_is_known_by_its_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "SOURCES", tmp_path)
    file = tmp_path / "arl2" / "ops" / "one.py"
    file.parent.mkdir(parents=True)
    found = []
    for text in ("x = 1", "x = 2", "x = 1"):
        file.write_text(text)
        found.append(provenance.source_fingerprint())
    (tmp_path / "notes.py").write_text("no part of it")
    assert found[0] == found[2] == provenance.source_fingerprint() != found[1]
    file.rename(file.with_name("two.py"))
    assert provenance.source_fingerprint() != found[0]
