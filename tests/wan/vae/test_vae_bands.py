"""Bands of a frame, decoded apart, are the frame; and what that costs."""

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from wan.utils.errors import InputError
from wan.vae import fast
from wan.vae.bands import ALL_ROWS, Band, Rows, StageHalos, plan_crops
from wan.vae.fast import FastDecoder
from wan.vae.wan_vae import WAN21_VAE, WanVAE, new_vae

TINY = WAN21_VAE | {"dim": 4, "z_dim": 2, "latent_mean": [0.25, -0.5], "latent_std": [1.5, 0.75]}
OTHERS = {
    "released": {},
    "one upsampling": {"dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 1},
    "four, and fewer blocks": {
        "dim_mult": [1, 2, 2, 4, 4],
        "temperal_downsample": [True, False, True, False],
        "num_res_blocks": 1,
    },
    "more blocks": {"dim_mult": [1, 2, 2], "temperal_downsample": [False, True], "num_res_blocks": 3},
}


def new(**config: Any) -> AutoencoderKLWan:
    """A VAE in float64 in which no parameter is at its neutral value."""
    torch.manual_seed(0)
    model = new_vae(TINY | config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model.double().eval()


def decoded(decoder: FastDecoder, latents: Tensor, band: Band | None = None) -> Tensor:
    """The frames of a video whose latents come two at a time."""
    stream = decoder.stream(band)
    return torch.cat([stream.decode(part, clamp=False) for part in latents.split(2, dim=1)], dim=1)


@pytest.mark.parametrize(("height", "count"), [(1, 1), (2, 2), (7, 3), (9, 2), (12, 5)])
@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_bands_decoded_apart_are_the_frames(height: int, count: int, config: dict[str, Any]) -> None:
    decoder = FastDecoder(new(**config))
    latents = torch.randn(2, 3, 2, height, 2, dtype=torch.float64)
    whole = decoded(decoder, latents)
    bands = [decoded(decoder, latents, Band(index, count)) for index in range(count)]
    heights = [band.shape[3] for band in bands]
    assert max(heights) - min(heights) <= 1 and sum(heights) == whole.shape[3]
    assert (torch.cat(bands, dim=3) - whole).abs().max() < 1e-12


def test_latents_of_sixty_rows_over_seven() -> None:
    decoder = FastDecoder(new())
    latents = torch.randn(1, 3, 2, 60, 1, dtype=torch.float64)
    whole = decoded(decoder, latents)
    bands = [decoded(decoder, latents, Band(index, 7)) for index in range(7)]
    assert [band.shape[3] for band in bands] == [68, 69, 68, 69, 68, 69, 69]
    assert (torch.cat(bands, dim=3) - whole).abs().max() < 1e-12


HALO_CASES = ((16, 2), (17, 3), (19, 4), (19, 5))


def test_a_halo_that_is_too_small_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer's halo is needed: with one row less, bands of some height are not the frames."""
    videos = {count: torch.randn(1, 2, 2, height, 1, dtype=torch.float64) for height, count in HALO_CASES}
    decoder = FastDecoder(new())
    layers = [decoder._head, *(upsampler for _, upsampler in decoder._stages if upsampler)]
    after_attention = [block for blocks, _ in decoder._stages for block in blocks if block.halo is not None][1:]
    for layer in [*layers, *after_attention]:
        errors = []
        for count, latents in videos.items():
            whole = decoded(decoder, latents)
            with monkeypatch.context() as patch:
                patch.setattr(layer, "halo", layer.halo - 1)
                bands = [decoded(decoder, latents, Band(index, count)) for index in range(count)]
            errors.append(float((torch.cat(bands, dim=3) - whole).abs().max()))
        assert max(errors) > 1e-11, layer  # the outermost rows of many layers weigh little


def test_crops_count_rows_that_are_there() -> None:
    stages = [StageHalos([2, None, 2], 1), StageHalos([2], 1)]
    assert plan_crops(Band(0, 1), 10, stages) == [[ALL_ROWS] * 4, [ALL_ROWS] * 2]
    # Rows 10 to 20 of 20: from 9 on before the pixels are made, from 7 on before the block, so pairs from 3 on, for
    # which row 3 of the stage before is enough: row 7 is computed from rows 6 to 8, which are copies of 3 and 4.
    assert plan_crops(Band(1, 2), 10, stages) == [
        [ALL_ROWS, slice(1, 10), slice(2, 9), ALL_ROWS],
        [slice(3, 14), slice(1, 11)],
    ]
    assert Rows(0, 10).grown(3, 10) == Rows(0, 10) and Rows(4, 5).grown(None, 10) == Rows(0, 10)


def test_only_the_fast_decoder_has_bands() -> None:
    vae = WanVAE(new())
    with pytest.raises(InputError, match="only the fast decoder decodes bands"):
        vae.decode_stream(Band(0, 2))
    vae.fast = True
    assert vae.decode_stream(Band(0, 2)).decode(torch.zeros(1, 1, 2, 4, 2)).shape[3] == 16


def work(decoder: FastDecoder, band: Band | None, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Multiplications of convolutions by stage, for the frames of a latent of 60 × 104 that is not the first."""
    counts, plain, latent = [0] * len(decoder._stages), fast._conv2d, torch.zeros(1, 1, 16, 60, 104, device="meta")

    def counted(x: Tensor, weight: Tensor, *options: Any, **more: Any) -> Tensor:
        stage = (x.shape[2] // 104).bit_length() - 1  # by width, which no band changes
        counts[stage] += x.shape[:3].numel() * weight.numel()
        return plain(x, weight, *options, **more)

    stream = decoder.stream(band)
    stream.decode(latent)
    with monkeypatch.context() as patch:
        patch.setattr(fast, "_conv2d", counted)
        stream.decode(latent)
    return counts


# By number of bands, percent of an undivided decoder's work: in each stage, and in all of them.
MOST = {2: ((75, 58, 53, 51), 54), 4: ((70, 41, 32, 27), 33), 8: ((60, 28, 19, 15), 21)}


@pytest.mark.parametrize("count", MOST)
def test_what_the_most_expensive_band_costs(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 480 × 832 pixels, by the released decoder; the numbers in `wan.vae.bands`."""
    with torch.device("meta"):
        decoder = FastDecoder(new_vae(WAN21_VAE))
    whole = work(decoder, None, monkeypatch)
    bands = [work(decoder, Band(index, count), monkeypatch) for index in range(count)]
    largest = max(bands, key=sum)
    parts = tuple(round(100 * part / all_of_it) for part, all_of_it in zip(largest, whole, strict=True))
    assert (parts, round(100 * sum(largest) / sum(whole))) == MOST[count]
