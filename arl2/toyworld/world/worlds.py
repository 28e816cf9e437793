"""The worlds by name: one way to sample and to caption scenes of each."""

from enum import StrEnum

from torch import Tensor

from arl2.toyworld.world.captions import caption_long_scenes, caption_scenes
from arl2.toyworld.world.long_scenes import LongScenes, sample_long_scenes
from arl2.toyworld.world.scenes import SceneBatch, Scenes, sample_scenes


class World(StrEnum):
    """Kind of scenes: `STANDARD` of `arl2.toyworld.world.scenes`, `LONG` of `arl2.toyworld.world.long_scenes`."""

    STANDARD = "standard"
    LONG = "long"


def sample_world(world: World, seeds: Tensor, num_frames: int) -> SceneBatch:
    """Sample scenes of a world, the standard one in its default mix; each is a function of its seed.

    Args:
        seeds: [B], int64; their device is that of the scenes.
        num_frames: default length of the videos.
    """
    return sample_long_scenes(seeds, num_frames) if world is World.LONG else sample_scenes(seeds, num_frames)


def caption_world(scenes: SceneBatch, informative: bool | Tensor | None = None) -> list[str]:
    """Make captions of scenes of any world.

    Args:
        scenes: a batch of B scenes.
        informative: whether to name colours and shapes, see `caption_scenes`.
    """
    if isinstance(scenes, LongScenes):
        return caption_long_scenes(scenes, informative)
    assert isinstance(scenes, Scenes)
    return caption_scenes(scenes, informative)
