"""A model as it is judged."""

from dataclasses import dataclass

from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler


@dataclass(frozen=True)
class EvalSetup:
    """What generates, and how.

    Attributes:
        transformer, sampler: the model, and in which steps.
        window_frames, sink_frames: of the softmax layers' memory; a window of one block sees no other block.
    """

    transformer: HybridWanModel
    sampler: FewStepSampler
    window_frames: int | None = None
    sink_frames: int = 0
