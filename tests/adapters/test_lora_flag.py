"""--lora of inference.py and of scripts/convert_checkpoint.py, and what programs without it say."""

import json
import shutil
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_world import planned, run_inference, save_model, videos_in, write_config
from lora_files import NATIVE, Pairs, named, new_pairs, products
from published import stored

from arl2.adapters import base_tensors
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.checkpoints.formats import read_transformer
from wan.checkpoints.lora import LoRASource
from wan.utils.errors import InputError

PROMPT = ("--prompt", "a red ball")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its transformer's weights as a file, and two LoRAs."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("lora_flag")
    save_model(folder / "model")
    weights = read_transformer(folder / "model")
    stored(weights.state, folder / "whole.safetensors")
    for name in ("a", "b"):
        stored(named(pairs_of(folder), NATIVE), folder / f"{name}.safetensors")
    return folder


def pairs_of(world: Path) -> Pairs:
    state = base_tensors(read_transformer(world / "model").state)
    return new_pairs({name: value.shape for name, value in state.items()})


def record_in(folder: Path) -> dict[str, Any]:
    (record,) = (json.loads(file.read_text()) for file in folder.glob("*.json"))
    return dict(record)


def test_loras_come_from_the_config_or_from_flags_which_may_be_repeated(world: Path, tmp_path: Path) -> None:
    a, b = world / "a.safetensors", world / "b.safetensors"
    config = write_config(tmp_path, world / "model", f"lora: [{a}, '{b}:-0.5']\n")
    expected = [LoRASource(a), LoRASource(b, -0.5)]
    assert planned(config, *PROMPT).config.lora_sources() == expected
    assert planned(config, *PROMPT, "--lora", f"{b}:2").config.lora_sources() == [LoRASource(b, 2.0)]
    plain = write_config(tmp_path, world / "model")
    for flags in (("--lora", a, "--lora", f"{b}:-0.5"), ("--lora", a, f"{b}:-0.5"), (f"lora=[{a}, '{b}:-0.5']",)):
        assert planned(plain, *PROMPT, *flags).config.lora_sources() == expected
    assert planned(plain, *PROMPT).config.lora_sources() == []


def test_a_record_names_loras_and_another_lora_is_noticed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, out = write_config(tmp_path, world / "model"), tmp_path / "out"
    lora = Path(shutil.copy(world / "a.safetensors", tmp_path / "style.safetensors"))
    assert run_inference(monkeypatch, config, *PROMPT, "--output_folder", tmp_path / "plain") == 0
    assert run_inference(monkeypatch, config, *PROMPT, "--lora", f"{lora}:0.5") == 0
    plain, record, made = record_in(tmp_path / "plain"), record_in(out), videos_in(out)
    (noted,) = record["settings"]["lora"]
    assert noted["scale"] == 0.5 and len(noted["sha256"]) == 32 and record["lora_files"] == [str(lora)]
    assert "lora" not in plain["settings"] and plain["lora_files"] == []
    # The weights noted are those before LoRAs, since sums of products have other last bits elsewhere.
    assert record["settings"]["weights"] == plain["settings"]["weights"]
    assert made.keys() == videos_in(tmp_path / "plain").keys() and made != videos_in(tmp_path / "plain")

    moved = lora.rename(tmp_path / "moved.safetensors")
    assert run_inference(monkeypatch, config, *PROMPT, "--lora", f"{moved}:0.5") == 0
    assert videos_in(out) == made, "the same LoRA in another place"
    capsys.readouterr()
    others = [["--lora", str(moved)], ["--lora", f"{moved}:0.5", str(world / "b.safetensors")], []]
    others.append(["--lora", f"{shutil.copy(world / 'b.safetensors', lora)}:0.5"])
    for flags in others:
        assert run_inference(monkeypatch, config, *PROMPT, *flags) == 2
        error = capsys.readouterr().err
        assert "made with other settings (lora was" in error and error.count("\n") == 1
    assert videos_in(out) == made


def test_files_in_each_other_s_place_are_told_where_they_belong(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, world / "model")
    web = tmp_path / "web.safetensors"
    web.write_text("<!DOCTYPE html><html>")
    for flags, words in (
        (["--checkpoint_path", world / "a.safetensors"], "holds a LoRA: give it as --lora, and the model"),
        (["--lora", world / "whole.safetensors"], "holds a whole model, not a LoRA: give it as --checkpoint_path"),
        (["--lora", world / "none.safetensors"], "no LoRA at"),
        (["--lora", web], "is a web page"),
        (["--lora", f"{world / 'a.safetensors'}:0"], "the scale 0 of"),
        (["--lora"], "expected at least one argument"),
    ):
        assert run_inference(monkeypatch, config, *PROMPT, *flags) == 2
        error = capsys.readouterr().err
        assert words in error and error.startswith("error: ") and error.count("\n") == 1, error


def test_what_can_be_told_without_a_model_is_told_before_it_loads(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_config(tmp_path, world / "model")
    monkeypatch.setattr(CausalVideoPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    for name in ("none.safetensors", "none"):
        with pytest.raises(InputError, match="no LoRA at"):
            planned(config, *PROMPT, "--lora", world / name)


def convert(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["convert_checkpoint.py", *map(str, arguments)])
    status: int = import_module("convert_checkpoint").main()
    return status


def test_a_model_and_its_lora_are_written_as_one(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = pairs_of(world)
    lora = stored(named(pairs, NATIVE), tmp_path / "lora.safetensors")
    target = tmp_path / "one.safetensors"
    assert convert(monkeypatch, world / "model", target, "--lora", f"{lora}:0.5") == 0
    before, after = (base_tensors(read_transformer(path).state) for path in (world / "model", target))
    changes = products(pairs, 0.5)
    for name, value in after.items():
        expected = (before[name].double() + changes[name]).float() if name in changes else before[name]
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
        assert torch.equal(value, before[name]) is (name not in changes)
    capsys.readouterr()
    assert convert(monkeypatch, world / "model", tmp_path / "two.pt", "--lora", world / "whole.safetensors") == 2
    assert "holds a whole model" in capsys.readouterr().err and not (tmp_path / "two.pt").exists()


@pytest.mark.parametrize("program", ["generate_latents", "select_layers"])
def test_programs_whose_results_name_one_checkpoint_take_no_loras(
    program: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, world / "model", f"lora: [{world / 'a.safetensors'}]\n")
    (tmp_path / "prompts.txt").write_text("a red ball\n")
    flags = ["--config", config, "--data_path", tmp_path / "prompts.txt"]
    if program == "select_layers":
        flags += ["--method", "replacement", "--yaml", tmp_path / "layers.yaml", "--checkpoint_path", world / "model"]
    else:
        flags += ["--output_folder", tmp_path / "data"]
    monkeypatch.setattr(sys, "argv", [program, *map(str, flags)])
    assert import_module(program).main() == 2
    error = capsys.readouterr().err
    assert "scripts/convert_checkpoint.py and its --lora" in error and error.count("\n") == 1


def test_a_lora_that_is_given_twice_or_with_no_number_is_refused(world: Path, tmp_path: Path) -> None:
    a, config = world / "a.safetensors", write_config(tmp_path, world / "model")
    (tmp_path / "link.safetensors").symlink_to(a)
    for flags, words in (
        (("--lora", a, "--lora", f"{a}:0.5"), "is given twice: give it once"),
        (("--lora", a, tmp_path / "link.safetensors"), "is given twice: give it once"),
        (("--lora", f"{a}:0,8"), "a scale is a number behind a colon, FILE:0.8"),
    ):
        with pytest.raises(InputError, match=words):
            planned(config, *PROMPT, *flags)
    with pytest.raises(InputError, match="is given twice"):
        CausalVideoPipeline.from_pretrained(world / "model", text_encoder=None, lora=[a, f"{a}:0.5"])


def test_a_pipeline_takes_loras_as_the_command_line_does(world: Path) -> None:
    load, a = CausalVideoPipeline.from_pretrained, world / "a.safetensors"
    expected = load(world / "model", text_encoder=None, lora=[LoRASource(a, 0.5)]).transformer.state_dict()
    for lora in ([f"{a}:0.5"], f"{a}:0.5"):
        found = load(world / "model", text_encoder=None, lora=lora).transformer.state_dict()  # type: ignore[arg-type]
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(InputError, match="lora holds a int"):
        load(world / "model", lora=[5])  # type: ignore[list-item]
