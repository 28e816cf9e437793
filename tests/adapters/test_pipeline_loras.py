"""LoRAs on a pipeline: put on, weighted, fused and taken off exactly, beside hybrid layers and the fast form."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lora_files import NATIVE, Pairs, named, new_pairs
from published import stored, wrapped
from torch import Tensor

from arl2.adapters import base_parameters, base_tensors, read_loras
from arl2.inference.model import InferenceModel
from arl2.model import HybridSettings
from pipelines.config import SpeedConfig
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from wan.checkpoints.lora import LoRASource
from wan.utils.errors import CheckpointError, InputError
from wan.vae.wan_vae import TOY_VAE

HYBRID = HybridSettings((0, 2), 4)
FAST = SpeedConfig(compile=True)


def new_pipeline() -> CausalVideoPipeline:
    pipeline = random_pipeline("toy", HYBRID, vae_config=TOY_VAE | {"dim": 4}, denoising_steps=[1000, 500])
    with torch.no_grad():
        for name in pipeline.transformer.hybrid_parameter_names():
            pipeline.transformer.get_parameter(name).add_(0.02 * torch.randn(()))
    return pipeline


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> CausalVideoPipeline:
    monkeypatch.setattr("arl2.inference.model.compiled", lambda function: function)
    return new_pipeline()


def pairs_for(pipeline: CausalVideoPipeline, size: float = 0.3) -> Pairs:
    shapes = {name: value.shape for name, value in base_tensors(pipeline.transformer.state_dict()).items()}
    return {name: (size * a, size * b) for name, (a, b) in new_pairs(shapes).items()}


def entries(pairs: Pairs) -> dict[str, Tensor]:
    return named(pairs, NATIVE)


def state(pipeline: CausalVideoPipeline) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], value) for name, value in other.items())


def require_sum(pipeline: CausalVideoPipeline, before: dict[str, Tensor], *weighted: tuple[Pairs, float]) -> None:
    """Weights are those of before plus all products, to rounding; what else there is stays."""
    originals = base_tensors(before)
    for name, value in base_parameters(pipeline.transformer).items():
        module, total = name.removesuffix(".weight"), originals[name].double()
        for pairs, weight in weighted:
            if name.endswith(".weight") and module in pairs:
                down, up = pairs[module]
                total = total + weight * (up.double() @ down.double())
        torch.testing.assert_close(value.double(), total, rtol=1e-6, atol=1e-6)
    new = pipeline.transformer.hybrid_parameter_names()
    assert all(torch.equal(pipeline.transformer.get_parameter(name), before[name]) for name in new)


def video(pipeline: CausalVideoPipeline) -> Tensor:
    frames: Tensor = pipeline("a red shape", 21, 32, 32, seeds=[1], output_type="latent").frames
    return frames


def test_loras_are_weighted_anew_and_taken_off_exactly(pipeline: CausalVideoPipeline, tmp_path: Path) -> None:
    before, first, second = state(pipeline), pairs_for(pipeline), pairs_for(pipeline)
    pipeline.load_lora_weights(stored(entries(first), tmp_path / "a.safetensors"))
    require_sum(pipeline, before, (first, 1))
    pipeline.load_lora_weights(entries(second), adapter_name="second")
    require_sum(pipeline, before, (first, 1), (second, 1))
    assert pipeline.get_active_adapters() == ["default_0", "second"]
    pipeline.set_adapters(["default_0", "second"], [0.5, -2.0])
    require_sum(pipeline, before, (first, 0.5), (second, -2))
    pipeline.set_adapters("second", 0.25)
    require_sum(pipeline, before, (second, 0.25))
    assert pipeline.get_active_adapters() == ["second"]
    pipeline.set_adapters(["second", "default_0"])
    require_sum(pipeline, before, (first, 1), (second, 1))
    pipeline.set_adapters([])
    assert same(state(pipeline), before)
    pipeline.unload_lora_weights()
    assert same(state(pipeline), before) and pipeline.get_active_adapters() == []
    pipeline.unload_lora_weights()


def test_fused_loras_stay_when_they_are_unloaded_and_unfused_ones_do_not(pipeline: CausalVideoPipeline) -> None:
    before, first, second = state(pipeline), pairs_for(pipeline), pairs_for(pipeline)
    pipeline.load_lora_weights(entries(first), "first")
    pipeline.load_lora_weights(entries(second), "second")
    pipeline.fuse_lora(lora_scale=0.5, adapter_names=["second"])
    require_sum(pipeline, before, (second, 0.5))
    for call in (
        lambda: pipeline.fuse_lora(),
        lambda: pipeline.set_adapters("first"),
        lambda: pipeline.load_lora_weights(entries(first), "third"),
    ):
        with pytest.raises(InputError, match="the adapters are fused: call unfuse_lora"):
            call()
    pipeline.unfuse_lora()
    require_sum(pipeline, before, (first, 1), (second, 1))
    pipeline.set_adapters("first", 0.5)
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    require_sum(pipeline, before, (first, 0.5))
    fused = state(pipeline)
    pipeline.load_lora_weights(entries(second))
    pipeline.unload_lora_weights()
    assert same(state(pipeline), fused)


def test_weights_and_names_that_do_not_fit_change_nothing(pipeline: CausalVideoPipeline) -> None:
    before, pairs = state(pipeline), pairs_for(pipeline)
    for call, words in (
        (lambda: pipeline.set_adapters("a"), "no adapter is loaded"),
        (lambda: pipeline.fuse_lora(), "no adapter is loaded"),
        (lambda: pipeline.load_lora_weights({"blocks.0.ffn.0.lora_A.weight": torch.ones(2, 192)}), "without lora_B"),
        (lambda: pipeline.load_lora_weights(wrapped(before)), "a whole model, not a LoRA"),
    ):
        with pytest.raises(InputError, match=words):
            call()
    pipeline.load_lora_weights(entries(pairs), "a")
    loaded = state(pipeline)
    for call, words in (
        (lambda: pipeline.load_lora_weights(entries(pairs), "a"), "an adapter 'a' already"),
        (lambda: pipeline.set_adapters(["a", "b"]), "no adapter 'b': those loaded are a"),
        (lambda: pipeline.set_adapters("a", [1.0, 2.0]), "2 weights for 1 adapters"),
        (lambda: pipeline.set_adapters("a", float("nan")), "the weight of adapter 'a', nan is out of range"),
        (lambda: pipeline.set_adapters("a", 101), "the weight of adapter 'a', 101 is out of range"),
        (lambda: pipeline.set_adapters("a", "0.5"), "the weight of adapter 'a', '0.5' does not fit"),
        (lambda: pipeline.set_adapters("a", {"transformer": 0.5}), "weights of single parts"),  # type: ignore[arg-type]
        (lambda: pipeline.set_adapters(["a", "a"], [0.5, 1.0]), "adapter 'a' is named twice"),
        (lambda: pipeline.set_adapters(5), "names of adapters are or hold a int"),  # type: ignore[arg-type]
        (lambda: pipeline.fuse_lora(lora_scale=float("nan")), "lora_scale nan is out of range"),
        (lambda: pipeline.fuse_lora(lora_scale=1e30), "lora_scale 1e\\+30 is out of range"),
        (lambda: pipeline.fuse_lora(lora_scale=0), "nothing to fuse: lora_scale is 0"),
        (lambda: pipeline.fuse_lora(adapter_names=[]), "nothing to fuse: no adapter is switched on"),
        (lambda: pipeline.fuse_lora(adapter_names="style"), "no adapter 'style'"),
        (lambda: pipeline.fuse_lora(["text_encoder"]), "hold no LoRA"),
        (lambda: pipeline.load_lora_weights(None), "a LoRA is a NoneType"),  # type: ignore[arg-type]
        (lambda: pipeline.load_lora_weights(entries(pairs), 5), "adapter_name 5 is no name"),  # type: ignore[arg-type]
        (lambda: pipeline.load_lora_weights(entries(pairs), weight_name="a"), "goes with a folder, not with tensors"),
        (lambda: pipeline.load_lora_weights(entries(pairs_for(pipeline, 1e21)), "c"), "leaves the range of float32"),
    ):
        with pytest.raises(InputError, match=words):
            call()
        assert same(state(pipeline), loaded)
    assert pipeline.get_active_adapters() == ["a"]
    pipeline.unload_lora_weights()
    assert same(state(pipeline), before)


def test_the_fast_form_follows_every_change_of_weights(pipeline: CausalVideoPipeline) -> None:
    pairs = pairs_for(pipeline, 0.8)
    before, plain = state(pipeline), video(pipeline)
    pipeline.load_lora_weights(entries(pairs), "a")
    adapted = video(pipeline)
    pipeline.set_adapters("a", -0.5)
    weighted = video(pipeline)
    assert (adapted - plain).abs().max() > 1e-3 and (adapted - weighted).abs().max() > 1e-3
    pipeline.unload_lora_weights()
    pipeline.optimize_for_inference(FAST)

    def require_video(expected: Tensor) -> None:
        assert isinstance(pipeline.flow_model, InferenceModel) and not pipeline.transformer.adapters()
        torch.testing.assert_close(video(pipeline), expected, rtol=1e-4, atol=1e-4)

    require_video(plain)
    pipeline.load_lora_weights(entries(pairs), "a")
    require_video(adapted)
    pipeline.set_adapters("a", -0.5)
    require_video(weighted)
    pipeline.fuse_lora(lora_scale=-2.0)
    require_video(adapted)
    pipeline.unfuse_lora()
    require_video(weighted)
    with pytest.raises(CheckpointError):
        pipeline.load_lora_weights(entries(pairs_for(pipeline, 1e21)))
    require_video(weighted)
    pipeline.unload_lora_weights()
    require_video(plain)
    pipeline.optimize_for_inference(SpeedConfig(compile=False))
    assert same(state(pipeline), before)
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in pipeline.transformer.parameters())


@pytest.fixture(scope="module")
def stored_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("loras")
    new_pipeline().save_pretrained(folder / "model")
    yield folder / "model"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loras_given_with_a_model_are_those_put_on_it(dtype: torch.dtype, stored_model: Path, tmp_path: Path) -> None:
    plain = CausalVideoPipeline.from_pretrained(stored_model, torch_dtype=dtype)
    file = stored(entries(pairs_for(plain)), tmp_path / "a.safetensors")
    merged = CausalVideoPipeline.from_pretrained(stored_model, torch_dtype=dtype, lora=[LoRASource(file, 0.5)])
    assert merged.base_fingerprint is not None and plain.base_fingerprint is None
    plain.load_lora_weights(file, "a")
    plain.set_adapters("a", 0.5)
    assert same(state(merged), state(plain))
    assert merged.get_active_adapters() == []
    with pytest.raises(CheckpointError, match="does not have"):
        read_loras({"blocks.0.self_attn.q.weight": torch.ones(2, 2)}, [LoRASource(file)])


def test_names_and_weights_as_users_of_diffusers_write_them(pipeline: CausalVideoPipeline, tmp_path: Path) -> None:
    before, pairs = state(pipeline), pairs_for(pipeline)
    stored(entries(pairs), tmp_path / "style.safetensors")
    pipeline.load_lora_weights(tmp_path, "default_1", weight_name="style.safetensors")
    pipeline.load_lora_weights(entries(pairs))  # finds a name that is free
    assert sorted(pipeline.get_active_adapters()) == ["default_1", "default_2"]
    pipeline.set_adapters(["default_1", "default_2"], [None, np.float32(0.5)])  # type: ignore[list-item]
    require_sum(pipeline, before, (pairs, 1.0), (pairs, 0.5))
    pipeline.fuse_lora(["transformer"], 2.0, "default_2")
    require_sum(pipeline, before, (pairs, 1.0))


def test_weights_that_cannot_be_added_to_are_refused(
    pipeline: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = pairs_for(pipeline)
    monkeypatch.setattr(pipeline.transformer, "hf_quantizer", object(), raising=False)
    with pytest.raises(InputError, match="a LoRA cannot be added to quantised weights"):
        pipeline.load_lora_weights(entries(pairs))
    monkeypatch.undo()
    pipeline.transformer.to("meta")  # where accelerate leaves weights that it brings layer by layer
    with pytest.raises(InputError, match="enable_sequential_cpu_offload keeps the weights away"):
        pipeline.load_lora_weights(entries(pairs))


@pytest.mark.parametrize("kind", ["model", "group"])
def test_loras_reach_weights_that_are_offloaded(kind: str, pipeline: CausalVideoPipeline) -> None:
    before, pairs = state(pipeline), pairs_for(pipeline)
    if kind == "model":
        pipeline.enable_model_cpu_offload(device="cpu")
    else:
        pipeline.enable_group_offload(torch.device("cpu"))
    pipeline.load_lora_weights(entries(pairs))
    require_sum(pipeline, before, (pairs, 1.0))
    pipeline.unload_lora_weights()
    assert same(state(pipeline), before)


def test_loras_are_switched_off_and_on_and_deleted(pipeline: CausalVideoPipeline) -> None:
    before, first, second = state(pipeline), pairs_for(pipeline), pairs_for(pipeline)
    assert pipeline.get_list_adapters() == {}
    for call in (pipeline.disable_lora, pipeline.enable_lora):
        with pytest.raises(InputError, match="no adapter is loaded"):
            call()
    pipeline.load_lora_weights(entries(first), "a")
    pipeline.load_lora_weights(entries(second), "b")
    pipeline.set_adapters(["a", "b"], [0.5, -2.0])
    for _ in range(2):  # a second time changes nothing
        pipeline.disable_lora()
        assert same(state(pipeline), before) and pipeline.get_active_adapters() == []
        assert pipeline.get_list_adapters() == {"transformer": ["a", "b"]}
    for _ in range(2):
        pipeline.enable_lora()
        require_sum(pipeline, before, (first, 0.5), (second, -2))
    with pytest.raises(InputError, match="there is no adapter 'c'"):
        pipeline.delete_adapters(["a", "c"])
    require_sum(pipeline, before, (first, 0.5), (second, -2))
    pipeline.disable_lora()
    pipeline.delete_adapters("a")
    assert same(state(pipeline), before)
    pipeline.enable_lora()
    require_sum(pipeline, before, (second, -2))
    pipeline.disable_lora()
    pipeline.load_lora_weights(entries(first), "a")  # the name is free again
    pipeline.enable_lora()
    require_sum(pipeline, before, (first, 1), (second, -2))
    pipeline.disable_lora()
    pipeline.set_adapters("a")  # ends being switched off
    pipeline.enable_lora()
    require_sum(pipeline, before, (first, 1))
    pipeline.fuse_lora()
    for call in (pipeline.disable_lora, pipeline.enable_lora, lambda: pipeline.delete_adapters("a")):
        with pytest.raises(InputError, match="the adapters are fused"):
            call()
    pipeline.unfuse_lora()
    pipeline.delete_adapters(["a", "b"])
    assert same(state(pipeline), before) and pipeline.get_list_adapters() == {}
