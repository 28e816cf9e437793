"""Decoders go on from a snapshot of their stream to the same bits, whichever decoder and wherever it was taken."""

from collections.abc import Callable

import pytest
import torch

from wan.utils.errors import InputError
from wan.vae.bands import Band
from wan.vae.divided import DividedStream
from wan.vae.fast import FastDecoder
from wan.vae.stream import SETTLING_LATENTS, LatentStream
from wan.vae.tiny import TinyDecoder
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae

LATENTS = (2, 4, 16, 4, 3)


def streams() -> dict[str, Callable[[], LatentStream]]:
    """What begins a stream, by decoder."""
    torch.manual_seed(0)
    vae = WanVAE(new_vae(TOY_VAE | {"dim": 4}).requires_grad_(False))
    fast, tiny = FastDecoder(vae.model), TinyDecoder(16, (8, 6, 4, 4)).requires_grad_(False)
    return {
        "plain": vae.decode_stream,
        "fast": fast.stream,
        "tiny": tiny.stream,
        "divided": lambda: DividedStream(16, fast.stream, by_video=True, max_rows=2),
        "band": lambda: fast.stream(Band(1, 2)),
    }


@pytest.mark.parametrize("decoder", ["plain", "fast", "tiny", "divided", "band"])
def test_a_restored_stream_goes_on(decoder: str) -> None:
    begin, latents = streams()[decoder], torch.randn(LATENTS, generator=torch.Generator().manual_seed(1))
    whole, ones = begin(), latents.split(1, dim=1)
    frames = [whole.decode(one) for one in ones]
    for after in (0, 1, 2, 3):
        stream = begin()
        for one in ones[:after]:
            stream.decode(one)
        held, other = stream.snapshot().clone(), begin()
        other.restore(held, torch.zeros_like(latents)[:, : min(after, SETTLING_LATENTS)])
        for one, expected in zip(ones[after:], frames[after:], strict=True):
            assert torch.equal(other.decode(one), expected), after
        again = other.snapshot()
        assert held.tensors.keys() == again.tensors.keys() or after < SETTLING_LATENTS


def test_a_snapshot_of_another_decoder_or_size_is_refused() -> None:
    kinds, latents = streams(), torch.randn(LATENTS)
    fast = kinds["fast"]()
    fast.decode(latents)
    snapshot = fast.snapshot().clone()
    for kind, zeros, words in (
        ("plain", latents[:, :2], "is missing"),
        ("fast", latents[:, :2, :, :2], "it must be"),
        ("fast", latents[:1, :2], "it must be"),
        ("fast", latents[:, :1], "is unknown"),
        ("fast", latents[:, :0], "is unknown"),
    ):
        with pytest.raises(InputError, match=words):
            kinds[kind]().restore(snapshot, zeros)
