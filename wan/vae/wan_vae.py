"""The Wan 2.1 VAE, through diffusers' AutoencoderKLWan: decoding and encoding as a stream.

The VAE is causal in time: its first latent is one frame, every later one four. A stream carries what the causal
convolutions need of the past, outside the module, so its memory does not grow with the video and several streams
can share one module. Streaming gives the same numbers as the whole clip.

Latents are [B, F, C, h, w], normalised per channel; pixels are [B, T, 3, H, W] in [-1, 1].
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor, nn

from wan.checkpoints.configs import check_settings, read_config
from wan.checkpoints.formats import WEIGHT_FILES
from wan.checkpoints.identify import family
from wan.checkpoints.loading import StateDict, as_state_dict, load_strict, read_folder, read_weights
from wan.checkpoints.saving import write_pickle
from wan.checkpoints.tensors import own_storage, require_same_type
from wan.snapshots import Snapshot
from wan.utils.device import holds_float16, wide_range_dtype
from wan.utils.errors import CheckpointError, InputError
from wan.utils.ranges import Bounds, Length, shown
from wan.vae.bands import Band
from wan.vae.divided import DividedStream
from wan.vae.fast import FastDecoder
from wan.vae.stream import LatentStream, shape_error
from wan.vae.tiny import TinyDecoder

NATIVE_VAE_FILE = "Wan2.1_VAE.pth"
# fmt: off
WAN21_VAE: dict[str, Any] = {
    "dim": 96,
    "z_dim": 16,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "latent_mean": [
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    ],
    "latent_std": [
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.916,
    ],
}
# fmt: on
"""Sizes of the released VAE, under the names of its own code."""
TOY_VAE: dict[str, Any] = WAN21_VAE | {"dim": 16, "latent_mean": [0.0] * 16, "latent_std": [1.0] * 16}
"""Sizes of the toy world's VAE. Its statistics are those of an untrained one; training measures and replaces them."""

_STAGES = 8
"""A config.json that names more stages is no VAE's."""
_DIFFUSERS: dict[str, Any] = {
    "base_dim": Annotated[int, Bounds(1, 4096)],
    "decoder_base_dim": Annotated[int, Bounds(1, 4096)] | None,
    "z_dim": Annotated[int, Bounds(1, 1024)],
    "dim_mult": Annotated[list[Annotated[int, Bounds(1, 64)]], Length(0, _STAGES)],
    "num_res_blocks": Annotated[int, Bounds(1, 64)],
    "attn_scales": Annotated[list[Annotated[float, Bounds(0, 1e6)]], Length(0, _STAGES)],
    "temperal_downsample": Annotated[list[bool], Length(0, _STAGES)],
    "dropout": Annotated[float, Bounds(0, 1)],
    "latents_mean": Annotated[list[Annotated[float, Bounds(-1e4, 1e4)]], Length(0, 4096)],
    "latents_std": Annotated[list[Annotated[float, Bounds(1e-6, 1e4)]], Length(0, 4096)],
    "is_residual": bool,
    "in_channels": Literal[3],
    "out_channels": Literal[3],
    "patch_size": Annotated[int, Bounds(1, 64)] | None,
    "scale_factor_temporal": Annotated[int, Bounds(1, 1 << _STAGES)],
    "scale_factor_spatial": Annotated[int, Bounds(1, 1 << _STAGES)],
}
# Without these diffusers would take the released VAE's values, which need not be this one's.
_NEEDED = (
    *("base_dim", "z_dim", "dim_mult", "num_res_blocks", "attn_scales", "temperal_downsample"),
    *("latents_mean", "latents_std"),
)

# A residual block's parts: diffusers' names and Wan's.
_RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}
_ENDS = {"conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2"}


class WanVAE:
    """Encoding and decoding with an AutoencoderKLWan.

    Attributes:
        model: the diffusers module, with all weights.
        fast: decode by `wan.vae.fast`: the same frames up to rounding.
        tiny: decode by this instead: other frames, see `wan.vae.tiny`.
    """

    def __init__(self, model: AutoencoderKLWan, fast: bool = False) -> None:
        self.model = model.eval()
        self.fast = fast
        self.tiny: TinyDecoder | None = None
        self.leave_float16()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.model.post_quant_conv.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' type, in which it computes."""
        return self.model.post_quant_conv.weight.dtype

    @property
    def latent_channels(self) -> int:
        """Channels of a latent."""
        return int(self.model.config.z_dim)

    @property
    def temporal_compression(self) -> int:
        """Frames per latent frame, after the first."""
        return 2 ** sum(self.model.config.temperal_downsample)

    @property
    def spatial_compression(self) -> int:
        """Pixels per latent along each side."""
        return 2 ** len(self.model.config.temperal_downsample)

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Self:
        """Move or cast the module; in the place of float16 comes what `wide_range_dtype` says."""
        if dtype is not None:
            dtype = wide_range_dtype(dtype, device or self.device)
        nn.Module.to(self.model, device=device, dtype=dtype)  # diffusers' own warns about any cast
        return self

    def leave_float16(self) -> None:
        """Cast the module if it is in float16, whose range the decoder's activations exceed."""
        if holds_float16(self.model):
            self.to(dtype=torch.float16)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every latent channel, each [C, 1, 1, 1]."""
        config = self.model.config
        mean, std = (
            torch.tensor(values, device=self.device, dtype=torch.float32).view(-1, 1, 1, 1)
            for values in (config.latents_mean, config.latents_std)
        )
        return mean.to(self.dtype), std.to(self.dtype)

    @property
    def decodes_bands(self) -> bool:
        """Whether a band of the rows can be decoded alone: of the decoders the fast one does that."""
        return self.fast and self.tiny is None

    def decode_stream(self, band: Band | None = None) -> LatentStream:
        """Begin to decode a video, with the weights as they are now.

        The module's own switches count: with `use_slicing` the videos of a batch are decoded one after the other; with
        `use_tiling` the rows of a frame, in bands of at most `tile_sample_min_height` pixels, by the fast decoder.

        Args:
            band: of the rows, the only one to decode: those of the whole frames, up to rounding.

        Raises:
            InputError: a band, and a decoder that has none: see `decodes_bands`; or tiling with the tiny decoder.
        """
        self.leave_float16()
        if band is not None and not self.decodes_bands:
            raise InputError("only the fast decoder decodes bands: set fast, without a tiny decoder")
        tiling, slicing = bool(self.model.use_tiling), bool(self.model.use_slicing)
        if tiling and self.tiny is not None:
            raise InputError("the tiny decoder decodes whole frames: leave tiling or tiny_vae out")
        if not (tiling or slicing):
            return self._whole_stream(band)
        fast = FastDecoder(self.model) if tiling or (self.fast and self.tiny is None) else None
        return DividedStream(
            self.latent_channels,
            (lambda part: self._whole_stream(None)) if fast is None else fast.stream,
            by_video=slicing,
            max_rows=self.model.tile_sample_min_height // self.spatial_compression if tiling else None,
            band=band,
        )

    def _whole_stream(self, band: Band | None) -> LatentStream:
        if self.tiny is not None:
            return self.tiny.stream()
        return FastDecoder(self.model).stream(band) if self.fast else DecodeStream(self)

    def encode_stream(self) -> "EncodeStream":
        """Begin to encode a video."""
        self.leave_float16()
        return EncodeStream(self)

    @torch.no_grad()
    def decode(self, latents_BFCHW: Tensor, clamp: bool = True) -> Tensor:
        """Decode a whole video, F latent frames to 4F - 3 frames."""
        return self.decode_stream().decode(latents_BFCHW, clamp)

    @torch.no_grad()
    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Encode a whole video of 4F - 3 frames to F latent frames."""
        return self.encode_stream().encode(pixels_BTCHW)


def _empty_cache(module: nn.Module) -> list[Tensor | str | None]:
    """One place for each causal convolution of an encoder or decoder: its last frames, or a mark of diffusers'."""
    return [None] * sum(isinstance(part, WanCausalConv3d) for part in module.modules())


class DecodeStream(LatentStream):
    """See `LatentStream`; latents come in the VAE's dtype."""

    def __init__(self, vae: WanVAE) -> None:
        super().__init__(vae.latent_channels)
        self._model = vae.model
        self._mean, self._std = vae.statistics()
        self._cache = _empty_cache(vae.model.decoder)
        self._started = False

    def _pixels(self, latents_BFCHW: Tensor) -> Tensor:
        latents = self._model.post_quant_conv(latents_BFCHW.transpose(1, 2) * self._std + self._mean)
        frames = []
        for latent in latents.split(1, dim=2):
            first, self._started = not self._started, True
            frames.append(self._model.decoder(latent, feat_cache=self._cache, feat_idx=[0], first_chunk=first))
        return torch.cat(frames, dim=2).transpose(1, 2)

    def snapshot(self) -> Snapshot:
        """See `LatentStream.snapshot`: the last frames that each causal convolution saw."""
        held = enumerate(self._cache)
        return Snapshot({str(place): frames for place, frames in held if isinstance(frames, Tensor)})

    def _set_counters(self, snapshot: Snapshot) -> None:
        pass  # marks in the cache depend on the number of latents alone


class EncodeStream:
    """Encodes the frames of one video (or batch) in order: 1 + 4k frames first, then multiples of 4."""

    def __init__(self, vae: WanVAE) -> None:
        self._model = vae.model
        self._mean, self._std = vae.statistics()
        self._stride = vae.temporal_compression
        self._spatial = vae.spatial_compression
        self._cache = _empty_cache(vae.model.encoder)
        self._started = False

    @torch.no_grad()
    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Normalised latents (the posterior's mean) of the next frames, [B, F, C, h, w].

        Raises:
            InputError: another shape, a number of frames that latents cannot hold, or a size that does not divide.
        """
        if pixels_BTCHW.ndim != 5 or pixels_BTCHW.shape[2] != 3:
            raise shape_error("pixels", pixels_BTCHW, 3)
        frames, (height, width) = pixels_BTCHW.shape[1], pixels_BTCHW.shape[-2:]
        first = 0 if self._started else 1
        if not frames or (frames - first) % self._stride:
            wanted = f"1 plus a multiple of {self._stride}" if first else f"a multiple of {self._stride} above 0"
            raise InputError(f"{frames} frames cannot be encoded here: give {wanted}")
        if height % self._spatial or width % self._spatial:
            raise InputError(f"{height}×{width} pixels cannot be encoded: both must be multiples of {self._spatial}")
        self._started = True
        pieces = [first] * first + [self._stride] * ((frames - first) // self._stride)
        encoded = [
            self._model.encoder(piece, feat_cache=self._cache, feat_idx=[0])
            for piece in pixels_BTCHW.transpose(1, 2).split(pieces, dim=2)
        ]
        mean = self._model.quant_conv(torch.cat(encoded, dim=2)).chunk(2, dim=1)[0]
        return ((mean - self._mean) / self._std).transpose(1, 2)


def native_vae_name(name: str, num_res_blocks: int) -> str:
    """Wan's name of a parameter of diffusers' AutoencoderKLWan."""
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return name.replace("post_quant_conv.", "conv2.").replace("quant_conv.", "conv1.")
    half, rest = name.split(".", 1)
    part = rest.split(".", 1)[0]
    if part in _ENDS:
        return f"{half}.{_ENDS[part]}{rest.removeprefix(part)}"
    # Wan numbers the parts of all stages through: num_res_blocks + 1 residual blocks and an upsampler each.
    rest = re.sub(
        r"^up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)",
        lambda m: f"upsamples.{int(m[1]) * (num_res_blocks + 2) + int(m[2] or num_res_blocks + 1)}",
        rest,
    )
    rest = re.sub(r"^down_blocks\.", "downsamples.", rest)
    rest = re.sub(r"^mid_block\.resnets\.(\d+)", lambda m: f"middle.{2 * int(m[1])}", rest)
    rest = re.sub(r"^mid_block\.attentions\.0", "middle.1", rest)
    pieces = [_RESIDUAL.get(piece, piece) for piece in rest.split(".")]
    return ".".join([half, *pieces])


def new_vae(config: Mapping[str, Any]) -> AutoencoderKLWan:
    """A VAE of the sizes in `config`, whose keys are those of `WAN21_VAE`."""
    return AutoencoderKLWan(
        base_dim=config["dim"],
        z_dim=config["z_dim"],
        dim_mult=list(config["dim_mult"]),
        num_res_blocks=config["num_res_blocks"],
        attn_scales=list(config["attn_scales"]),
        temperal_downsample=list(config["temperal_downsample"]),
        latents_mean=list(config["latent_mean"]),
        latents_std=list(config["latent_std"]),
        scale_factor_temporal=2 ** sum(config["temperal_downsample"]),
        scale_factor_spatial=2 ** len(config["temperal_downsample"]),
    )


def _native_names(model: AutoencoderKLWan) -> dict[str, str]:
    """Wan's name of every parameter to diffusers' name."""
    return {native_vae_name(name, model.config.num_res_blocks): name for name in model.state_dict()}


def native_vae_names(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Wan's names and shapes of all parameters of a VAE; nothing is allocated."""
    with torch.device("meta"):
        model = new_vae(config)
    shapes = model.state_dict()
    return {native: tuple(shapes[name].shape) for native, name in _native_names(model).items()}


def vae_from_native(state: StateDict, config: Mapping[str, Any], source: str | Path = "VAE weights") -> WanVAE:
    """A VAE from weights under Wan's names.

    Raises:
        CheckpointError: names or shapes do not fit.
    """
    with torch.device("meta"):
        model = new_vae(config)
    names = _native_names(model)
    if state.keys() & set(names.values()):
        raise CheckpointError(f"{source} holds a VAE under diffusers' names: give its folder, which has a config.json")
    if not names.keys() & state.keys():
        raise CheckpointError(f"{source} holds {family(state)}, not a Wan VAE: check the model folder")
    state = own_storage({names.get(name, name): value for name, value in state.items()}, source)
    require_same_type(list(state), state, source)
    load_strict(model, state, source)
    return WanVAE(model)


def load_vae(
    path: str | Path,
    *,
    config: Mapping[str, Any] = WAN21_VAE,
    dtype: torch.dtype = torch.float32,
    device: torch.device = torch.device("cpu"),
) -> WanVAE:
    """Load a VAE, strictly and offline.

    Args:
        path: a native `.pth` file, a native Wan folder, or a diffusers folder (of the VAE or of a pipeline).
        config: sizes of native weights; diffusers folders bring their own.
        dtype, device: of the module; in the place of float16 comes what `wide_range_dtype` says.

    Raises:
        CheckpointError: missing, damaged, of another family, or not fitting.
    """
    path = Path(path)
    folder = path / "vae" if (path / "vae").is_dir() else path
    if path.is_file() or (path / NATIVE_VAE_FILE).is_file():
        file = path if path.is_file() else path / NATIVE_VAE_FILE
        vae = vae_from_native(as_state_dict(read_weights(file), file), config, file)
    elif (folder / "config.json").exists() and (
        folder != path or read_config(folder / "config.json").get("_class_name") == "AutoencoderKLWan"
    ):
        vae = WanVAE(_load_diffusers(folder))
    else:
        raise CheckpointError(f"no VAE in {path}: expected {NATIVE_VAE_FILE}, or vae/ in diffusers' layout")
    return vae.to(device, dtype)


def _load_diffusers(folder: Path) -> AutoencoderKLWan:
    config = vae_config(folder)
    with torch.device("meta"):
        model = AutoencoderKLWan.from_config(config)
    state, file = read_folder(folder, WEIGHT_FILES)
    state = own_storage(state, file)
    require_same_type(list(state), state, file)
    load_strict(model, state, file)
    return model


def vae_config(folder: Path) -> dict[str, Any]:
    """The config.json of a VAE in diffusers' layout, as diffusers takes it.

    Raises:
        CheckpointError: it is of another class or of Wan 2.2, or a setting is missing, unknown, out of range or
            contradicts another.
    """
    path = folder / "config.json"
    config = read_config(path)
    if config.get("_class_name") != "AutoencoderKLWan":
        raise CheckpointError(f"{path} describes a {shown(config.get('_class_name'))}, not a Wan VAE")
    if config.get("is_residual") or config.get("patch_size") is not None:
        raise CheckpointError(f"{folder} holds a Wan 2.2 VAE: give the folder of Wan 2.1")
    found = check_settings(config, _DIFFUSERS, path, needed=_NEEDED)
    stages, downsample = len(found["dim_mult"]), found["temperal_downsample"]
    sizes: tuple[tuple[str, Any, int], ...] = (
        ("latents_mean", len(found["latents_mean"]), found["z_dim"]),
        ("latents_std", len(found["latents_std"]), found["z_dim"]),
        ("temperal_downsample", len(downsample), stages - 1),
    )
    for name, length, wanted in sizes:
        if length != wanted:
            raise CheckpointError(f"{path}: {name} has {length} entries, its other sizes say {wanted}")
    for name, factor in (("temporal", 2 ** sum(downsample)), ("spatial", 2 ** len(downsample))):
        if found.get(f"scale_factor_{name}", factor) != factor:
            raise CheckpointError(
                f"{path}: scale_factor_{name} is {found[f'scale_factor_{name}']}, temperal_downsample says {factor}"
            )
    return {"_class_name": "AutoencoderKLWan"} | found


def spatial_stride(folder: Path) -> int:
    """Pixels per latent along each side of the VAE in a native or diffusers folder, without reading its weights.

    Raises:
        CheckpointError: its config.json cannot be read, or says something that is no VAE's.
    """
    return 2 ** len(_downsampling(folder))


def temporal_stride(folder: Path) -> int:
    """Frames per latent frame, after the first, likewise."""
    return 2 ** sum(_downsampling(folder))


def _downsampling(folder: Path) -> list[bool]:
    """Whether each halving of the size halves the rate too."""
    inner = folder / "vae"
    stages = vae_config(inner) if (inner / "config.json").exists() else WAN21_VAE
    return list(stages["temperal_downsample"])


def save_native_vae(vae: WanVAE, path: Path) -> None:
    """Write the weights under Wan's names as a `.pth`; atomic.

    Raises:
        InputError: the file cannot be written.
    """
    state = vae.model.state_dict()
    write_pickle(path, {native: state[name] for native, name in _native_names(vae.model).items()})
