"""The memory demo: models continue the same long scenes of the toy world, and a picture says what each remembers.

An object is in sight in the given frames, goes behind a wall again and again, and has to come back as it was. The
caption names neither colour nor shape.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler
from arl2.toyworld.probe.long_probe import STANDARD_LATENTS, LongProbe, make_long_probe, watch
from arl2.toyworld.probe.memory_benchmark import equal_memory_window
from arl2.toyworld.probe.passes import Answer, Passes, PassVotes, answers_of
from arl2.toyworld.world.reader import detect
from arl2.toyworld.world.worlds import World
from pipelines.media.contact_sheet import FAINT, GAP, INK, LINE, PAGE, enlarge
from pipelines.media.video import to_uint8
from wan.text import TextEncoder
from wan.utils.files import atomic_path
from wan.vae.wan_vae import WanVAE

TIMES = 4
"""Length of the videos, as a multiple of a standard one."""
RIGHT, WRONG = (26, 127, 55), (207, 34, 46)
FRAMES_PER_PICTURE = 3
"""Frames of the video per picture of the animation."""


@dataclass(frozen=True)
class Watched:
    """What a model made of a scene.

    Attributes:
        title: name of the model, and what it remembers.
        frames: bytes, [T, 3, H, W].
        answers: on the objects that came back; none for the true frames.
    """

    title: str
    frames: Tensor
    answers: list[Answer]


@dataclass(frozen=True)
class Scene:
    """A scene, and what models made of it.

    Attributes:
        rows: one per model.
        moments: frame in the middle of every time that the first object is in sight, and the first frame of that time.
    """

    rows: list[Watched]
    moments: list[tuple[int, int]]


def setups(
    generator: HybridWanModel, hybrid: HybridWanModel, sampler: FewStepSampler, tokens_per_frame: int
) -> dict[str, EvalSetup | None]:
    """The true frames through the VAE, softmax with full memory and with a window of the hybrid's bytes, the hybrid."""
    trained = hybrid.trained_memory
    assert trained is not None and trained.window_frames is not None
    layers = len(hybrid.hybrid_attentions())
    window = equal_memory_window(generator, layers, trained.window_frames, tokens_per_frame)
    return {
        "the scene itself": None,
        "softmax, all frames remembered": EvalSetup(generator, sampler),
        "softmax, window of the hybrid's bytes": EvalSetup(generator, sampler, window),
        "hybrid, memory of fixed size": EvalSetup(hybrid, sampler, trained.window_frames, trained.sink_frames),
    }


def continue_scenes(
    rows: Mapping[str, EvalSetup | None], vae: WanVAE, encoder: TextEncoder, seed: int, videos: list[int]
) -> list[Scene]:
    """Let every model continue every scene.

    Args:
        rows: from `setups`.
        vae, encoder: of the toy world.
        seed, videos: scenes of the probe, see `arl2.toyworld.probe.long_probe.probe_scenes`.
    """
    probe = make_long_probe(encoder, World.STANDARD, seed, videos, TIMES * STANDARD_LATENTS)
    passes = probe.passes()
    scenes = [Scene([], _moments(passes, place)) for place in range(len(videos))]
    for title, setup in rows.items():
        frames, answers = _watched(setup, vae, probe, passes)
        for place, scene in enumerate(scenes):
            scene.rows.append(Watched(title, frames[place], answers[place]))
    return scenes


def _moments(passes: Passes, place: int) -> list[tuple[int, int]]:
    """See `Scene`."""
    firsts, lasts = (times[place, 0].tolist() for times in (passes.first, passes.last))
    return [((first + last) // 2, first) for first, last in zip(firsts, lasts, strict=True) if first >= 0]


def _watched(
    setup: EvalSetup | None, vae: WanVAE, probe: LongProbe, passes: Passes
) -> tuple[Tensor, list[list[Answer]]]:
    votes, shown = PassVotes(passes, probe.scenes.half_of), []
    for first, pixels in watch(setup, vae, probe):
        votes.add(first, detect(pixels, probe.scenes.halved))
        shown.append(torch.stack([to_uint8(video).permute(0, 3, 1, 2) for video in pixels.cpu()]))
    return torch.cat(shown, 1), answers_of(passes, votes, probe.scenes, probe.asked(passes))


def memory_sheet(scenes: list[Scene], scale: int = 2) -> Image.Image:
    """A row per scene and model, with a frame of each time that the first object is in sight; the first is given.

    Frames in which colour and shape are right have a green border, others a red one.

    Args:
        scenes: from `continue_scenes`.
        scale: how often each pixel is repeated.
    """
    columns = max(len(scene.moments) for scene in scenes)
    height, width = (size * scale for size in scenes[0].rows[0].frames.shape[-2:])
    row_height = LINE + height + GAP
    sheet_height = sum(len(scene.rows) for scene in scenes) * row_height + GAP
    sheet = Image.new("RGB", (columns * (width + GAP) + GAP, sheet_height), PAGE)
    page, font = ImageDraw.Draw(sheet), ImageFont.load_default(16)
    top = 0
    for scene in scenes:
        for row in scene.rows:
            page.text((GAP, top + LINE / 2 + 2), _title(row), INK, font, anchor="lm")
            right = {answer.frame: bool(answer.colour and answer.shape) for answer in row.answers if answer.thing == 0}
            for column, (frame, first) in enumerate(scene.moments):
                box = (GAP + column * (width + GAP), top + LINE)
                sheet.paste(Image.fromarray(enlarge(row.frames[frame : frame + 1], scale)[0].numpy()), box)
                if first in right:
                    edge = (box[0] - 2, box[1] - 2, box[0] + width + 1, box[1] + height + 1)
                    page.rectangle(edge, outline=RIGHT if right[first] else WRONG, width=3)
            top += row_height
    return sheet


def _title(row: Watched) -> str:
    right = sum(answer.colour and answer.shape for answer in row.answers)
    return f"{row.title}: {right} of {len(row.answers)} times right" if row.answers else row.title


def write_animation(scene: Scene, path: Path, scale: int = 2, fps: int = 16) -> None:
    """Write an animated WebP of a scene, one model below the other.

    Args:
        scene: one of `continue_scenes`.
        path: of the file.
        scale: how often each pixel is repeated.
        fps: rate of the video; every third frame is shown.
    """
    height, width = (size * scale for size in scene.rows[0].frames.shape[-2:])
    font = ImageFont.load_default(13)
    pictures = []
    for frame in range(0, len(scene.rows[0].frames), FRAMES_PER_PICTURE):
        picture = Image.new("RGB", (2 * (width + GAP) + GAP, 2 * (height + LINE) + GAP), PAGE)
        page = ImageDraw.Draw(picture)
        for place, row in enumerate(scene.rows):
            left, top = GAP + place % 2 * (width + GAP), place // 2 * (height + LINE)
            page.text((left, top + LINE / 2 + 2), row.title, INK, font, anchor="lm")
            picture.paste(Image.fromarray(enlarge(row.frames[frame : frame + 1], scale)[0].numpy()), (left, top + LINE))
        page.text((picture.width - GAP, picture.height - 2), f"{frame / fps:.0f} s", FAINT, font, anchor="rb")
        pictures.append(picture)
    duration = round(1000 * FRAMES_PER_PICTURE / fps)
    with atomic_path(path) as temporary:
        pictures[0].save(
            temporary, format="webp", save_all=True, append_images=pictures[1:], duration=duration, loop=0, quality=70
        )
