"""Loading from a folder or the hub, in every type, with parts left out; and the fast form that is made by default."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers_world import new_pipeline
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from pipelines.config import SpeedConfig
from pipelines.generation.inputs import hub
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.utils.errors import CheckpointError, InputError

load = CausalVideoPipeline.from_pretrained


def video(pipeline: CausalVideoPipeline) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    frames = pipeline("a red shape", 9, seeds=[1], output_type="latent").frames  # type: ignore[union-attr]
    assert isinstance(frames, Tensor)
    return frames


def test_types_by_name(model: Path) -> None:
    assert load(model).transformer.dtype is torch.float32
    half = load(model, dtype="bfloat16", device_map="cpu")
    assert {half.transformer.dtype, half.vae.dtype, half.text_encoder.dtype} == {torch.bfloat16}  # type: ignore[union-attr]
    assert load(model, torch_dtype="torch.bfloat16").dtype is torch.bfloat16
    with pytest.raises(InputError, match="dtype and torch_dtype mean the same"):
        load(model, dtype="bfloat16", torch_dtype="bfloat16")
    for name in ("int8", "half"):
        with pytest.raises(InputError, match="bfloat16, float16, float32 or auto"):
            load(model, torch_dtype=name)


def test_auto_is_the_type_of_the_weights(tmp_path: Path, model: Path) -> None:
    load(model, torch_dtype=torch.bfloat16).save_pretrained(tmp_path)
    pipeline = load(tmp_path, torch_dtype="auto")
    assert pipeline.transformer.dtype is pipeline.wan_vae.dtype is torch.bfloat16
    assert load(model, torch_dtype="auto").transformer.dtype is torch.float32


def test_devices_by_name(model: Path) -> None:
    with pytest.raises(InputError, match="give one of them"):
        load(model, device="cpu", device_map="cpu")
    with pytest.raises(InputError, match="'balanced' is no device"):
        load(model, device_map="balanced")


def test_without_a_text_encoder(model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    whole, pipeline = load(model), load(bare, text_encoder=None)
    with pytest.raises(InputError, match="no text encoder: pass prompt_embeds"):
        pipeline("a red shape")
    embeds, expected = whole.encode_prompt(["a red shape"]), video(whole)
    pipeline.set_progress_bar_config(disable=True)
    found = pipeline(None, 9, prompt_embeds=embeds, seeds=[1], output_type="latent").frames  # type: ignore[union-attr]
    assert torch.equal(found, expected)
    pipeline.save_pretrained(tmp_path / "saved")
    assert load(tmp_path / "saved").text_encoder is None
    with pytest.raises(CheckpointError, match="no text encoder"):
        load(bare)


def test_parts_that_are_there_are_taken(model: Path) -> None:
    whole = load(model)
    other = load(model, transformer=whole.transformer, vae=whole.vae, text_encoder=whole.text_encoder)
    assert other.transformer is whole.transformer and other.vae is whole.vae
    assert other.text_encoder is whole.text_encoder and other.tokenizer is not None
    with pytest.raises(InputError, match="goes with none of"):
        load(model, transformer=whole.transformer, use_ema=True)


def test_unknown_arguments_fail_before_anything_is_read(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.generation.mixins.loading.read_generator", lambda *_: pytest.fail("was read"))
    with pytest.raises(TypeError, match="'variant': it takes pretrained"):
        load(model, variant="fp16")
    with pytest.raises(InputError, match="frames_per_block"):
        load(model, frames_per_block="three")


def test_a_repository_comes_through_the_cache(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = dict[str, Any]()

    def snapshot(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(model)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert load("someone/something", revision="v1", cache_dir="/cache").config.num_frames == 21
    assert asked["name"] == "someone/something" and asked["revision"] == "v1" and asked["cache_dir"] == "/cache"
    patterns = set(asked["allow_patterns"])
    assert {"transformer/*.safetensors", "text_encoder/*.safetensors", "tokenizer/*", "Wan2.1_VAE.pth"} <= patterns
    assert not any(pattern.endswith(".py") or pattern == "*" for pattern in patterns)
    load("someone/something", text_encoder=None)
    assert not any(pattern.startswith(("text_encoder/*.s", "tokenizer")) for pattern in asked["allow_patterns"])
    asked.clear()
    load(str(model))
    assert not asked, "a folder never asks the hub"


def test_a_lora_of_a_repository_comes_through_the_cache(
    model: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline, asked = load(model), list[list[str]]()
    change = {"blocks.0.self_attn.q.diff_b": torch.full((pipeline.transformer.config.dim,), 0.5)}
    for name in ("light.safetensors", "pytorch_lora_weights.safetensors"):
        save_file(change, tmp_path / name)
    before = pipeline.transformer.get_parameter("blocks.0.self_attn.q.bias").clone()

    def snapshot(name: str, **options: Any) -> str:
        assert name == "someone/lora" and options["revision"] == "v2"
        asked.append(options["allow_patterns"])
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    for weight_name in ("light.safetensors", None):
        pipeline.load_lora_weights("someone/lora", weight_name=weight_name, revision="v2")
        torch.testing.assert_close(pipeline.transformer.get_parameter("blocks.0.self_attn.q.bias"), before + 0.5)
        pipeline.unload_lora_weights()
    assert asked[0] == ["light.safetensors", "adapter_config.json"]
    assert "pytorch_lora_weights.safetensors" in asked[1] and "light.safetensors" not in asked[1]
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"the hub was not reached: give the folder of a LoRA"):
        pipeline.load_lora_weights("someone/lora", cache_dir=tmp_path, local_files_only=True)
    with pytest.raises(CheckpointError, match="no LoRA at nowhere"):
        pipeline.load_lora_weights("nowhere")


class UnknownError(RepositoryNotFoundError):
    """As the hub raises it, without a response of its library for HTTP."""

    def __init__(self) -> None:
        Exception.__init__(self, "long\ntext")


class BrokenError(HfHubHTTPError):
    """Likewise."""

    def __init__(self) -> None:
        Exception.__init__(self, "bad\ngateway")


ANSWERS: dict[str, tuple[Callable[[], Exception], str]] = {
    "offline": (lambda: LocalEntryNotFoundError("long\ntext"), "the hub was not reached"),
    "unknown": (UnknownError, "shows no repository"),
    "broken": (BrokenError, r"\(bad\): try again"),
    "full": (lambda: OSError(28, "No space left on device"), "No space left"),
}


@pytest.mark.parametrize("case", sorted(ANSWERS))
def test_a_hub_that_does_not_give_is_one_line(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    error, message = ANSWERS[case]

    def refuse(*_: Any, **__: Any) -> str:
        raise error()

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    with pytest.raises(InputError, match=message) as caught:
        load("someone/something")
    assert "\n" not in str(caught.value)


def test_offline_for_real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the hub was not reached"):
        load("someone/something", cache_dir=tmp_path, local_files_only=True)


def test_settings_are_stored(model: Path) -> None:
    stored = json.loads((model / "model_index.json").read_text())
    assert (stored["height"], stored["width"], stored["num_frames"]) == (16, 32, 21)
    assert load(model, num_frames=9).config.num_frames == 9


@pytest.fixture
def gpu_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU is taken for a device on which blocks are compiled by default."""

    def compiled(self: SpeedConfig, device: torch.device, dtype: torch.dtype) -> SpeedConfig:
        on = {"compile": True, "cuda_graphs": False, "kernels": False, "overlap_decoding": False}
        return replace(self, **{name: value for name, value in on.items() if getattr(self, name) is None})

    monkeypatch.setattr("arl2.inference.model.compiled", lambda function: function)
    monkeypatch.setattr(SpeedConfig, "on", compiled)
    monkeypatch.setattr(CausalVideoPipeline, "_takes_fast_form_by_default", lambda self: True)


def is_fast(pipeline: CausalVideoPipeline) -> bool:
    return pipeline.flow_model is not pipeline.transformer


@pytest.mark.usefixtures("gpu_like")
def test_the_first_call_optimizes_unless_it_is_told_not_to(model: Path) -> None:
    plain, fast = load(model, optimize=False), load(model)
    expected = video(plain)
    assert not is_fast(plain) and not is_fast(fast)
    torch.testing.assert_close(video(fast), expected, rtol=1e-4, atol=1e-4)
    assert is_fast(fast)
    fast.leave_fast_form()
    assert torch.equal(video(fast), expected) and not is_fast(fast)
    assert is_fast(load(model, optimize=SpeedConfig()))


@pytest.mark.usefixtures("gpu_like")
def test_what_changes_weights_makes_the_fast_form_anew(model: Path) -> None:
    pipeline, plain = load(model), load(model, optimize=False)
    video(pipeline)
    first = pipeline.flow_model
    video(pipeline)
    assert pipeline.flow_model is first, "nothing changed"
    for each in (pipeline, plain):
        with torch.no_grad():
            each.transformer.blocks[1].self_attn.q.weight.mul_(1.5)
            each.transformer.head.head.bias.add_(0.3)
    changed = video(plain)
    torch.testing.assert_close(video(pipeline), changed, rtol=1e-4, atol=1e-4)
    assert pipeline.flow_model is not first and is_fast(pipeline)
    pipeline.to(torch.float64)
    assert not is_fast(pipeline) and pipeline.transformer.adapters()
    torch.testing.assert_close(video(pipeline).float(), changed, rtol=1e-4, atol=1e-4)
    assert is_fast(pipeline)


@pytest.mark.usefixtures("gpu_like")
def test_what_is_saved_of_a_fast_form_has_its_adapters(model: Path, tmp_path: Path) -> None:
    pipeline = load(model)
    expected = video(pipeline)
    assert is_fast(pipeline) and not pipeline.transformer.adapters()
    pipeline.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.transformer.adapters() and torch.equal(video(again), expected)


@pytest.mark.usefixtures("gpu_like")
def test_weights_under_merged_adapters_cannot_be_changed(model: Path) -> None:
    pipeline = load(model)
    video(pipeline)
    with torch.no_grad():
        pipeline.transformer.blocks[0].ffn[0].weight.mul_(2)
    with pytest.raises(InputError, match="leave_fast_form"):
        video(pipeline)


@pytest.mark.usefixtures("gpu_like")
def test_another_transformer_is_seen(model: Path) -> None:
    pipeline, other = load(model), new_pipeline(guidance_distilled=True)
    with torch.no_grad():
        other.transformer.head.head.bias.add_(0.3)
    other.optimizes_by_default = False
    video(pipeline)
    pipeline.transformer = other.transformer
    torch.testing.assert_close(video(pipeline), video(other), rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("gpu_like")
@pytest.mark.parametrize("what", ["picture", "guidance", "again"])
def test_the_fast_form_takes_what_the_plain_one_takes(what: str, model: Path) -> None:
    frames = torch.rand(9, 3, 16, 32) * 2 - 1
    options: dict[str, Any] = {
        "picture": {"image": frames[0]},
        "guidance": {"guidance_scale": 3.0, "negative_prompt": "blue"},
        "again": {"video": frames, "strength": 0.5},
    }[what]
    found = []
    for optimize in (False, True):
        pipeline = load(model, optimize=optimize, guidance_distilled=False)
        pipeline.set_progress_bar_config(disable=True)
        options |= {"num_frames": 9, "seeds": [1], "output_type": "latent"}
        found.append(pipeline("a red shape", **options).frames)  # type: ignore[union-attr]
        assert is_fast(pipeline) is optimize
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"guidance_scale": 3.0}, {"image": torch.zeros(3, 16, 32)}])
def test_recorded_passes_take_guidance_and_kept_frames(options: dict[str, Any], model: Path) -> None:
    found = []
    for optimize in (False, True):
        pipeline = load(model, device="cuda", optimize=optimize, guidance_distilled=False)
        pipeline.set_progress_bar_config(disable=True)
        for _ in range(2):  # the second video replays
            video = pipeline("a red shape", 45, seeds=[1], output_type="latent", **options).frames  # type: ignore[union-attr]
        found.append(video)
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2)


@pytest.mark.gpu
def test_a_gpu_optimizes_by_default(model: Path) -> None:
    plain = video(load(model, device="cuda", optimize=False))
    pipeline = load(model).to("cuda")
    torch.testing.assert_close(video(pipeline), plain, rtol=1e-3, atol=1e-3)
    assert is_fast(pipeline)
    pipeline.to("cpu")
    assert not is_fast(pipeline)
    torch.testing.assert_close(video(pipeline), plain.cpu(), rtol=1e-2, atol=1e-2)


def test_names_in_the_place_of_parts_and_devices_that_are_not_there(model: Path) -> None:
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "a transformer": ({"transformer": "x"}, "transformer is a str: give a HybridWanModel"),
        "a VAE": ({"vae": "x"}, "vae is a str: give a AutoencoderKLWan"),
        "a text encoder": ({"text_encoder": "umt5"}, "text_encoder is a str: give a UMT5EncoderModel"),
        "a tokenizer": ({"tokenizer": "umt5"}, "tokenizer is a str: give a PreTrainedTokenizerBase"),
        "a speed": ({"optimize": "yes"}, "optimize is a str"),
        "a GPU": ({"device_map": "cuda:99"}, r"no device cuda:99 here \("),
        "no values": ({"device_map": "meta"}, "no device meta here"),
    }
    for options, words in wrong.values():
        with pytest.raises(InputError, match=words):
            load(model, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_cast_leaves_gates_as_loading_does(dtype: torch.dtype, model: Path) -> None:
    moved, loaded = load(model).to("cpu", dtype), load(model, dtype=dtype)
    assert loaded.transformer.dtype is loaded.transformer.get_parameter("blocks.0.self_attn.q.weight").dtype is dtype
    for part in ("transformer", "vae", "text_encoder"):
        one, other = getattr(moved, part).state_dict(), getattr(loaded, part).state_dict()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], rtol=0, atol=0, msg=f"{part}.{name}")
