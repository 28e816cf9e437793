"""The Wan VAE's decoder, fast: the weights of diffusers' AutoencoderKLWan, the same frames up to rounding.

One frame passes at a time, channels last throughout, in three steps that repeat:

- Adding bias and residual, RMS norm and SiLU are one kernel, which reads and writes every value once.
- It writes into a ring of the last three frames side by side in channels, so that a causal 3×3×3 convolution is one
  two-dimensional convolution over the ring. The newest frame takes the oldest one's place, nothing is moved: each
  convolution has its weights in the three orders that the ring can have. The ring is all that a stream remembers.
- Upsampling by 2 and the 3×3 convolution after it are one 2×2 convolution at the low resolution, with four times the
  channels: of the nine pixels under the kernel those that are copies of one share the sum of their weights.

A stream may be given a band of the video's rows. Only attention in the first stage and what comes before it, at the
size of latents, then see the whole frame; see `wan.vae.bands`.

Shapes are [B, H, W, C] unless the name says otherwise.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn
from torch.nn import functional as F

from wan.snapshots import Snapshot
from wan.utils.device import triton_installed
from wan.utils.errors import InputError
from wan.vae.bands import ALL_ROWS, Band, StageHalos, plan_crops
from wan.vae.stream import LatentStream

TAPS = 3  # frames under a causal kernel
# Convolutions on tensor cores want channels in multiples of this; the 9 of the last one are padded.
_CHANNEL_MULTIPLE = 8


class Sum(NamedTuple):
    """A frame that the next kernel adds up while it reads it.

    Attributes:
        raw: [B, H, W, C]; or [B, H/2, 2, W/2, 2, C], a view in which an upsampling convolution left its pixels.
        bias_C: added to every pixel, in float32 or better.
        residual: [B, H, W, C], contiguous.
    """

    raw: Tensor
    bias_C: Tensor | None = None
    residual: Tensor | None = None

    def new_frame(self) -> Tensor:
        """An uninitialised contiguous frame of this shape."""
        batch, *sides, channels = self.raw.shape
        height, width = sides if len(sides) == 2 else (2 * sides[0], 2 * sides[2])
        return self.raw.new_empty(batch, height, width, channels)

    def rows(self, rows: slice) -> "Sum":
        """Some of the rows; pairs of rows of a view that an upsampling convolution left."""
        if rows == ALL_ROWS:
            return self
        residual = None if self.residual is None else self.residual[:, rows].contiguous()
        return Sum(self.raw[:, rows], self.bias_C, residual)


def add_norm_silu(
    x: Sum, out: Tensor, gamma_C: Tensor | None = None, *, silu: bool = True, total: Tensor | None = None
) -> None:
    """Add up a frame, normalise each pixel to `gamma_C` times the unit vector, apply SiLU; in float32 or better.

    Args:
        out: [B, H, W, C], where the result goes: channels adjacent, pixels at one distance throughout an image.
        gamma_C: the norm's weights times √C; None for neither norm nor SiLU.
        silu: whether SiLU follows the norm.
        total: [B, H, W, C], contiguous: takes the sum before the norm.
    """
    silu = silu and gamma_C is not None
    if out.is_cuda and triton_installed():
        from wan.vae.fast_triton import add_norm_silu_triton

        add_norm_silu_triton(x.raw, _pair_strides(x.raw), x.bias_C, x.residual, gamma_C, out, total, silu)
        return
    y = x.raw.reshape(out.shape).to(torch.promote_types(out.dtype, torch.float32))
    if x.bias_C is not None:
        y = y + x.bias_C
    if x.residual is not None:
        y = y + x.residual
    if total is not None:
        total.copy_(y)
    if gamma_C is not None:
        y = F.normalize(y, dim=-1) * gamma_C
    out.copy_(F.silu(y) if silu else y)


def _pair_strides(raw: Tensor) -> tuple[int, int, int, int, int]:
    """Strides of images, of pairs of rows and rows in them, of pairs of columns and columns in them."""
    if raw.ndim == 4:
        image, row, column, _ = raw.stride()
        return image, 2 * row, row, 2 * column, column
    image, row_pair, row, column_pair, column, _ = raw.stride()
    return image, row_pair, row, column_pair, column


def _conv2d(x: Tensor, weight: Tensor, bias_C: Tensor | None = None, padding: int = 0) -> Tensor:
    y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias_C, padding=padding)
    return y.permute(0, 2, 3, 1).contiguous()  # already is, wherever the library computes in channels last


def _wide(x: Tensor) -> Tensor:
    """Float32, or float64 if it is."""
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _gamma(norm: Any) -> Tensor:
    return _wide(norm.gamma).flatten() * norm.scale


@dataclass
class _Ring:
    """The last frames that a convolution saw.

    Attributes:
        frames_BHWSC: in slots; zero before the first frame, which is the convolution's own padding.
        newest: the slot last written.
    """

    frames_BHWSC: Tensor
    newest: int = TAPS - 1


_Past = dict[object, Any]  # what a stream remembers, by layer
Crops = list[list[slice]]
"""Rows to keep of what each layer of each stage leaves, see `wan.vae.bands.plan_crops`."""


class _CausalConv:
    """A causal 3×k×k convolution over a ring; leaves its bias to the next kernel.

    Attributes:
        halo: here and of all layers: rows on either side of a row that it is computed from; None for all rows.
    """

    def __init__(self, conv: WanCausalConv3d) -> None:
        weight = conv.weight.detach()
        self.bias_C = _wide(conv.bias)
        # With the newest frame in slot n, slot n - 1 holds the one before it: kernel places 2 and 1.
        self.weights = [
            torch.cat([weight[:, :, (slot - newest - 1) % TAPS] for slot in range(TAPS)], dim=1).contiguous(
                memory_format=torch.channels_last
            )
            for newest in range(TAPS)
        ]
        self.padding = weight.shape[-1] // 2
        self.halo = weight.shape[-2] // 2

    def push(self, x: Sum, past: _Past, gamma_C: Tensor | None = None, total: Tensor | None = None) -> _Ring:
        """The ring after one more frame."""
        ring: _Ring | None = past.get(self)
        if ring is None:
            batch, height, width, channels = x.new_frame().shape
            ring = past[self] = _Ring(x.raw.new_zeros(batch, height, width, TAPS, channels))
        ring.newest = (ring.newest + 1) % TAPS
        add_norm_silu(x, ring.frames_BHWSC[..., ring.newest, :], gamma_C, total=total)
        return ring

    def __call__(self, x: Sum, past: _Past, gamma_C: Tensor | None = None, total: Tensor | None = None) -> Sum:
        """The convolution of norm and SiLU of `x`; of `x` itself without `gamma_C`. `total` as in `add_norm_silu`."""
        ring = self.push(x, past, gamma_C, total)
        return Sum(_conv2d(ring.frames_BHWSC.flatten(3), self.weights[ring.newest], padding=self.padding), self.bias_C)


class _ResidualBlock:
    def __init__(self, block: Any) -> None:
        self.gammas = _gamma(block.norm1), _gamma(block.norm2)
        self.convs = _CausalConv(block.conv1), _CausalConv(block.conv2)
        self.halo = sum(conv.halo for conv in self.convs)
        self.bias_C, self.shortcut = self.convs[1].bias_C, None
        if not isinstance(block.conv_shortcut, nn.Identity):
            self.shortcut = block.conv_shortcut.weight.detach().flatten(1)
            self.bias_C = self.bias_C + _wide(block.conv_shortcut.bias)

    def __call__(self, x: Sum, past: _Past) -> Sum:
        total = x.new_frame()
        y = self.convs[0](x, past, self.gammas[0], total)
        y = self.convs[1](y, past, self.gammas[1])
        return Sum(y.raw, self.bias_C, total if self.shortcut is None else F.linear(total, self.shortcut))


class _Attention:
    """Attention among the pixels of a frame, with one head."""

    halo = None

    def __init__(self, block: Any) -> None:
        self.gamma_C = _gamma(block.norm)
        self.qkv = block.to_qkv.weight.detach().flatten(1), block.to_qkv.bias.detach()
        self.out, self.bias_C = block.proj.weight.detach().flatten(1), _wide(block.proj.bias)

    def __call__(self, x: Sum, past: _Past) -> Sum:
        total, normed = x.new_frame(), x.new_frame()
        add_norm_silu(x, normed, self.gamma_C, silu=False, total=total)
        q, k, v = F.linear(normed.flatten(1, 2), *self.qkv).unsqueeze(1).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v).squeeze(1).unflatten(1, total.shape[1:3])
        return Sum(F.linear(y, self.out), self.bias_C, total)


class _Upsampler:
    """Twice the height and width and, after the first frame, twice the frames where the VAE does that."""

    def __init__(self, layer: Any) -> None:
        self.in_time = _CausalConv(layer.time_conv) if layer.mode == "upsample3d" else None
        conv = layer.resample[1]
        self.weight, self.bias_C = _upsampling_weight(conv.weight), _wide(conv.bias)
        self.halo = conv.weight.shape[-2] // 2  # at the size that it leaves; in time it mixes no rows

    def __call__(self, x: Sum, past: _Past, first: bool) -> Iterator[Sum]:
        if self.in_time is None or first:
            frame = x.new_frame()
            add_norm_silu(x, frame)
            yield self._in_space(frame)
            return
        ring = self.in_time.push(x, past)
        halves = self.in_time.weights[ring.newest].chunk(2), self.in_time.bias_C.to(x.raw.dtype).chunk(2)
        for weight, bias_C in zip(*halves, strict=True):
            yield self._in_space(_conv2d(ring.frames_BHWSC.flatten(3), weight, bias_C))

    def _in_space(self, x: Tensor) -> Sum:
        batch, height, width, _ = x.shape
        # [B, H + 1, W + 1, 4C]: the output at (2i + a, 2j + b) is at (i + a, j + b), channels from (2a + b)C.
        y = _conv2d(x, self.weight, padding=1)
        image, row, column, _ = y.stride()
        channels = y.shape[-1] // 4
        strides = (image, row, row + 2 * channels, column, column + channels, 1)
        return Sum(y.as_strided((batch, height, 2, width, 2, channels), strides), self.bias_C)


def _upsampling_weight(weight_OIKK: Tensor) -> Tensor:
    """The 2×2 kernel, [4O, I, 2, 2], that does what nearest upsampling by 2 and a 3×3 kernel do.

    Place k of the kernel at output row 2i + a lies on input row i + ⌊(a + k - 1) / 2⌋. With a = 0 the 2×2 kernel
    covers rows i - 1 and i, with a = 1 rows i and i + 1; likewise for columns.
    """
    weight = _wide(weight_OIKK)
    shared = weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]])
    summed = torch.einsum("ayk,bxl,oikl->aboiyx", shared, shared, weight).flatten(0, 2)
    return summed.to(weight_OIKK.dtype).contiguous(memory_format=torch.channels_last)


class _Head:
    """Norm, SiLU and the last convolution.

    It has so few output channels that its three frames are convolved on their own, and what a frame adds to the
    next two is kept instead of the frame.
    """

    def __init__(self, norm: Any, conv: WanCausalConv3d) -> None:
        self.gamma_C, self.bias_C = _gamma(norm), _wide(conv.bias)
        weight = conv.weight.detach().movedim(2, 0).flatten(0, 1)
        padding = -weight.shape[0] % _CHANNEL_MULTIPLE
        self.weight = F.pad(weight, (0, 0) * 3 + (0, padding)).contiguous(memory_format=torch.channels_last)
        self.halo = weight.shape[-2] // 2

    def __call__(self, x: Sum, past: _Past) -> Tensor:
        """A frame of the video, [B, H, W, 3], in float32 or better."""
        normed = x.new_frame()
        add_norm_silu(x, normed, self.gamma_C)
        places = TAPS * len(self.bias_C)
        y = _wide(_conv2d(normed, self.weight, padding=1)[..., :places])
        oldest, middle, newest = y.chunk(TAPS, dim=-1)
        if self not in past:
            past[self] = torch.zeros_like(newest), torch.zeros_like(newest)
        next_frame, frame_after = past[self]
        pixels = newest + next_frame + self.bias_C
        next_frame.copy_(frame_after + middle)
        frame_after.copy_(oldest)
        return pixels


class FastDecoder:
    """The decoder's weights, arranged for speed; what a stream remembers is in the stream.

    Args:
        model: the VAE of Wan 2.1, on the device and in the dtype to compute in. Later changes to it go unseen.

    Raises:
        InputError: the VAE of Wan 2.2.
    """

    def __init__(self, model: AutoencoderKLWan) -> None:
        config, decoder = model.config, model.decoder
        if config.is_residual or config.patch_size is not None:
            raise InputError("this is the VAE of Wan 2.2: give that of Wan 2.1")
        self.latent_channels = int(config.z_dim)
        self.dtype = decoder.conv_in.weight.dtype
        # A 1×1 convolution has no padding, so that the latents' statistics can be part of it.
        conv = model.post_quant_conv
        weight, bias = _wide(conv.weight).flatten(1), _wide(conv.bias)
        mean, std = (weight.new_tensor(values) for values in (config.latents_mean, config.latents_std))
        self._from_latents = weight * std, bias + weight @ mean
        self._conv_in = _CausalConv(decoder.conv_in)
        mid: list[_ResidualBlock | _Attention] = [_ResidualBlock(decoder.mid_block.resnets[0])]
        for attention, resnet in zip(decoder.mid_block.attentions, decoder.mid_block.resnets[1:], strict=True):
            mid += [_Attention(attention), _ResidualBlock(resnet)]
        stages = [
            ([_ResidualBlock(resnet) for resnet in block.resnets], block.upsamplers and _Upsampler(block.upsamplers[0]))
            for block in decoder.up_blocks
        ]
        self._stages: list[tuple[list[Any], _Upsampler | None]] = [(mid + stages[0][0], stages[0][1]), *stages[1:]]
        self._head = _Head(decoder.norm_out, decoder.conv_out)

    def stream(self, band: Band | None = None) -> "FastDecodeStream":
        """Begin to decode a video.

        Args:
            band: of its rows, the only one to decode; None for all rows.
        """
        return FastDecodeStream(self, band)

    def prepare(self, latents_BFCHW: Tensor) -> Tensor:
        """The decoder's input, [B, F, H, W, C], from normalised latents."""
        weight, bias = self._from_latents
        return F.linear(latents_BFCHW.movedim(2, -1).to(weight.dtype), weight, bias).to(self.dtype)

    def crops(self, band: Band, height: int) -> Crops:
        """Where `frames` has to crop latents of `height` rows, so that only a band of the video's rows is decoded."""
        halos = [
            StageHalos([block.halo for block in blocks], (upsampler or self._head).halo)
            for blocks, upsampler in self._stages
        ]
        return plan_crops(band, height, halos)

    def frames(self, latent: Tensor, past: _Past, first: bool, crops: Crops | None = None) -> Iterator[Tensor]:
        """The frames of one prepared latent, each [B, H, W, 3]; updates `past`.

        Args:
            crops: see `crops`; the same for all latents of a stream.
        """
        if crops is None:
            crops = [[ALL_ROWS] * (len(blocks) + 1) for blocks, _ in self._stages]
        return self._frames(0, self._conv_in(Sum(latent), past), past, first, crops)

    def _frames(self, stage: int, x: Sum, past: _Past, first: bool, crops: Crops) -> Iterator[Tensor]:
        blocks, upsampler = self._stages[stage]
        *after_blocks, last = crops[stage]
        for block, rows in zip(blocks, after_blocks, strict=True):
            x = block(x, past).rows(rows)
        if upsampler is None:
            yield self._head(x, past)[:, last]
            return
        # Depth first: of the large frames only one exists at a time.
        for frame in upsampler(x, past, first):
            yield from self._frames(stage + 1, frame.rows(last), past, first, crops)


class FastDecodeStream(LatentStream):
    """See `LatentStream`; frames have their channels last in memory, and only the rows of the band if there is one."""

    def __init__(self, decoder: FastDecoder, band: Band | None = None) -> None:
        super().__init__(decoder.latent_channels)
        self._decoder, self._band = decoder, band
        self._crops: Crops | None = None
        self._past: _Past = {}
        self._shape: tuple[int, ...] | None = None

    def _pixels(self, latents_BFCHW: Tensor) -> Tensor:
        shape = tuple(latents_BFCHW.shape)
        first, size = self._shape is None, (shape[0], *shape[3:])
        if self._shape not in (None, size):
            raise InputError(f"latents of shape {shape} do not go on from {self._shape}: begin a stream for each video")
        self._shape = size
        if first and self._band is not None:
            self._crops = self._decoder.crops(self._band, shape[3])
        frames = []
        for latent in self._decoder.prepare(latents_BFCHW).unbind(1):
            decoded = self._decoder.frames(latent, self._past, first, self._crops)
            frames += [frame.to(self._decoder.dtype) for frame in decoded]
            first = False
        return torch.stack(frames, dim=1).movedim(-1, 2)

    def _rings(self) -> dict[str, _Ring]:
        """By place: layers come into `_past` in the order of the decoder."""
        return {str(place): held for place, held in enumerate(self._past.values()) if isinstance(held, _Ring)}

    def snapshot(self) -> Snapshot:
        """See `LatentStream.snapshot`: the rings, and what the last frames add to the next two."""
        rings = self._rings()
        tensors = {place: ring.frames_BHWSC for place, ring in rings.items()}
        for held in self._past.values():
            if not isinstance(held, _Ring):
                tensors |= {"next": held[0], "after": held[1]}
        return Snapshot(tensors, {place: ring.newest for place, ring in rings.items()})

    def _set_counters(self, snapshot: Snapshot) -> None:
        for place, ring in self._rings().items():
            ring.newest = snapshot.counter(place, most=TAPS - 1)
