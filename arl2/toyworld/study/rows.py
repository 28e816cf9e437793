"""Rows of the distillation study: its models, and their differences from the 75 % hybrid."""

from dataclasses import dataclass
from enum import StrEnum

from arl2.toyworld.study.ablations import Variant
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK


class Kind(StrEnum):
    """Source of a row's weights."""

    SOFTMAX = "softmax"
    STAGE1 = "stage1"
    STAGE2 = "stage2"
    WINDOW = "window"
    AGAIN = "again"
    RAW = "raw"


class Window(StrEnum):
    """Window of the softmax layers.

    It is everything, or the own block, or as many frames as take the memory of the 75 % hybrid. The last choice is the
    length of a training video: then longer videos show no distance that is new.
    """

    FULL = "full"
    OWN_BLOCK = "own block"
    EQUAL = "equal memory"
    EQUAL_WITH_SINK = "equal memory, first block kept"
    TRAINED = "length of training"

    def frames(self, equal: int, trained: int) -> int | None:
        """Latent frames of the window; None for everything.

        Args:
            equal: frames of the window with the memory of the 75 % hybrid.
            trained: latent frames of a training video.
        """
        known = {Window.FULL: None, Window.OWN_BLOCK: FRAMES_PER_BLOCK, Window.TRAINED: trained}
        return known.get(self, equal)

    @property
    def sink_frames(self) -> int:
        """First latent frames that the window never drops."""
        return FRAMES_PER_BLOCK if self is Window.EQUAL_WITH_SINK else 0


@dataclass(frozen=True)
class Row:
    """Model of the study.

    Attributes:
        name: name of its files, and in the table.
        kind: `SOFTMAX` the generator itself; `STAGE1` hybrid layers after stage 1; `STAGE2` trained by stage 2;
            `WINDOW` the generator, fine-tuned to a window; `AGAIN` another row's weights; `RAW` those before averaging.
        share: percentage of hybrid layers; those that stage 1 fits best are chosen.
        layers: hybrid layers, instead of a percentage.
        variant: variant of the hybrid layer.
        window: window of the softmax layers.
        settings: settings of stage 2, `key=value`.
        of: row whose weights an `AGAIN` or `RAW` row uses.
        noise_seed: seed of the benchmark's noise; the teacher's is 0.
    """

    name: str
    kind: Kind = Kind.STAGE2
    share: int = 75
    layers: tuple[int, ...] = ()
    variant: Variant = Variant.PLAIN
    window: Window = Window.FULL
    settings: tuple[str, ...] = ()
    of: str = ""
    noise_seed: int = 0

    @property
    def trains(self) -> bool:
        """True if the row is trained beyond stage 1."""
        return self.kind in (Kind.STAGE2, Kind.WINDOW)


MAIN = "hybrid_75"
WINDOW_SETTINGS = ("optimizer.lr=3.0e-4", "init_from=null")
"""Settings of rows in which all parameters train and not adapters: a lower learning rate."""

PARTS: dict[str, tuple[Row, ...]] = {
    "ratios": (
        Row("teacher", Kind.SOFTMAX),
        Row("teacher_other_noise", Kind.SOFTMAX, noise_seed=1),
        Row("local_only", Kind.SOFTMAX, window=Window.OWN_BLOCK),
        Row(MAIN),
        Row("hybrid_100", share=100),
        Row("hybrid_50", share=50),
        Row("hybrid_25", share=25),
        Row("gate_zero_100", share=100, variant=Variant.GATE_ZERO),
    ),
    "window": (
        Row("window_cut", Kind.SOFTMAX, window=Window.EQUAL),
        Row("window_sink_cut", Kind.SOFTMAX, window=Window.EQUAL_WITH_SINK),
        Row("window", Kind.WINDOW, window=Window.EQUAL, settings=WINDOW_SETTINGS),
        Row("window_sink", Kind.WINDOW, window=Window.EQUAL_WITH_SINK, settings=WINDOW_SETTINGS),
        Row("hybrid_75_trained_window", window=Window.EQUAL),
        Row("hybrid_75_trained_window_sink", window=Window.EQUAL_WITH_SINK),
        Row("hybrid_75_own_block", Kind.AGAIN, of=MAIN, window=Window.OWN_BLOCK),
        Row("hybrid_75_window", Kind.AGAIN, of=MAIN, window=Window.EQUAL),
        Row("hybrid_75_trained_length", Kind.AGAIN, of=MAIN, window=Window.TRAINED),
        Row("teacher_trained_length", Kind.SOFTMAX, window=Window.TRAINED),
    ),
    "ablations": (
        Row("gate_zero", variant=Variant.GATE_ZERO),
        Row("stage1_only", Kind.STAGE1),
        Row("stage2_only", settings=("init_from=null",)),
        Row("no_lora", settings=("lora=false",)),
        Row("no_gate", variant=Variant.NO_GATE),
        Row("no_rope", variant=Variant.NO_ROPE),
        Row("token_reads", variant=Variant.TOKEN_READS),
        Row("noisy_writes", variant=Variant.NOISY_WRITES),
    ),
    "settings": (
        Row("no_ema", Kind.RAW, of=MAIN),
        Row("target_x0", settings=("target=x0",)),
        Row("levels_uniform", settings=("levels.source=uniform",)),
        Row("context_student", settings=("context=student",)),
    ),
}

SELECTION_SHARE = 50
"""Percentage of hybrid layers at which selection methods are compared: it has the most combinations."""
RANDOM_SETS = 3


def row_for(layers: list[int]) -> Row:
    """Row for a set of layers; methods that choose the same set use the same row."""
    return Row("layers_" + "-".join(map(str, layers)), layers=tuple(layers))
