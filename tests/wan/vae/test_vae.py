"""The VAE as a stream: chunks, interleaved streams, layouts, and bad input. Golden values are in test_golden.py."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

from wan.utils.errors import CheckpointError, InputError
from wan.vae.wan_vae import WAN21_VAE, WanVAE, load_vae, native_vae_name, native_vae_names, new_vae, save_native_vae

TINY = WAN21_VAE | {"dim": 4, "z_dim": 2, "latent_mean": [0.3, -0.2], "latent_std": [1.5, 0.7]}


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(new_vae(TINY))


def test_sizes_are_read_from_the_configuration(vae: WanVAE) -> None:
    assert (vae.latent_channels, vae.temporal_compression, vae.spatial_compression) == (2, 4, 8)
    shallow = WanVAE(new_vae(TINY | {"dim_mult": [1, 2], "temperal_downsample": [True]}))
    assert (shallow.latent_channels, shallow.temporal_compression, shallow.spatial_compression) == (2, 2, 2)


def test_pixels_are_clamped_unless_asked_not_to_be(vae: WanVAE) -> None:
    latents = 50 * torch.randn(1, 2, 2, 2, 3)
    raw = vae.decode(latents, clamp=False)
    assert raw.abs().max() > 1
    assert torch.equal(vae.decode(latents), raw.clamp(-1, 1))


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [1, 2, 2], [3, 1, 1], [2, 3]])
def test_decoding_in_chunks_equals_decoding_at_once(vae: WanVAE, chunks: list[int]) -> None:
    latents = torch.randn(2, 5, 2, 2, 3)
    stream = vae.decode_stream()
    pieces = [stream.decode(piece) for piece in latents.split(chunks, dim=1)]
    whole = vae.decode(latents)
    assert whole.shape == (2, 17, 3, 16, 24)
    assert torch.equal(torch.cat(pieces, dim=1), whole)
    assert whole.abs().max() <= 1


def test_decoding_equals_diffusers_own(vae: WanVAE) -> None:
    latents = torch.randn(1, 4, 2, 2, 3)
    mean, std = vae.statistics()
    theirs = vae.model.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)
    torch.testing.assert_close(vae.decode(latents), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [[1, 4, 4, 4], [5, 8], [1, 12]])
def test_encoding_in_chunks_equals_diffusers_whole_clip(vae: WanVAE, chunks: list[int]) -> None:
    pixels = torch.rand(1, 13, 3, 16, 24) * 2 - 1
    mean, std = vae.statistics()
    theirs = (vae.model.encode(pixels.transpose(1, 2)).latent_dist.mode() - mean) / std
    stream = vae.encode_stream()
    pieces = [stream.encode(piece) for piece in pixels.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), theirs.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_two_streams_do_not_disturb_each_other(vae: WanVAE) -> None:
    videos = torch.randn(2, 1, 3, 2, 2, 3).unbind(0)
    streams = [vae.decode_stream() for _ in videos]
    pieces: list[list[torch.Tensor]] = [[], []]
    for frame in range(3):
        for index, (stream, video) in enumerate(zip(streams, videos, strict=True)):
            pieces[index].append(stream.decode(video[:, frame : frame + 1]))
    for video, parts in zip(videos, pieces, strict=True):
        assert torch.equal(torch.cat(parts, dim=1), vae.decode(video))


def test_two_encoding_streams_do_not_disturb_each_other(vae: WanVAE) -> None:
    videos = (torch.rand(2, 1, 9, 3, 16, 16) * 2 - 1).unbind(0)
    streams = [vae.encode_stream() for _ in videos]
    pieces: list[list[torch.Tensor]] = [[], []]
    for frames in (slice(0, 1), slice(1, 5), slice(5, 9)):
        for parts, stream, video in zip(pieces, streams, videos, strict=True):
            parts.append(stream.encode(video[:, frames]))
    for video, parts in zip(videos, pieces, strict=True):
        torch.testing.assert_close(torch.cat(parts, dim=1), vae.encode(video), rtol=1e-5, atol=1e-5)


def test_what_a_stream_keeps_does_not_grow(vae: WanVAE) -> None:
    stream, sizes = vae.decode_stream(), []
    for _ in range(6):
        stream.decode(torch.randn(1, 3, 2, 2, 3))
        sizes.append(sum(part.numel() for part in stream._cache if isinstance(part, torch.Tensor)))
    assert len(set(sizes)) == 1


def test_frames_that_latents_cannot_hold_are_an_error(vae: WanVAE) -> None:
    with pytest.raises(InputError, match="1 plus a multiple of 4"):
        vae.encode(torch.zeros(1, 4, 3, 16, 24))
    with pytest.raises(InputError, match="multiples of 8"):
        vae.encode(torch.zeros(1, 1, 3, 17, 24))
    stream = vae.encode_stream()
    stream.encode(torch.zeros(1, 1, 3, 16, 24))
    with pytest.raises(InputError, match="a multiple of 4"):
        stream.encode(torch.zeros(1, 5, 3, 16, 24))
    with pytest.raises(InputError, match="0 frames cannot be encoded"):
        stream.encode(torch.zeros(1, 0, 3, 16, 24))


@pytest.mark.parametrize("shape", [(2, 2, 2, 2), (1, 2, 3, 2, 2), (1, 0, 2, 2, 2)], ids=["4-d", "channels", "empty"])
def test_latents_of_another_shape_are_an_error(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[batch, frames, 2, height, width\]"):
        vae.decode(torch.zeros(shape))


@pytest.mark.parametrize("shape", [(5, 3, 16, 16), (1, 3, 5, 16, 16)], ids=["4-d", "channels first"])
def test_pixels_of_another_shape_are_an_error(vae: WanVAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match=r"expected \[batch, frames, 3, height, width\]"):
        vae.encode(torch.zeros(shape))


def test_native_names_are_those_that_diffusers_converts() -> None:
    converted = convert_wan_vae_to_diffusers({name: name for name in native_vae_names(WAN21_VAE)})
    with torch.device("meta"):
        assert set(converted) == set(new_vae(WAN21_VAE).state_dict())
    assert all(native_vae_name(theirs, WAN21_VAE["num_res_blocks"]) == native for theirs, native in converted.items())


@pytest.mark.parametrize("stages", [([1, 2], [True]), ([1, 2, 2, 4, 4], [True, False, True, False])])
def test_other_depths_than_the_released_one(stages: tuple[list[int], list[bool]], tmp_path: Path) -> None:
    config = TINY | {"dim_mult": stages[0], "temperal_downsample": stages[1], "num_res_blocks": 1}
    vae = WanVAE(new_vae(config))
    save_native_vae(vae, tmp_path / "vae.pth")
    again = load_vae(tmp_path / "vae.pth", config=config)
    for name, value in vae.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value)


def test_native_and_diffusers_layouts_load_the_same(vae: WanVAE, tmp_path: Path) -> None:
    save_native_vae(vae, tmp_path / "native" / "Wan2.1_VAE.pth")
    vae.model.save_pretrained(tmp_path / "diffusers" / "vae")
    latents = torch.randn(1, 2, 2, 2, 3)
    for folder in ("native", "diffusers", "diffusers/vae"):
        assert torch.equal(load_vae(tmp_path / folder, config=TINY).decode(latents), vae.decode(latents))


def test_bad_folders_and_files_are_an_error(vae: WanVAE, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no VAE in"):
        load_vae(tmp_path)
    save_native_vae(vae, tmp_path / "vae.pth")
    with pytest.raises(CheckpointError, match="shape"):
        load_vae(tmp_path / "vae.pth", config=TINY | {"dim": 8})
    torch.save({"blocks.0.self_attn.q.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="not a Wan VAE"):
        load_vae(tmp_path / "other.pth", config=TINY)
    state = torch.load(tmp_path / "vae.pth", weights_only=True)
    del state["conv2.bias"]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match="missing"):
        load_vae(tmp_path / "short.pth", config=TINY)
    (tmp_path / "cut.pth").write_bytes((tmp_path / "vae.pth").read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="damaged"):
        load_vae(tmp_path / "cut.pth", config=TINY)


def test_the_vae_of_wan_2_2_is_an_error(tmp_path: Path) -> None:
    AutoencoderKLWan(
        base_dim=4, decoder_base_dim=4, z_dim=16, is_residual=True, patch_size=2, in_channels=12, out_channels=12
    ).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"a Wan 2\.2 VAE"):
        load_vae(tmp_path)


def test_a_file_in_diffusers_names_is_an_error_that_asks_for_its_folder(vae: WanVAE, tmp_path: Path) -> None:
    vae.model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="give its folder"):
        load_vae(tmp_path / "diffusion_pytorch_model.safetensors", config=TINY)
