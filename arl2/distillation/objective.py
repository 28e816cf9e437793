"""What a trainer asks of an objective, and what both objectives share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from arl2.distillation.batch import BatchNoise, VideoBatch
from arl2.model import HybridWanModel
from wan.memory import Memory
from wan.utils.errors import InputError

LayerReports = dict[str, dict[int, float]]
"""Name of a measurement to its value in every hybrid layer."""


class Path(StrEnum):
    """How the blocks of a video are computed: one after the other over a memory, or all in one forward."""

    LOOP = "loop"
    PARALLEL = "parallel"


@dataclass(frozen=True)
class ObjectiveSettings:
    """What both objectives need to be told.

    Attributes:
        frames_per_block: latent frames of a block.
        blocks_per_graph: blocks through which gradients go back; None for the whole video.
        path: the loop is the specification and takes everything; in parallel the same takes half the time or less, by
            fewer and larger kernels.
    """

    frames_per_block: int
    blocks_per_graph: int | None = None
    path: Path = Path.LOOP

    def __post_init__(self) -> None:
        if self.blocks_per_graph is not None and self.blocks_per_graph < 1:
            raise InputError(f"blocks_per_graph {self.blocks_per_graph} is not positive: give blocks, or null for all")
        if self.path is Path.PARALLEL and self.blocks_per_graph is not None:
            raise InputError("path parallel has one graph for all blocks: drop blocks_per_graph, or take path loop")

    def starts_graph(self, block: int) -> bool:
        """Whether the memory is to be detached before this block is remembered.

        Before, not after: afterwards it would cut the gradient of what the block writes. Nothing is to be cut before
        the first block.
        """
        return self.blocks_per_graph is not None and block > 0 and block % self.blocks_per_graph == 0


class Objective(ABC):
    """Something to minimise over videos, for some parameters of a model.

    Attributes:
        model: holds the parameters; the rest of it is frozen.
        on_new_memory: told every memory that `losses` makes, and whether it is differentiable (the student's).
    """

    model: HybridWanModel
    on_new_memory: Callable[[Memory, bool], None] | None = None

    def new_memory(
        self, batch: VideoBatch, window_frames: int | None = None, sink_frames: int = 0, differentiable: bool = False
    ) -> Memory:
        """Empty memory for the videos of a batch; see `wan.model.CausalWanModel.memory_for`."""
        memory = self.model.memory_for(batch.latents_BFCHW, window_frames, sink_frames, differentiable)
        if self.on_new_memory is not None:
            self.on_new_memory(memory, differentiable)
        return memory

    @abstractmethod
    def parameters_to_train(self) -> dict[str, nn.Parameter]:
        """Names and parameters."""

    @abstractmethod
    def losses(self, batch: VideoBatch, noise: BatchNoise) -> Iterator[Tensor]:
        """Parts whose sum is the loss of the batch, a mean over its videos.

        A part is to be back-propagated before the next is asked for: its graph is then free.

        Raises:
            InputError: the frames do not divide into blocks.
        """

    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """Figures of the last batch; waits for the device."""

    @abstractmethod
    def reports(self, batch: VideoBatch, noise: BatchNoise) -> LayerReports:
        """Figures of every hybrid layer on a batch, without gradients."""


@contextmanager
def frozen_teacher(model: HybridWanModel, compiled: bool = False) -> Iterator[None]:
    """Be the teacher: softmax layers, no adapters, no gradients, the precision of inference (no autocast).

    Args:
        model: hybrid; switched back afterwards.
        compiled: let blocks that were compiled run so, which the trainer keeps them from elsewhere.
    """
    device = model.patch_embedding.weight.device
    with (
        torch.no_grad(),
        torch.autocast(device.type, enabled=False),
        model.as_teacher(),
        torch.compiler.set_stance("default") if compiled else nullcontext(),
    ):
        yield
