"""What is not finite stops its video and is named; nothing that exceeds float16's range runs in it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from inference_world import SIZE, planned, run_inference, save_model, write_config
from paths import ROOT
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines.generation.blocks import GIVEN, LATENTS, PIXELS, TEXT, NonFiniteBlockError
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.run import generate
from pipelines.generation.streaming import FiniteCheck
from pipelines.media.video import read_video
from wan.text import TextEncoder, load_text_encoder
from wan.utils.device import wide_range_dtype
from wan.vae.wan_vae import TOY_VAE, WanVAE, load_vae, new_vae

BUNDLE = ROOT / "models" / "toyworld"
PROMPT = "a red ring rolls behind the wall and comes out again"


@pytest.fixture
def broken(folder: Path) -> CausalVideoPipeline:
    """A pipeline to be broken by its test."""
    return CausalVideoPipeline.from_pretrained(folder)


def refusal(pipeline: CausalVideoPipeline, **options: object) -> NonFiniteBlockError:
    """The error of a video's first block that fails."""
    with pytest.raises(NonFiniteBlockError) as caught:
        for _ in pipeline.stream("a red shape", 9, **SIZE, seeds=[0], **options):
            pass
    return caught.value


def test_the_first_broken_tensor_is_named() -> None:
    good, bad = torch.zeros(3), torch.tensor([0.0, torch.inf])
    assert FiniteCheck({"a": good, "b": good}).wait()
    check = FiniteCheck({"a": good, "b": bad, "c": bad * torch.nan})
    assert not check.wait() and check.first_broken() == "b"


@torch.no_grad()
def test_text(broken: CausalVideoPipeline) -> None:
    broken.text_encoder.encoder.final_layer_norm.weight.fill_(torch.nan)
    error = refusal(broken)
    assert (error.block, error.what) == (0, TEXT)
    assert "block 0 is not finite (text embedding): check the text encoder's weights" in str(error)


def test_embeddings_that_the_transformers_type_cannot_hold(broken: CausalVideoPipeline) -> None:
    broken.to(dtype=torch.float16)
    with pytest.raises(NonFiniteBlockError, match="text embedding"):
        next(broken.stream(prompt_embeds=torch.full((1, 4, 64), 1e5), num_frames=9, **SIZE))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_given_frames(broken: CausalVideoPipeline, value: float) -> None:
    broken.register_to_config(frames_per_block=1)
    with torch.no_grad():
        broken.vae.encoder.conv_out.bias.fill_(value)
    assert refusal(broken, image=torch.zeros(1, 1, 3, *SIZE.values())).what == GIVEN


def test_latents(broken: CausalVideoPipeline) -> None:
    broken.transformer.head.head.bias.fill_(torch.inf)
    assert refusal(broken).what == LATENTS


def _decoder_weight(pipeline: CausalVideoPipeline) -> None:
    pipeline.vae.decoder.conv_in.weight.mul_(torch.nan)


def _infinite_pixels(pipeline: CausalVideoPipeline) -> None:
    pipeline.vae.decoder.conv_out.bias.fill_(torch.inf)  # clamping would make white of it


def _statistics(pipeline: CausalVideoPipeline) -> None:
    pipeline.vae.register_to_config(latents_std=[torch.nan, *pipeline.vae.config.latents_std[1:]])


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("breaking", [_decoder_weight, _infinite_pixels, _statistics])
@torch.no_grad()
def test_pixels(broken: CausalVideoPipeline, breaking: object, fast: bool) -> None:
    breaking(broken)
    broken.wan_vae.fast = fast
    error = refusal(broken)
    assert error.what == PIXELS and "check the weights and the statistics of the VAE" in str(error)


@torch.no_grad()
def test_a_later_block_is_named_and_those_before_are_handed_out(broken: CausalVideoPipeline) -> None:
    decoded = 0

    def poison(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        nonlocal decoded
        decoded += 1
        return output * torch.nan if decoded > 3 else output

    broken.vae.decoder.register_forward_hook(poison)
    blocks = broken.stream("a red shape", 21, **SIZE, seeds=[0])
    assert next(blocks).index == 0
    with pytest.raises(NonFiniteBlockError, match=r"block 1 is not finite .pixels"):
        next(blocks)


@torch.no_grad()
def test_black_is_finite(broken: CausalVideoPipeline) -> None:
    broken.vae.decoder.conv_out.weight.zero_()
    broken.vae.decoder.conv_out.bias.fill_(-1e30)
    for block in broken.stream("a red shape", 9, **SIZE, seeds=[0]):
        assert not block.frames_BTHWC.wait().any() and block.finite.wait()


@torch.no_grad()
def test_a_run_leaves_such_videos_out_and_fails(
    broken: CausalVideoPipeline, config: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (config.parent / "prompts.txt").write_text("red\nblue\n")
    run = planned(config, "--data_path", config.parent / "prompts.txt")
    _decoder_weight(broken)
    assert generate(run, broken) == 2
    assert caplog.text.count("block 0 is not finite (pixels)") == 2 and not list(run.output_folder.iterdir())


def test_a_vae_that_turned_to_nan_is_no_success(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    weights = model / "vae" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["decoder.conv_in.weight"] *= torch.nan
    save_file(state, weights)
    assert run_inference(monkeypatch, write_config(tmp_path, model), "--prompt", "red") in (1, 2)
    assert not list((tmp_path / "out").glob("*"))


def test_float16_gives_the_video_of_float32(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config, videos = ROOT / "configs" / "toyworld" / "inference.yaml", []
    monkeypatch.chdir(ROOT)
    for dtype in ("float32", "float16"):
        out = tmp_path / dtype
        flags = ("--prompt", PROMPT, "--num_output_frames", 9, "--dtype", dtype, "--output_folder", out)
        assert run_inference(monkeypatch, config, *flags) == 0
        videos.append(read_video(next(out.glob("*.mp4"))).astype(int))
    assert np.abs(videos[0] - videos[1]).mean(axis=(1, 2, 3)).max() < 3


def pixels_of(pipeline: CausalVideoPipeline) -> Tensor:
    """The first block of a video of the toy world, [1, 9, 3, 64, 96]."""
    return next(pipeline.stream(PROMPT, 9, 64, 96, seeds=[0])).pixels_BTCHW.float()


@pytest.fixture(scope="module")
def wanted() -> Tensor:
    return pixels_of(CausalVideoPipeline.from_pretrained(BUNDLE))


def _loaded() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(BUNDLE, torch_dtype=torch.float16)


def _cast() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(BUNDLE).to(dtype=torch.float16)


def _cast_and_moved() -> CausalVideoPipeline:
    return CausalVideoPipeline.from_pretrained(BUNDLE).to("cpu", torch.float16)


def _built_of_parts() -> CausalVideoPipeline:
    parts = CausalVideoPipeline.from_pretrained(BUNDLE).components
    vae, text = nn.Module.half(parts["vae"]), parts["text_encoder"].half()
    return CausalVideoPipeline(parts["transformer"], vae, text, parts["tokenizer"])


def _halved_later() -> CausalVideoPipeline:
    pipeline = CausalVideoPipeline.from_pretrained(BUNDLE)
    nn.Module.half(pipeline.vae)
    pipeline.text_encoder.half()
    return pipeline


@pytest.mark.parametrize("make", [_loaded, _cast, _cast_and_moved, _built_of_parts, _halved_later])
def test_no_way_to_float16_leads_the_decoder_there(make: object, wanted: Tensor) -> None:
    pipeline = make()
    gates = [p for name, p in pipeline.transformer.named_parameters() if name.endswith(("A_log", "dt_bias"))]
    assert all(gate.dtype is torch.float32 for gate in gates)
    difference = (pixels_of(pipeline) - wanted).abs().mean(dim=(0, 2, 3, 4)) * 127.5
    assert difference.max() < 3
    assert pipeline.wan_vae.dtype is torch.float32 and pipeline.text_encoder.dtype is torch.float32


def test_other_casts_are_diffusers_own(broken: CausalVideoPipeline) -> None:
    broken.to(torch.bfloat16)
    assert {part.dtype for part in (broken.transformer, broken.vae, broken.text_encoder)} == {torch.bfloat16}


def test_parts_leave_float16_without_a_pipeline(folder: Path) -> None:
    assert load_vae(folder, dtype=torch.float16).dtype is torch.float32
    assert load_text_encoder(folder, dtype=torch.float16).model.dtype is torch.float32
    vae = WanVAE(nn.Module.half(new_vae(TOY_VAE | {"dim": 4})))
    assert vae.dtype is torch.float32 and vae.to(dtype=torch.bfloat16).dtype is torch.bfloat16
    model = load_text_encoder(folder).model.half()
    assert TextEncoder(model, None, 8).model.dtype is torch.float32


def test_the_type_in_the_place_of_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert wide_range_dtype(torch.float16, cpu) is torch.float32
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert wide_range_dtype(dtype, cpu) is dtype
    for capability, wanted in (((7, 5), torch.float32), ((9, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, answer=capability: answer)
        assert wide_range_dtype(torch.float16, gpu) is wanted


@pytest.mark.gpu
def test_checking_waits_for_nothing_on_a_gpu() -> None:
    value = torch.randn(1000, device="cuda")
    FiniteCheck({"a": value})  # loads kernels
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    later = torch.cuda.current_stream().record_event()
    check = FiniteCheck({"a": value, "b": value / 0})
    assert not later.query()
    assert check.first_broken() == "b"


@pytest.mark.gpu
def test_float16_on_a_gpu_gives_the_video_of_float32(wanted: Tensor) -> None:
    pipeline = CausalVideoPipeline.from_pretrained(BUNDLE, torch_dtype=torch.float16, device=torch.device("cuda"))
    difference = (pixels_of(pipeline).cpu() - wanted).abs().mean(dim=(0, 2, 3, 4)) * 127.5
    assert difference.max() < 5 and pipeline.wan_vae.dtype is torch.bfloat16
