"""Memory probe: accuracy of colour and shape of objects after they were hidden.

Videos continue given real frames, or are generated from captions that name nothing. Objects that come out from behind
the wall are read from the pixels and compared with those that went in.
"""

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from arl2.evaluation.eval_setup import EvalSetup
from arl2.rollout import remember_block, rollout
from arl2.toyworld.world.captions import caption_scenes, names_answer
from arl2.toyworld.world.latents import embed_captions, encode_pixels
from arl2.toyworld.world.reader import CHANCE, Reading, judge, read_generated, read_video
from arl2.toyworld.world.render import as_pixels, hidden_spans, render, visible_fraction
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, SceneBatch, Scenes, sample_scenes
from arl2.toyworld.world.worlds import caption_world
from wan.text import TextEncoder
from wan.utils.errors import InputError
from wan.vae.wan_vae import WanVAE

PROBE_MIX = {"occlusion": 0.5, "binding": 0.5}
FIRST_SEED = -10_000_000
"""First seed of the probe; training uses seeds from 0."""
MEASURES = ("colour", "shape", "both")
FORMS = ("continued", "generated", "obeyed", "long")
"""Kinds of videos that a model is judged on; see `arl2.toyworld.probe.memory_benchmark`."""
CONTINUED = ("continued", "long")
"""Forms that go on from given blocks."""


@dataclass(frozen=True)
class ProbeSet:
    """Scenes of a probe, with real latents.

    Attributes:
        text_BTD: embeddings of captions that name nothing.
        telling_text_BTD: embeddings of captions that name colour and shape of every object.
        context_blocks: given blocks of a continued video.
        times: length of the generated videos, as a multiple of the real ones.
        noise_seed: seed of the models' noise.
    """

    scenes: Scenes
    latents_BFCHW: Tensor
    text_BTD: Tensor
    telling_text_BTD: Tensor
    context_blocks: int = 2
    times: int = 1
    noise_seed: int = 0

    @property
    def frames(self) -> int:
        """Latent frames of the generated videos, given ones included."""
        return self.latents_BFCHW.shape[1] * self.times

    @property
    def given_frames(self) -> int:
        """Given latent frames of a continued video."""
        return self.context_blocks * FRAMES_PER_BLOCK

    def noise(self, continued: bool, block: int, step: int) -> Tensor:
        """Noise of all videos before a step of a block, [B, F, C, h, w]; it does not depend on the batch size."""
        seed = zlib.crc32(f"{int(self.scenes.seed[0])}/{self.noise_seed}/{continued}/{block}/{step}".encode())
        shape = (len(self.scenes), FRAMES_PER_BLOCK, *self.latents_BFCHW.shape[2:])
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.latents_BFCHW.device)


def silent_captions(scenes: SceneBatch) -> list[str]:
    """Captions of scenes of any world that name no colour and no shape.

    Raises:
        InputError: one names an answer, which would make the probe void.
    """
    captions = caption_world(scenes, informative=False)
    told = [caption for caption in captions if names_answer(caption)]
    if told:
        raise InputError(f"the caption {told[0]!r} names the answer: the probe's captions must not")
    return captions


def make_probe_set(vae: WanVAE, encoder: TextEncoder, videos: int, seed: int, hidden_frames: int) -> ProbeSet:
    """Sample scenes that hide one or two objects behind a wall.

    Raises:
        InputError: a caption names an answer, which would make the probe void.
    """
    first = FIRST_SEED + seed * videos
    scenes = sample_scenes(
        torch.arange(first, first + videos, device=vae.device), mix=PROBE_MIX, hidden_frames=hidden_frames
    )
    captions = silent_captions(scenes)
    latents = torch.cat([encode_pixels(vae, as_pixels(render(scenes[rows]))) for rows in _batches(videos)])
    text, telling = (
        embed_captions(encoder, spoken).to(vae.device)
        for spoken in (captions, caption_scenes(scenes, informative=True))
    )
    return ProbeSet(scenes, latents, text, telling)


BATCH = 32
"""Default videos per batch; a larger batch uses a GPU better and changes nothing else."""


def _batches(videos: int, size: int = BATCH) -> Iterator[slice]:
    for first in range(0, videos, size):
        yield slice(first, min(first + size, videos))


@torch.no_grad()
def generate_latents(
    setup: EvalSetup, probe: ProbeSet, rows: slice, text_BTD: Tensor, continued: bool = False
) -> Tensor:
    """Generate latents of whole videos, [B, F, C, h, w], after the given blocks or from the caption alone."""
    model, real = setup.transformer, probe.latents_BFCHW[rows]
    given = probe.given_frames if continued else 0
    like = real[:, :1].expand(-1, probe.frames, -1, -1, -1)
    memory = model.memory_for(like, setup.window_frames, setup.sink_frames)
    text = model.embed_text(text_BTD[rows].to(model.dtype))
    for start in range(0, given, FRAMES_PER_BLOCK):
        remember_block(model, real[:, start : start + FRAMES_PER_BLOCK], text, memory, start)

    def noise(block: int, step: int) -> Tensor:
        return probe.noise(continued, block, step)[rows]

    blocks = (probe.frames - given) // FRAMES_PER_BLOCK
    made = [block.latents_BFCHW for block in rollout(model, setup.sampler, noise, text, memory, blocks, given)]
    return torch.cat([real[:, :given].float(), *(part.float() for part in made)], dim=1)


@torch.no_grad()
def make_videos(
    setup: EvalSetup, vae: WanVAE, probe: ProbeSet, text_BTD: Tensor, continued: bool = False, batch: int = BATCH
) -> tuple[Tensor, Tensor]:
    """Generate all videos of a probe as `generate_latents` does; returns latents and pixels [B, T, 3, H, W]."""
    parts = []
    for rows in _batches(len(probe.scenes), batch):
        latents = generate_latents(setup, probe, rows, text_BTD, continued)
        parts.append((latents, vae.decode(latents.to(vae.dtype)).float()))
    latents, pixels = (torch.cat(part) for part in zip(*parts, strict=True))
    return latents, pixels


def videos_of_form(
    setup: EvalSetup, vae: WanVAE, probe: ProbeSet, form: str, batch: int = BATCH
) -> tuple[Tensor, Tensor]:
    """Generate the videos of one of `FORMS`; see `make_videos`."""
    text = probe.telling_text_BTD if form == "obeyed" else probe.text_BTD
    return make_videos(setup, vae, probe, text, form in CONTINUED, batch)


def interval(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson interval of a fraction, 95 % by default; (0, 1) for an empty sample."""
    if not total:
        return 0.0, 1.0
    fraction, z2 = right / total, z * z
    middle = (fraction + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(fraction * (1 - fraction) / total + z2 / (4 * total * total))
    return middle - half, middle + half


def accuracy(right: Tensor, counts: Tensor, chance: float) -> dict[str, float | int | list[float]]:
    """Accuracy among the entries that count, with its interval and chance level."""
    hits, total = int((right & counts).sum()), int(counts.sum())
    return {
        "accuracy": hits / total if total else math.nan,
        "interval": list(interval(hits, total)),
        "objects": total,
        "chance": chance,
    }


def accuracies(verdict: dict[str, Tensor], counts: Tensor) -> dict[str, dict[str, float | int | list[float]]]:
    """Accuracies of all measures among the entries that count."""
    return {name: accuracy(verdict[name], counts, CHANCE[name]) for name in MEASURES}


def judge_continued(reading: Reading, scenes: Scenes) -> dict[str, object]:
    """Accuracies after the first re-emergence: overall, by hidden duration, and by number of objects."""
    verdict = judge(reading, scenes)
    if verdict["count"].shape[-1] < 2:
        raise InputError("no object comes out again within these videos: make them longer")
    before, after = ({name: values[..., phase].cpu() for name, values in verdict.items()} for phase in (0, 1))
    spans = hidden_spans(visible_fraction(scenes) == 0)[:, :, 0]
    duration = (spans[..., 1] - spans[..., 0] + 1).cpu()
    two = scenes.exists.sum(1, keepdim=True).cpu() == 2
    groups: dict[str, Tensor] = {"one object": ~two.expand_as(duration), "two objects": two.expand_as(duration)}
    for low in sorted({int(value) // 4 * 4 for value in duration[after["count"]].tolist()}):
        groups[f"hidden {low} to {low + 3} frames"] = (duration >= low) & (duration < low + 4)
    return {
        "after": accuracies(after, after["count"]),
        "before": accuracies(before, before["count"]),
        "place": accuracy(after["place"], after["count"], math.nan),
        "groups": {name: accuracies(after, after["count"] & group) for name, group in groups.items()},
    }


def judge_every_pass(reading: Reading, scenes: Scenes) -> dict[str, object]:
    """Accuracies after every re-emergence in long videos: pass by pass, and after each object's last one."""
    verdict = {name: values.cpu() for name, values in judge(reading, scenes).items()}
    counts = verdict["count"][..., 1:]
    if not counts.any():
        raise InputError("no object comes out again within these videos: make them longer")
    passes = [
        accuracies({name: verdict[name][..., phase] for name in MEASURES}, verdict["count"][..., phase])
        for phase in range(1, verdict["count"].shape[-1])
        if verdict["count"][..., phase].any()
    ]
    last = 1 + (counts * torch.arange(1, counts.shape[-1] + 1)).argmax(-1, keepdim=True)
    after_last = {name: verdict[name].gather(-1, last)[..., 0] for name in MEASURES}
    return {"after_last": accuracies(after_last, counts.any(-1)), "passes": passes}


def judge_generated(reading: Reading, scenes: Scenes) -> dict[str, object]:
    """Fraction of objects that come out as they went in, in videos generated from the caption alone."""
    same = {name: values.cpu() for name, values in reading.same_object().items()}
    return {"same_object": accuracies(same, scenes.exists.cpu())}


def judge_obeyed(reading: Reading, scenes: Scenes) -> dict[str, dict[str, float | int | list[float]]]:
    """Prompt adherence: fraction of objects that, when first seen, have the colour and shape that the caption names.

    Of two objects each must be in the half that the caption names.
    """
    colour, shape = reading.colour[..., 0] == scenes.colour, reading.shape[..., 0] == scenes.shape
    return accuracies(
        {"colour": colour.cpu(), "shape": shape.cpu(), "both": (colour & shape).cpu()}, scenes.exists.cpu()
    )


def judge_form(form: str, pixels: Tensor, scenes: Scenes) -> dict[str, Any]:
    """Accuracies on the videos of one of `FORMS`.

    Args:
        pixels: [B, T, 3, H, W] in [-1, 1].
        scenes: scenes that the videos should show.
    """
    if form == "continued":
        return judge_continued(read_video(pixels, scenes), scenes)
    if form == "long":
        return judge_every_pass(read_video(pixels, scenes), scenes)
    reading = read_generated(pixels, scenes.exists[:, 1])
    return judge_generated(reading, scenes) if form == "generated" else dict(judge_obeyed(reading, scenes))


@torch.no_grad()
def probe_model(setup: EvalSetup, vae: WanVAE, probe: ProbeSet) -> dict[str, Any]:
    """Accuracies of all forms except the long one, and of both measures after the first re-emergence."""
    verdicts: dict[str, Any] = {}
    for form in FORMS[:-1]:
        _, pixels = videos_of_form(setup, vae, probe, form)
        verdicts[form] = judge_form(form, pixels, probe.scenes)
    return verdicts["continued"]["after"]["both"] | verdicts


@torch.no_grad()
def ceilings(vae: WanVAE, probe: ProbeSet) -> dict[str, dict[str, object]]:
    """Accuracies of the probe on real videos, and on real videos through the VAE: its upper bounds."""
    pixels = torch.cat([as_pixels(render(probe.scenes[rows])).cpu() for rows in _batches(len(probe.scenes))])
    decoded = [
        vae.decode(probe.latents_BFCHW[rows].to(vae.dtype)).float().cpu() for rows in _batches(len(probe.scenes))
    ]
    result = {}
    for name, shown in (("ground_truth", pixels), ("ground_truth_through_vae", torch.cat(decoded))):
        continued = judge_continued(read_video(shown.to(vae.device), probe.scenes), probe.scenes)
        after = continued["after"]
        assert isinstance(after, dict)
        result[name] = after["both"] | {"continued": continued}
    return result
