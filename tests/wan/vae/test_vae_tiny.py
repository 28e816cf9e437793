"""The tiny decoder: one video however it is cut, strict names, and in the place of the VAE's decoder."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pipelines.config import SpeedConfig
from pipelines.generation.random_model import random_pipeline
from wan.utils.errors import CheckpointError, InputError
from wan.vae.tiny import MemoryBlock, TinyDecoder, load_tiny_decoder

CHANNELS = (8, 6, 5, 4)
BATCH, FRAMES, HEIGHT, WIDTH = 2, 5, 3, 4


def new_decoder(latent_channels: int = 16) -> TinyDecoder:
    torch.manual_seed(0)
    return TinyDecoder(latent_channels, CHANNELS).eval()


def whole(decoder: TinyDecoder, latents: Tensor) -> Tensor:
    """All frames at once, layer by layer, every memory block on the whole video moved on by a frame."""
    x = latents.flatten(0, 1)
    for layer in decoder.decoder:
        if isinstance(layer, MemoryBlock):
            video = x.unflatten(0, (len(latents), -1))
            before = F.pad(video, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1]
            x = layer(x, before.flatten(0, 1))
        else:
            x = layer(x)
    return 2 * x.unflatten(0, (len(latents), -1))[:, 3:] - 1


@pytest.mark.parametrize("pieces", [[5], [1, 1, 1, 1, 1], [2, 3], [3, 2]])
def test_a_video_is_the_same_however_it_is_cut(pieces: list[int]) -> None:
    decoder, latents = new_decoder(), torch.randn(BATCH, FRAMES, 16, HEIGHT, WIDTH)
    stream = decoder.stream()
    parts = [stream.decode(piece, clamp=False) for piece in latents.split(pieces, dim=1)]
    assert [part.shape[1] for part in parts] == [4 * n - 3 * (i == 0) for i, n in enumerate(pieces)]
    with torch.no_grad():
        expected = whole(decoder, latents)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=1e-4, atol=1e-5)
    assert expected.shape == (BATCH, 4 * FRAMES - 3, 3, 8 * HEIGHT, 8 * WIDTH)


def test_names_are_strict_and_the_encoder_is_left_out(tmp_path: Path) -> None:
    decoder, file = new_decoder(), tmp_path / "taew2_1.pth"
    state = decoder.state_dict() | {"encoder.0.weight": torch.zeros(1)}
    # A stage that could make two frames of one, of which only the later is wanted.
    state["decoder.7.conv.weight"] = torch.cat([torch.randn(8, 8, 1, 1), state["decoder.7.conv.weight"]])
    torch.save(state, file)
    loaded = load_tiny_decoder(file, 16)
    for name, value in decoder.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    with pytest.raises(CheckpointError, match="shape"):
        load_tiny_decoder(file, 48)
    torch.save(state | {"decoder.99.weight": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="unexpected"):
        load_tiny_decoder(file, 16)
    torch.save({"x": torch.zeros(1)}, file)
    with pytest.raises(CheckpointError, match="no tiny decoder"):
        load_tiny_decoder(file, 16)


def test_other_latents_are_an_error() -> None:
    for shape in ((1, 1, 15, 2, 2), (1, 16, 2, 2), (1, 0, 16, 2, 2)):
        with pytest.raises(InputError, match="do not fit"):
            new_decoder().stream().decode(torch.zeros(shape))


def test_a_pipeline_decodes_with_it(tmp_path: Path) -> None:
    pipeline, decoder = random_pipeline("toy"), new_decoder()
    torch.save(decoder.state_dict(), tmp_path / "tiny.pth")
    pipeline.optimize_for_inference(SpeedConfig(compile=False, tiny_vae=str(tmp_path / "tiny.pth")))
    blocks = list(pipeline.stream("a red shape", 21, 16, 16, seeds=[0]))
    stream = decoder.stream()
    for block in blocks:
        assert torch.equal(block.pixels_BTCHW, stream.decode(block.latents_BFCHW))
    with pytest.raises(CheckpointError, match="no checkpoint"):
        pipeline.optimize_for_inference(SpeedConfig(tiny_vae=str(tmp_path / "none.pth")))
