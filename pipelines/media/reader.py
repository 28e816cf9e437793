"""Real videos as training data sees them: with captions, at a given size and frame rate, frame by frame."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.error import FFmpegError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.prompts import read_prompts
from wan.utils.errors import InputError
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)

Picture = NDArray[np.uint8]


class UnusableVideoError(InputError):
    """A video that cannot become a sample: unreadable, without pictures or times, or too short."""


@dataclass(frozen=True)
class CaptionedVideo:
    """A video and what it shows.

    Attributes:
        source: what it is called in the list, or in the folder.
        path: where it is.
        prompt: its caption.
    """

    source: str
    path: Path
    prompt: str


def find_videos(source: Path) -> list[CaptionedVideo]:
    """The videos that a list or a folder names.

    Args:
        source: a file of lines path<TAB>prompt, paths relative to it; or a folder of .mp4 with captions in .txt of the
            same name beside them. Videos of a folder without a caption are left out with a warning.

    Raises:
        InputError: nothing there, a line without tab or prompt, a video named twice, or not one that exists.
    """
    videos = _from_folder(source) if source.is_dir() else _from_list(source)
    if not videos:
        raise InputError(f"no captioned videos in {source}: put a .txt of the same name beside every .mp4")
    if not any(video.path.is_file() for video in videos):
        raise InputError(f"none of the {len(videos)} videos of {source} exists, such as {videos[0].path}: check paths")
    return videos


def _from_list(file: Path) -> list[CaptionedVideo]:
    videos: dict[str, CaptionedVideo] = {}
    for line in read_prompts(file):
        name, _, prompt = (part.strip() for part in line.partition("\t"))
        if not name or not prompt:
            raise InputError(f"{file}: {line[:60]!r} is not a path, a tab and a prompt: write every line so")
        if name in videos:
            raise InputError(f"{file} names {name} twice: give every video one caption")
        videos[name] = CaptionedVideo(name, file.parent / name, prompt)
    return list(videos.values())


def _from_folder(folder: Path) -> list[CaptionedVideo]:
    videos = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() == ".mp4"):
        try:
            prompt = " ".join(read_prompts(path.with_suffix(".txt")))
        except InputError as error:
            log.warning("left out %s: %s", path.name, error)
            continue
        videos.append(CaptionedVideo(path.name, path, prompt))
    return videos


def centre_crop(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """The largest box of an aspect (width / height) in the middle of a picture: left, top, right, bottom."""
    crop_width, crop_height = min(width, height * aspect), min(height, width / aspect)
    left, top = (width - crop_width) / 2, (height - crop_height) / 2
    return left, top, left + crop_width, top + crop_height


def _fit(frame: av.VideoFrame, pixel_aspect: float, height: int, width: int) -> Picture:
    """A frame upright, cropped and resized, [height, width, 3]."""
    if frame.rotation % 90:
        raise UnusableVideoError(f"is turned by {frame.rotation} degrees, not by a multiple of 90")
    turns = frame.rotation // 90 % 4
    picture = np.rot90(frame.to_ndarray(format="rgb24"), turns)
    aspect = width / height / (1 / pixel_aspect if turns % 2 else pixel_aspect)
    box = centre_crop(picture.shape[1], picture.shape[0], aspect)
    resized = Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def _timed_frames(path: Path) -> Iterator[tuple[float, av.VideoFrame, float]]:
    """Every frame with the second at which it appears, from 0, and the shape of its pixels; last, when the video ends.

    The end comes as the last frame once more, at its end.
    """
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise UnusableVideoError("has no pictures")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise UnusableVideoError("has pictures that no decoder knows")
        stream.thread_type = "AUTO"
        # Without this the decoder makes up pixels where it notices damage, and reports success.
        stream.codec_context.options = {"err_detect": "explode"}
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        start, now, last = None, 0.0, None
        for last in container.decode(stream):
            if last.time is None:
                raise UnusableVideoError("has frames without times")
            start = last.time if start is None else start
            now = last.time - start
            yield now, last, pixel_aspect
        if last is not None and stream.average_rate:
            yield now + 1 / float(stream.average_rate), last, pixel_aspect


def read_clip(path: Path, height: int, width: int, fps: int) -> Iterator[Picture]:
    """The frames of a video at a frame rate, upright, its middle cropped to the aspect and resized, [height, width, 3].

    Every frame is the one that a player would show at that moment. Memory does not grow with the video.

    Raises:
        UnusableVideoError: unreadable, or damaged so that the decoder notices.
    """
    number, shown, fitted = 0, None, None
    early = Fraction(1, 1000)  # containers round times, to milliseconds at worst
    try:
        for time, frame, pixel_aspect in _timed_frames(path):
            while shown is not None and Fraction(number, fps) < Fraction(time) - early:
                if fitted is None:
                    fitted = _fit(shown, pixel_aspect, height, width)
                yield fitted
                number += 1
            if frame is not shown:
                shown, fitted = frame, None
    except (OSError, FFmpegError) as error:
        raise UnusableVideoError(f"cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:  # PyAV decodes titles and the like as it opens a file
        raise UnusableVideoError(f"cannot be read ({error})") from error


def encode_frames(vae: WanVAE, pictures: Iterator[Picture], latent_frames: int) -> Tensor:
    """Normalised latents [F, C, h, w] of the first frames of a video, which are streamed through the encoder.

    Args:
        pictures: [height, width, 3] each; no more are taken than needed.
        latent_frames: F; takes (F - 1)·stride + 1 pictures, stride being the VAE's.

    Raises:
        UnusableVideoError: there are fewer.
    """
    stream, stride = vae.encode_stream(), vae.temporal_compression
    latents, taken = [], 0
    for number in range(latent_frames):
        piece = list(islice(pictures, stride if number else 1))
        taken += len(piece)
        if len(piece) < (stride if number else 1):
            raise UnusableVideoError(f"has {taken} frames at this rate, {(latent_frames - 1) * stride + 1} are needed")
        pixels_THWC = torch.from_numpy(np.stack(piece)).to(vae.device)
        pixels_TCHW = pixels_THWC.permute(0, 3, 1, 2).float() / 127.5 - 1
        latents.append(stream.encode(pixels_TCHW[None].to(vae.dtype)))
    return torch.cat(latents, dim=1)[0]
