"""The fast VAE decoder against the plain one: chunks, sizes, depths, types; and its kernel against plain torch."""

from itertools import product
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from torch import Tensor, nn

from wan.utils.errors import InputError
from wan.vae.fast import FastDecoder, FastDecodeStream, Sum, add_norm_silu
from wan.vae.wan_vae import WAN21_VAE, WanVAE, new_vae

TINY = WAN21_VAE | {"dim": 4, "z_dim": 2, "latent_mean": [0.25, -0.5], "latent_std": [1.5, 0.75]}
STANDARD = {"latent_mean": [0.0, 0.0], "latent_std": [1.0, 1.0]}


def new(dtype: torch.dtype = torch.float32, **config: Any) -> WanVAE:
    """A VAE in which no parameter, scales of norms included, is at its neutral value."""
    vae = WanVAE(new_vae(TINY | config))
    with torch.no_grad():
        for parameter in vae.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return vae.to(dtype=dtype)


def decode(vae: WanVAE, latents: Tensor, chunks: tuple[int, ...]) -> Tensor:
    stream = FastDecoder(vae.model).stream()
    return torch.cat([stream.decode(piece, clamp=False) for piece in latents.split(chunks, dim=1)], dim=1)


def distance(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


def test_a_vae_that_is_told_to_decodes_fast() -> None:
    vae, latents = new(), torch.randn(1, 4, 2, 5, 7)
    plain = vae.decode(latents)
    vae.fast = True
    assert isinstance(vae.decode_stream(), FastDecodeStream)
    fast = vae.decode(latents)
    assert distance(fast, plain) < 2e-5 and not torch.equal(fast, plain)


@pytest.mark.parametrize("chunks", [(1, 3, 3), (1, 1, 2), (3, 1), (4,)])
@pytest.mark.parametrize("config", [{}, {"dim": 6}, STANDARD], ids=["dim 4", "dim 6", "other statistics"])
def test_equals_the_plain_decoder_in_float64(
    chunks: tuple[int, ...], config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WanUpsample, "forward", nn.Upsample.forward)  # which copies pixels, through float32
    vae = new(torch.float64, **config)
    latents = torch.randn(1, sum(chunks), 2, 5, 7, dtype=torch.float64)
    assert distance(decode(vae, latents, chunks), vae.decode(latents, clamp=False)) < 1e-12


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 2)])
@pytest.mark.parametrize("chunks", [(1, 3, 3), (3,)])
def test_batches_and_sizes_in_float32(size: tuple[int, int], chunks: tuple[int, ...]) -> None:
    vae = new()
    latents = torch.randn(2, sum(chunks), 2, *size)
    assert distance(decode(vae, latents, chunks), vae.decode(latents, clamp=False)) < 2e-5


@pytest.mark.parametrize(
    ("dim_mult", "in_time"),
    [([1, 2], [True]), ([1, 2], [False]), ([1, 2, 2, 4, 4], [True, False, True, False])],
)
def test_other_depths_than_the_released_one(dim_mult: list[int], in_time: list[bool]) -> None:
    vae = new(dim_mult=dim_mult, temperal_downsample=in_time, num_res_blocks=1)
    latents = torch.randn(1, 4, 2, 2, 3)
    assert distance(decode(vae, latents, (1, 2, 1)), vae.decode(latents, clamp=False)) < 2e-5


def test_bfloat16_is_as_close_to_the_truth_as_in_the_plain_decoder() -> None:
    vae = new(dim=8)
    latents = torch.randn(1, 4, 2, 4, 6).bfloat16()
    truth = vae.decode(latents.float(), clamp=False)
    vae.to(dtype=torch.bfloat16)
    plain = distance(vae.decode(latents, clamp=False), truth)
    fast = decode(vae, latents, (1, 3))
    assert fast.dtype == torch.bfloat16
    assert distance(fast, truth) < 1.1 * plain


def test_pixels_are_clamped_unless_asked_not_to_be() -> None:
    decoder, latents = FastDecoder(new().model), 50 * torch.randn(1, 2, 2, 2, 3)
    raw = decoder.stream().decode(latents, clamp=False)
    assert raw.abs().max() > 1
    assert torch.equal(decoder.stream().decode(latents), raw.clamp(-1, 1))


def test_two_streams_do_not_disturb_each_other() -> None:
    vae, videos = new(), torch.randn(2, 1, 3, 2, 2, 3).unbind(0)
    decoder = FastDecoder(vae.model)
    streams = [decoder.stream() for _ in videos]
    pieces = [
        [stream.decode(video[:, i : i + 1]) for stream, video in zip(streams, videos, strict=True)] for i in (0, 1, 2)
    ]
    for video, parts in zip(videos, zip(*pieces, strict=True), strict=True):
        assert distance(torch.cat(parts, dim=1), vae.decode(video)) < 2e-5


def test_what_a_stream_keeps_stays_where_it_is() -> None:
    def kept(stream: FastDecodeStream) -> list[int]:
        parts = [part if isinstance(part, tuple) else (part.frames_BHWSC,) for part in stream._past.values()]
        return [tensor.data_ptr() for part in parts for tensor in part]

    stream, addresses = FastDecoder(new().model).stream(), []
    for _ in range(4):
        stream.decode(torch.randn(1, 3, 2, 2, 3))
        addresses.append(kept(stream))
    assert addresses[0]
    assert addresses.count(addresses[0]) == len(addresses)


@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (1, 2, 3, 2, 2), (1, 0, 2, 2, 2)], ids=["4-d", "channels", "empty"])
def test_latents_of_another_shape_are_an_error(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[batch, frames, 2, height, width\]"):
        FastDecoder(new().model).stream().decode(torch.zeros(shape))


def test_latents_of_another_size_than_before_are_an_error() -> None:
    stream = FastDecoder(new().model).stream()
    stream.decode(torch.zeros(1, 1, 2, 2, 2))
    with pytest.raises(InputError, match="begin a stream for each video"):
        stream.decode(torch.zeros(1, 1, 2, 2, 3))


def test_the_vae_of_wan_2_2_is_an_error() -> None:
    with torch.device("meta"):
        model = AutoencoderKLWan(
            base_dim=4, decoder_base_dim=4, z_dim=16, is_residual=True, patch_size=2, in_channels=12, out_channels=12
        )
    with pytest.raises(InputError, match=r"VAE of Wan 2\.2"):
        FastDecoder(model)


def frame(shape: tuple[int, int, int, int], upsampled: bool, like: dict[str, Any]) -> Tensor:
    """Values as a convolution leaves them: in order, or with the pixels of an upsampled frame among the channels."""
    batch, height, width, channels = shape
    if not upsampled:
        return torch.randn(shape, **like)
    y = torch.randn(batch, height // 2 + 1, width // 2 + 1, 4 * channels, **like)
    image, row, column, _ = y.stride()
    strides = (image, row, row + 2 * channels, column, column + channels, 1)
    return y.as_strided((batch, height // 2, 2, width // 2, 2, channels), strides)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [4, 96, 192, 384])
def test_the_kernel_equals_plain_torch(channels: int, dtype: torch.dtype) -> None:
    pytest.importorskip("triton")
    like: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    yes_no = (False, True)
    for upsampled, biased, residual, normed, silu, summed in product(*[yes_no] * 6):
        shape = (2, 6, 10, channels) if upsampled else (2, 5, 7, channels)
        x = Sum(
            frame(shape, upsampled, like),
            torch.randn(channels, device="cuda") if biased else None,
            torch.randn(shape, **like) if residual else None,
        )
        gamma = torch.randn(channels, device="cuda") * channels**0.5 if normed else None
        results = []
        for device in ("cuda", "cpu"):
            # Unwritten places hold NaN: what is missing, or too much, shows.
            ring = torch.full((*shape[:3], 3, channels), torch.nan, device=device, dtype=dtype)
            total = torch.full(shape, torch.nan, device=device, dtype=dtype) if summed else None
            there = Sum(*(part if part is None else part.to(device) for part in x)) if device == "cpu" else x
            weights = None if gamma is None else gamma.to(device)
            add_norm_silu(there, ring[..., 1, :], weights, silu=silu, total=total)
            results.append((ring.cpu(), ring[..., 1, :].cpu() if total is None else total.cpu()))
        for kernel, plain in zip(*results, strict=True):
            torch.testing.assert_close(kernel, plain, equal_nan=True)


@pytest.mark.gpu
def test_float32_on_the_gpu_equals_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    vae = new(dim=8)
    latents = torch.randn(2, 4, 2, 5, 7)
    expected = vae.decode(latents, clamp=False)
    vae.to(torch.device("cuda"))
    assert distance(decode(vae, latents.cuda(), (1, 3)).cpu(), expected) < 2e-5
