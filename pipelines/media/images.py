"""Pictures that a video starts with: files and objects of any kind, to what a viewer shows of them, in sRGB.

What is done to a picture, in this order:

- Orientation: the EXIF tag is applied.
- Grey with more than 8 bits: 16-bit values cover 0 to 65535 (a 12-bit TIFF 0 to 4095), 32-bit integers likewise,
  floats 0 to 1. Values outside, and 32-bit integers that stay below 256, are refused, since their range is not known.
- Colours: an embedded ICC profile is converted to sRGB; CMYK, YCbCr, LAB and HSV become RGB.
- Transparency: composited over `BACKGROUND`; nothing that lies hidden under alpha 0 shows.
- Size: scaled and cropped about the centre.

Of animations and documents with several pages the first is taken, with a warning.
"""

import io
import logging
import struct
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from stat import S_ISDIR, S_ISREG
from typing import BinaryIO

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError
from torch import Tensor

from pipelines.prompts.names import shown
from wan.utils.errors import InputError

log = logging.getLogger(__name__)

Picture = Image.Image | NDArray[np.uint8] | Tensor | Path | str
"""One picture: of PIL, uint8 [H, W], [H, W, 3] or [H, W, 4] of NumPy, a tensor [3, H, W], or a file."""

BACKGROUND = (255, 255, 255)
"""Colour behind transparent pixels: white."""
MAX_HEAD_BYTES = 65536
"""Bytes of an unknown file that are searched for its kind."""
MAX_PIXELS = 178_956_970
"""Largest picture that is read: half a gigabyte of RGB."""
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "DIB", "AVIF", "JPEG2000", "PPM", "TGA", "ICO", "ICNS"),
    *("PCX", "SGI", "PSD", "QOI", "DDS", "SUN", "FITS"),
)
"""Formats that Pillow may try: no format that starts other programs, as EPS does."""
ONE_PICTURE = ("MPO", "PSD", "ICO", "ICNS")
"""Formats whose further frames are no other pictures: depth maps, layers, sizes."""
RAW_SUFFIXES = (".dng", ".nef", ".cr2", ".cr3", ".arw", ".orf", ".rw2", ".raf", ".pef", ".srw")
SIGNATURES = (
    (4, b"ftypheic", "HEIC"),
    (4, b"ftypheix", "HEIC"),
    (4, b"ftyphevc", "HEIC"),
    (4, b"ftypmif1", "HEIF"),
    (4, b"ftypmsf1", "HEIF"),
    (0, b"\xff\x0a", "JPEG XL"),
    (4, b"JXL ", "JPEG XL"),
    (0, b"%PDF", "PDF"),
    (0, b"%!PS", "EPS"),
    (0, b"\xc5\xd0\xd3\xc6", "EPS"),
    (0, b"\x76\x2f\x31\x01", "OpenEXR"),
    (0, b"#?RADIANCE", "Radiance HDR"),
)
"""Position, bytes and name of what people take for a picture."""
GREY_16, DNG_VERSION, BITS_PER_SAMPLE, PHOTOMETRIC, WHITE_IS_ZERO = 65535, 50706, 258, 262, 0
PILLOW_ERRORS = (
    *(OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, RuntimeError),
    *(OverflowError, ZeroDivisionError, MemoryError, struct.error, Image.DecompressionBombError),
)
"""Errors of Pillow's readers for damaged files; only calls of them stand under it."""


def read_image(path: Path, height: int, width: int, *, quiet: bool = False) -> Tensor:
    """An image file scaled and cropped about its centre, [1, 1, 3, height, width] in [-1, 1].

    Args:
        quiet: do not warn, as of animations; for a file that `check_images` has seen.

    Raises:
        InputError: not an image, damaged, too large, or of values whose range is not known.
    """
    return _normalised(_fit(open_image(path, quiet=quiet), height, width))[None, None]


def check_images(paths: Iterable[Path]) -> None:
    """Read image files whole, so that a broken one is known before anything is generated.

    Raises:
        InputError: the message names all that cannot be used.
    """
    distinct = list(dict.fromkeys(paths))
    problems = []
    for path in distinct:
        try:
            open_image(path)
        except InputError as error:
            problems.append(str(error))
    if problems:
        count = f"{len(problems)} of {len(distinct)} images cannot be used: " if len(distinct) > 1 else ""
        raise InputError(count + "; ".join(problems))


def open_image(path: Path, *, quiet: bool = False) -> Image.Image:
    """Open an image file as a viewer shows it, as RGB.

    Raises:
        InputError: see `read_image`.
    """
    with _opened(path) as file, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = _identified(path, file)
        raw_mode = _raw_mode(image)
        upright = _upright(image, shown(path))
        pages = _num_pages(image)
    if not quiet:
        for message in dict.fromkeys(str(warning.message) for warning in caught):
            log.warning("%s: %s", shown(path), " ".join(message.split()))
        if pages > 1:
            log.warning("%s holds %d pictures (an animation or pages): the first is taken", shown(path), pages)
        _warn_if_dark(path, image, raw_mode)
    return _shown_colours(upright, _tiff_tags(image), shown(path))


def _identified(path: Path, file: BinaryIO) -> Image.Image:
    """An image file of which the header was read, and is as it should be."""
    Image.init()
    try:
        image = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except UnidentifiedImageError as error:
        file.seek(0)
        raise InputError(f"{shown(path)} {_what_it_is(file.read(MAX_HEAD_BYTES))}") from error
    except PILLOW_ERRORS as error:
        raise _damaged(shown(path), error) from error
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"{shown(path)} has {width}×{height} = {width * height // 10**6} million pixels, more than "
            f"{MAX_PIXELS // 10**6} million: scale it down"
        )
    # Of camera raw, which is built like TIFF, only a thumbnail would be read.
    if DNG_VERSION in _tiff_tags(image) or path.suffix.lower() in RAW_SUFFIXES:
        raise InputError(f"{shown(path)} is camera raw, which is not read: convert it to PNG or JPEG")
    return image


def _raw_mode(image: Image.Image) -> str:
    """The layout of a PNG's values in its file, such as "RGB;16B", which Pillow forgets once it has read them."""
    tiles = getattr(image, "tile", [])
    return str(tiles[0][3]) if image.format == "PNG" and tiles else ""


def _warn_if_dark(path: Path, image: Image.Image, raw_mode: str) -> None:
    """Warn of 16-bit pictures whose values would fit into 8 bits, since they come out nearly black."""
    largest = 0
    if image.mode.startswith("I;16"):
        largest = int(np.asarray(image).max())
    elif raw_mode in ("RGB;16B", "RGBA;16B") and not np.asarray(image)[..., :3].any():
        # Pillow keeps the high byte of every value; read as of the other byte order, the file gives the low one.
        with Image.open(path, formats=["PNG"]) as again:
            again.tile = [tile._replace(args=raw_mode.replace("16B", "16L")) for tile in again.tile]
            largest = int(np.asarray(again)[..., :3].max())
    if 0 < largest <= 255:
        log.warning(
            "%s has 16 bits per value, and no value is above %d, so it is nearly black: save an 8-bit picture as 8-bit",
            shown(path),
            largest,
        )


def _num_pages(image: Image.Image) -> int:
    """Pictures that a file holds; 1 if it is damaged after the first."""
    if image.format in ONE_PICTURE:
        return 1
    try:
        return int(getattr(image, "n_frames", 1))
    except PILLOW_ERRORS:
        return 1


def _opened(path: Path) -> BinaryIO:
    """A file that is open and not empty."""
    try:
        status = path.stat()
        if S_ISDIR(status.st_mode):
            raise InputError(f"{shown(path)} is a folder: give an image file")
        if not S_ISREG(status.st_mode):
            raise InputError(f"{shown(path)} is not a regular file: give an image file")
        if not status.st_size:
            raise InputError(f"{shown(path)} is empty, not an image: make or copy it again")
        return path.open("rb")
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, InputError):
            raise
        raise InputError(f"no image {shown(path)}: check the path") from error
    except OSError as error:
        raise InputError(f"cannot read the image {shown(path)} ({error.strerror}): check the path") from error


def _what_it_is(content: bytes) -> str:
    """Name the likely kind of a file that Pillow does not know, and the cure."""
    start = content[:1024].lstrip(b"\xef\xbb\xbf \t\r\n")
    cure = "which is not read: convert it to PNG or JPEG"
    if content.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the image: run git lfs pull"
    if start.lower().startswith((b"<!doctype html", b"<html")):
        return "is a web page, not an image: download the image itself"
    if start.startswith((b"<svg", b"<?xml", b"<!--", b"<!DOCTYPE svg")) and b"<svg" in content[:65536]:
        return f"is SVG, {cure}"
    if content[4:8] == b"ftyp" and content[8:11] not in (b"hei", b"hev", b"mif", b"msf", b"avi"):
        return "is a video: give one of its frames as PNG or JPEG"
    if content.startswith(b"\x1a\x45\xdf\xa3") or (content.startswith(b"RIFF") and content[8:12] == b"AVI "):
        return "is a video: give one of its frames as PNG or JPEG"
    for position, signature, name in SIGNATURES:
        if content[position : position + len(signature)] == signature:
            return f"is {name}, {cure}"
    return "is not an image, or is damaged: give a PNG or JPEG"


def _damaged(name: str, error: Exception) -> InputError:
    if isinstance(error, Image.DecompressionBombError):
        return InputError(f"{name} has more than {MAX_PIXELS // 10**6} million pixels: scale it down")
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(f"the image {name} is damaged or not complete ({reason}): make or copy it again")


def _tiff_tags(image: Image.Image) -> dict[int, object]:
    """Tags of a TIFF that describe its values; nothing for other pictures."""
    if not isinstance(image, TiffImagePlugin.TiffImageFile):
        return {}
    try:
        return {tag: image.tag_v2[tag] for tag in (DNG_VERSION, BITS_PER_SAMPLE, PHOTOMETRIC) if tag in image.tag_v2}
    except PILLOW_ERRORS as error:
        raise _damaged("TIFF", error) from error


def to_rgb(image: Image.Image, name: str = "the image") -> Image.Image:
    """Convert a picture to RGB as a viewer shows it; the module lists the steps.

    Raises:
        InputError: damaged, without pixels, or of values whose range is not known.
    """
    return _shown_colours(_upright(image, name), _tiff_tags(image), name)


def _upright(image: Image.Image, name: str) -> Image.Image:
    """A decoded copy of a picture, turned as its EXIF tag says."""
    if min(image.size) < 1:
        raise InputError(f"{name} has no pixels ({image.width}×{image.height}): give another")
    try:
        image.load()
        return ImageOps.exif_transpose(image)
    except PILLOW_ERRORS as error:
        raise _damaged(name, error) from error


def _shown_colours(image: Image.Image, tags: dict[int, object], name: str) -> Image.Image:
    """An upright picture as RGB: grey of many bits, colour profiles and transparency resolved."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        image = _to_8_bits(image, tags, name)
    colours, alpha = _divided(image)
    rgb = _to_srgb(colours, profile, name)
    return rgb if alpha is None else Image.composite(rgb, Image.new("RGB", rgb.size, BACKGROUND), alpha)


def _to_8_bits(image: Image.Image, tags: dict[int, object], name: str) -> Image.Image:
    """Grey of more than 8 bits per pixel as L, or as LA if one value is transparent."""
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode == "F":
        limit, what, cure = 1.0, "32-bit floats", "divide so that they lie between 0 and 1"
    else:
        limit, what, cure = GREY_16, "integers", "scale them to 16 bits, or save them as 8-bit grey"
        if image.mode.startswith("I;16") and tags.get(BITS_PER_SAMPLE) == (12,):
            limit = 4095
    # 32-bit integers up to 255 are 8-bit grey or a nearly black picture, and nothing tells which.
    if not (low >= 0 and high <= limit) or (image.mode == "I" and 0 < high <= 255):  # NaN is refused too
        raise InputError(f"{name} has {what} from {low:.9g} to {high:.9g}, whose range is not known: {cure}")
    grey = np.rint(values.astype(np.float32) * (255 / limit)).astype(np.uint8)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO and image.mode.startswith("I;16"):
        grey = 255 - grey
    result = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        result.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return result


def _divided(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colours without transparency, and the transparency if there is any."""
    if image.mode == "1":
        image = image.convert("L") if "transparency" not in image.info else image.convert("LA")
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if not image.has_transparency_data:
        return image, None
    key = image.info.get("transparency")
    if image.mode == "RGB" and isinstance(key, tuple) and max(key) > 255:
        # A 16-bit PNG, which is read as 8-bit colours while its key stays as it is.
        image = image.copy()
        image.info["transparency"] = tuple(value >> 8 for value in key)
    rgba = image.convert("RGBA")
    colours = rgba.convert("RGB")
    return colours.convert("L") if image.mode in ("L", "LA") else colours, rgba.getchannel("A")


def _to_srgb(image: Image.Image, profile: bytes | None, name: str) -> Image.Image:
    """Colours without transparency as RGB, by the embedded profile if there is one that fits."""
    if image.mode == "LAB":
        transform = ImageCms.buildTransform(
            ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), inMode="LAB", outMode="RGB"
        )
        return transform.apply(image)
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("RGB")
    converted = None if not profile else _by_profile(image, profile, name)
    return converted or image.convert("RGB")


def _by_profile(image: Image.Image, profile: bytes, name: str) -> Image.Image | None:
    """A picture in sRGB; None if its profile is sRGB already, or cannot be used."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in (source.profile.profile_description or "").lower():
            return None
        space = source.profile.xcolor_space.strip()
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        if space != {"L": "GRAY"}.get(image.mode, image.mode):
            raise ImageCms.PyCMSError(f"it is for {space}, the picture is {image.mode}")
        return ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, OSError, TypeError, ValueError) as error:
        log.warning(
            "%s: its colour profile cannot be used (%s): its colours may be off", name, " ".join(str(error).split())
        )
        return None


def _fit(image: Image.Image, height: int, width: int) -> Image.Image:
    """An RGB picture scaled and cropped about its centre."""
    scale = max(height / image.height, width / image.width)
    size = (round(image.width * scale), round(image.height * scale))
    if size[0] * size[1] > MAX_PIXELS:
        # A strip: it would grow huge, and nearly all of it would be cut off again.
        box_width, box_height = width / scale, height / scale
        left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
        box = (max(left, 0), max(top, 0), min(left + box_width, image.width), min(top + box_height, image.height))
        return image.resize((width, height), Image.Resampling.LANCZOS, box)
    image = image.resize(size, Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normalised(image: Image.Image) -> Tensor:
    """An RGB picture [3, H, W] in [-1, 1]."""
    pixels = torch.from_numpy(np.asarray(image).copy())
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


def first_frames(images: Picture | Sequence[Picture], batch: int, height: int, width: int, stride: int = 4) -> Tensor:
    """The frames that videos start with, [B, T, 3, height, width] in [-1, 1].

    Args:
        images: one picture for all videos, or a list of one per video. Pictures of PIL, files, and uint8 arrays
            [H, W, 3] (or [H, W], [H, W, 4], and [B, H, W, 3] for a batch) are scaled and cropped about their centre.
            Tensors have the size of the video and values in [-1, 1], or 0 to 255 as uint8: [3, H, W], [B, 3, H, W], or
            [B, T, 3, H, W] with T = 1 + a multiple of `stride`.
        batch: videos.
        height, width: of the videos, in pixels.
        stride: video frames per latent frame.

    Raises:
        InputError: another kind, type, shape, range or number, or a file that cannot be used.
    """
    if isinstance(images, list | tuple):
        if len(images) != batch:
            raise InputError(f"{len(images)} images for {batch} videos: give one per video")
        if any(isinstance(one, list | tuple) for one in images):
            raise InputError("images are lists of lists: give one picture per video, or a tensor [B, T, 3, H, W]")
        frames = torch.cat([_frames_of(one, 1, height, width, stride).cpu() for one in images])
    else:
        frames = _frames_of(images, batch, height, width, stride)
    return frames if len(frames) == batch else frames.expand(batch, -1, -1, -1, -1)


def _frames_of(image: object, batch: int, height: int, width: int, stride: int) -> Tensor:
    """The frames of one argument, [1 or B, T, 3, H, W]."""
    if isinstance(image, Tensor):
        return _frames_of_tensor(image, batch, height, width, stride)
    if isinstance(image, str | Path):
        return read_image(Path(image), height, width)
    if isinstance(image, np.ndarray):
        pictures = _pictures_of_array(image, batch)
    elif isinstance(image, Image.Image):
        pictures = [image]
    else:
        raise InputError(
            f"an image is a {type(image).__name__}: give a PIL image, a uint8 array [H, W, 3], a tensor or a path"
        )
    rgb = [to_rgb(picture) for picture in pictures]
    return torch.stack([_normalised(_fit(picture, height, width)) for picture in rgb])[:, None]


def _pictures_of_array(array: NDArray[np.uint8], batch: int) -> list[Image.Image]:
    if array.dtype != np.uint8:
        raise InputError(f"an image array is {array.dtype}: give uint8 from 0 to 255, or a tensor in [-1, 1]")
    arrays = list(array) if array.ndim == 4 else [array]
    if len(arrays) not in (1, batch):
        raise InputError(f"{len(arrays)} images for {batch} videos: give one per video")
    for one in arrays:
        if one.ndim not in (2, 3) or (one.ndim == 3 and one.shape[2] not in (1, 3, 4)) or not one.size:
            raise InputError(f"an image array has the shape {list(array.shape)}: give [H, W, 3]")
    return [Image.fromarray(one[..., 0] if one.ndim == 3 and one.shape[2] == 1 else one) for one in arrays]


def _frames_of_tensor(tensor: Tensor, batch: int, height: int, width: int, stride: int) -> Tensor:
    if tensor.ndim not in (3, 4, 5) or tuple(tensor.shape[-3:]) != (3, height, width) or not tensor.numel():
        raise InputError(
            f"an image tensor has the shape {list(tensor.shape)}: give [3, {height}, {width}], with a batch in front "
            "or a batch and frames; other sizes as uint8 arrays or PIL images are scaled and cropped"
        )
    frames = tensor[(None,) * (4 - tensor.ndim)][:, None] if tensor.ndim < 5 else tensor
    if len(frames) not in (1, batch):
        raise InputError(f"{len(frames)} images for {batch} videos: give one per video")
    if (frames.shape[1] - 1) % stride:
        raise InputError(f"{frames.shape[1]} given frames cannot be encoded: give 1 plus a multiple of {stride}")
    if frames.is_meta:
        raise InputError("an image tensor is without values (meta device): give one with values")
    if frames.dtype is torch.uint8:
        return frames.float() / 127.5 - 1
    if not frames.is_floating_point():
        raise InputError(f"an image tensor is {frames.dtype}: give floats in [-1, 1], or uint8")
    low, high = (float(value) for value in frames.aminmax())
    if not (low >= -1 and high <= 1):  # NaN too
        raise InputError(
            f"an image tensor has values from {low:.9g} to {high:.9g}: give -1 to 1, such as x / 127.5 - 1"
        )
    if low >= 0 and high > low:  # diffusers' own pipelines take 0 to 1
        log.warning(
            "an image tensor has values from %.3g to %.3g, and 0 is middle grey here: if they are meant from 0 to 1, "
            "give 2 * x - 1",
            low,
            high,
        )
    return frames
