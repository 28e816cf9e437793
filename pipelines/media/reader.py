"""Real videos as training data sees them: with captions, at a given size and frame rate, frame by frame.

Pictures are what a player shows: in the colours of the stream (`pipelines.media.frames`), upright, with square pixels.
Videos of variable rate are sampled by their times. Interlaced videos are read as they are stored, with a warning. The
alpha of VP8 and VP9, which decoders leave out, is ignored.
"""

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path

import av
import numpy as np
import torch
from av.container import InputContainer
from av.error import FFmpegError
from av.stream import Disposition
from PIL import Image
from torch import Tensor

from pipelines.media.frames import Picture, UnusableVideoError, upright
from pipelines.media.images import MAX_PIXELS
from pipelines.prompts.files import check_prompt, read_lines
from pipelines.prompts.names import find_file, is_file, shown
from wan.utils.errors import InputError
from wan.utils.files import LFS_POINTER, is_lfs_pointer
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")
"""Endings of what counts as a video in a folder; a list may name files with others."""
CAPTION_SUFFIXES = (".txt", ".TXT")
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,flv,asf,ogg,mxf,nut,ivf,gif,yuv4mpegpipe"
"""Formats that hold pictures of their own: no playlists, and nothing that names other files."""


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
        source: a file of lines path<TAB>prompt, paths relative to it; or a folder of videos (`SUFFIXES`, in any case)
            with captions in .txt of the same name beside them. Videos of a folder without a caption are left out with
            a warning. Every name that the system allows is found, but for those with a tab or a line break in a list.

    Raises:
        InputError: nothing there, a line without tab or prompt, a video named twice, or not one that exists.
    """
    videos = _from_folder(source) if os.path.isdir(source) else _from_list(source)
    if not videos:
        raise InputError(f"no captioned videos in {shown(source)}: put a .txt of the same name beside every video")
    if not any(is_file(video.path) for video in videos):
        raise InputError(
            f"none of the {len(videos)} videos of {shown(source)} exists, such as {shown(videos[0].path)}: check paths"
        )
    return videos


def _from_list(file: Path) -> list[CaptionedVideo]:
    videos: dict[str, CaptionedVideo] = {}
    cure = "give a folder, or a text file of lines path<TAB>prompt"
    for number, line in read_lines(file, "list of videos", cure, bytes_in_names=True):
        where = f"{shown(file)} line {number}"
        name, _, prompt = line.partition("\t")
        if not name.strip() or not prompt.strip():
            raise InputError(f"{where}: '{shown(line)[:60]}' is not a path, a tab and a prompt: write every line so")
        prompt = prompt.strip()
        check_prompt(prompt, where)
        path = find_file(name, (file.parent,))
        source = name if path == file.parent / name else name.strip()
        other = videos.setdefault(os.path.realpath(path), CaptionedVideo(source, path, prompt))
        if other.path is not path:
            which = "" if other.source == source else f", which is {shown(other.source)},"
            raise InputError(f"{where} names {shown(source)}{which} twice: give every video one caption")
    return list(videos.values())


def _from_folder(folder: Path) -> list[CaptionedVideo]:
    videos = []
    for path in sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES):
        captions = [path.with_suffix(suffix) for suffix in CAPTION_SUFFIXES]
        file = next((caption for caption in captions if is_file(caption)), captions[0])
        try:
            prompt = " ".join(line.strip() for _, line in read_lines(file, "caption", "write what the video shows"))
            check_prompt(prompt, shown(file.name))
        except InputError as error:
            log.warning("left out %s: %s", shown(path.name), error)
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
    picture, is_on_its_side = upright(frame)
    aspect = width / height / (1 / pixel_aspect if is_on_its_side else pixel_aspect)
    box = centre_crop(picture.shape[1], picture.shape[0], aspect)
    resized = Image.fromarray(np.ascontiguousarray(picture)).resize((width, height), Image.Resampling.BICUBIC, box)
    return np.asarray(resized)


def _opened(path: Path) -> InputContainer:
    """An open video. Only that file is read: its name is no address or pattern, and its content no playlist."""
    if path.exists() and not path.is_file():
        raise UnusableVideoError("is not a regular file")  # a pipe would be waited for
    if path.exists() and is_lfs_pointer(path):
        raise UnusableVideoError(f"is {LFS_POINTER.format('video')}")
    return av.open(f"file:{path}", options={"protocol_whitelist": "file", "format_whitelist": CONTAINERS})


def _timed_frames(path: Path) -> Iterator[tuple[float, av.VideoFrame, float]]:
    """Every frame with the second at which it appears, from 0, and the shape of its pixels; last, when the video ends.

    The end comes as the last frame once more, at its end.
    """
    with _opened(path) as container:
        streams = [stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic]
        if not streams:
            raise UnusableVideoError("has no pictures")
        stream = streams[0]
        if stream.codec_context is None:
            raise UnusableVideoError("has pictures that no decoder knows")
        stream.thread_type = "AUTO"
        # Without this the decoder makes up pixels where it notices damage, and reports success.
        stream.codec_context.options = {"err_detect": "explode", "max_pixels": str(MAX_PIXELS)}
        pixel_aspect = float(stream.sample_aspect_ratio or 1)
        start, now, last, is_interlaced = None, 0.0, None, False
        for last in container.decode(stream):
            if last.time is None:
                raise UnusableVideoError("has frames without times")
            if last.interlaced_frame and not is_interlaced:
                is_interlaced = True
                log.warning("%s is interlaced: its fields stay woven; deinterlace it first", shown(path))
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
