"""The rows of the study of distillation: which models are made, and how they differ from the 75 % hybrid."""

from dataclasses import dataclass
from enum import StrEnum

from arl2.toyworld.study.ablations import Variant
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK


class Kind(StrEnum):
    """Where a row's weights come from."""

    SOFTMAX = "softmax"
    STAGE1 = "stage1"
    STAGE2 = "stage2"
    WINDOW = "window"
    AGAIN = "again"
    RAW = "raw"


class Window(StrEnum):
    """What softmax layers see: everything; their own block; as many frames as remember what the 75 % hybrid does; or as
    many as a training video has, so that no longer video shows them a distance that they have not met."""

    FULL = "full"
    OWN_BLOCK = "own block"
    EQUAL = "equal memory"
    EQUAL_WITH_SINK = "equal memory, first block kept"
    TRAINED = "length of training"

    def frames(self, equal: int, trained: int) -> int | None:
        """Of the window, given that of equal memory and the latent frames of a training video."""
        known = {Window.FULL: None, Window.OWN_BLOCK: FRAMES_PER_BLOCK, Window.TRAINED: trained}
        return known.get(self, equal)

    @property
    def sink_frames(self) -> int:
        """Of the window, never dropped."""
        return FRAMES_PER_BLOCK if self is Window.EQUAL_WITH_SINK else 0


@dataclass(frozen=True)
class Row:
    """One model of the study.

    Attributes:
        name: of its files, and in the table.
        kind: `SOFTMAX` the generator itself; `STAGE1` hybrid layers as stage 1 left them; `STAGE2` trained by stage 2;
            `WINDOW` the generator, fine-tuned to a window; `AGAIN` another row's weights; `RAW` those before averaging.
        share: of hybrid layers, in percent; those that stage 1 fits best.
        layers: in the place of a share.
        variant: of the hybrid layer.
        window: of the softmax layers.
        settings: of stage 2, `key=value`.
        of: the row whose weights an `AGAIN` or `RAW` row takes.
        noise_seed: of the exam; the teacher's is 0.
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
        """Whether it is trained beyond stage 1."""
        return self.kind in (Kind.STAGE2, Kind.WINDOW)


MAIN = "hybrid_75"
WINDOW_SETTINGS = ("optimizer.lr=3.0e-4", "init_from=null")
"""All parameters train, not adapters: a lower rate."""

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
"""In percent: where there is most to choose from."""
RANDOM_SETS = 3


def row_for(layers: list[int]) -> Row:
    """A row for a set of layers; methods that choose the same share it."""
    return Row("layers_" + "-".join(map(str, layers)), layers=tuple(layers))
