"""Measure sessions on the toy world: bytes of a saved one, and what a video shows after its prompt has changed.

    python scripts/toyworld/measure_switches.py --num_videos 16 --json switches.json

Every video begins as "a red ring moves behind the wall and comes out again", with a colour and a shape that its number
chooses, and is switched after three blocks, while the object is away or about to be, to another colour and shape. The
reader of the toy world then tells what the last third of the video shows: what the new prompt names, what the former
one named, or something else. Both ways of `on_switch` start from the same noise.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
import tempfile
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from arl2.toyworld.world.reader import detect
from arl2.toyworld.world.scenes import COLOURS, SHAPES
from pipelines.cli import choose_device, entry_point
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.console.shipped import ROOT
from pipelines.flags import Parser, as_path
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.prompts.schedules import OnSwitch
from wan.utils.files import check_target, write_json
from wan.utils.ranges import Bounds

log = logging.getLogger(__name__)

BLOCKS, SWITCH_AFTER, LAST_FRAMES = 7, 3, 28
PER_BLOCK, BATCH = 3, 4
FULL, WINDOW = MemoryConfig(MemoryKind.full), MemoryConfig(MemoryKind.window, 9, 3)
MODELS: dict[str, tuple[str | None, MemoryConfig]] = {
    "softmax, full": (None, FULL),
    "softmax, window 9 with sink 3": (None, WINDOW),
    "75 % hybrid, full": ("hybrid_75.safetensors", FULL),
    "75 % hybrid, window 9 with sink 3": ("hybrid_75.safetensors", WINDOW),
}


def named(number: int) -> tuple[int, int]:
    """Colour and shape of the object that a prompt names."""
    return number % len(COLOURS), number // len(COLOURS) % len(SHAPES)


def prompt_of(number: int) -> str:
    """A prompt that names one object."""
    colour, shape = named(number)
    return f"a {list(COLOURS)[colour]} {list(SHAPES)[shape]} moves behind the wall and comes out again"


def shown(pixels: Tensor) -> list[tuple[int, int]]:
    """Colour and shape that most of the area of each video's last frames has."""
    found = detect(pixels[:, -LAST_FRAMES:].float().cpu(), torch.zeros(len(pixels), dtype=torch.bool))
    weight = found.area[:, 0, :, None]
    colours = (found.votes[:, 0]).sum(1).argmax(-1)
    shapes = (found.scores[:, 0] * weight).sum(1).argmax(-1)
    return list(zip(colours.tolist(), shapes.tolist(), strict=True))


def outcomes(pipeline: CausalVideoPipeline, memory: MemoryConfig, on_switch: OnSwitch, videos: int) -> dict[str, Any]:
    """How many videos show the new prompt's object, the former one's, or another."""
    counts = {"new": 0, "new colour": 0, "former": 0, "former colour": 0, "other colour": 0}
    for first in range(0, videos, BATCH):
        numbers = list(range(first, min(first + BATCH, videos)))
        later = [7 * number + 9 for number in numbers]
        schedule = [
            (0, [prompt_of(number) for number in numbers]),
            (SWITCH_AFTER * PER_BLOCK, [prompt_of(number) for number in later]),
        ]
        frames = (BLOCKS * PER_BLOCK - 1) * pipeline.wan_vae.temporal_compression + 1
        blocks = pipeline.stream(schedule, frames, seeds=numbers, memory=memory, on_switch=on_switch)
        pixels = torch.cat([block.pixels_BTCHW.cpu() for block in blocks], dim=1)
        for seen, old, new in zip(shown(pixels), map(named, numbers), map(named, later), strict=True):
            counts["new"] += seen == new
            counts["former"] += seen == old
            counts["new colour"] += seen[0] == new[0]
            counts["former colour"] += seen[0] == old[0] != new[0]
            counts["other colour"] += seen[0] not in (old[0], new[0])
    return {"videos": videos, **counts}


def bytes_of_saves(pipeline: CausalVideoPipeline, memory: MemoryConfig, folder: Path) -> dict[str, int]:
    """Bytes of a file after so many blocks."""
    sizes, path = {}, folder / "held.safetensors"
    with pipeline.session(prompt_of(0), None, seeds=[0], memory=memory) as session:
        for block in range(1, 4 * BLOCKS + 1):
            session.next()
            if block in (BLOCKS, 4 * BLOCKS):
                session.save(path)
                sizes[f"{block} blocks"] = path.stat().st_size
    return sizes


@entry_point()
def main() -> int:
    """Parse, generate, save, read, write."""
    parser = Parser(__doc__, aliases={"--videos": "--num_videos"})
    parser.add_argument("--json", type=as_path, required=True, metavar="PATH", help="where the figures go")
    parser.add_value("--num_videos", Annotated[int, Bounds(1, 10**6)], "videos per row", default=16)
    parser.add_device(None)
    arguments = parser.parse_args()
    check_target(arguments.json)
    device, page = choose_device(arguments.device), {}
    folder = ROOT / "models" / "toyworld"
    for name, (weights, memory) in MODELS.items():
        pipeline = CausalVideoPipeline.from_pretrained(
            folder, checkpoint_path=None if weights is None else folder / weights, device=device, height=64, width=96
        )
        with tempfile.TemporaryDirectory() as temporary:
            page[name] = {"bytes of a save": bytes_of_saves(pipeline, memory, Path(temporary))}
        for on_switch in OnSwitch:
            page[name][on_switch.value] = outcomes(pipeline, memory, on_switch, arguments.num_videos)
        log.info("%s: %s", name, page[name])
        write_json(arguments.json, page)
    log.info("the figures are in %s", arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
