"""Rows of the study of long training: models trained on long videos, and how they differ."""

from dataclasses import dataclass, replace
from enum import StrEnum

from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK
from arl2.toyworld.world.worlds import World


class Start(StrEnum):
    """What a row's training starts from, if not from another row."""

    GENERATOR = "the shipped generator"
    SHIPPED = "the shipped hybrid"
    STAGE1 = "stage 1 of the study of distillation"


class Stage(StrEnum):
    """Training of a row. Models of the first two are there for others to begin with, and are not examined."""

    ONE = "stage 1 on short videos"
    SHORT = "stage 2 on short videos"
    LONG = "stage 2 on long videos"


class Layers(StrEnum):
    """Hybrid layers of a row."""

    NONE = "none"
    SHIPPED = "those of the shipped hybrid"
    ALL = "all"


class Window(StrEnum):
    """Memory of the softmax layers, in training and afterwards."""

    FULL = "full memory"
    TRAINED = "window of a short video's length"
    EQUAL = "window of the bytes of the 75 % hybrid"
    EQUAL_WITH_SINK = "window of the bytes of the 75 % hybrid, first block kept"

    @property
    def sink_frames(self) -> int:
        """First latent frames that the window never drops."""
        return FRAMES_PER_BLOCK if self is Window.EQUAL_WITH_SINK else 0


@dataclass(frozen=True)
class LongRow:
    """A model of the study.

    Attributes:
        name: of its files, and in the table.
        layers: which are hybrid.
        start: weights to begin with; or else
        after: name of a row whose weights it begins with.
        window: memory of the softmax layers.
        window_frames: latent frames of that window, if it is another than `window` says.
        stage: how it is trained.
        trains_all: whether all parameters train, not those of the hybrid layers and adapters alone.
        settings: further settings of the training, `key=value`.
        world: kind of the scenes that it is trained on and examined with.
    """

    name: str
    layers: Layers = Layers.SHIPPED
    start: Start = Start.SHIPPED
    after: str = ""
    window: Window = Window.TRAINED
    window_frames: int | None = None
    stage: Stage = Stage.LONG
    trains_all: bool = False
    settings: tuple[str, ...] = ()
    world: World = World.STANDARD

    @property
    def is_short(self) -> bool:
        """Whether it is trained on short videos."""
        return self.stage is not Stage.LONG


RESAMPLED = ("context=resampled", "resample_steps=4", "steps=800")
"""All blocks are made from noise, as in inference; see `arl2.distillation.stage2.Context`. A step takes three times as
long as one on the data."""
ROUNDS = (*RESAMPLED, "resample_rounds=4")
"""Errors add up over four blocks: what is remembered was made after blocks that were made themselves."""
SLOWER = ("optimizer.lr=3.0e-4",)
"""All parameters train at a lower rate than adapters."""


def _twice(row: LongRow) -> tuple[LongRow, LongRow]:
    """A model trained on the data, and one that goes on with its own errors in memory."""
    return row, replace(row, name=f"{row.name}_resampled", after=row.name, settings=(*row.settings, *RESAMPLED))


def _softmax(name: str, window: Window, world: World = World.STANDARD) -> tuple[LongRow, LongRow]:
    """A softmax model, trained as the hybrids are, all of its parameters."""
    start = Start.GENERATOR
    return _twice(LongRow(name, Layers.NONE, start, window=window, trains_all=True, settings=SLOWER, world=world))


def _variant(name: str, *settings: str, window_frames: int | None = None) -> tuple[LongRow, LongRow]:
    """A variant of the state: stage 1 of all layers, then long training, from nothing like all the others."""
    first = f"stage1_{name}"
    return (
        LongRow(first, Layers.ALL, Start.GENERATOR, stage=Stage.ONE, settings=settings),
        LongRow(f"state_{name}", after=first, window_frames=window_frames, settings=settings),
    )


def _in_long_world(name: str, layers: Layers = Layers.SHIPPED, after: str = "") -> tuple[LongRow, LongRow]:
    """A hybrid of the long world. All of its parameters train: the generator knows the standard world alone."""
    row = LongRow(name, layers, after=after, trains_all=True, settings=SLOWER, world=World.LONG)
    return _twice(row)


SMALLER_WINDOW = 12
"""Latent frames of a window that leaves bytes for a second state, or for values of twice the channels, in the hybrid
layers: a state takes 49 KB in each of six layers, a frame 18 KB in each of the two others."""
SMALLEST_WINDOW = 6
"""The same for a window of one block in the hybrid layers, with the inputs of its writes."""

PARTS: dict[str, tuple[LongRow, ...]] = {
    "hybrids": (
        *_twice(LongRow("hybrid_75")),
        LongRow("hybrid_100_short", Layers.ALL, Start.STAGE1, stage=Stage.SHORT),
        *_twice(LongRow("hybrid_100", Layers.ALL, after="hybrid_100_short")),
    ),
    "softmax": (
        *_softmax("softmax_equal", Window.EQUAL),
        *_softmax("softmax_equal_sink", Window.EQUAL_WITH_SINK),
        *_softmax("softmax_window", Window.TRAINED),
        *_softmax("softmax_full", Window.FULL),
    ),
    "contexts": (
        LongRow("hybrid_75_resampled_at_once", settings=RESAMPLED),
        LongRow("hybrid_75_resampled_1", after="hybrid_75", settings=(*RESAMPLED, "resample_steps=1")),
        LongRow("hybrid_75_resampled_2", after="hybrid_75", settings=(*RESAMPLED, "resample_steps=2")),
        LongRow("hybrid_75_resampled_rounds", after="hybrid_75_resampled", settings=ROUNDS),
        LongRow("hybrid_100_resampled_rounds", Layers.ALL, after="hybrid_100_resampled", settings=ROUNDS),
        LongRow("hybrid_75_longer", after="hybrid_75"),
        LongRow("hybrid_75_noise", settings=("context_sigma=0.3",)),
        LongRow("hybrid_100_resampled_at_once", Layers.ALL, after="hybrid_100_short", settings=RESAMPLED),
        *_twice(LongRow("hybrid_75_all", trains_all=True, settings=SLOWER)),
    ),
    "states": (
        *_variant("paper"),
        *_variant("slow_decay", "state.decay=slow"),
        *_variant("no_rotation", "state.rotation=none"),
        *_variant("spatial_rotation", "state.rotation=spatial"),
        *_variant("wrapped_rotation", "state.rotation=wrapped", "state.rotation_period=21"),
        *_variant("slow_rotation", "state.rotation=slow", "state.rotation_rate=0.25"),
        *_variant("two_states", "state.num_states=2", window_frames=SMALLER_WINDOW),
        *_variant("wide_values", "state.value_expansion=2", window_frames=SMALLER_WINDOW),
        *_variant("local_window", "state.local_frames=3", window_frames=SMALLEST_WINDOW),
        *_variant("small_window", window_frames=SMALLER_WINDOW),
    ),
    "long_world": (
        *_in_long_world("long_world_hybrid_75"),
        *_softmax("long_world_softmax_equal", Window.EQUAL, World.LONG),
        *_softmax("long_world_softmax_equal_sink", Window.EQUAL_WITH_SINK, World.LONG),
        *_in_long_world("long_world_hybrid_100", Layers.ALL, "hybrid_100_short"),
        *_softmax("long_world_softmax_window", Window.TRAINED, World.LONG),
        *_softmax("long_world_softmax_full", Window.FULL, World.LONG),
    ),
}
"""Rows in the order of what they decide. `hybrid_75_longer` tells what the second training alone is worth, and
`state_small_window` what the bytes of a larger state cost elsewhere. Rows of "states" take about the same bytes."""
