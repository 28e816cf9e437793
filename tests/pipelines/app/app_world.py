"""A tiny app, and what its pages would send, for tests."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from sessions_world import build

from pipelines.app.limits import Limits
from pipelines.app.live import LaneBlock, Update
from pipelines.app.models import AppModel, models_of
from pipelines.config import InferenceConfig, MemoryConfig, MemoryKind

HEIGHT, WIDTH, BLOCKS = 16, 32, 4
CONFIG = InferenceConfig(memory=MemoryConfig(MemoryKind.trained, 6, 0))
FORM: dict[str, Any] = {
    "prompt": "a red shape",
    "models": ["full memory", "equal window", "hybrid"],
    "seed": 3,
    "steps": 2,
    "height": HEIGHT,
    "width": WIDTH,
    "blocks": BLOCKS,
    "image": None,
    "video": None,
    "on_switch": "keep",
}


@cache
def models() -> dict[str, AppModel]:
    """A softmax model with full memory and with a window, and a hybrid; none may be changed."""
    return models_of(CONFIG, build(), build((0, 2)))


def limits(**values: Any) -> Limits:
    """Limits of a page that plays as fast as frames come."""
    return Limits(**{"pixels": HEIGHT * WIDTH, "blocks": 50, "playback_fps": 1000, **values})


def lane_blocks(updates: Iterator[Update], lane: int = 0) -> list[LaneBlock]:
    """The blocks of one video, to its end."""
    return [block for update in updates for block in update.blocks if block.lane == lane]
