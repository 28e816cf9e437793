"""Limits of the app, and requests of visitors held against them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from pipelines.config import FramesPerSecond, Pixels
from pipelines.generation.inputs.given import GivenVideo
from pipelines.media.images import check_images
from pipelines.prompts.files import check_prompt
from pipelines.prompts.names import is_file, shown
from pipelines.prompts.schedules import OnSwitch
from wan.utils.errors import InputError
from wan.utils.ranges import Bounds, Seed, check_ranges, typed

MAX_STEPS = 50
MIN_SIDE = 16
"""Pixels of the smallest side."""


@dataclass(frozen=True)
class Limits:
    """Bounds on what visitors can ask for.

    Attributes:
        running: generations that take turns on the models.
        waiting: generations in the queue behind them; more are refused.
        lanes: videos side by side in one page, forks included.
        prompt_characters: length of a prompt.
        pixels: height times width of a video.
        blocks: generated for a video that has an end.
        given_frames: frames of a video that is continued.
        pause_seconds: time after which a paused generation ends, since it holds memory.
        idle_seconds: time after which a page that takes no frames is taken for closed.
        keep_seconds: time for which a finished video can be downloaded.
        recorded_frames: frames per video that go into its file; the file of a longer video ends there.
        playback_fps: frames per second at which the page plays, and reads videos; blocks are not handed out faster.
    """

    running: Annotated[int, Bounds(1, 1000)] = 2
    waiting: Annotated[int, Bounds(0, 1000)] = 8
    lanes: Annotated[int, Bounds(1, 16)] = 4
    prompt_characters: Annotated[int, Bounds(1, 10**6)] = 2000
    pixels: Annotated[int, Bounds(1)] = 480 * 832
    blocks: Annotated[int, Bounds(1, 10**6)] = 7
    given_frames: Annotated[int, Bounds(1, 10**6)] = 81
    pause_seconds: Annotated[float, Bounds(0, above=True)] = 600.0
    idle_seconds: Annotated[float, Bounds(0, above=True)] = 60.0
    keep_seconds: Annotated[float, Bounds(0, above=True)] = 1800.0
    recorded_frames: Annotated[int, Bounds(1)] = 16 * 3600
    playback_fps: FramesPerSecond = 16

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def pages(self) -> int:
        """Generations that run or wait at a time."""
        return self.running + self.waiting


@dataclass(frozen=True)
class Request:
    """A checked request.

    Attributes:
        models: names of the models, one per video.
        steps: denoising steps per block; None for the model's own.
        blocks: to be generated; None for no end.
        image: picture to start with; None for none.
        video: to be continued; None for none. A tensor is [T, 3, height, width] in [-1, 1].
        given_frames: of picture or video.
        on_switch: what happens to the memory when the prompt changes.
    """

    prompt: str
    models: tuple[str, ...]
    seed: int
    height: int
    width: int
    steps: int | None = None
    blocks: int | None = None
    image: Path | None = None
    video: GivenVideo | Tensor | None = None
    given_frames: int = 0
    on_switch: OnSwitch = OnSwitch.keep


FORM = ("prompt", "models", "seed", "height", "width", "steps", "blocks", "image", "video", "on_switch")
"""What a page sends to start a generation."""


def read_prompt(prompt: Any, limits: Limits) -> str:
    """A prompt as a page sends it.

    Raises:
        InputError: no text, an empty one, or one that is too long.
    """
    if not isinstance(prompt, str):
        raise InputError(f"the prompt is a {type(prompt).__name__}: give text")
    if len(prompt) > limits.prompt_characters:
        raise InputError(f"the prompt has {len(prompt)} characters: give at most {limits.prompt_characters}")
    text = prompt.strip()
    check_prompt(text, "the prompt")
    return text


def read_request(form: Mapping[str, Any], limits: Limits, known: Sequence[str]) -> Request:
    """Check what a page sends.

    Args:
        form: values by the names of `FORM`; steps of 0 stand for the model's own, blocks of 0 for no end, and image
            and video are None or files.
        known: names of the models.

    Raises:
        InputError: a value that is missing, of another type or beyond the limits.
    """
    require(form, FORM)
    prompt = read_prompt(form["prompt"], limits)
    blocks = typed(Annotated[int, Bounds(0, limits.blocks)], form["blocks"], "blocks")
    height, width = (typed(Pixels, form[name], name) for name in ("height", "width"))
    if min(height, width) < MIN_SIDE:
        raise InputError(f"{height}×{width} pixels are too few: give at least {MIN_SIDE} per side")
    if height * width > limits.pixels:
        raise InputError(
            f"{height}×{width} are {height * width} pixels: give at most {limits.pixels}, or start the app with a "
            "larger height and width"
        )
    image, video = form["image"], form["video"]
    if image is not None and video is not None:
        raise InputError("a picture and a video are given to start with: remove one of them")
    picture = None if image is None else _read_image(image)
    given = None if video is None else read_video(video, height, width, limits)
    return Request(
        prompt,
        read_models(form["models"], limits, known),
        typed(Seed, form["seed"], "seed"),
        height,
        width,
        read_steps(form["steps"]),
        blocks or None,
        picture,
        given,
        int(picture is not None) if given is None else given.num_frames,
        typed(OnSwitch, form["on_switch"], "on_switch"),
    )


def require(form: Mapping[str, Any], names: Sequence[str]) -> None:
    """Make sure that a page has sent everything.

    Raises:
        InputError: something is missing.
    """
    missing = [name for name in names if name not in form]
    if missing:
        raise InputError(f"the request has no {missing[0]}: reload the page")


def read_steps(steps: Any) -> int | None:
    """Denoising steps per block; None, for the model's own, where a page sends 0.

    Raises:
        InputError: no number, or one beyond the limits.
    """
    found: int = typed(Annotated[int, Bounds(0, MAX_STEPS)], steps, "steps")
    return found or None


def read_file(path: Any, what: str) -> Path:
    """A file that a page has sent, as a file of this machine.

    Raises:
        InputError: it is none.
    """
    if not isinstance(path, str | Path):
        raise InputError(f"the {what} is a {type(path).__name__}: give a file")
    if not is_file(Path(path)):
        raise InputError(f"no {what} at {shown(path)}: send it again")
    return Path(path)


def read_video(path: Any, height: int, width: int, limits: Limits) -> GivenVideo:
    """A video to be continued, whose frames are read as they are needed.

    Raises:
        InputError: it cannot be read, has no frames or too many.
    """
    video = GivenVideo(read_file(path, "video"), height, width, limits.playback_fps)
    # Of a long video no more is decoded than tells that it is too long.
    if sum(1 for _ in islice(video.pictures(), limits.given_frames + 1)) > limits.given_frames:
        raise InputError(
            f"the video has more than {limits.given_frames} frames at {video.fps} per second: give a shorter one, or "
            "start the app with more num_output_frames"
        )
    return video


def _read_image(path: Any) -> Path:
    """A picture that a page has sent, as a file of this machine.

    Raises:
        InputError: it is none, or cannot be read.
    """
    file = read_file(path, "image")
    check_images([file])
    return file


def read_models(names: Any, limits: Limits, known: Sequence[str]) -> tuple[str, ...]:
    """The models of a request, in the order in which they are offered.

    Raises:
        InputError: none, an unknown one, or too many.
    """
    if not isinstance(names, Sequence) or isinstance(names, str):
        raise InputError(f"models is a {type(names).__name__}: give a list of names")
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"model {str(unknown[0])[:60]!r} is unknown: choose from {', '.join(known)}")
    chosen = tuple(name for name in known if name in names)
    if not chosen:
        raise InputError("no model is chosen: choose at least one")
    if len(chosen) > limits.lanes:
        raise InputError(f"{len(chosen)} models are chosen: choose at most {limits.lanes}")
    return chosen
