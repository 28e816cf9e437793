"""Parts on the CPU between uses, decoding in parts, and quantised weights: the same videos, or a refusal."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import accelerate
import pytest
import torch
from accelerate.hooks import CpuOffload
from torch import Tensor

from pipelines.config import SpeedConfig
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.utils.errors import CheckpointError, InputError
from wan.vae.divided import DividedStream

CPU = torch.device("cpu")


def video(pipeline: CausalVideoPipeline, **options: Any) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    given = {"prompt": "a red shape", "num_frames": 21, "seeds": [1], "output_type": "pt"} | options
    frames = pipeline(**given).frames  # type: ignore[union-attr]
    assert isinstance(frames, Tensor)
    return frames


def test_whole_parts_come_and_go(pipeline: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, order = video(pipeline), list[str]()
    pipeline.enable_model_cpu_offload(device="cpu")
    names = {id(part): name for name, part in pipeline.components.items()}
    before, init = CpuOffload.pre_forward, CpuOffload.init_hook

    def come(self: CpuOffload, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        order.append(names[id(module)])
        return before(self, module, *args, **kwargs)

    def go(self: CpuOffload, module: torch.nn.Module) -> torch.nn.Module:
        order.append(f"{names[id(module)]} away")
        return init(self, module)

    monkeypatch.setattr(CpuOffload, "pre_forward", come)
    monkeypatch.setattr(CpuOffload, "init_hook", go)
    assert torch.equal(video(pipeline), expected)
    changes = [name for name, last in zip(order, [None, *order], strict=False) if name != last]
    assert changes[:3] == ["text_encoder", "transformer", "text_encoder away"] and "vae" not in changes
    assert changes[-2:] == ["text_encoder away", "transformer away"], "freed at the end of the video"
    assert torch.equal(video(pipeline), expected)


def layer_by_layer(model: torch.nn.Module, device: torch.device, **_: Any) -> None:
    """As `accelerate.cpu_offload`, which from the CPU to the CPU takes all weights for tied ones and fails.

    Every weight is on the meta device, but for the time of its own module's forward.
    """

    def keep(module: torch.nn.Module) -> None:
        own = {name: value.data for name, value in module.named_parameters(recurse=False)}

        def load(*_: Any) -> None:
            for name, value in own.items():
                module._parameters[name] = torch.nn.Parameter(value, requires_grad=False)

        def drop(*_: Any) -> None:
            for name, value in own.items():
                module._parameters[name] = torch.nn.Parameter(value.to("meta"), requires_grad=False)

        module.register_forward_pre_hook(load)
        module.register_forward_hook(drop)
        module._hf_hook = SimpleNamespace(execution_device=device)
        drop()

    for module in list(model.modules()):
        keep(module)


def test_layers_that_come_one_by_one(pipeline: CausalVideoPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accelerate, "cpu_offload", layer_by_layer)
    expected = video(pipeline)
    pipeline.enable_sequential_cpu_offload(device="cpu")
    assert pipeline.transformer.blocks[0].self_attn.q.weight.is_meta, "weights are elsewhere between uses"
    assert not pipeline.vae.post_quant_conv.weight.is_meta
    torch.testing.assert_close(video(pipeline), expected)


def test_groups_of_layers(pipeline: CausalVideoPipeline, tmp_path: Path) -> None:
    expected = video(pipeline)
    with pytest.raises(InputError, match="leaf_level"):
        pipeline.enable_group_offload(CPU, offload_type="block_level", num_blocks_per_group=1)
    with pytest.raises(InputError, match="exclude_modules='text_encoder'"):
        pipeline.enable_group_offload(CPU, offload_to_disk_path=str(tmp_path))
    pipeline.enable_group_offload(CPU, offload_to_disk_path=str(tmp_path), exclude_modules="text_encoder")
    assert list(tmp_path.glob("*.safetensors")), "weights are on the disk between uses"
    torch.testing.assert_close(video(pipeline), expected)
    for other in ("enable_model_cpu_offload", "enable_sequential_cpu_offload"):
        with pytest.raises(InputError, match=f"{other} does not go with enable_group_offload, which cannot be undone"):
            getattr(pipeline, other)(device="cpu")
    with pytest.raises(InputError, match="enable_group_offload keeps them"):
        pipeline.optimize_for_inference(SpeedConfig(compile=True))


@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_the_fast_form_and_offloading_exclude_one_another(enable: str, pipeline: CausalVideoPipeline) -> None:
    getattr(pipeline, enable)(device="cpu")
    with pytest.raises(InputError, match=f"{enable} keeps them on the CPU"):
        pipeline.optimize_for_inference(SpeedConfig(compile=True))
    pipeline.remove_all_hooks()
    pipeline.optimize_for_inference(SpeedConfig())


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_needs_a_gpu(enable: str, pipeline: CausalVideoPipeline) -> None:
    with pytest.raises(InputError, match=f"{enable} needs a GPU"):
        getattr(pipeline, enable)()


@pytest.mark.gpu
@pytest.mark.parametrize("enable", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_from_a_gpu(enable: str, pipeline: CausalVideoPipeline) -> None:
    expected = video(pipeline)
    getattr(pipeline, enable)()
    torch.testing.assert_close(video(pipeline).cpu(), expected, rtol=1e-2, atol=1e-2)
    assert pipeline.transformer.device.type in ("cpu", "meta")


@pytest.mark.gpu
def test_groups_of_layers_on_a_gpu(pipeline: CausalVideoPipeline) -> None:
    expected = video(pipeline)
    pipeline.enable_group_offload(torch.device("cuda"))
    torch.testing.assert_close(video(pipeline).cpu(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("by_hand", [False, True])
def test_frames_decoded_in_parts_are_those_of_the_whole(by_hand: bool, pipeline: CausalVideoPipeline) -> None:
    options = {"height": 48, "width": 32, "num_videos_per_prompt": 2, "seeds": [1, 2], "num_frames": 9}
    expected = video(pipeline, **options)
    if by_hand:  # on the VAE itself, as users of diffusers do
        pipeline.vae.enable_tiling(tile_sample_min_height=16)
        pipeline.vae.enable_slicing()
    else:
        pipeline.enable_vae_tiling(16)
        pipeline.enable_vae_slicing()
    torch.testing.assert_close(video(pipeline, **options), expected, rtol=1e-4, atol=1e-4)
    stream = pipeline.wan_vae.decode_stream()
    assert isinstance(stream, DividedStream)
    stream.decode(torch.zeros(2, 1, 16, 6, 4))
    assert [len(bands) for bands in stream._streams] == [3, 3], "two videos in three bands"
    pipeline.disable_vae_tiling()
    pipeline.disable_vae_slicing()
    assert torch.equal(video(pipeline, **options), expected)
    with pytest.raises(InputError, match="at least 8"):
        pipeline.enable_vae_tiling(4)


def test_quantisers_that_are_not_installed_are_named(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import QuantoConfig

    if "optimum" in sys.modules:
        pytest.skip("quanto is installed")
    with pytest.raises(InputError, match=r"cannot be used here: .*quanto") as caught:
        CausalVideoPipeline.from_pretrained(model, quantization_config=QuantoConfig(weights_dtype="int8"))
    assert "\n" not in str(caught.value)


def test_quantisation_of_what_cannot_be(model: Path, tmp_path: Path) -> None:
    from diffusers import QuantoConfig

    config = QuantoConfig(weights_dtype="int8")
    with pytest.raises(InputError, match="another layout"):
        CausalVideoPipeline.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(InputError, match="goes with none of"):
        CausalVideoPipeline.from_pretrained(model, quantization_config=config, use_ema=True)


def test_weights_that_are_not_finite_are_not_quantised(pipeline: CausalVideoPipeline, tmp_path: Path) -> None:
    from diffusers import QuantoConfig

    with torch.no_grad():
        pipeline.transformer.blocks[0].ffn[0].linear.weight[0, 0] = torch.nan
    pipeline.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="NaN"):
        CausalVideoPipeline.from_pretrained(tmp_path, quantization_config=QuantoConfig(weights_dtype="int8"))


def test_eight_bits_by_torchao(model: Path) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    from diffusers import TorchAoConfig

    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    small = CausalVideoPipeline.from_pretrained(model, quantization_config=config)
    assert "Int8" in type(small.transformer.blocks[1].self_attn.q.weight).__name__
    options = {"num_frames": 9, "output_type": "latent"}
    expected = video(CausalVideoPipeline.from_pretrained(model), **options)
    assert 0 < (video(small, **options) - expected).norm() / expected.norm() < 0.1
    with pytest.raises(InputError, match="they are quantised"):
        small.optimize_for_inference(SpeedConfig(compile=True))


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [4, 8])
def test_bits_by_bitsandbytes(bits: int, model: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from diffusers import BitsAndBytesConfig

    config = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    options = {"num_frames": 9, "output_type": "latent"}
    small = CausalVideoPipeline.from_pretrained(
        model, quantization_config=config, torch_dtype="bfloat16", device="cuda"
    )
    expected = video(CausalVideoPipeline.from_pretrained(model), **options)
    assert 0 < (video(small, **options).float().cpu() - expected).norm() / expected.norm() < 0.5


def test_a_device_that_is_not_there_leaves_all_as_it_was(pipeline: CausalVideoPipeline) -> None:
    pipeline.set_progress_bar_config(disable=True)
    for move in (
        lambda: pipeline.to("cuda:99"),
        lambda: pipeline.enable_model_cpu_offload(device="cuda:99"),
        lambda: pipeline.enable_sequential_cpu_offload(device="cuda:99"),
        lambda: pipeline.enable_group_offload(torch.device("cuda:99")),
    ):
        with pytest.raises(InputError, match="no device cuda:99 here"):
            move()
    pipeline("a red shape", 9, seeds=[1], output_type="latent")
