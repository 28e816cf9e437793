"""Model and sampling settings of an evaluation."""

from dataclasses import dataclass

from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler


@dataclass(frozen=True)
class EvalSetup:
    """Model to evaluate with its sampling settings.

    Attributes:
        transformer, sampler: the model and its denoising steps.
        window_frames, sink_frames: memory of the softmax layers; with a window of one block they see no other block.
    """

    transformer: HybridWanModel
    sampler: FewStepSampler
    window_frames: int | None = None
    sink_frames: int = 0
