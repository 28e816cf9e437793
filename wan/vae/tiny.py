"""A tiny decoder in the place of the VAE's, from weights in TAEHV's format (taew2_1.pth for Wan 2.1).

Quick, and less exact. Layers and names are those of such files (github.com/madebyollin/taehv): two-dimensional
convolutions, blocks that also see their own input of the frame before, and layers that make two frames of one. It takes
normalised latents.
"""

from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wan.checkpoints.loading import StateDict, as_state_dict, load_strict, read_weights
from wan.checkpoints.tensors import own_storage
from wan.snapshots import Snapshot
from wan.utils.errors import CheckpointError
from wan.vae.stream import LatentStream

STAGES = 3
LAYERS_PER_STAGE = 6
"""Three memory blocks, upsampling, growing, a convolution."""
FIRST_STAGE = 3
"""Place of the first stage among the layers."""
IMAGE_CHANNELS = 3


class _SoftClamp(nn.Module):
    """3·tanh(x / 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class MemoryBlock(nn.Module):
    """A residual block of a frame and of the input that it had for the frame before."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x_NCHW: Tensor, before_NCHW: Tensor) -> Tensor:
        """The next features, [N, C, H, W]."""
        return F.relu(self.conv(torch.cat([x_NCHW, before_NCHW], dim=1)) + x_NCHW)


class _Grow(nn.Module):
    """`times` frames of each: [N, C, H, W] to [N·times, C, H, W], a frame's own one after the other."""

    def __init__(self, channels: int, times: int) -> None:
        super().__init__()
        self.times = times
        self.conv = nn.Conv2d(channels, channels * times, 1, bias=False)

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return self.conv(x_NCHW).unflatten(1, (self.times, -1)).flatten(0, 1)


class TinyDecoder(nn.Module):
    """The decoder.

    Args:
        latent_channels: of a latent.
        channels: of the three stages and of what follows them.
        growth: frames that each stage makes of one.
    """

    def __init__(self, latent_channels: int, channels: tuple[int, ...], growth: tuple[int, ...] = (1, 2, 2)) -> None:
        super().__init__()
        self.latent_channels, self.growth = latent_channels, growth
        layers: list[nn.Module] = [_SoftClamp(), nn.Conv2d(latent_channels, channels[0], 3, padding=1), nn.ReLU()]
        for (width, after), times in zip(pairwise(channels), growth, strict=True):
            layers += [MemoryBlock(width) for _ in range(3)]
            layers += [nn.Upsample(scale_factor=2), _Grow(width, times)]
            layers += [nn.Conv2d(width, after, 3, padding=1, bias=False)]
        layers += [nn.ReLU(), nn.Conv2d(channels[-1], IMAGE_CHANNELS, 3, padding=1)]
        self.decoder = nn.Sequential(*layers)

    @property
    def frames_per_latent(self) -> int:
        """Frames of a latent; of the video's first one only the last is part of the video."""
        return prod(self.growth)

    def frames(self, latent_BCHW: Tensor, past: dict[int, Tensor]) -> Tensor:
        """All frames of one latent, [B, T, 3, H, W], about 0 to 1.

        Args:
            past: by place of a memory block its last input; empty at the start of a video, and updated.
        """
        batch, x = len(latent_BCHW), latent_BCHW
        for place, layer in enumerate(self.decoder):
            if isinstance(layer, MemoryBlock):
                frames_BTCHW = x.unflatten(0, (batch, -1))
                before = past.get(place, torch.zeros_like(frames_BTCHW[:, :1]))
                past[place] = frames_BTCHW[:, -1:]
                x = layer(x, torch.cat([before, frames_BTCHW[:, :-1]], dim=1).flatten(0, 1))
            else:
                x = layer(x)
        return x.unflatten(0, (batch, -1))

    def stream(self) -> "TinyDecodeStream":
        """Begin to decode a video."""
        return TinyDecodeStream(self)


class TinyDecodeStream(LatentStream):
    """See `LatentStream`."""

    def __init__(self, decoder: TinyDecoder) -> None:
        super().__init__(decoder.latent_channels)
        self._decoder = decoder
        self._past: dict[int, Tensor] = {}

    def _pixels(self, latents_BFCHW: Tensor) -> Tensor:
        decoder, first = self._decoder, not self._past
        latents = latents_BFCHW.to(next(decoder.parameters()).dtype)
        # One latent at a time: the features of a frame are large.
        pixels = torch.cat([decoder.frames(latent, self._past) for latent in latents.unbind(1)], dim=1) * 2 - 1
        return pixels[:, decoder.frames_per_latent - 1 :] if first else pixels

    def snapshot(self) -> Snapshot:
        """See `LatentStream.snapshot`: the last input of every memory block."""
        return Snapshot({str(place): held for place, held in self._past.items()})

    def _set_counters(self, snapshot: Snapshot) -> None:
        pass  # it counts nothing


def load_tiny_decoder(
    path: str | Path,
    latent_channels: int,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),
) -> TinyDecoder:
    """Load a tiny decoder, strictly and offline.

    Args:
        path: a `.pth` or `.safetensors` of TAEHV's; its encoder is left out.
        latent_channels: that the latents have.
        dtype, device: of the module.

    Raises:
        CheckpointError: missing, damaged, or for other latents.
    """
    state = {
        name: value
        for name, value in as_state_dict(read_weights(path), path).items()
        if not name.startswith("encoder.")
    }
    # Where each stage's first memory block has its last convolution, and the convolution after the last stage.
    places = [f"decoder.{FIRST_STAGE + LAYERS_PER_STAGE * stage}.conv.4.weight" for stage in range(STAGES)]
    last = f"decoder.{FIRST_STAGE + LAYERS_PER_STAGE * STAGES - 1}.weight"
    if not {*places, last} <= state.keys() or any(state[name].ndim != 4 for name in (*places, last)):
        raise CheckpointError(f"{path} holds no tiny decoder in TAEHV's format: give taew2_1.pth")
    with torch.device("meta"):
        decoder = TinyDecoder(latent_channels, tuple(len(state[name]) for name in (*places, last)))
    load_strict(decoder, own_storage(_narrowed(state, decoder), path), path)
    return decoder.to(device, dtype).eval().requires_grad_(False)


def _narrowed(state: StateDict, decoder: TinyDecoder) -> StateDict:
    """Layers that could make more frames than are wanted, cut to the last of them, as the format has it."""
    narrowed = dict(state)
    for place, layer in enumerate(decoder.decoder):
        name = f"decoder.{place}.conv.weight"
        if isinstance(layer, _Grow) and name in narrowed and narrowed[name].ndim:
            narrowed[name] = narrowed[name][-len(layer.conv.weight) :]
    return narrowed
